"""Combining the shards of MindSpeed-Core-MS's distributed optimizer.

Shards are files of the real mindspore.save_checkpoint, the truth is the tensors before they were
cut, outputs are read by the real mindspore.load_checkpoint. With MINDSPEED_CORE_MS=<checkout of
r0.1.0> its own combine_ckpt_dp_zero.py runs on the same input, and its own buffers and optimizer
say where parameters lie."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from convert.combine_ckpt_dp_zero import main
from tests.support import mindspeed_optimizer as optimizer
from tests.support import mindspeed_shards as lab
from tests.support.mindspore_load import load

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("mindspore"), reason="no mindspore")
CHECKOUT = os.environ.get("MINDSPEED_CORE_MS")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="MINDSPEED_CORE_MS=<checkout of MindSpeed-Core-MS r0.1.0> is not set"
)

_ODD = {
    "a.embedding.weight": (37, 9),
    "a.layers.0.norm.weight": (9,),
    "a.layers.0.mlp.weight": (130, 9),
    "a.layers.0.mlp.bias": (130,),
    "a.layers.1.norm.weight": (1,),
    "a.head.weight": (3, 5, 7),
}
_EVEN = {"a.x.weight": (7, 12), "a.y.weight": (24,), "a.z.weight": (12, 5)}
_HALF = {"b.one.weight": (65, 3), "b.two.weight": (300,)}


@dataclass
class Case:
    """A checkpoint: its buffers, data parallel groups, ZeRO-3 parameters (whole shapes), and the
    files' format."""

    buffers: list[lab.Shapes]
    groups: list[list[int]]
    zero3: dict[str, tuple[int, ...]] | None = None
    form: str = "ckpt"
    extra: dict[str, np.ndarray] = field(default_factory=dict)


CASES = {
    "dp1": Case([lab.Shapes(_ODD)], [[0]]),
    "dp2-one-bucket": Case([lab.Shapes(_ODD)], [[0, 1]]),
    "dp3-buckets": Case([lab.Shapes(_ODD, bucket_size=300)], [[0, 1, 2]], form="safetensors"),
    "dp4-many-buckets": Case([lab.Shapes(_ODD, bucket_size=1)], [[0, 1, 2, 3]]),
    "dp2-unaligned": Case([lab.Shapes(_EVEN, aligned=False, bucket_size=50)], [[0, 1]]),
    "dp3-unaligned": Case([lab.Shapes(_EVEN, aligned=False)], [[0, 1, 2]]),
    "dp2-two-buffers": Case(
        [lab.Shapes(_ODD, bucket_size=400), lab.Shapes(_HALF, "bfloat16", bucket_size=100)],
        [[0, 1]],
        extra={
            "bf16:b.frozen.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
            "bf16:b.one.weight": np.zeros((65, 3), np.float32),
        },
    ),
    "dp3-zero3": Case(
        [lab.Shapes(_ODD)], [[0, 1, 2]], zero3={"c.fc.weight": (6, 5), "c.proj.weight": (3, 2)}
    ),
    "tp2-dp2": Case([lab.Shapes(_ODD, bucket_size=300)], [[0, 2], [1, 3]]),
    "dp12": Case([lab.Shapes(_ODD)], [list(range(12))]),
}


@dataclass
class Written:
    """A case on disk: its folder, and per group the whole states and the other entries of the first
    rank's file."""

    case: Case
    folder: Path
    states: list[dict[str, np.ndarray]]
    others: list[dict[str, np.ndarray]]

    def combine(self, *flags: str) -> int:
        forms = ["--src-format", self.case.form]
        return main(
            [
                "--strategy-dir",
                str(self.folder / "opt_shard_info"),
                "--checkpoint-dir",
                str(self.folder),
                *forms,
                "--max-proccess-limit",
                "2",
                *flags,
            ]
        )


