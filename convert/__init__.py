"""ParamMap's converter: read → plan → execute → verify."""

__version__ = "0.1.0"
