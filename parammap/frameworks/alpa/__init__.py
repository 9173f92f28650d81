"""Alpa: the serving folder of llm_serving, and training checkpoints of alpa.serialization."""
