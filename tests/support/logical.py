"""Which element of which logical tensor an element of a MindSpore file is: worked out here by hand,
with none of our code.

For legacy GPT checkpoints of Megatron-LM: multi-head attention, no gating, four heads and 64
columns, a tied head and no padding of the vocabulary, as in
tests/data/megatron/cac60ce4_patched_legacy_tp2pp2."""

import json
import math
import re
from pathlib import Path

HEADS, HEAD_SIZE = 4, 16
_PARTS = {
    "attention.qkv_proj": "attention.{}",
    "attention.out_proj": "attention.out",
    "mlp.mapping": "mlp.fc1",
    "mlp.projection": "mlp.fc2",
}
_WHOLE = {
    "language_model.embedding.word_embeddings.weight": "embedding.word.weight",
    "language_model.embedding.position_embeddings.weight": "embedding.position.weight",
    "language_model.encoder.final_norm.gamma": "final_norm.weight",
    "language_model.encoder.final_norm.beta": "final_norm.bias",
    "language_model.output_layer.weight": "embedding.word.weight",
}
_BY_ROWS, _BY_COLUMNS = (
    ("mapping", "word_embeddings", "output_layer"),
    ("out_proj.weight", "projection.weight"),
)


def role_and_name(key: str) -> tuple[str, str]:
    prefix, _, rest = key.partition(".")
    return (prefix, rest) if prefix.startswith("exp_avg") else ("weight", key)


def element(key: str, shape: tuple[int, ...], flat: int, tp: int) -> tuple[str, str, int, int]:
    """(role, atom, row, column) of the `flat`-th element of tensor `key` of a rank's `shape`."""
    role, name = role_and_name(key)
    columns = math.prod(shape[1:])
    row, column = divmod(flat, columns)
    if "qkv_proj" in name:
        head, within = divmod(row, 3 * HEAD_SIZE)
        part, row = (
            "qkv"[within // HEAD_SIZE],
            (tp * (shape[0] // (3 * HEAD_SIZE)) + head) * HEAD_SIZE + within % HEAD_SIZE,
        )
        name = name.replace("qkv_proj", part)
    elif any(part in name for part in _BY_ROWS):
        row += tp * shape[0]
    elif name.endswith(_BY_COLUMNS):
        column += tp * columns
    name = _WHOLE.get(name, name.removeprefix("language_model.encoder."))
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return role, re.sub("gamma$", "weight", re.sub("beta$", "bias", name)), row, column


def content_offset(file: Path, key: str, content: bytes) -> int:
    """The byte at which a tensor's content begins in a MindSpore file: found by its name, then by
    the content itself."""
    data, name = file.read_bytes(), key.encode()
    if file.suffix == ".safetensors":
        start = 8 + int.from_bytes(data[:8], "little")
        return start + json.loads(data[8:start])[key]["data_offsets"][0]
    tag = data.index(bytes([0x0A, len(name)]) + name + b"\x12")
    offset = data.index(content, tag)
    assert offset - tag < len(name) + 64
    return offset


def flip(file: Path, offset: int, bit: int) -> None:
    """Flip one bit of the byte at `offset`."""
    with open(file, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1 << bit]))
