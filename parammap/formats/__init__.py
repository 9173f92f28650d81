"""Containers: one module per file format. A container knows bytes and nothing of models.

Every container offers `read(path)`, which touches headers only and says where each tensor's bytes
lie, and `frame(…)`, which says, before a single byte is written, which bytes an output file
consists of (see `frames`)."""
