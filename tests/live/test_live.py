"""Real megatron-core training, converted, loaded by MindSpore itself: every tensor equals the live
state, bit for bit.

The proof (examples/mindspore_proof.py) compares with what the running process held, and uses
nothing of the converter."""

import json
from pathlib import Path

import pytest

from parammap.checkpoint.manifest import MANIFEST
from parammap.cli.main import main
from tests.support.live import prove
from tests.support.runs import every_run
from tests.support.variants import DEFECTS, VARIANTS

SOUND = [variant for variant in VARIANTS if variant not in DEFECTS]


def convert(run, out, *flags):
    return main(["convert", str(run.path), str(out), "--to", "mindspore", *flags])


@every_run(*SOUND)
def test_every_tensor_equals_the_live_state(trained_variant, tmp_path, core, variant):
    run = trained_variant(core, variant)
    assert convert(run, tmp_path / "out") == 0
    prove(run, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["misfits"] == [] and manifest["dropped"] == [] and len(manifest["digests"]) > 30


@every_run("uneven")
def test_layers_of_each_stage_are_checked(trained_variant, tmp_path, capsys, core, variant):
    run = trained_variant(core, variant)
    for wrong in ("2,3,1", "3,4", "3,2,2,0"):
        assert convert(run, tmp_path / "out", "--stage-layers", wrong) == 2, wrong
        assert "--stage-layers" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    assert convert(run, tmp_path / "out", "--stage-layers", "3,2,2") == 0
    prove(run, tmp_path / "out")


def test_safetensors_equal_the_live_state(trained_variant, tmp_path):
    run = trained_variant("0.16.1", "tp2pp2")
    assert convert(run, tmp_path / "out", "--format", "safetensors", "--workers", "1") == 0
    prove(run, tmp_path / "out")


@every_run("stale")
def test_stale_model_weights_are_reported_and_the_optimizers_are_taken(
    trained_variant, tmp_path, capsys, core, variant
):
    """core 0.6 with --overlap-param-gather saves 16-bit weights that are one step old; the
    optimizer's are right."""
    run = trained_variant(core, variant)
    assert convert(run, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "stale (first at row" in said
    prove(run, tmp_path / "out")
    kinds = {
        misfit["kind"]
        for misfit in json.loads((tmp_path / "out" / MANIFEST).read_text())["misfits"]
    }
    assert kinds == {"stale"}
    assert convert(run, tmp_path / "accepted", "--accept-stale") == 0


@every_run("fp32_mixed_group")
def test_permuted_optimizer_slices_are_refused(trained_variant, tmp_path, capsys, core, variant):
    """fp32 and bf16 parameters in one group: Megatron exchanges their optimizer slices, moments and
    all."""
    run = trained_variant(core, variant)
    assert convert(run, tmp_path / "out") == 2
    assert "permuted" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert convert(run, tmp_path / "out", "--accept-permuted", "--accept-stale") == 0


@pytest.mark.parametrize("lost", ["layout_tp01_pp001.json", "layout_tp00_pp000.json"])
def test_a_layout_file_is_missing(trained_variant, tmp_path, capsys, lost):
    import shutil

    run = trained_variant("0.16.1", "tp2pp2")
    source = Path(shutil.copytree(run.path, tmp_path / "src"))
    for path in source.rglob(lost):
        path.unlink()
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    assert "says nothing of optimizer 0" in capsys.readouterr().err


def test_layout_of_another_iteration_is_refused(trained_variant, tmp_path, capsys):
    import shutil

    run = trained_variant("0.16.1", "tp2pp2")
    source = Path(shutil.copytree(run.path, tmp_path / "src"))
    shutil.rmtree(next(source.glob("iter_*/param_map")))
    for path in (source / "param_map").glob("layout_*.json"):
        layout = json.loads(path.read_text())
        path.write_text(json.dumps({**layout, "iteration": layout["iteration"] + 100}))
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    assert "written at iteration" in capsys.readouterr().err


def test_bare_maps_of_a_padded_release_are_refused(trained_variant, tmp_path, capsys):
    """From core 0.7 on the file has no bucket bounds: where buckets are padded, a bare map cannot
    say what lies where."""
    import shutil

    run = trained_variant("0.16.1", "dp3_padded")
    source = Path(shutil.copytree(run.path, tmp_path / "src"))
    for path in source.rglob("layout_*.json"):
        path.unlink()
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    assert "padded" in capsys.readouterr().err


def test_bare_maps_of_core_0_6_suffice(trained_variant, tmp_path):
    """distrib_optim.pt of core 0.6 has its bucket bounds itself."""
    import shutil

    run = trained_variant("0.6.0", "dp3_padded")
    source = Path(shutil.copytree(run.path, tmp_path / "src"))
    for path in source.rglob("layout_*.json"):
        path.unlink()
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "mindspore"]) == 0
    prove(run, tmp_path / "out")
