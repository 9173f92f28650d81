"""Metaseq's checkpoints as a user meets them: what `parammap inspect` says of them, flat files that
lost their metadata, one file among others, and a reader of the output that goes away. What is so is
taken from torch.load."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.convert_to_singleton import main as convert_to_singleton
from convert.reshard_fsdp import main as reshard_fsdp
from parammap.cli.main import main
from parammap.formats import torch_zip
from tests.support import paths
from tests.support.archives import reseal
from tests.support.torch_load import torch_load

ROOT = paths.ROOT
DATA = ROOT / "tests/data/metaseq"
FP32, FP16 = DATA / "mp1dp3_fp32", DATA / "mp2dp2_fp16"
FIVE, LOST = FP32 / "up/rf_n5", FP16 / "up/y2022_2"


def run(capsys, *arguments: object) -> tuple[int, dict]:
    """Exit status and the JSON that a command prints."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def overwrite(path: Path, name: str, value: np.generic) -> None:
    """Write a value over the first element of a tensor of the model."""
    with open(path, "r+b") as file:
        file.seek(torch_zip.read(path)["model"][name].extents[0].offset)
        file.write(value.tobytes())
    reseal(path)


# ------------------------------------------------------------------------------------------------------------
# inspection


@pytest.mark.parametrize("folder", [FP32, FP16, FIVE], ids=lambda path: path.name)
def test_inspection_says_what_the_shards_hold(folder, capsys):
    shards = {
        tuple(map(int, re.findall(r"(?:part-|shard)(\d+)", path.name))): torch_load(path)
        for path in folder.glob("checkpoint_3-*.pt")
    }
    parts, count = (1 + max(key[dim] for key in shards) for dim in (0, 1))
    first, settings = (
        shards[0, 0],
        torch_load(FP32 / "checkpoint_3-model_part-0-shard0.pt")["cfg"]["model"],
    )
    _, facts = run(capsys, "inspect", folder)
    assert (facts["framework"], facts["iteration"]) == (
        "metaseq",
        first["optimizer_history"][-1]["num_updates"],
    )
    assert (facts["layout"]["tp"], facts["layout"]["dp"]) == (parts, count)
    assert facts["model"] == {
        "num_layers": settings.decoder_layers,
        "hidden_size": settings.decoder_embed_dim,
        "ffn_hidden_size": settings.decoder_ffn_embed_dim,
        "num_attention_heads": settings.decoder_attention_heads,
        "kv_channels": settings.decoder_embed_dim // settings.decoder_attention_heads,
        "vocab_size": 56,
        "max_position_embeddings": settings.max_target_positions,
        "activation": settings.activation_fn,
        "untie_embeddings_and_output_weights": not settings.share_decoder_input_output_embed,
    }
    flats = {one["key"]: one for one in facts["flat_parameters"]}
    seen = []
    for number, entry in enumerate(first["shard_metadata"]["param_metadata"]):
        for key, param in entry["params"].items():
            one = flats[".".join(filter(None, (entry["fsdp_path"], key)))]
            padding = sum(
                shards[0, shard]["shard_metadata"]["param_metadata"][number]["params"][key][
                    "padding"
                ]
                for shard in range(count)
            )
            seen.append(one["key"])
            assert one["chunk"] == first["model"][one["key"]].numel() and one["parts"] == list(
                range(parts)
            )
            assert (one["parameters"], one["numel"], one["padding"]) == (
                len(param["names"]),
                sum(param["numels"]),
                padding,
            )
    assert seen == list(flats)
    optimizer = first["last_optimizer_state"]
    assert facts["optimizer"]["groups"][0]["lr"] == optimizer["param_groups"][0]["lr"]
    assert facts["optimizer"]["loss_scale"] == optimizer.get("loss_scale")
    assert {state["role"]: state["dtype"] for state in facts["states"]} == {
        "weight": str(first["model"]["flat_param_0"].dtype).removeprefix("torch."),
        "exp_avg": "float32",
        "exp_avg_sq": "float32",
    }
    assert facts["parameters"]["total"] == 12313 and facts["missing"] == []
    assert facts["files"] == [
        {
            "kind": "tensors",
            "files": len(shards),
            "bytes": sum(path.stat().st_size for path in folder.glob("checkpoint_3-*.pt")),
        }
    ]
    assert (facts["sidecar"] is None) == (folder == FIVE)


