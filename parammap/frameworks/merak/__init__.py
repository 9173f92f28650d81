"""Merak: GPT-2 as Merak's runtime and its tools save it."""
