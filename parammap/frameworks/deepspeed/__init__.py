"""DeepSpeed: Megatron-DeepSpeed's pipelines of GPT and BLOOM, plain models under ZeRO, and
universal checkpoints."""
