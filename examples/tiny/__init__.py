"""Trains a tiny GPT with the real megatron-core on a CPU and saves it exactly as Megatron-LM
does."""
