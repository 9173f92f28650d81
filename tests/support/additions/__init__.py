"""A framework and a file format that are no part of ParamMap, as somebody else would add them:
tests/unit/test_registry.py copies them elsewhere and registers them."""
