"""The weights of the tiny GPT-2, for all tests of this room."""

from tests.support.merak import weights

__all__ = ["weights"]
