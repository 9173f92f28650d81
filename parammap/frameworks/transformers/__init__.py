"""Hugging Face's transformers: GPT-2, OPT, LLaMA-like models and BLOOM, as save_pretrained writes
them."""