def _scalars(rank: int, step: int) -> dict[str, np.ndarray]:
    return {
        "state_step": np.array([step], np.float32),
        "learning_rate_group_0": np.float64(1e-3 / 3),
        "weight_decay_group_0": np.float64(0.1),
        "max_lr": np.float64(0.7),
        "num_steps": np.int64(8),
        "dp_rng_generator": np.full(3, rank, np.uint8),
        "default_generator": np.full(5, rank, np.uint8),
        "epoch_num": np.int64(0),
        "step_num": np.int64(step),
    }


def _states(
    shapes: dict[str, tuple[int, ...]], random: np.random.Generator
) -> dict[str, np.ndarray]:
    return {
        prefix + name: random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
        for prefix in lab.PREFIXES
    }


def _lay_out(
    case: Case, folder: Path, step: int = 2
) -> tuple[Written, dict[Path, dict[str, np.ndarray]]]:
    """The case's files as {path: {name: array}}; the strategies are written."""
    written, files, random = (
        Written(case, folder, [], []),
        {},
        np.random.default_rng(len(str(folder)) + step),
    )
    zero3 = (
        None
        if case.zero3 is None
        else [prefix + name for name in case.zero3 for prefix in lab.PREFIXES]
    )
    for ranks in case.groups:
        states = _states(
            {name: s for buffer in case.buffers for name, s in buffer.shapes.items()}, random
        )
        cut = _states(case.zero3 or {}, random)
        lab.write_strategy(
            folder / "opt_shard_info", ranks[0], lab.strategy(case.buffers, ranks, zero3)
        )
        shards = lab.shards(case.buffers, states, len(ranks))
        for number, rank in enumerate(ranks):
            parts = {name: np.split(array, len(ranks))[number] for name, array in cut.items()}
            path = folder / f"rank_{rank}" / f"network_rank_{rank}-0_{step}.{case.form}"
            files[path] = shards[number] | parts | _scalars(rank, step) | case.extra
        written.states.append(states | cut)
        written.others.append(
            _scalars(ranks[0], step)
            | {
                name.removeprefix("bf16:"): array
                for name, array in case.extra.items()
                if name.removeprefix("bf16:") not in states
            }
        )
    return written, files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Written]:
    """Every case on disk, to be read only; an older save lies beside each newer one."""
    root, result, old, new = tmp_path_factory.mktemp("shards"), {}, {}, {}
    for name, case in CASES.items():
        old |= _lay_out(case, root / name, step=10)[1]
        result[name], files = _lay_out(case, root / name, step=9)
        new |= files
    lab.save(old | new, root)
    for path in old:
        os.utime(path, (1e9, 1e9))
    for path in new:
        os.utime(path, (1e9 + 1, 1e9 + 1))
    return result


@pytest.fixture(scope="module")
def outputs(written, tmp_path_factory) -> dict[tuple[str, str], list[dict[str, np.ndarray]]]:
    """(case, format) → what MindSpore loads from each group's combined file."""
    root, files, keys = tmp_path_factory.mktemp("combined"), [], []
    for name, one in written.items():
        for form in ("ckpt", "safetensors"):
            out = root / name / form
            assert one.combine("--output-dir", str(out), "--dst-format", form) == 0
            for ranks in one.case.groups:
                files.append(
                    out / f"rank_{ranks[0]}" / f"network_rank_{ranks[0]}-0_9_dp_merged.{form}"
                )
                keys.append((name, form))
            assert sorted(p for p in out.rglob("*") if p.is_file()) == sorted(
                files[-len(one.case.groups) :]
            )
    result: dict = {}
    for key, loaded in zip(keys, load(files, root / "loaded"), strict=True):
        result.setdefault(key, []).append(loaded)
    return result


