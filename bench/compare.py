"""Whether the benchmark's subjects did the same work: the two forward conversions, and the way back
beside its origin."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from parammap.formats import mindspore_ckpt  # noqa: E402


def same_conversion(ours: Path, theirs: Path) -> None:
    """Both converters must have written the same tensors, whatever they call them. Raises
    SystemExit if not."""
    for rank in sorted(path.name for path in theirs.glob("rank_*")):
        if _contents(ours / rank / "network.ckpt") != _contents(theirs / rank / "network.ckpt"):
            sys.exit(
                f"bench: {rank}: the two conversions hold different tensors; their times cannot be "
                f"compared"
            )


def _contents(path: Path) -> Counter:
    """How often each (shape, hash of the bytes) occurs among the float32 tensors of more than one
    element."""
    found: Counter = Counter()
    with open(path, "rb") as file:
        for stored in mindspore_ckpt.read(path).values():
            if stored.dtype == "float32" and stored.numel > 1:
                digest = hashlib.blake2b()
                for extent in stored.extents:
                    file.seek(extent.offset)
                    digest.update(file.read(extent.nbytes))
                found[stored.shape, digest.digest()] += 1
    return found


def same_checkpoint(origin: Path, returned: Path) -> None:
    """What came back must hold the origin's tensors, bit for bit, as torch.load reads them. Raises
    SystemExit if not."""
    import torch

    for path in sorted(origin.glob("iter_*/mp_rank_*/*.pt")):
        before, after = (
            dict(
                _tensors(
                    torch.load(
                        folder / path.relative_to(origin),
                        map_location="cpu",
                        mmap=True,
                        weights_only=False,
                    )
                )
            )
            for folder in (origin, returned)
        )
        wrong = sorted(map(str, before.keys() ^ after.keys()))
        wrong += [
            str(key)
            for key in before.keys() & after.keys()
            if not _same_bits(before[key], after[key])
        ]
        if wrong or not before:
            sys.exit(
                f"bench: {path.relative_to(origin)}: {wrong[0] if wrong else 'no tensor'} differs "
                f"after the way "
                "there and back"
            )


def _tensors(value: object, key: tuple = ()) -> Iterator[tuple[tuple, object]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, (*key, name))


def _same_bits(one, other) -> bool:
    import torch

    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )
