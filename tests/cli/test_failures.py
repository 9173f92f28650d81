"""What goes wrong on shared clusters: each case gets one line that names the file, the right
status, and no half result."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli.main import main
from tests.support import paths
from tests.support.mindspore_load import load

ROOT = paths.ROOT
DATA = paths.TESTS / "data" / "megatron"
GOLDEN = "cac60ce4_patched_legacy_tp2pp2"


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(DATA / GOLDEN, tmp_path / "src"))


def convert(source, out, *flags):
    return main(["convert", str(source), str(out), "--to", "mindspore", *flags])


def assert_refused(capsys, source, *said, flags=()):
    out = source.parent / "out"
    before = sorted(path.name for path in source.parent.iterdir())
    assert convert(source, out, *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("parammap:")]
    assert len(error) == 1 and all(word in error[0] for word in said), error
    assert sorted(path.name for path in source.parent.iterdir()) == before


def rank(source, name="mp_rank_01_001"):
    return source / "iter_0000002" / name


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_truncated_file(source, capsys, file):
    path = rank(source) / file
    path.write_bytes(path.read_bytes()[:-4000])
    assert_refused(capsys, source, str(path))


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_missing_file(source, capsys, file):
    (rank(source) / file).unlink()
    assert_refused(capsys, source, str(rank(source) / file), "missing")


def test_missing_rank(source, capsys):
    shutil.rmtree(rank(source))
    assert_refused(capsys, source, "tp1 pp1", "missing")


def test_a_rank_too_many(source, capsys):
    shutil.copytree(rank(source), rank(source, "mp_rank_02_001"))
    assert_refused(capsys, source, "tp2 pp1", "should not exist")


def test_ranks_swapped(source, capsys):
    """The stages' maps stay where they were, so they contradict the files."""
    first, last = rank(source, "mp_rank_00_000"), rank(source, "mp_rank_00_001")
    first.rename(source / "iter_0000002/parked")
    last.rename(first)
    (source / "iter_0000002/parked").rename(last)
    assert convert(source, source.parent / "out") == 2


def test_no_sidecar(source, capsys):
    shutil.rmtree(source / "param_map")
    assert_refused(capsys, source, "param_map", "--sidecar", "--weights-only")


def test_map_of_one_rank_missing(source, capsys):
    (source / "param_map/param_map_buffer0_dp0tp1pp1vpp0.json").unlink()
    assert_refused(capsys, source, "param_map", "tp1 pp1")


def test_map_is_no_json(source, capsys):
    path = source / "param_map/param_map_buffer0_dp0tp1pp1vpp0.json"
    path.write_text("{" + path.read_text())
    assert_refused(capsys, source, str(path), "JSON")


def test_map_of_another_model(source, capsys):
    other = DATA / "cac60ce4_patched_legacy_pp2dp3_untied_padded" / "param_map"
    for pp in (0, 1):
        for tp in (0, 1):
            shutil.copy(
                other / f"param_map_buffer0_dp0tp0pp{pp}vpp0.json",
                source / f"param_map/param_map_buffer0_dp0tp{tp}pp{pp}vpp0.json",
            )
    assert_refused(capsys, source, "another run")


def test_map_of_another_run_of_the_same_shape(source, capsys):
    """Slices of equal shapes exchanged in the map: only the values can tell, and the moments would
    be wrong too."""
    for path in (source / "param_map").glob("*pp0vpp0.json"):
        entries = json.loads(path.read_text())
        a, b = (
            f"module.language_model.encoder.layers.{n}.mlp.dense_4h_to_h.weight" for n in (0, 1)
        )
        entries[a], entries[b] = entries[b], entries[a]
        path.write_text(json.dumps(entries))
    assert_refused(capsys, source, "permuted", "layers.0.mlp.fc2.weight", "layers.1.mlp.fc2.weight")
    out = source.parent / "out"
    assert convert(source, out, "--accept-permuted") == 0
    kinds = {
        entry["tensor"]: entry["kind"]
        for entry in json.loads((out / MANIFEST).read_text())["misfits"]
    }
    assert kinds == {"layers.0.mlp.fc2.weight": "permuted", "layers.1.mlp.fc2.weight": "permuted"}


