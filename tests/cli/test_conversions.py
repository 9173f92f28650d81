"""What `parammap formats` promises is kept: a conversion along every pair of its tables, and walks
through many of them.

What each file means is for the tests of its framework; here the digests of all logical tensors have
to stay what they were, read again by the reader of the framework that was written for."""

import json
import random
from pathlib import Path

import pytest

from parammap.cli.main import main
from parammap.families import BLOOM, FAMILIES, GPT2, LLAMA, OPT, YUAN
from parammap.frameworks import conversions, registry
from parammap.frameworks.architecture import architecture_of
from parammap.tensors.logical import EXP_AVG_SQ, MAIN_PARAM
from tests.support import hub
from tests.support.conversions import DOCS, convert, digests

#: targets whose checkpoints nothing here reads; that they are right is for
#: tests/frameworks/alpa/test_alpa_training.py
UNREAD = ("alpa-training",)
#: targets that can be cut, and into what
CUTS = {
    "megatron": ("tp", "pp"),
    "mindspore": ("tp", "pp"),
    "merak": ("tp", "pp"),
    "metaseq": ("tp", "dp"),
}
#: what tells tensors of one kind from another; a dtype that the target would choose by itself is
#: said
DTYPED = ("alpa", "alpa-training")
#: copies that ranks of these files keep and that differ, as training left them
DRIFTED = [(BLOOM, "deepspeed"), (GPT2, "deepspeed")]
#: what those files, whose training had no arguments for it, do not say of themselves
UNRECORDED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def config_of(family: str, start: Path) -> dict:
    known = architecture_of(registry.read(start))
    return {
        "model_type": family,
        "n_layer": known.layers,
        "n_head": known.heads,
        "vocab_size": known.vocab,
        **(
            {"n_embd": known.hidden, "n_positions": known.positions}
            if family == GPT2
            else {"hidden_size": known.hidden}
        ),
        **UNRECORDED,
    }


def flags_for(
    family: str, framework: str, to: str, start: Path, found: dict, folder: Path
) -> list[str]:
    dtype = next(dtype for (role, _), (dtype, *_) in found.items() if role == MAIN_PARAM)
    flags = ["--dtype", dtype] if to in DTYPED else []
    if (family, framework) in DRIFTED:
        flags += ["--replicas", "first"]
        if to in ("transformers", "merak"):
            (folder / "config.json").write_text(json.dumps(config_of(family, start)))
            flags += ["--config", str(folder / "config.json")]
    return flags


@pytest.mark.parametrize(("family", "framework", "to"), list(conversions.pairs()))
def test_every_pair_keeps_every_tensor(source, tmp_path, family, framework, to):
    start = source(family, framework)
    before = digests(start)
    out = convert(
        start, tmp_path / "out", to, *flags_for(family, framework, to, start, before, tmp_path)
    )
    if to in UNREAD:
        return
    if conversions.goes(family, framework, to) == conversions.WEIGHTS:
        before = {key: value for key, value in before.items() if key[0] == MAIN_PARAM}
    after = digests(out)
    assert after == before and len(after) > 20


@pytest.mark.parametrize(
    ("family", "framework", "to"),
    [
        (family, framework, to)
        for family in FAMILIES
        for framework in conversions.sources(family)
        for to in registry.targets()
        if not conversions.goes(family, framework, to) and family != YUAN
    ],
)
def test_every_other_pair_is_refused(source, tmp_path, capsys, family, framework, to):
    start = source(family, framework)
    capsys.readouterr()
    assert main(["convert", str(start), str(tmp_path / "out"), "--to", to]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


HOPS = 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [GPT2, LLAMA, OPT])
def test_a_walk_of_six_conversions_comes_back(tmp_path, family, seed):
    """Through random frameworks and layouts, from transformers' own files back to these, to the
    last bit."""
    rng = random.Random(f"{family} {seed}")
    here, framework = hub.save(family, tmp_path / "0", seed=seed), "transformers"
    before, path = digests(here), [framework]
    for hop in range(1, HOPS + 1):
        ways = [
            to
            for to in conversions.sources(family)
            if conversions.goes(family, framework, to)
            and to != framework
            and not registry.target(to).needs_optimizer
        ]
        to = "transformers" if hop == HOPS and framework != "transformers" else rng.choice(ways)
        sizes = [
            part for size in CUTS.get(to, ()) for part in (f"--{size}", str(rng.choice([1, 2, 4])))
        ]
        flags = ["--dtype", "float32"] if to in DTYPED else []
        here, framework = convert(here, tmp_path / str(hop), to, *sizes, *flags), to
        path.append(f"{to} {' '.join(sizes)}")
        assert digests(here) == before, path
    if framework != "transformers":
        here = convert(here, tmp_path / "back", "transformers")
    assert digests(here) == before, path
    assert hub.logits(here).equal(hub.logits(tmp_path / "0")), path


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_with_the_optimizer_comes_back(source, tmp_path, seed):
    """The same from a trained run on, by frameworks that keep the whole state."""
    rng, here, framework = random.Random(f"optimizer {seed}"), source(GPT2, "megatron"), "megatron"
    before, path = digests(here), [framework]
    for hop in range(1, HOPS + 1):
        to = rng.choice(
            [
                to
                for to in conversions.sources(GPT2)
                if to != framework and conversions.goes(GPT2, framework, to) == conversions.WHOLE
            ]
        )
        sizes = [
            part for size in CUTS.get(to, ()) for part in (f"--{size}", str(rng.choice([1, 2, 4])))
        ]
        here, framework = convert(here, tmp_path / str(hop), to, *sizes), to
        path.append(f"{to} {' '.join(sizes)}")
        assert digests(here) == before and EXP_AVG_SQ in {role for role, _ in before}, path


def test_the_table_in_the_docs_is_the_one_of_the_code(capsys):
    assert main(["formats"]) == 0
    assert capsys.readouterr().out.strip() in (DOCS / "formats.md").read_text()
