"""The file formats that MindSpore has."""

from __future__ import annotations

from parammap.formats import mindspore_ckpt, safetensors

FORMATS = {one.name: one for one in (mindspore_ckpt.FORMAT, safetensors.FORMAT)}
BY_SUFFIX = {suffix: one for one in FORMATS.values() for suffix in one.suffixes}
