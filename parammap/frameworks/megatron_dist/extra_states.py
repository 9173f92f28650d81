"""Extra states in format torch_dist: one object for each layer's module, and for each expert's.

`decoder.layers.mlp.linear_fc1._extra_state/shard_3_8` is that of layer 3 of 8, `…/shard_3.1_8.4`
that of its expert 1 of 4; tensor-parallel ranks have one in common (megatron-core 0.8 to 0.20,
transformer/utils.py, make_sharded_object_for_checkpoint; transformer/moe/experts.py)."""

from __future__ import annotations

import re

from parammap.checkpoint.extra_states import KEY, holds_anything
from parammap.formats.torch_dist import Contents
from parammap.frameworks.megatron.chunks import Stack
from parammap.frameworks.megatron.specification import Specification

_OBJECT = re.compile(rf"(.*{KEY})/shard_([\d.]+)_([\d.]+)")


def read(contents: Contents, specification: Specification) -> tuple[dict[str, object], list[str]]:
    """Each extra state by the model's own name for it, and the keys of those that are left behind:
    experts that are parameters of one module have one in common there, which none of theirs is."""
    states, left_behind = {}, []
    for key in sorted(contents.objects):
        if match := _OBJECT.fullmatch(key):
            module, numbers, sizes = match[1], _numbers(match[2]), _numbers(match[3])
            apart = Stack(module, sizes).name(numbers)
            name, (value,) = specification.own_name(apart), contents.load(key)
            if name != apart and holds_anything(value):
                left_behind.append(key)
            states[name] = value if name == apart else None
    return states, left_behind


def key_of(key: str, numbers: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """The object's key, from that of its stack, its numbers in it, and the sizes of the stack."""
    return f"{key}/shard_{_joined(numbers or (0,))}_{_joined(sizes or (1,))}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _joined(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
