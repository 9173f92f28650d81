"""Megatron-LM, --ckpt-format torch_dist: one folder of .distcp files for all ranks."""