def test_optimizer_file_of_another_run(source, capsys):
    """A file of the same shape whose values belong to no parameter of this model."""
    path = rank(source, "mp_rank_00_000") / "distrib_optim.pt"
    saved = torch.load(path, weights_only=True)
    (buffer,) = saved[0].values()
    generator = torch.Generator().manual_seed(1)
    buffer["param"] = [
        torch.randn(bucket.shape, generator=generator) * 0.02 for bucket in buffer["param"]
    ]
    torch.save(saved, path)
    assert_refused(capsys, source, "unrelated")


def test_maps_of_a_second_launch(source, capsys):
    """The existing patch names the maps of a second launch vpp1, and leaves the old ones as
    vpp0."""
    for path in list((source / "param_map").glob("*vpp0.json")):
        shutil.copy(path, str(path).replace("vpp0", "vpp1"))
    assert_refused(capsys, source, "buffers", "different runs")


def test_foreign_pickle_runs_nothing(source, capsys):
    import pickle
    import zipfile

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {source.parent}/attacked",)

    path = rank(source) / "model_optim_rng.pt"
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Attack()}, protocol=2))
        archive.writestr("archive/version", "3")
    assert_refused(capsys, source, str(path), "system")
    assert not (source.parent / "attacked").exists()


def test_not_a_checkpoint(tmp_path, capsys):
    folder = tmp_path / "src"
    folder.mkdir()
    assert_refused(capsys, folder, str(folder))
    assert convert(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere" in capsys.readouterr().err


def test_wrong_iteration(source, capsys):
    assert_refused(capsys, source, "iter_0000007", flags=["--iteration", "7"])


def test_a_layout_that_does_not_divide(source, capsys):
    assert_refused(capsys, source, "attention heads", "tp 3", flags=["--tp", "3"])
    assert_refused(
        capsys, source, "--stage-layers 1,4", "4 layers", flags=["--stage-layers", "1,4"]
    )


def test_target_with_other_content(source, capsys):
    out = source.parent / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    assert_refused(capsys, source, str(out), "--overwrite")
    assert (out / "precious").exists()
    assert convert(source, out, "--overwrite") == 0
    assert not (out / "precious").exists() and (out / MANIFEST).exists()


def test_the_source_is_never_the_target(source, capsys):
    """Not even on demand: replacing the target would throw the checkpoint away."""
    before = files(source.parent)
    for target in (source, source.parent):
        assert convert(source, target, "--overwrite") == 2
        assert "which is read" in capsys.readouterr().err
    assert convert(source / "iter_0000002", source, "--overwrite") == 2
    assert files(source.parent) == before


def test_the_same_conversion_again_is_done_already(source, capsys):
    out = source.parent / "out"
    assert convert(source, out) == 0
    before = (out / "rank_0/network.ckpt").stat().st_mtime_ns
    assert convert(source, out) == 0
    assert "already" in capsys.readouterr().out
    assert (out / "rank_0/network.ckpt").stat().st_mtime_ns == before
    assert convert(source, out, "--format", "safetensors") == 2


def test_dry_run_writes_nothing(source, capsys):
    before = sorted(source.parent.rglob("*"))
    assert convert(source, source.parent / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "rank_3/network.ckpt" in said and "bytes" in said and "MB" in said
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_file_that_cannot_grow_fails_the_run(source, workers):
    """The kernel refuses to write on, as on a full disk: nothing is published, no temporary file
    stays."""
    out = source.parent / "out"
    limited = subprocess.run(
        command(source, out, "--workers", workers),
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert limited.returncode == 3, limited.stderr
    assert "File too large" in limited.stderr and "network.ckpt" in limited.stderr
    assert not out.exists() and not list(source.parent.rglob("*.tmp"))
    assert convert(source, out) == 0


def test_too_little_room_is_told_before_anything_is_written(source, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs privileges that this machine does not give")
    try:
        assert convert(source, disk / "out") == 2
        assert "GB free" in capsys.readouterr().err and list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def command(source, out, *flags):
    return [
        sys.executable,
        "-m",
        "parammap",
        "convert",
        str(source),
        str(out),
        "--to",
        "mindspore",
        *flags,
    ]


def test_killed_midway_then_run_again(source):
    """kill −9 after the first file: nothing is published; the same command goes on and the result
    is the usual one."""
    out, staging = source.parent / "out", source.parent / ".out.parammap"
    slow = (
        "import parammap.execute.writer as e, time; w = e.Writer._fill\n"
        "def slow(*a):\n    time.sleep(0.02)\n    yield from w(*a)\n"
        "e.Writer._fill = slow\nimport sys; from parammap.cli.main import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", slow, *command(source, out, "--workers", "1")[3:]], cwd=ROOT
    )
    first = staging / "out/rank_0/network.ckpt"
    deadline = time.monotonic() + 900
    while (
        not (first.exists() and (staging / "journal").read_text().count("\n") > 1)
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert first.exists() and not out.exists()
    done = first.stat().st_mtime_ns
    assert convert(source, out) == 0
    assert (out / "rank_0/network.ckpt").stat().st_mtime_ns == done
    fresh = source.parent / "fresh"
    assert convert(source, fresh) == 0
    assert files(out) == files(fresh) and not staging.exists()
    digests = [json.loads((folder / MANIFEST).read_text())["digests"] for folder in (out, fresh)]
    assert digests[0] == digests[1] and digests[0]


def test_a_killed_worker_fails_the_run(source):
    out = source.parent / "out"
    suicidal = (
        "import parammap.execute.writer as e, os, signal; w = e.Writer._fill\n"
        "def die(self, hole):\n    if 'rank_3' in self.task.path: os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
        "    yield from w(self, hole)\n"
        "e.Writer._fill = die\nimport sys; from parammap.cli.main import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", suicidal, *command(source, out, "--workers", "2")[3:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3 and "killed" in run.stderr and not out.exists()
    assert convert(source, out) == 0


def test_a_changed_source_is_not_resumed(source):
    """What an interrupted run has written counts only for the very same source files."""
    out, staging = source.parent / "out", source.parent / ".out.parammap"
    run = subprocess.run(
        command(source, out),
        cwd=ROOT,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (670_000, 670_000)),
    )
    assert run.returncode == 3 and len((staging / "journal").read_text().splitlines()) > 1
    done = [
        json.loads(line[9:])["path"] for line in (staging / "journal").read_text().splitlines()[1:]
    ]
    assert "rank_2/network.ckpt" in done
    change_a_moment(rank(source, "mp_rank_00_001") / "distrib_optim.pt")
    assert convert(source, out) == 0
    fresh = source.parent / "fresh"
    assert convert(source, fresh) == 0
    assert files(out) == files(fresh)


def change_a_moment(path):
    saved = torch.load(path, weights_only=True)
    (buffer,) = saved[0].values()
    buffer["exp_avg"][0][:100] += 1
    torch.save(saved, path)


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_copies_that_differ_between_ranks_are_reported_and_kept(source, capsys, tmp_path):
    """A norm drifted on tensor-parallel rank 1: each rank's file holds its own copy, and the run
    says so."""
    name = "language_model.encoder.layers.0.input_norm.weight"
    _, _, start, end, bucket = json.loads(
        (source / "param_map/param_map_buffer0_dp0tp1pp0vpp0.json").read_text()
    )[f"module.{name}"]
    path = rank(source, "mp_rank_01_000") / "distrib_optim.pt"
    saved = torch.load(path, weights_only=True)
    (buffer,) = saved[0].values()
    before = sum(len(part) for part in buffer["exp_avg"][:bucket])
    buffer["exp_avg"][bucket][start - before : end - before] += 1
    torch.save(saved, path)
    assert convert(source, source.parent / "out") == 1
    assert (
        "layers.0.input_norm.weight (exp_avg): the ranks' copies differ" in capsys.readouterr().out
    )
    files = [source.parent / f"out/rank_{number}/network.ckpt" for number in (0, 1)]
    key = "exp_avg.language_model.encoder.layers.0.input_norm.gamma"
    one, other = (arrays[key] for arrays in load(files, tmp_path / "loaded"))
    drifted = buffer["exp_avg"][bucket][start - before : end - before].numpy()
    assert (other == drifted).all() and (one != drifted).all()
