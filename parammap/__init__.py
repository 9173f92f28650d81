"""ParamMap: the whole training state of large models, in another framework or parallel layout, bit
for bit."""

__version__ = "0.1.0"
