"""What a checkpoint says of itself is held to: whose a file is, which tensors there are, which
program wrote a result."""

import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from parammap.checkpoint import completeness
from parammap.checkpoint.manifest import VERSION
from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.job import fingerprint
from parammap.job.conversion import _planned
from parammap.job.request import Request
from parammap.plan.plan import Fill, Plan
from parammap.tensors.region import Region
from tests.support import paths
from tests.support.deepspeed_goldens import BLOOM, GPT, PLAIN, unpack
from tests.support.torch_load import torch_load

ROOT = paths.ROOT
DATA = ROOT / "tests" / "data"
LEGACY = DATA / "megatron" / "cac60ce4_patched_legacy_tp2pp2"
MODEL = "model_optim_rng.pt"


@pytest.fixture
def legacy(tmp_path):
    """A checkpoint of Megatron-LM's at tp 2, pp 2, to be changed."""
    return shutil.copytree(LEGACY, tmp_path / "source")


@pytest.fixture
def mindspore(tmp_path):
    """The same for MindSpore."""
    assert main(["convert", str(LEGACY), str(tmp_path / "ms"), "--to", "mindspore"]) == 0
    return tmp_path / "ms"


def refused(capsys, source, *flags):
    """Why a conversion is refused, which writes nothing."""
    target = source.parent / "out"
    capsys.readouterr()
    assert main(["convert", str(source), str(target), *flags]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not target.exists()
    return message


def saved_again(path, rank=None, **more):
    """Save a file of Megatron-LM's again, with another rank or with more in it, and without classes
    that are not here."""
    content = torch_load(path)
    vars(content["args"]).pop("model_type", None)
    if rank is not None:
        content["args"].rank = rank
    torch.save({**content, **more}, path, pickle_protocol=4 if more else 2)


def exchange(one, other):
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


# ---------------------------------------------------------------------------------------------------------
# the fingerprint


def run(program, *args):
    return subprocess.run(
        [sys.executable, "-m", "parammap", *map(str, args)],
        cwd=program,
        capture_output=True,
        text=True,
    )


def test_the_result_of_another_program_is_no_result_of_this_one(tmp_path):
    for package in ("parammap",):
        shutil.copytree(
            ROOT / package,
            tmp_path / "program" / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    args = "convert", LEGACY, tmp_path / "out", "--to", "mindspore"
    assert run(tmp_path / "program", *args).returncode == 0
    again = run(tmp_path / "program", *args)
    assert again.returncode == 0 and "already" in again.stdout + again.stderr
    with open(tmp_path / "program" / "parammap" / "families" / "gpt2.py", "a") as table:
        table.write("\n_ROWS = (*_ROWS,)\n")
    changed = run(tmp_path / "program", *args)
    assert changed.returncode == 2 and "is not empty" in changed.stderr


def test_a_source_that_changed_with_its_time_put_back_is_another(legacy, capsys):
    args = ["convert", str(legacy), str(legacy.parent / "out"), "--to", "mindspore"]
    assert main(args) == main(args) == 0 and "already" in capsys.readouterr().out
    file = next(legacy.rglob(MODEL))
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(args) == 2 and "is not empty" in capsys.readouterr().err


def changes(fill: Fill):
    yield replace(fill, source=fill.source.at(fill.source.file, 4))
    yield replace(fill, source=fill.source._replace(dtype="int32"))
    yield replace(fill, counted=not fill.counted)
    yield replace(fill, model_copy=None)
    row, col = fill.region.offsets
    yield replace(fill, region=Region((row + 1, col), fill.region.sizes))
    yield replace(fill, tensor=replace(fill.tensor, name="another"))


def test_the_fingerprint_is_of_the_whole_plan():
    plan = _planned(Request(source=LEGACY, target=Path("out"), to="mindspore"))[4]
    task = plan.tasks[0]
    number, fill = next(
        (number, one) for number, (one, *_) in enumerate(task.fills) if one.model_copy
    )
    fills = [
        (*task.fills[:number], (other, *task.fills[number][1:]), *task.fills[number + 1 :])
        for other in changes(fill)
    ]
    tasks = [
        task,
        *(replace(task, fills=one) for one in fills),
        replace(task, path="another"),
        replace(task, segments=task.segments[::-1]),
        replace(task, specs=(replace(task.specs[0], data=b"1"), *task.specs[1:])),
    ]
    found = [fingerprint.fingerprint(Plan([one, *plan.tasks[1:]]), ["options"]) for one in tasks]
    found.append(fingerprint.fingerprint(plan, ["others"]))
    assert len(set(found)) == len(found) == 1 + 6 + 3 + 1
    assert found[0] == fingerprint.fingerprint(
        _planned(Request(source=LEGACY, target=Path("out"), to="mindspore"))[4], ["options"]
    )


# ------------------------------------------------------------------------------------------------
# nothing comes out armed


def rewritten(path, old, new):
    """A file of torch.save's with some bytes of its pickle replaced by others."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


def test_a_global_that_python_renames_does_not_come_out_armed(mindspore, capsys, monkeypatch):
    """`__builtin__.eval` is nothing to who loads protocol 4, and `eval` to who loads protocol 2."""
    stand_in = types.ModuleType("_a_stand_in")
    stand_in.eval = type("eval", (), {"__module__": stand_in.__name__})
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    path = mindspore / "pt_meta" / "args_tp01_pp000.pt"
    saved_again(path, more=[stand_in.eval])
    rewritten(path, b"_a_stand_in", b"__builtin__")
    message = refused(capsys, mindspore, "--to", "megatron")
    assert str(path) in message and "builtins.eval" in message


def test_foreign_objects_are_refused_by_file_and_name(mindspore, capsys):
    path = mindspore / "pt_meta" / "args_tp01_pp000.pt"
    saved_again(path, more=[torch.hub.load])
    message = refused(capsys, mindspore, "--to", "megatron")
    assert str(path) in message and "torch.hub.load" in message


# -------------------------------------------------------------------------------------------------------
# whose a file is


@pytest.mark.parametrize(
    "pair", list(combinations(["00_000", "00_001", "01_000", "01_001"], 2)), ids="-".join
)
@pytest.mark.parametrize("flags", [(), ("--weights-only",)], ids=["whole", "weights"])
def test_folders_of_two_ranks_of_megatron_are_not_exchanged(legacy, capsys, pair, flags):
    one, other = (legacy / "iter_0000002" / f"mp_rank_{name}" for name in pair)
    exchange(one, other)
    assert "mp_rank" in refused(capsys, legacy, "--to", "megatron", *flags)


def test_a_file_of_megatron_is_not_put_over_another(tmp_path, capsys):
    source = shutil.copytree(DATA / "megatron" / "cac60ce4_mcore_pp2dp2_llama", tmp_path / "source")
    one, other = sorted(source.rglob(MODEL))
    shutil.copyfile(one, other)
    assert "is the same file as" in refused(capsys, source, "--to", "megatron", "--weights-only")


@pytest.mark.parametrize("name", ["stock_merge_pp_tp2pp2", "trained_tp1pp2dp3"])
def test_files_of_yuan(tmp_path, capsys, name):
    """Those of a training say whose they are; those that one process wrote say nothing, and are
    taken."""
    source = shutil.copytree(DATA / "yuan" / name, tmp_path / "source")
    files = sorted(source.rglob(MODEL))
    assert main(["digest", str(source), "--weights-only"]) == 0
    exchange(files[0].parent, files[1].parent)
    if name.startswith("trained"):
        assert "was written by rank" in refused(
            capsys, source, "--to", "megatron", "--weights-only"
        )


def test_what_is_laid_out_anew_says_whose_it_is(tmp_path, capsys):
    flags = "--tp", "1", "--pp", "2", "--dp", "2"
    assert main(["convert", str(LEGACY), str(tmp_path / "out"), "--to", "megatron", *flags]) == 0
    files = sorted((tmp_path / "out").rglob(MODEL))
    assert [torch_load(file)["args"].rank for file in files] == [0, 2]
    again = (
        "convert",
        str(tmp_path / "out"),
        str(tmp_path / "back"),
        "--to",
        "megatron",
        "--tp",
        "2",
        "--dp",
        "1",
    )
    assert main(again) == 0
    exchange(files[0].parent, files[1].parent)
    (tmp_path / "source").mkdir()
    assert "was written by rank" in refused(
        capsys, (tmp_path / "out").rename(tmp_path / "source" / "relaid"), "--to", "megatron"
    )


def test_what_an_earlier_release_laid_out_anew_is_read(legacy):
    """It left the ranks of the old layout in the files, and its manifest does not say otherwise."""
    out = legacy.parent / "out"
    assert (
        main(
            [
                "convert",
                str(legacy),
                str(out),
                "--to",
                "megatron",
                "--tp",
                "1",
                "--pp",
                "2",
                "--dp",
                "2",
            ]
        )
        == 0
    )
    manifest = json.loads((out / "parammap_manifest.json").read_text())
    assert manifest.pop("version") == VERSION  # as of an earlier version, which says none
    for file, rank in zip(sorted(out.rglob(MODEL)), (2, 0), strict=True):
        saved_again(file, rank)
        next(one for one in manifest["files"] if out / one["path"] == file)["bytes"] = (
            file.stat().st_size
        )
    (out / "parammap_manifest.json").write_text(json.dumps(manifest))
    assert registry.read(out, weights_only=True).layout.dp == 2


def test_arguments_of_two_ranks_of_mindspore_are_not_exchanged(mindspore, capsys):
    exchange(*(mindspore / "pt_meta" / f"args_tp0{tp}_pp000.pt" for tp in range(2)))
    assert "was written by rank" in refused(capsys, mindspore, "--to", "megatron")


@pytest.mark.parametrize(("name", "pairs"), [("mp2dp2_fp16", 6), ("mp1dp3_fp32", 3)])
def test_no_two_files_of_metaseq_are_exchanged(tmp_path, capsys, name, pairs):
    source = shutil.copytree(
        DATA / "metaseq" / name, tmp_path / "source", ignore=shutil.ignore_patterns("param_map")
    )
    found = list(combinations(sorted(source.glob("checkpoint_3-*.pt")), 2))
    assert len(found) == pairs
    for one, other in found:
        exchange(one, other)
        assert "was written by rank" in refused(capsys, source / "checkpoint_3", "--to", "metaseq")
        exchange(one, other)


def test_files_of_deepspeed_that_say_their_rank(tmp_path, capsys):
    """As Megatron-DeepSpeed saves its arguments; the golden's are fewer."""
    source = unpack(GPT, tmp_path / "source")
    files = [source / "global_step3" / f"mp_rank_0{m}_model_states.pt" for m in range(4)]
    for m, file in enumerate(files):
        content = torch_load(file)
        vars(content["args"]).update(rank=m % 2 + 4 * (m // 2), world_size=8)
        torch.save(content, file)
    registry.read(source)
    exchange(files[0], files[1])
    assert "was written by rank 1" in refused(capsys, source, "--to", "megatron")


# --------------------------------------------------------------------------------------------------------
# what is missing


@pytest.mark.parametrize("golden", [BLOOM, PLAIN["zero1"]])
def test_a_parameter_that_a_universal_checkpoint_lacks(tmp_path, golden):
    folder = unpack(golden, tmp_path / "source") / "ORACLE_universal"
    registry.read(folder)
    for parameter in sorted(path.parent for path in folder.glob("zero/*/exp_avg.pt")):
        parameter.rename(tmp_path / "spare")
        with pytest.raises(RefusedError, match="missing"):
            registry.read(folder)
        (tmp_path / "spare").rename(parameter)


def test_moments_that_a_universal_checkpoint_lacks(tmp_path, capsys):
    folder = unpack(BLOOM, tmp_path / "source") / "ORACLE_universal"
    for state in ("exp_avg.pt", "exp_avg_sq.pt"):
        next(folder.glob(f"zero/*/{state}")).unlink()
    assert "missing" in refused(capsys, folder, "--to", "megatron")


def test_a_parameter_that_a_map_lacks(mindspore, capsys):
    path = next((mindspore / "pt_meta").glob("param_map*.json"))
    content = json.loads(path.read_text())
    gone = next(name for name in content if name.endswith("layers.1.mlp.dense_4h_to_h.bias"))
    path.write_text(json.dumps({name: entry for name, entry in content.items() if name != gone}))
    message = refused(capsys, mindspore, "--to", "megatron")
    assert "does not name layers.1.mlp.fc2.bias" in message


def test_each_tensor_of_a_model_is_missed():
    """The tensors of each layer and those outside; what no model must have is a position table, an
    output layer, and a bias of which all layers lose theirs."""
    source = registry.read(LEGACY)
    names = {held.canonical for held in source.index.held}
    missed = set()
    for name in names:
        kept = [held for held in source.index.held if held.canonical != name]
        try:
            completeness.check(replace(source, index=replace(source.index, held=kept)))
        except RefusedError as error:
            assert name.rsplit(".", 1)[0] in str(error) or "tensors are missing" in str(error)
            missed.add(name)
    assert names - missed <= {"embedding.position.weight", "output.weight"} and len(missed) > 40
