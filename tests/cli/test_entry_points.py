"""convert_pt2ckpt.py, flag by flag, as users of MindSpeed-Core-MS's tool call it; and the flags of
`parammap convert`."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from convert.convert_pt2ckpt import main as convert_pt2ckpt
from parammap.cli.main import main
from tests.support import paths
from tests.support.mindspore_load import load
from tests.support.torch_load import torch_load

ROOT = paths.ROOT
GOLDEN = ROOT / "tests/data/megatron/cac60ce4_patched_legacy_tp2pp2"
LLAMA = ROOT / "tests/data/megatron/cac60ce4_mcore_pp2dp2_llama"


def old(out, *flags, source=GOLDEN, maps=True):
    given = ["--param-map-path", str(source / "param_map")] if maps else []
    return convert_pt2ckpt(
        ["--megatron-path", str(source / "iter_0000002"), "--ms-path", str(out), *given, *flags]
    )


def test_as_a_script_with_all_its_flags(tmp_path):
    out = tmp_path / "out"
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "convert/convert_pt2ckpt.py",
            "--megatron-path",
            GOLDEN / "iter_0000002",
            "--ms-path",
            out,
            "--param-map-path",
            GOLDEN / "param_map",
            "--pp-size",
            "2",
            "--tp-size",
            "2",
            "--dp-size",
            "1",
            "--cp-size",
            "1",
            "--parallel-init-order",
            "tp-cp-ep-dp-pp",
            "--vpp-size",
            "1",
            "--stage-list",
            "2",
            "2",
            "--num-layers",
            "4",
            "--generate-all-dp-cp",
            "--file-prefix",
            "first",
            "--format",
            "safetensors",
            "--dist-opt-content",
            "param",
            "exp_avg",
            "exp_avg_sq",
            "--debug",
            "--multiprocess-off",
            "--process-limit",
            "3",
            "--process_timeout",
            "60",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("successfully") == 4
    assert "language_model.encoder.layers.3.mlp.mapping.weight [128, 64] float32" in run.stdout
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")) == [
        f"rank_{number}/first.safetensors" for number in range(4)
    ]
    (arrays,) = load([out / "rank_2/first.safetensors"], tmp_path / "loaded")
    assert "exp_avg_sq.language_model.output_layer.weight" in arrays


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tp-size", "4"], "tp 2"),
        (["--pp-size", "1"], "pp 2"),
        (["--vpp-size", "2"], "vpp 1"),
        (["--num-layers", "8"], "4 layers"),
        (["--stage-list", "1", "3"], "[2, 2]"),
        (["--dist-opt-content", "param", "momentum"], "momentum"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(flags, said, tmp_path, capsys):
    assert old(tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_states_are_chosen(tmp_path):
    assert old(tmp_path / "out", "--dist-opt-content", "param", "exp_avg") == 0
    (arrays,) = load([tmp_path / "out/rank_0/network.ckpt"], tmp_path / "loaded")
    prefixes = {name.partition(".")[0] for name in arrays if "." in name}
    assert prefixes == {"language_model", "exp_avg"}
    dropped = json.loads((tmp_path / "out/parammap_manifest.json").read_text())["dropped"]
    assert dropped and all(name.endswith("(exp_avg_sq)") for name in dropped)


def test_weights_alone_are_float32(tmp_path):
    assert old(tmp_path / "out", "--convert-param-only", maps=False) == 0
    (arrays,) = load([tmp_path / "out/rank_0/network.ckpt"], tmp_path / "loaded")
    model = torch_load(GOLDEN / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")["model"][
        "language_model"
    ]
    weight = model["encoder"]["layers.1.mlp.dense_4h_to_h.weight"]
    assert weight.dtype == torch.bfloat16
    assert np.array_equal(
        arrays["language_model.encoder.layers.1.mlp.projection.weight"], weight.float().numpy()
    )
    assert not any(name.startswith("exp_avg") for name in arrays)
    meta = torch_load(tmp_path / "out/pt_meta/args_tp00_pp000.pt")
    assert meta["param_name_list"][0][-1] == "model.language_model.embedding.word_embeddings.weight"


def test_maps_must_be_named_unless_weights_alone(tmp_path, capsys):
    assert old(tmp_path / "out", maps=False) == 2
    assert "--param-map-path" in capsys.readouterr().err


def test_time_that_is_over_fails_the_run(tmp_path, capsys, monkeypatch):
    from parammap.execute import local as execute

    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(execute.time, "monotonic", lambda: next(clock))
    assert old(tmp_path / "out", "--process_timeout", "30") == 3
    assert "time" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("can_link", [True, False])
def test_every_rank_gets_its_file(can_link, tmp_path, monkeypatch):
    """dp 2 · cp 2 on tp 2 · pp 2: 16 ranks; the data- and context-parallel ones share the file of
    the first."""
    if not can_link:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
        )
    assert old(tmp_path / "out", "--dp-size", "2", "--cp-size", "2", "--generate-all-dp-cp") == 0
    files = [tmp_path / f"out/rank_{number}/network.ckpt" for number in range(16)]
    assert len(list((tmp_path / "out").glob("rank_*"))) == 16
    for pp in range(2):
        for tp in range(2):
            same = [files[((pp * 2 + dp) * 2 + cp) * 2 + tp] for dp in range(2) for cp in range(2)]
            assert len({path.stat().st_ino for path in same}) == (1 if can_link else 4)
            assert len({path.read_bytes() for path in same}) == 1
    assert len({path.read_bytes() for path in files}) == 4
    assert json.loads((tmp_path / "out/parammap_manifest.json").read_text())["links"] == (
        "hard links" if can_link else "copies"
    )


def test_the_sources_own_names(tmp_path):
    """--names megatron: the checkpoint's names, with the layers' global numbers."""
    assert (
        main(
            [
                "convert",
                str(LLAMA),
                str(tmp_path / "out"),
                "--to",
                "mindspore",
                "--weights-only",
                "--names",
                "megatron",
            ]
        )
        == 0
    )
    (stage,) = load([tmp_path / "out/rank_2/network.ckpt"], tmp_path / "loaded")
    model = torch_load(LLAMA / "iter_0000002/mp_rank_00_001/model_optim_rng.pt")["model"]
    renumbered = {
        name.replace("layers.0.", "layers.2.", 1).replace("layers.1.", "layers.3.", 1): value
        for name, value in model.items()
        if isinstance(value, torch.Tensor)
    }
    assert {"bf16:" + name for name in renumbered} == {name for name in stage if "." in name}
    for name, value in renumbered.items():
        assert np.array_equal(stage["bf16:" + name], value.view(torch.uint16).numpy()), name


def test_names_that_differ_from_the_existing_tools_are_listed(tmp_path):
    assert old(tmp_path / "out") == 0
    unlike = json.loads((tmp_path / "out/parammap_manifest.json").read_text())[
        "names_unlike_mindspeed_converter"
    ]
    assert (
        unlike["language_model.encoder.final_norm.gamma"]
        == "language_model.encoder.final_norm.weight"
    )
    assert "language_model.encoder.layers.0.attention.qkv_proj.weight" not in unlike
