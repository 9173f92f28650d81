"""CRC-32 as zlib and zip archives have it, and that of two runs of bytes from those of each.

It is linear: behind `n` more bytes, the checksum of what came before them counts x^(8n) times, as a
polynomial over GF(2) modulo the one of the CRC (zlib 1.3, crc32.c, crc32_combine)."""

from __future__ import annotations

from functools import lru_cache

try:
    from isal.isal_zlib import crc32  # several times as fast
except ImportError:
    from zlib import crc32

__all__ = ["combine", "crc32"]

#: the polynomial and 1, the bit of x^0 being the highest
_POLYNOMIAL, _ONE = 0xEDB88320, 1 << 31


def combine(first: int, second: int, nbytes: int) -> int:
    """The checksum of some bytes and the `nbytes` behind them, whose own are `first` and `second`;
    of the second alone, if `second` is that of both."""
    return _product(_behind(nbytes), first) ^ second


def _product(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(1024)
def _behind(nbytes: int) -> int:
    """x^(8 · nbytes)."""
    result, power = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            result = _product(power, result)
        power, nbytes = _product(power, power), nbytes >> 1
    return result
