"""Megatron-LM, torch format: rank folders with model_optim_rng.pt, and the distributed optimizer's
buckets."""
