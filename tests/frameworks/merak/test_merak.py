"""Merak's checkpoints of GPT-2: what its own tools write, and what its own runtime's parts save."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import convert_merak_gpt2_checkpoint
from parammap.cli.main import main
from tests.support.merak import (
    CONFIG,
    DATA,
    HF,
    SAID,
    TRACKER,
    WHOLE,
    as_run,
    assert_same,
    convert,
    digests,
    load,
    module,
)

CHECKOUT = os.environ.get("MERAK")
CUSTOM_CUTS = ("--partition-method", "custom", "--custom-partition", "0,3,5,7")
#: what Merak's tool wrote of HF, and the flags for the same
GOLDENS = {
    "stock_hf_to_tp2pp2": ("--tp", "2", "--pp", "2"),
    "stock_hf_to_tp1pp2": ("--tp", "1", "--pp", "2"),
    "stock_hf_to_tp2pp1": ("--tp", "2", "--pp", "1"),
    "stock_hf_to_tp2pp3_custom0357": ("--tp", "2", "--pp", "3", *CUSTOM_CUTS),
}


@pytest.fixture
def run(tmp_path, weights):
    return as_run(tmp_path / "run", weights, config=SAID)


@pytest.mark.parametrize("golden", GOLDENS)
@pytest.mark.parametrize("serialization", ["zip", "legacy"])
def test_transformers_to_merak_is_what_the_tool_writes(golden, serialization, tmp_path):
    out = convert(HF, tmp_path / "out", *GOLDENS[golden], "--serialization", serialization)
    assert_same(out, DATA / golden)
    assert (out / TRACKER).read_text() == "release"


def test_the_circle_that_the_tool_cannot_close(tmp_path, weights, capsys):
    """hf → tp2pp2 → tp1pp2 → hf, each step the golden's."""
    first = convert(HF, tmp_path / "1", "--tp", "2", "--pp", "2")
    assert_same(first, DATA / "stock_hf_to_tp2pp2")
    second = convert(first, tmp_path / "2", "--tp", "1", "--pp", "2")
    assert_same(second, DATA / "stock_hf_to_tp1pp2")
    third = convert(second, tmp_path / "3", "--format", "bin", to="transformers")
    there = load(third / "pytorch_model.bin")
    assert there.keys() == weights.keys() and all(
        torch.equal(there[name], tensor) for name, tensor in weights.items()
    )
    assert (
        digests(capsys, third)
        == digests(capsys, HF)
        == digests(capsys, first)
        == digests(capsys, second)
    )


@pytest.mark.parametrize("golden", GOLDENS)
def test_the_tools_own_files_are_read(golden, tmp_path, weights, capsys):
    """Their tensors lie strided: views of transposed and cut ones, of which torch.save keeps the
    whole storage."""
    source = DATA / golden
    assert digests(capsys, source) == digests(capsys, HF)
    out = convert(source, tmp_path / "out", *WHOLE, "--config", str(CONFIG))
    model = load(out / "iter_0000000_all_dp/model_optim.pt")["model"]
    assert list(model) == [module(name, 4) for name in weights]
    assert all(torch.equal(model[module(name, 4)], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("command", ["verify", "diff", "inspect", "locate"])
def test_an_output_is_proved(command, tmp_path, capsys):
    out = convert(HF, tmp_path / "out", "--tp", "2", "--pp", "2")
    capsys.readouterr()
    arguments = {
        "verify": [out, "--against", HF],
        "diff": [out, HF],
        "inspect": [out],
        "locate": [out, "layers.3.mlp.fc2.weight[5,7]"],
    }[command]
    assert main([command, *map(str, arguments)]) == 0
    said = capsys.readouterr().out
    if command == "locate":
        file, offset = re.search(r"(\S+mp_rank_00_pp_rank_001/\S+\.pt) bytes (\d+) ", said).groups()
        with open(file, "rb") as stream:
            stream.seek(int(offset))
            found = np.frombuffer(stream.read(4), np.float32)[0]
        assert (
            found
            == load(HF / "pytorch_model.bin")["transformer.h.3.mlp.c_proj.weight"][7, 5].item()
        )


def test_a_flipped_bit_is_found(tmp_path, capsys):
    out = convert(DATA / "stock_hf_to_tp2pp2", tmp_path / "out", *WHOLE, "--config", str(CONFIG))
    path = out / "iter_0000000_all_dp/model_optim.pt"
    content = bytearray(path.read_bytes())
    where = content.find(
        load(path)["model"]["module.3.transformer.h.1.mlp.c_proj.weight"].numpy().tobytes()
    )
    content[where + 4] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["diff", str(out), str(DATA / "stock_hf_to_tp2pp2")]) == 1
    assert "layers.1.mlp.fc2.weight" in capsys.readouterr().out


def test_a_deepspeed_runs_output_of_the_tool_is_read(tmp_path):
    """Its float16 buffers are dropped, its arguments kept but for what only Megatron could load;
    compared with the inverse of its cutting, worked out here."""
    source = DATA / "ds_gpt_to_merak_tp2pp2"
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_head": 4,
                "activation_function": "gelu",
                "layer_norm_epsilon": 1e-5,
            }
        )
    )
    out = convert(source, tmp_path / "out", *WHOLE, "--config", str(config), "--for-release")
    made = load(out / "iter_0000000_all_dp/model_optim.pt")
    stages = [
        [
            load(source / f"release/mp_rank_0{tp}_pp_rank_00{pp}/partial_model_optim.pt")
            for tp in range(2)
        ]
        for pp in range(2)
    ]
    seen = 0
    for ranks in stages:
        for name in ranks[0]["model"]:
            if name.endswith(("attn.bias", "masked_bias")):
                assert name not in made["model"]
                continue
            parts = [rank["model"][name] for rank in ranks]
            if "c_attn" in name:
                whole = torch.cat(
                    [torch.cat([part.chunk(3)[k] for part in parts]) for k in range(3)]
                )
            elif name.endswith("row_linear.weight"):
                whole = torch.cat(parts, dim=1)
            else:
                cut = "col_linear" in name or name.endswith(("wte.weight", "lm_head.weight"))
                whole = torch.cat(parts) if cut else parts[0]
            matrix = whole.dim() == 2 and "_linear" in name
            own = made["model"][name.replace(".col_linear", "").replace(".row_linear", "")]
            assert own.dtype == torch.float16 and torch.equal(own, whole.T if matrix else whole), (
                name
            )
            seen += 1
    assert seen == len(made["model"]) == 53
    saved = vars(stages[0][0]["args"])
    assert saved["consumed_train_samples"] == 18 and isinstance(made["args"], Namespace)
    assert vars(made["args"]) == {**saved, "consumed_train_samples": 0, "consumed_valid_samples": 0}


@pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of Merak d72efe5, as MERAK")
@pytest.mark.parametrize("golden", GOLDENS)
def test_the_tool_itself_writes_the_same(golden, tmp_path):
    tp, pp = GOLDENS[golden][1::2][:2]
    custom = (
        ["--partition_method", "custom", "--custom_partition", "0,3,5,7"]
        if "custom" in golden
        else []
    )
    subprocess.run(
        [
            sys.executable,
            Path(CHECKOUT) / "tools/convert_merak_gpt2_checkpoint.py",
            "--merak_tp",
            tp,
            "--merak_pp",
            pp,
            "--load_path",
            HF / "pytorch_model.bin",
            "--json_path",
            CONFIG,
            *custom,
            "--save_path",
            tmp_path / "theirs",
            "--convert_type",
            "transformers_to_merak",
        ],
        check=True,
        timeout=900,
        capture_output=True,
    )
    assert_same(convert(HF, tmp_path / "mine", *GOLDENS[golden]), tmp_path / "theirs")


ENTRY = Path(convert_merak_gpt2_checkpoint.__file__)


def test_the_entry_point_as_the_guide_has_it(tmp_path, weights):
    """transformers_to_merak, merak with a custom partition, transformers; each as a script of its
    own, from anywhere."""

    def call(*flags):
        done = subprocess.run(
            [sys.executable, ENTRY, *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr

    call(
        "--merak_tp",
        "2",
        "--merak_pp",
        "2",
        "--load_path",
        HF / "pytorch_model.bin",
        "--json_path",
        CONFIG,
        "--save_path",
        "1",
        "--convert_type",
        "transformers_to_merak",
    )
    assert_same(tmp_path / "1", DATA / "stock_hf_to_tp2pp2")
    call(
        "--merak_tp",
        "2",
        "--merak_pp",
        "3",
        "--load_path",
        "1/release",
        "--save_path",
        "2",
        "--partition_method",
        "custom",
        "--custom_partition",
        "0,3,5,7",
        "--convert_type",
        "merak",
    )
    assert_same(tmp_path / "2", DATA / "stock_hf_to_tp2pp3_custom0357")
    call("--load_path", "2/release", "--save_path", "3", "--convert_type", "transformers")
    there = load(tmp_path / "3/pytorch_model.bin")
    assert there.keys() == weights.keys() and all(
        torch.equal(there[name], tensor) for name, tensor in weights.items()
    )


def test_the_entry_point_refuses_another_configuration(tmp_path, capsys):
    other = tmp_path / "config.json"
    other.write_text("{}")
    assert (
        convert_merak_gpt2_checkpoint.main(
            [
                "--load_path",
                str(HF),
                "--json_path",
                str(other),
                "--save_path",
                str(tmp_path / "o"),
                "--convert_type",
                "transformers_to_merak",
            ]
        )
        == 2
    )
    assert "must be the config.json of" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_megatron_run_goes_to_merak_and_back_to_its_digests(trained, tmp_path, capsys):
    run = trained(tp=2, pp=2, layers=2, hidden=64, heads=4, dtype="bf16")
    out = tmp_path / "out"
    assert (
        convert_merak_gpt2_checkpoint.main(
            [
                "--load_path",
                str(run.path),
                "--save_path",
                str(out),
                "--merak_tp",
                "4",
                "--merak_pp",
                "2",
                "--convert_type",
                "merak",
            ]
        )
        == 0
    )
    assert digests(capsys, out) == digests(capsys, run.path, "--weights-only")