def test_inspection_in_words(capsys, tmp_path):
    assert main(["inspect", str(FIVE), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    for words in (
        "Metaseq checkpoint, iteration 3",
        "1 model-parallel part (tp) × 5 FSDP shards (dp)",
        "4 heads",
        "tied output layer",
        "MetaseqAdam, the loss not scaled",
        "decoder.layers.{0-2}.flat_param_0 on part 0: "
        "12 parameters, 3,584 elements in 5 shards of 717 (padding 1)",
    ):
        assert words in said, words
    assert main(["inspect", str(FP16)]) == 0
    assert "the loss scaled by 4" in capsys.readouterr().out


def test_whole_tensors_are_no_flat_parameters(capsys):
    """metaseq's reshard_fsdp leaves the metadata of the shards in files of whole tensors."""
    assert torch_load(FP16 / "up/rf1/reshard-model_part-0.pt")["shard_metadata"]
    assert run(capsys, "inspect", FP16 / "up/rf1")[1]["flat_parameters"] == []


def test_inspection_of_alpas_folder(capsys, tmp_path):
    assert main(["convert", str(FP16), str(tmp_path / "np"), "--to", "alpa"]) == 0
    _, facts = run(capsys, "inspect", tmp_path / "np")
    source = run(capsys, "inspect", FP16)[1]
    assert {
        **facts["model"],
        **{name: source["model"][name] for name in ("num_attention_heads", "kv_channels")},
    } == source["model"]
    assert (facts["parameters"], facts["flat_parameters"]) == (source["parameters"], [])
    assert main(["inspect", str(tmp_path / "np")]) == 0
    assert "one folder of whole tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["inspect", FP32], ["digest", FP32], ["diff", FP32, FIVE], ["formats"]],
    ids=lambda arguments: arguments[0],
)
def test_nobody_reads_on(arguments):
    """As of `parammap inspect … | head -1`: quiet, and the status that SIGPIPE gives."""
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "parammap", *arguments],
        cwd=ROOT,
        env=buffered,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# --------------------------------------------------------------------------------------- flat files
# without their metadata


def test_flat_files_are_verified_with_borrowed_metadata(capsys, tmp_path):
    """As the output alone, as the output beside a source, and as the source."""
    out = Path(shutil.copytree(LOST, tmp_path / "out"))
    for arguments in ([out], [out, "--against", FP16], [FP16, "--against", out]):
        assert main(["verify", *map(str, arguments)]) == 2
        assert "--metadata-from" in capsys.readouterr().err
    assert run(capsys, "inspect", out, "--metadata-from", FP16)[1]["layout"]["dp"] == 2
    assert run(capsys, "verify", out, "--metadata-from", FP16)[0] == 0
    asked = {
        "output": [out, "--against", FP16, "--output-metadata-from", FP16, "--weights-only"],
        "source": [FP16, "--against", out, "--metadata-from", FP16, "--weights-only"],
    }
    for arguments in asked.values():
        status, found = run(capsys, "verify", *arguments)
        assert (status, found["problems"], found["tensors_compared"]) == (0, [], 53)
    path = out / "reshard-model_part-1-shard0.pt"
    content = torch_load(path)
    content["model"]["flat_param_0"][21] += 1
    torch.save(content, path)
    for arguments in asked.values():
        status, found = run(capsys, "verify", *arguments)
        assert status == 1 and [problem["name"] for problem in found["problems"]] == [
            "embedding.word.weight (weight)"
        ]
    assert (
        main(["verify", *map(str, asked["output"]), "--repair", "--into", str(tmp_path / "mended")])
        == 0
    )
    assert torch.equal(
        torch_load(tmp_path / "mended" / path.name)["model"]["flat_param_0"],
        torch_load(LOST / path.name)["model"]["flat_param_0"],
    )


# ----------------------------------------------------------------------------------------------------
# one file among others


def test_one_file_is_verified_by_its_own_manifest(capsys, tmp_path):
    assert (
        reshard_fsdp(
            [
                "--input",
                f"{FP16}/checkpoint_3-model_part-*-shard*.pt",
                "--output",
                f"{tmp_path}/reshard-model_part-{{part}}.pt",
            ]
        )
        == 0
    )
    assert convert_to_singleton([str(tmp_path)]) == 0
    path = tmp_path / "restored.pt"
    status, found = run(capsys, "verify", path)
    assert (status, found["tensors_compared"]) == (0, 53)
    overwrite(path, "decoder.layers.1.fc1.weight", np.float16(77))
    status, found = run(capsys, "verify", path)
    assert status == 1 and "layers.1.mlp.fc1.weight (weight)" in {
        problem["name"] for problem in found["problems"]
    }


def test_a_part_is_not_verified_by_the_digests_of_a_piece_of_it(capsys, tmp_path):
    """The manifest of one part of several holds digests that sum up over parts."""
    path = tmp_path / "reshard-model_part-0.pt"
    assert (
        reshard_fsdp(
            ["--input", f"{FP16}/checkpoint_3-model_part-0-shard*.pt", "--output", str(path)]
        )
        == 0
    )
    status, found = run(
        capsys, "verify", path, "--against", f"{FP16}/checkpoint_3-model_part-0-shard*.pt"
    )
    assert (status, found["problems"]) == (0, [])


# -------------------------------------------------------------------------------------------------
# what a conversion says


def test_the_plan_counts_the_strips_of_turned_tensors(capsys):
    """Alpa's training checkpoints hold OPT's matrices as [in, out]."""

    def memory(target: str) -> int:
        assert (
            main(["convert", str(FP16), "/none/out", "--to", target, "--dry-run", "--workers", "2"])
            == 0
        )
        return int(re.search(r"(\d+) MB of memory", capsys.readouterr().out)[1])

    assert memory("alpa-training") - memory("alpa") == round(2 * (16 << 20) / 1e6)


def test_what_was_found_is_told_again(tmp_path):
    """Status 1 for values that became infinite in float16, also when the output is there
    already."""
    source = tmp_path / "source"
    shutil.copytree(FP32, source, ignore=shutil.ignore_patterns("up", "truth*"))
    path = source / "checkpoint_3-model_part-0-shard0.pt"
    overwrite(path, "flat_param_0", np.float32(1e6))
    for _ in range(2):
        assert main(["convert", str(source), str(tmp_path / "np"), "--to", "alpa"]) == 1
