"""The nouns: tensors, layouts, arrangements, digests. Nothing here reads a file or knows a
framework."""
