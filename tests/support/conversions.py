"""What the tests of test_conversions share with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from parammap.cli.main import main
from parammap.families import BLOOM, GPT2, LLAMA, MIXTURE, OPT, YUAN
from parammap.frameworks import registry
from parammap.proof import verify
from parammap.tensors.arrangement import PADDING
from parammap.tensors.logical import MODEL_PARAM
from tests.support import deepspeed_goldens, hub, paths
from tests.support.reshards import RUNS

DATA, DOCS = paths.TESTS / "data", paths.ROOT / "docs"

#: what is not made by converting: (family, framework): a run of real training, or files that real
#: software wrote
TRAINED = {(GPT2, "megatron"): "tied", (LLAMA, "megatron"): "llama", (MIXTURE, "megatron"): "moe"}

FILES = {
    (YUAN, "megatron"): DATA / "yuan/trained_tp1pp2dp3",
    (OPT, "metaseq"): DATA / "metaseq/mp2dp2_fp16",
}

PACKED = {(GPT2, "deepspeed"): deepspeed_goldens.GPT, (BLOOM, "deepspeed"): deepspeed_goldens.BLOOM}

#: what the others are made from
MADE_FROM = {
    "mindspore": "megatron",
    "megatron-dist": "megatron",
    "merak": "transformers",
    "alpa": "transformers",
}


def digests(source: Path, **reading) -> dict[tuple[str, str], tuple]:
    """By role and name: dtype, shape and digest of all that is no vocabulary's padding and no
    16-bit copy."""
    summed = verify.digests(registry.read(source, **reading).index, 1)
    return {
        (tensor.state, tensor.name): (tensor.dtype, tensor.shape, one.digests[0])
        for tensor, one in summed.items()
        if tensor.state != MODEL_PARAM and not tensor.name.endswith((f".{PADDING}", "version"))
    }


def convert(source: Path, out: Path, to: str, *flags: str) -> Path:
    assert main(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def source(trained, tmp_path_factory):
    """source(family, framework): a checkpoint of it, made once; to be read only."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, framework: str) -> Path:
        key = family, framework
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{framework}")
            if key in TRAINED:
                made[key] = trained(**RUNS[TRAINED[key]]).path
            elif key in FILES:
                made[key] = FILES[key]
            elif key in PACKED:
                made[key] = deepspeed_goldens.unpack(PACKED[key], folder)
            elif framework == "transformers":
                made[key] = hub.save(family, folder)
            else:
                made[key] = convert(make(family, MADE_FROM[framework]), folder / "made", framework)
        return made[key]

    return make
