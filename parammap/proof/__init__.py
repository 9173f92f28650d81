"""Proof after the fact: checkpoints read again, compared element by element, located and mended."""
