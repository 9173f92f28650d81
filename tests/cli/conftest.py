"""A checkpoint of each family and framework, for all tests of this room."""

from tests.support.conversions import source

__all__ = ["source"]
