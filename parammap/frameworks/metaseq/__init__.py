"""Metaseq (OPT): model-parallel parts × FSDP shards, whole parts, singletons."""