def _assert_same(loaded: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert {name.removeprefix("bf16:") for name in loaded} == set(expected)
    for name, array in expected.items():
        if name in loaded:
            assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape, name
            assert loaded[name].tobytes() == array.tobytes(), name
        else:
            assert (
                loaded["bf16:" + name].tobytes()
                == (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            ), name


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_combined_equals_the_truth(written, outputs, name, form):
    one = written[name]
    for loaded, states, others in zip(outputs[name, form], one.states, one.others, strict=True):
        _assert_same(loaded, states | others)


def test_no_save_optim(written, tmp_path):
    for name in ("dp2-two-buffers", "dp3-zero3"):
        assert written[name].combine("--output-dir", str(tmp_path / name), "--no-save-optim") == 0
    loaded = load(sorted(tmp_path.rglob("*_dp_merged.ckpt")), tmp_path / "loaded")
    for one, content in zip(
        (written["dp2-two-buffers"], written["dp3-zero3"]), loaded, strict=True
    ):
        kept = {
            name: array
            for name, array in (one.states[0] | one.others[0]).items()
            if not name.startswith("exp_avg")
        }
        for gone in (
            "state_step",
            "learning_rate_group_0",
            "weight_decay_group_0",
            "default_generator",
            "epoch_num",
        ):
            del kept[gone]
        _assert_same(content, kept)


def test_copy_to_all_dp_ranks_and_rank_section(written, tmp_path):
    one = written["tp2-dp2"]
    assert (
        one.combine(
            "--output-dir", str(tmp_path), "--copy-to-all-dp-ranks", "--rank-section", "1", "2"
        )
        == 0
    )
    files = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert files == [f"rank_{n}/network_rank_{n}-0_9_dp_merged.ckpt" for n in (1, 3)]
    assert (tmp_path / files[0]).read_bytes() == (tmp_path / files[1]).read_bytes()
    one.combine("--output-dir", str(tmp_path), "--rank-section", "0", "1")
    assert [path.parent.name for path in sorted(tmp_path.rglob("*_merged.ckpt"))] == [
        "rank_0",
        "rank_1",
        "rank_3",
    ]


@pytest.fixture
def copied(written, tmp_path):
    """copied(case): that case in a folder of its own, to be changed."""

    def copy(name: str) -> Written:
        one = written[name]
        shutil.copytree(one.folder, tmp_path / name)
        return Written(one.case, tmp_path / name, one.states, one.others)

    return copy


def _tree(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_folder_in_and_out(copied, capsys):
    one = copied("tp2-dp2")
    before = _tree(one.folder)
    assert one.combine("--output-dir", str(one.folder)) == 0
    after = _tree(one.folder)
    assert set(after) - set(before) == {
        f"rank_{n}/network_rank_{n}-0_9_dp_merged.ckpt" for n in (0, 1)
    }
    assert before.items() <= after.items()
    capsys.readouterr()
    assert one.combine("--output-dir", str(one.folder)) == 2
    assert "rank_0/network_rank_0-0_9_dp_merged.ckpt: exists already" in capsys.readouterr().err
    assert one.combine("--output-dir", str(one.folder), "--dst-format", "safetensors") == 0
    assert _tree(one.folder).items() >= after.items()


def _newest(one: Written, rank: int) -> Path:
    return one.folder / f"rank_{rank}" / f"network_rank_{rank}-0_9.ckpt"


def _strategy(one: Written) -> Path:
    return one.folder / "opt_shard_info/rank_0/dist_opt_shard_info_rank_0-0_0.json"


def _cut(path: Path, nbytes: int) -> None:
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - nbytes)


def _edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1
    path.write_text(text)


DAMAGE = {
    "truncated": (
        lambda one: _cut(_newest(one, 1), 40),
        "rank_1/network_rank_1-0_9.ckpt",
        "truncated",
    ),
    "empty folder": (
        lambda one: [path.unlink() for path in (one.folder / "rank_1").iterdir()],
        "rank_1",
        "no .ckpt",
    ),
    "one rank older": (
        lambda one: _newest(one, 1).unlink(),
        "rank_1/network_rank_1-0_10.ckpt",
        "step",
    ),
    "not a checkpoint": (
        lambda one: (_newest(one, 1).chmod(0o600), _newest(one, 1).write_text("hello")),
        "rank_1",
        "kind",
    ),
    "strategy cut": (
        lambda one: _cut(_strategy(one), 9),
        "dist_opt_shard_info_rank_0-0_0.json",
        "damaged",
    ),
    "strategy gone": (lambda one: _strategy(one).unlink(), "opt_shard_info", "--strategy-dir"),
    "strategy of another dp": (
        lambda one: _edit(
            _strategy(one), r'"dp_rank_list": \[\s*0,\s*1\s*\]', '"dp_rank_list": [0]'
        ),
        "network_rank_0-0_9.ckpt",
        "buffer_0_bucket_0",
    ),
    "other shape": (
        lambda one: _edit(_strategy(one), r"37,\s*9", "36, 9"),
        "a.embedding.weight",
        "damaged",
    ),
    "parameter missing": (
        lambda one: _edit(_strategy(one), r'"a.layers.0.mlp.weight": \{[^}]*\},', ""),
        "dist_opt_shard_info_rank_0-0_0.json",
        "missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(copied, capsys, tmp_path, damage):
    one = copied("dp2-one-bucket")
    change, *said = DAMAGE[damage]
    change(one)
    assert one.combine("--output-dir", str(tmp_path / "out")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("parammap:")]
    assert len(error) == 1 and all(word in error[0] for word in said), error
    assert not (tmp_path / "out").exists()


def test_missing_rank_folder(copied, capsys, tmp_path):
    one = copied("dp4-many-buckets")
    (one.folder / "rank_2").rename(tmp_path / "parked")
    assert one.combine("--output-dir", str(tmp_path / "out")) == 2
    assert "rank_2: missing" in capsys.readouterr().err


def test_files_of_the_same_second(copied, tmp_path):
    """After a copy without -p their times say nothing: the higher step counts."""
    one = copied("dp2-one-bucket")
    for path in one.folder.glob("rank_*/*"):
        os.utime(path, (1e9, 1e9))
    assert one.combine("--output-dir", str(tmp_path / "out")) == 0
    assert [path.name for path in (tmp_path / "out/rank_0").iterdir()] == [
        "network_rank_0-0_10_dp_merged.ckpt"
    ]


def test_output_folder_that_is_a_file(written, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert written["dp1"].combine("--output-dir", str(tmp_path / "out")) == 2
    assert f"{tmp_path / 'out'}: is no folder" in capsys.readouterr().err


def test_rest_of_an_older_strategy_is_ignored(copied, tmp_path):
    """MindSpeed-Core-MS overwrites the file without cutting it."""
    one = copied("dp2-one-bucket")
    with open(_strategy(one), "a") as file:
        file.write(" 12\n    }\n}")
    assert one.combine("--output-dir", str(tmp_path / "out")) == 0


def test_bucket_that_dp_does_not_divide_lost_elements(tmp_path, capsys):
    """Without memory alignment r0.1.0 pads to dp bytes, not elements, and each rank saves numel //
    dp elements."""
    lab.write_strategy(
        tmp_path / "opt_shard_info",
        0,
        lab.strategy([lab.Shapes({"a.w": (5,)}, aligned=False)], [0, 1], None),
    )
    assert (
        main(
            ["--strategy-dir", str(tmp_path / "opt_shard_info"), "--checkpoint-dir", str(tmp_path)]
        )
        == 2
    )
    assert "last 1 elements of a.w" in capsys.readouterr().err


def test_failed_worker(copied, capsys, tmp_path, monkeypatch):
    """A file that shrinks after the plan is made: status 3, nothing published, nothing half."""
    from parammap.job import combine_shards as combine

    one, out = copied("tp2-dp2"), tmp_path / "out"
    real = combine._execute
    monkeypatch.setattr(
        combine, "_execute", lambda *args: (_cut(_newest(one, 3), 3000), real(*args))
    )
    assert one.combine("--output-dir", str(out)) == 3
    assert "rank_3/network_rank_3-0_9.ckpt: ends before the last byte" in capsys.readouterr().err
    assert not list(out.rglob("*_dp_merged.ckpt")) or all(
        ".parammap" in str(p) for p in out.rglob("*_dp_merged.ckpt")
    )


@needs_checkout
@pytest.mark.parametrize("flags", [(), ("--no-save-optim",)], ids=["all", "no-save-optim"])
def test_equal_to_the_original(written, tmp_path, flags):
    """The original on the same input: byte for byte the same files."""
    for name in ("dp2-one-bucket", "dp4-many-buckets", "dp2-two-buffers", "dp3-zero3", "tp2-dp2"):
        one = written[name]
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        assert one.combine("--output-dir", str(ours), "--copy-to-all-dp-ranks", *flags) == 0
        script = Path(CHECKOUT) / "mindspeed_ms/tools/converter/combine_ckpt_dp_zero.py"
        subprocess.run(
            [
                sys.executable,
                script,
                "--strategy-dir",
                one.folder / "opt_shard_info",
                "--checkpoint-dir",
                one.folder,
                "--output-dir",
                theirs,
                "--copy-to-all-dp-ranks",
                "--max-proccess-limit",
                "1",
                *flags,
            ],
            check=True,
            capture_output=True,
            timeout=900,
        )
        files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.ckpt"))
        assert files == sorted(path.relative_to(ours) for path in ours.rglob("*.ckpt")) and files
        for path in files:
            assert (ours / path).read_bytes() == (theirs / path).read_bytes(), f"{name}: {path}"


@pytest.fixture(scope="module")
def saved_by_the_optimizer(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("optimizer")
    run = subprocess.run(
        [sys.executable, optimizer.__file__, CHECKOUT, out],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return out


@needs_checkout
@pytest.mark.parametrize("name", optimizer.CASES)
def test_what_the_real_optimizer_saves(saved_by_the_optimizer, tmp_path, name):
    """Files, strategies and ranges are of its own code; the truth is what it was given."""
    source = saved_by_the_optimizer / name
    assert (
        main(
            [
                "--strategy-dir",
                str(source / "opt_shard_info"),
                "--checkpoint-dir",
                str(source),
                "--output-dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    (loaded,) = load([tmp_path / "rank_0/network_rank_0-0_5_dp_merged.ckpt"], tmp_path / "loaded")
    states = {
        name: array
        for name, array in loaded.items()
        if name
        not in (
            "state_step",
            "learning_rate_group_0",
            "weight_decay_group_0",
            "epoch_num",
            "step_num",
        )
    }
    _assert_same(states, dict(np.load(source / "truth.npz")))


@needs_checkout
@pytest.mark.parametrize("name", optimizer.CASES)
def test_the_lab_lays_out_as_the_real_optimizer(saved_by_the_optimizer, name):
    dp, bucket_size, aligned, dtypes, flavour = optimizer.CASES[name]
    buffers = [
        lab.Shapes(
            {f"b{b}.{name}": shape for name, shape in optimizer.SHAPES.items()},
            dtype.lower(),
            bucket_size,
            aligned,
        )
        for b, dtype in enumerate(dtypes)
    ]
    zero3 = (
        [prefix + name for name in optimizer.ZERO3 for prefix in lab.PREFIXES]
        if flavour == "ddp"
        else None
    )
    path = (
        saved_by_the_optimizer / name / "opt_shard_info/rank_0/dist_opt_shard_info_rank_0-0_0.json"
    )
    ours = json.loads(json.dumps(lab.strategy(buffers, list(range(dp)), zero3)))
    assert json.loads(path.read_text()) == ours
