"""What `parammap formats` promises is kept: a conversion along every pair of its tables, and walks through many of them.

What each file means is for the tests of its framework; here the digests of all logical tensors have to stay what they were,
read again by the reader of the framework that was written for.
"""

import json
import random
from pathlib import Path

import pytest

from convert import formats, frameworks
from convert.architecture import BLOOM, GPT2, LLAMA, MIXTURE, OPT, YUAN
from convert.cli import main
from convert.fusion import PADDING
from convert.proof import verify
from convert.tensors import EXP_AVG_SQ, MODEL_WEIGHT, WEIGHT
from tests.lab import deepspeed_goldens, hub
from tests.test_relayout import RUNS

DATA, DOCS = Path(__file__).parent / "data", Path(__file__).parent.parent / "docs"
#: what is not made by converting: (family, framework): a run of real training, or files that real software wrote
TRAINED = {(GPT2, "megatron"): "tied", (LLAMA, "megatron"): "llama", (MIXTURE, "megatron"): "moe"}
FILES = {(YUAN, "megatron"): DATA / "yuan/trained_tp1pp2dp3", (OPT, "metaseq"): DATA / "metaseq/mp2dp2_fp16"}
PACKED = {(GPT2, "deepspeed"): deepspeed_goldens.GPT, (BLOOM, "deepspeed"): deepspeed_goldens.BLOOM}
#: what the others are made from
MADE_FROM = {"mindspore": "megatron", "megatron-dist": "megatron", "merak": "transformers", "alpa": "transformers"}
#: targets whose checkpoints nothing here reads; that they are right is for tests/test_alpa_training.py
UNREAD = ("alpa-training",)
#: targets that can be cut, and into what
CUTS = {"megatron": ("tp", "pp"), "mindspore": ("tp", "pp"), "merak": ("tp", "pp"), "metaseq": ("tp", "dp")}
#: what tells tensors of one kind from another; a dtype that the target would choose by itself is said
DTYPED = ("alpa", "alpa-training")
#: copies that ranks of these files keep and that differ, as training left them
DRIFTED = [(BLOOM, "deepspeed"), (GPT2, "deepspeed")]
#: what those files, whose training had no arguments for it, do not say of themselves
UNRECORDED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def digests(source: Path, **reading) -> dict[tuple[str, str], tuple]:
    """By role and name: dtype, shape and digest of all that is no vocabulary's padding and no 16-bit copy."""
    summed = verify.digests(frameworks.read(source, **reading).index, 1)
    return {(tensor.role, tensor.name): (tensor.dtype, tensor.shape, one.digests[0]) for tensor, one in summed.items()
            if tensor.role != MODEL_WEIGHT and not tensor.name.endswith((f".{PADDING}", "version"))}


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


def config_of(family: str, start: Path) -> dict:
    known = frameworks.architecture_of(frameworks.read(start))
    return {"model_type": family, "n_layer": known.layers, "n_head": known.heads, "vocab_size": known.vocab,
            **({"n_embd": known.hidden, "n_positions": known.positions} if family == GPT2 else
               {"hidden_size": known.hidden}),
            **UNRECORDED}


def flags_for(family: str, framework: str, to: str, start: Path, found: dict, folder: Path) -> list[str]:
    dtype = next(dtype for (role, _), (dtype, *_) in found.items() if role == WEIGHT)
    flags = ["--dtype", dtype] if to in DTYPED else []
    if (family, framework) in DRIFTED:
        flags += ["--replicas", "first"]
        if to in ("transformers", "merak"):
            (folder / "config.json").write_text(json.dumps(config_of(family, start)))
            flags += ["--config", str(folder / "config.json")]
    return flags


@pytest.mark.parametrize(("family", "framework", "to"), list(formats.pairs()))
def test_every_pair_keeps_every_tensor(source, tmp_path, family, framework, to):
    start = source(family, framework)
    before = digests(start)
    out = convert(start, tmp_path / "out", to, *flags_for(family, framework, to, start, before, tmp_path))
    if to in UNREAD:
        return
    if formats.goes(family, framework, to) == formats.WEIGHTS:
        before = {key: value for key, value in before.items() if key[0] == WEIGHT}
    after = digests(out)
    assert after == before and len(after) > 20


@pytest.mark.parametrize(("family", "framework", "to"), [
    (family, framework, to) for family in formats.TITLES for framework in formats.SOURCES for to in formats.TARGETS
    if family in formats.SOURCES[framework].families and not formats.goes(family, framework, to)
    and family != YUAN])
def test_every_other_pair_is_refused(source, tmp_path, capsys, family, framework, to):
    start = source(family, framework)
    capsys.readouterr()
    assert main(["convert", str(start), str(tmp_path / "out"), "--to", to]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


HOPS = 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [GPT2, LLAMA, OPT])
def test_a_walk_of_six_conversions_comes_back(tmp_path, family, seed):
    """Through random frameworks and layouts, from transformers' own files back to these, to the last bit."""
    rng = random.Random(f"{family} {seed}")
    here, framework = hub.save(family, tmp_path / "0", seed=seed), "transformers"
    before, path = digests(here), [framework]
    for hop in range(1, HOPS + 1):
        ways = [to for to in formats.SOURCES if formats.goes(family, framework, to) and to != framework
                and not formats.TARGETS[to].needs_optimizer]
        to = "transformers" if hop == HOPS and framework != "transformers" else rng.choice(ways)
        sizes = [part for size in CUTS.get(to, ()) for part in (f"--{size}", str(rng.choice([1, 2, 4])))]
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
        to = rng.choice([to for to in formats.SOURCES if to in formats.TARGETS and to != framework
                         and formats.goes(GPT2, framework, to) == formats.WHOLE])
        sizes = [part for size in CUTS.get(to, ()) for part in (f"--{size}", str(rng.choice([1, 2, 4])))]
        here, framework = convert(here, tmp_path / str(hop), to, *sizes), to
        path.append(f"{to} {' '.join(sizes)}")
        assert digests(here) == before and EXP_AVG_SQ in {role for role, _ in before}, path


def test_the_table_in_the_docs_is_the_one_of_the_code(capsys):
    assert main(["formats"]) == 0
    assert capsys.readouterr().out.strip() in (DOCS / "formats.md").read_text()
