"""Shards of MindSpeed-Core-MS's distributed optimizer as the source of a conversion, without
combining them first.

The shards are a converted checkpoint, cut and saved by the real mindspore; the truth is that
checkpoint itself."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from convert.combine_ckpt_dp_zero import main
from parammap.checkpoint.manifest import MANIFEST
from parammap.cli import main as cli
from parammap.frameworks import registry
from tests.support import mindspeed_shards as lab
from tests.support import paths
from tests.support.mindspore_load import load

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("mindspore"), reason="no mindspore")
GOLDEN = paths.TESTS / "data/megatron/cac60ce4_patched_legacy_tp2pp2"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, Path]:
    """A MindSpore checkpoint (tp2 pp2), and the same state in shards over dp 2."""
    root = tmp_path_factory.mktemp("sharded")
    plain, cut, files = root / "plain", root / "cut", {}
    assert cli.main(["convert", str(GOLDEN), str(plain), "--to", "mindspore"]) == 0
    shutil.copytree(plain / "pt_meta", cut / "pt_meta")
    folders = sorted(plain.glob("rank_*"))
    for number, content in enumerate(
        load([folder / "network.ckpt" for folder in folders], root / "loaded")
    ):
        pp, tp = divmod(number, 2)
        ranks = [pp * 4 + tp, pp * 4 + 2 + tp]
        shapes = {
            name: array.shape for name, array in content.items() if f"exp_avg.{name}" in content
        }
        buffers = [lab.Shapes(shapes, bucket_size=2000)]
        lab.write_strategy(cut / "opt_shard_info", ranks[0], lab.strategy(buffers, ranks, None))
        rest = {
            name: array
            for name, array in content.items()
            if name.split("exp_avg.")[-1].split("exp_avg_sq.")[-1] not in shapes
        }
        for rank, shards in zip(ranks, lab.shards(buffers, content, 2), strict=True):
            files[cut / f"rank_{rank}" / f"network_rank_{rank}-0_2.ckpt"] = shards | rest
    lab.save(files, root)
    return plain, cut


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_shards_are_a_source(sharded, tmp_path):
    """From shards to Megatron-LM in one step: the same files as from the checkpoint that was never
    cut."""
    for source in sharded:
        assert (
            cli.main(["convert", str(source), str(tmp_path / source.name), "--to", "megatron"]) == 0
        )
    plain, cut = _contents(tmp_path / "plain"), _contents(tmp_path / "cut")
    assert plain and plain == cut


def test_shards_without_their_strategy_are_no_source(sharded, tmp_path, capsys):
    shutil.copytree(sharded[1], tmp_path / "cut")
    (tmp_path / "cut/opt_shard_info/rank_1").rename(tmp_path / "parked")
    assert (
        cli.main(["convert", str(tmp_path / "cut"), str(tmp_path / "out"), "--to", "megatron"]) == 2
    )
    assert "rank_1" in capsys.readouterr().err


def test_combined_files_beside_their_shards_are_a_source(sharded, tmp_path):
    cut = Path(shutil.copytree(sharded[1], tmp_path / "cut"))
    assert (
        main(
            [
                "--strategy-dir",
                str(cut / "opt_shard_info"),
                "--checkpoint-dir",
                str(cut),
                "--output-dir",
                str(cut),
            ]
        )
        == 0
    )
    plain, combined = (registry.read(source) for source in (sharded[0], cut))
    assert set(plain.index.shards) == set(combined.index.shards)
    assert all("_dp_merged" in held.found.stored.extents[0].file for held in combined.index.held)
