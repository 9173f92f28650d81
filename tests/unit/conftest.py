"""The buffers that even small matrices do not fit, for all tests of this room."""

from tests.support.transposed import buffers

__all__ = ["buffers"]
