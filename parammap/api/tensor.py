"""Tensors that are read when they are asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parammap.errors import RefusedError
from parammap.execute.read import read
from parammap.plan.plan import Wanted, narrowed
from parammap.plan.planner import Planner
from parammap.proof.compare import values
from parammap.tensors.arrays import Array
from parammap.tensors.digest import MASK, cells_digest
from parammap.tensors.layout import Place
from parammap.tensors.logical import ITEMSIZE
from parammap.tensors.region import Region, cells_of, whole

if TYPE_CHECKING:
    import torch

#: what a digest reads at a time
_BAND_BYTES = 4 << 20
#: what stands between the brackets of a tensor
Index = int | slice


class Tensor:
    """A tensor of a checkpoint, by the name that it has in some framework. Nothing of it is read
    before it is asked for, and then only the elements asked for.

    `dtype` is torch's name of its dtype on disk, such as "bfloat16"; `state` is "weight",
    "exp_avg", "exp_avg_sq", or "model_weight" for the copy that the model computes with. Of
    elements that several ranks keep, the first rank's are read."""

    def __init__(self, wanted: Wanted, state: str, planner: Planner) -> None:
        self.state = state
        self._wanted, self._planner = wanted, planner

    @property
    def name(self) -> str:
        return self._wanted.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._wanted.spec.shape

    @property
    def dtype(self) -> str:
        return self._wanted.spec.dtype

    @property
    def nbytes(self) -> int:
        return self._wanted.spec.nbytes

    def numpy(self, region: Region | None = None) -> Array:
        """The values of the tensor, or of a region of it, in an array of their own. numpy has no
        bfloat16: such values come as float32, which holds each of them exactly; all others come in
        the tensor's own dtype.

        Raises RefusedError for a region that reaches outside, and for files that cannot be read.
        """
        return values(self.bits(region), self.dtype)

    def bits(self, region: Region | None = None) -> Array:
        """The same elements as they lie on disk: unsigned integers of the dtype's width."""
        wanted = self._wanted
        if region is not None and region != whole(self.shape):
            self._check(region)
            wanted = narrowed(wanted, region)
        return read(wanted.spec, self._planner.fills(wanted, Place()))

    def torch(self, region: Region | None = None) -> torch.Tensor:
        """The same elements as a tensor of torch, in the tensor's own dtype, on the CPU."""
        import torch

        bits = self.bits(region)
        signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
        return signed.view(getattr(torch, self.dtype))

    def digest(self) -> str:
        """The digest of its elements, 16 hexadecimal digits: for a tensor of a Checkpoint, what
        `parammap digest` prints of it and manifests hold."""
        total, rows = 0, range(len(self.shape))[:1]
        for band in whole(self.shape).pieces(rows, _BAND_BYTES // ITEMSIZE[self.dtype]):
            bits = self.bits(band).reshape(-1, math.prod(self.shape[1:]))
            first_row = sum(band.offsets[:1])
            total += cells_digest(bits, cells_of(Region((first_row, 0), bits.shape), bits.shape))
        return f"{total & MASK:016x}"

    def __getitem__(self, key: Index | tuple[Index, ...]) -> Array:
        """`tensor[0:4, :]` is `tensor.numpy()[0:4, :]`, of which only these elements are read."""
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > len(self.shape):
            raise IndexError(f"{self}: {len(keys)} indices for {len(self.shape)} dimensions")
        keys = (*keys, *(slice(None) for _ in self.shape[len(keys) :]))
        ranges = [_range(one, size) for one, size in zip(keys, self.shape, strict=True)]
        region = Region(tuple(r.start for r in ranges), tuple(map(len, ranges)))
        kept = [len(r) for one, r in zip(keys, ranges, strict=True) if isinstance(one, slice)]
        return self.numpy(region).reshape(kept)

    def __repr__(self) -> str:
        return f"<Tensor {self.name} ({self.state}) {list(self.shape)} {self.dtype}>"

    def _check(self, region: Region) -> None:
        if not (
            len(region.offsets) == len(region.sizes) == len(self.shape)
            and min((*region.offsets, *region.sizes), default=0) >= 0
            and all(map(int.__le__, region.ends, self.shape))
        ):
            raise RefusedError(
                f"{self.name}: {region} is no region of its shape {list(self.shape)}"
            )


def _range(key: Index, size: int) -> range:
    """The indices that a key names along a dimension, one after the other."""
    if not isinstance(key, slice):
        at = range(size)[key]
        return range(at, at + 1)
    found = range(size)[key]
    if found.step != 1:
        raise IndexError(f"step {found.step}: only a step of 1 is read; take numpy()[…] of all")
    return found
