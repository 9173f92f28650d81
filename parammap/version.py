"""The release, for the package, what it writes and its command line."""

__version__ = "0.2.0.dev0"
