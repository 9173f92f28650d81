"""With MEGATRON_LM=<git checkout>: Megatron-LM's own pretrain_gpt.py, as people run it, goes on in
another layout.

Transformer Engine's layers (by the stand-in), torch_dist with the fully parallel save, bf16, the
hook by the patch. The script trains and saves; it goes on from its own checkpoint, and from the
same in another layout and format. Losses and gradient norms of its log are equal within bf16's
bounds, and the buckets lie as those that the script itself saves there."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from examples.tiny.trained import Trained
from examples.tiny.whole import Sizes
from tests.support import mlm_entry
from tests.support.going_on import LOSS, NORM, convert
from tests.support.live_matrix import buckets
from tests.support.megatron_lm import CHECKOUT, MOCK_VOCAB, needs_checkout, needs_its_packages

BEFORE, ALL = 2, 5
RELEASES = ("core_r0.14.0", "core_r0.16.0", "core_r0.19.0", "main")

AS_PEOPLE_RUN_IT = (
    f"--transformer-impl transformer_engine --no-rope-fusion --no-bias-swiglu-fusion {MOCK_VOCAB}"
)
GATED = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights"
)
MODELS = {
    "gpt": "",
    "llama": f"{GATED} --group-query-attention --num-query-groups 2",
    "moe": "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-grouped-gemm "
    "--moe-token-dispatcher-type allgather",
    "mla": f"{GATED} --qk-layernorm --multi-latent-attention --q-lora-rank 32 --kv-lora-rank 16 "
    f"--qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 16",
}
FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
}

#: model, layout of the source, the frameworks that its checkpoint passes, layout in which the
#: script goes on
CASES = {
    "gpt-dp4": ("gpt", Sizes(dp=4), ("megatron",), Sizes()),
    "llama-tp2dp2": ("llama", Sizes(tp=2, dp=2), ("megatron",), Sizes(pp=2)),
    "llama-cp2": ("llama", Sizes(cp=2), ("mindspore", "megatron"), Sizes(dp=2)),
    "moe-ep2dp2": ("moe", Sizes(dp=2, ep=2), ("megatron",), Sizes(dp=2)),
    "mla-dp2": ("mla", Sizes(dp=2), ("megatron",), Sizes(pp=2)),
    "mla-tp2dp2": ("mla", Sizes(tp=2, dp=2), ("megatron-dist",), Sizes(pp=2)),
}
#: the others count copies on tp ranks in the norm of gradients (tests/support/live_matrix.py)
ONLY = {"mla-tp2dp2": ("core_r0.19.0", "main")}


class Lived(NamedTuple):
    own: Trained
    checkpoint: Path
    resumed: Trained


every_case = pytest.mark.parametrize(
    ("release", "case"),
    [
        pytest.param(release, case, id=f"{release}-{case}", marks=pytest.mark.full)
        for case in CASES
        for release in ONLY.get(case, RELEASES)
    ],
)


def train(release: str, model: str, sizes: Sizes, folder: Path, until: int, *more: Any) -> Trained:
    """Until that iteration, and save; every run is told the same --train-iters, which makes its
    data."""
    folder.mkdir()
    layout = [word for size, flag in FLAGS.items() for word in (flag, str(getattr(sizes, size)))]
    words = [
        *AS_PEOPLE_RUN_IT.split(),
        *MODELS[model].split(),
        *layout,
        "--train-iters",
        str(ALL),
        "--exit-interval",
        str(until),
        "--save-interval",
        str(until),
        *map(str, more),
    ]
    ranks = sizes.tp * sizes.pp * sizes.dp * sizes.cp
    return mlm_entry.train(CHECKOUT, release, folder, ranks, words, None)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Lived]:
    @functools.cache
    def run(release: str, case: str) -> Lived:
        model, source, frameworks, target = CASES[case]
        scratch = tmp_path_factory.mktemp(f"{release}-{case}")
        form = "torch_dist" if frameworks[-1] == "megatron-dist" else "torch"
        saved = checkpoint = train(
            release, model, source, scratch / "source", BEFORE, "--ckpt-format", "torch_dist"
        ).path
        own = train(
            release,
            model,
            source,
            scratch / "own",
            ALL,
            "--ckpt-format",
            "torch_dist",
            "--load",
            saved,
        )
        for framework in frameworks:
            checkpoint = convert(
                checkpoint, scratch / framework, framework, None if form == "torch_dist" else target
            )
        load = ("--ckpt-format", form, "--load", checkpoint)
        return Lived(
            own, checkpoint, train(release, model, target, scratch / "resumed", ALL, *load)
        )

    return run


def logged(run: Trained, value: str) -> np.ndarray:
    """Of each iteration, as the script printed it."""
    log = "".join(file.read_text() for file in sorted((run.path.parent / "logs").glob("rank*.log")))
    lines = dict(re.findall(rf"iteration +(\d+)/.*?\| {value}: ([^ ]+) \|", log))
    assert sorted(lines) == [str(number) for number in range(BEFORE + 1, ALL + 1)]
    return np.array([float(lines[number]) for number in sorted(lines)])


@needs_checkout
@needs_its_packages
@every_case
def test_the_script_goes_on_in_another_layout(lived, release, case):
    run = lived(release, case)
    assert np.abs(logged(run.resumed, "lm loss") - logged(run.own, "lm loss")).max() < LOSS["bf16"]
    assert (
        np.abs(logged(run.resumed, "grad norm") / logged(run.own, "grad norm") - 1).max()
        < NORM["bf16"]
    )


@needs_checkout
@needs_its_packages
@every_case
def test_buckets_are_those_that_the_script_saves_there(lived, release, case):
    run = lived(release, case)
    assert buckets(run.checkpoint) == buckets(run.resumed.path) != {}
