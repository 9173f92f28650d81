"""Yuan-2.0: against what its own split and merge tools wrote, and, where these are wrong, against
the rule in plain torch.

`tests/data/yuan`: a model of 6 layers as Yuan-2.0's code saves it (blocks 1,2,2,1) with what its
tools made of it, and a checkpoint that its real optimizer trained at dp 3. Nothing here but torch
reads what is expected."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.repartition import main as repartition
from parammap.checkpoint import completeness
from parammap.cli.main import main
from parammap.frameworks import registry
from parammap.frameworks.megatron.facts import Facts
from tests.support import paths
from tests.support.torch_load import torch_load
from tests.support.views import matrix_of

ROOT = paths.ROOT
DATA = ROOT / "tests/data/yuan"
SOURCE, SPLIT, MERGED = (
    DATA / name for name in ("tp1pp4_blocks1221", "stock_split_tp2pp4", "stock_merge_pp_tp2pp2")
)
TRAINED = DATA / "trained_tp1pp2dp3"
SPLIT_DIM = {
    "word_embeddings": 0,
    "word_embeddings_for_head": 0,
    "get_value": 0,
    "get_query_key": 0,
    "dense": 1,
    "dense_h_to_4h": 0,
    "dense_4h_to_h": 1,
}
STATES = ("param", "exp_avg", "exp_avg_sq")


def rank_folder(save: Path, tp: int, pp: int, stages: int) -> Path:
    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    return (
        save
        / f"iter_{iteration:07d}"
        / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if stages > 1 else ""))
    )


def flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts, in their order."""
    result = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        result |= flat(value, name) if isinstance(value, dict) else {name: value}
    return result


def model(save: Path, tp: int, pp: int, stages: int) -> dict[str, torch.Tensor]:
    return flat(torch_load(rank_folder(save, tp, pp, stages) / "model_optim_rng.pt")["model"])


def arguments(save: Path, tp: int, pp: int, stages: int) -> dict:
    return vars(torch_load(rank_folder(save, tp, pp, stages) / "model_optim_rng.pt")["args"])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def assert_same_models(one: Path, other: Path, tps: int, stages: int) -> None:
    for tp in range(tps):
        for pp in range(stages):
            a, b = model(one, tp, pp, stages), model(other, tp, pp, stages)
            assert set(a) == set(b)
            assert all(same_bits(a[name], b[name]) for name in a)


def shard(name: str, whole: torch.Tensor, tps: int, tp: int) -> torch.Tensor:
    """What tensor-parallel rank `tp` has of a parameter; both halves of the gated MLP are cut."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module == "dense_h_to_4h":
        return torch.cat([half.chunk(tps)[tp] for half in whole.chunk(2)])
    return whole.chunk(tps, SPLIT_DIM[module])[tp] if module in SPLIT_DIM else whole


def joined(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module == "dense_h_to_4h":
        return torch.cat([torch.cat([s.chunk(2)[half] for s in shards]) for half in range(2)])
    return torch.cat(shards, SPLIT_DIM[module]) if module in SPLIT_DIM else shards[0]


def states(save: Path, tp: int, pp: int, stages: int) -> dict[str, dict[str, torch.Tensor]]:
    """{state: {parameter: tensor}} of a rank's optimizer: the buffer holds the parameters from the
    last to the first."""
    tensors = model(save, tp, pp, stages)
    saved = torch.load(rank_folder(save, tp, pp, stages) / "distrib_optim.pt", weights_only=True)
    assert (
        list(saved) == [0]
        and list(saved[0]) == [torch.float32]
        and list(saved[0][torch.float32]) == list(STATES)
    )
    used = sum(t.numel() for t in tensors.values())
    result = {}
    for state, buffer in saved[0][torch.float32].items():
        assert buffer.dtype == torch.float32 and buffer.shape == (math.ceil(used / 3) * 3,)
        pieces = buffer[:used].split([t.numel() for t in reversed(tensors.values())])
        result[state] = {
            name: piece.view(tensors[name].shape)
            for name, piece in zip(reversed(tensors), pieces, strict=True)
        }
    return result


def by_global_layer(stage: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    return {
        re.sub(r"layers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + first}.", name): t
        for name, t in stage.items()
    }


def whole_states(save: Path, tps: int, blocks: list[int]) -> dict[str, dict[str, torch.Tensor]]:
    """{state: {parameter by global layer: whole tensor}}, the tied head's copy left out."""
    result = {state: {} for state in STATES}
    for pp in range(len(blocks)):
        ranks = [states(save, tp, pp, len(blocks)) for tp in range(tps)]
        for state in STATES:
            whole = {
                name: joined(name, [rank[state][name] for rank in ranks])
                for name in ranks[0][state]
            }
            result[state] |= by_global_layer(whole, sum(blocks[:pp]))
    for named in result.values():
        named.pop("word_embeddings_for_head.weight", None)
    return result


# ------------------------------------------------------------------------------------------------------------
# the weights


def run(load: Path, save: Path, *flags: str) -> int:
    return repartition(["--load", str(load), "--save", str(save), *flags])


def test_split_equals_the_stock_tools_output(tmp_path, capsys):
    assert run(SOURCE, tmp_path / "out", "--target-tensor-model-parallel-size", "2") == 0
    assert "the weights alone" in capsys.readouterr().out
    assert_same_models(tmp_path / "out", SPLIT, 2, 4)


@pytest.mark.parametrize(
    ("load", "more"),
    [(SPLIT, []), (SOURCE, ["--target-tensor-model-parallel-size", "2"])],
    ids=["two steps", "one step"],
)
def test_merge_pp_equals_the_stock_tools_output(load, more, tmp_path):
    assert (
        run(
            load,
            tmp_path / "out",
            "--target-pipeline-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-blocks",
            "3,3",
            *more,
        )
        == 0
    )
    assert_same_models(tmp_path / "out", MERGED, 2, 2)
    assert [name.split(".")[-2] for name in model(tmp_path / "out", 0, 1, 2)][-2:] == [
        "final_layernorm",
        "word_embeddings_for_head",
    ]


def test_merge_tp_is_the_inverse_of_split(tmp_path):
    assert run(SPLIT, tmp_path / "out", "--target-tensor-model-parallel-size", "1") == 0
    assert_same_models(tmp_path / "out", SOURCE, 1, 4)
    name = "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"
    as_stock_has_it = torch.cat([model(SPLIT, tp, 0, 4)[name] for tp in range(2)])
    merged = model(tmp_path / "out", 0, 0, 4)[name]
    assert merged.shape == as_stock_has_it.shape and not torch.equal(merged, as_stock_has_it)


@pytest.mark.parametrize("load", [MERGED, SPLIT, SOURCE], ids=["even stages", "tp 2", "tp 1"])
def test_one_stage_has_no_copy_of_the_embedding(load, tmp_path):
    """The stock tool leaves the last stage's copy in the model."""
    assert (
        run(
            load,
            tmp_path / "out",
            "--target-pipeline-model-parallel-size",
            "1",
            "--target-tensor-model-parallel-size",
            "1",
        )
        == 0
    )
    tensors = model(tmp_path / "out", 0, 0, 1)
    assert not any("for_head" in name for name in tensors)
    expected = {
        name: tensor
        for pp, first in enumerate((0, 1, 3, 5))
        for name, tensor in by_global_layer(model(SOURCE, 0, pp, 4), first).items()
        if "for_head" not in name
    }
    assert set(tensors) == set(expected) and all(
        same_bits(tensors[name], expected[name]) for name in tensors
    )


def test_a_model_of_one_stage_that_kept_the_copy(tmp_path):
    """As the stock merge_pp leaves it."""
    assert run(SOURCE, tmp_path / "one", "--target-pipeline-model-parallel-size", "1") == 0
    path = rank_folder(tmp_path / "one", 0, 0, 1) / "model_optim_rng.pt"
    content = torch_load(path)
    del content["args"].model_type  # an object of Yuan's own
    embedding = content["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    content["model"]["word_embeddings_for_head"] = {"weight": embedding.clone()}
    torch.save(content, path)
    assert (
        run(
            tmp_path / "one",
            tmp_path / "again",
            "--target-tensor-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-size",
            "4",
            "--target-pipeline-model-parallel-blocks",
            "1,2,2,1",
        )
        == 0
    )
    assert_same_models(tmp_path / "again", SPLIT, 2, 4)
    assert run(tmp_path / "one", tmp_path / "tp2", "--target-tensor-model-parallel-size", "2") == 0
    assert not any("for_head" in name for name in model(tmp_path / "tp2", 0, 0, 1))


def test_a_target_stage_inside_one_source_stage(tmp_path):
    """The stock tool fails there."""
    assert (
        run(
            MERGED,
            tmp_path / "out",
            "--target-pipeline-model-parallel-size",
            "4",
            "--target-pipeline-model-parallel-blocks",
            "1,2,2,1",
        )
        == 0
    )
    assert_same_models(tmp_path / "out", SPLIT, 2, 4)


def test_the_arguments_tell_the_new_layout(tmp_path):
    assert (
        run(
            SOURCE,
            tmp_path / "out",
            "--target-tensor-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-blocks",
            "4,2",
        )
        == 0
    )
    before, after = arguments(SOURCE, 0, 0, 4), arguments(tmp_path / "out", 1, 1, 2)
    changed = {name: after[name] for name in before if before[name] != after[name]}
    assert changed == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "transformer_pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_blocks": "4,2",
        "pipeline_blocks": [4, 2],
        "rank": 129,
    }
    assert (before["pipeline_model_parallel_method"], before["padded_vocab_size"]) == ("block", 128)
    assert (
        len(model(tmp_path / "out", 0, 0, 2)["language_model.embedding.word_embeddings.weight"])
        == 64
    )


# ----------------------------------------------------------------------------------------------------------
# the optimizer


@pytest.mark.parametrize(("tp", "blocks"), [(2, [3]), (4, [2, 1]), (1, [1, 1, 1]), (2, [1, 2])])
def test_the_optimizer_goes_along(tp, blocks, tmp_path):
    """To another layout and back: in each the states are those of the trained run, by the rule in
    plain torch."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert (
        run(
            TRAINED,
            there,
            "--target-tensor-model-parallel-size",
            str(tp),
            "--target-pipeline-model-parallel-size",
            str(len(blocks)),
            "--target-pipeline-model-parallel-blocks",
            ",".join(map(str, blocks)),
        )
        == 0
    )
    trained, made = whole_states(TRAINED, 1, [1, 2]), whole_states(there, tp, blocks)
    for state in STATES:
        assert set(made[state]) == set(trained[state])
        assert all(same_bits(made[state][name], trained[state][name]) for name in trained[state])
    assert (
        run(
            there,
            back,
            "--target-tensor-model-parallel-size",
            "1",
            "--target-pipeline-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-blocks",
            "1,2",
        )
        == 0
    )
    assert_same_models(back, TRAINED, 1, 2)
    for pp in range(2):
        a, b = states(back, 0, pp, 2), states(TRAINED, 0, pp, 2)
        assert all(
            same_bits(a[state][name], b[state][name]) for state in STATES for name in b[state]
        )
        rank_metadata = [
            torch_load(rank_folder(save, 0, pp, 2) / "model_optim_rng.pt")
            for save in (back, TRAINED)
        ]
        assert rank_metadata[0]["optimizer"] == rank_metadata[1]["optimizer"]
        assert rank_metadata[0]["opt_param_scheduler"] == rank_metadata[1]["opt_param_scheduler"]


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    return folder


def test_an_optimizer_of_another_model_is_refused(tmp_path, capsys):
    save = copy_of(TRAINED, tmp_path / "in")
    shutil.copy(rank_folder(save, 0, 1, 2) / "distrib_optim.pt", rank_folder(save, 0, 0, 2))
    assert run(save, tmp_path / "out") == 2
    assert "of different runs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_missing_optimizer_file_is_refused(tmp_path, capsys):
    save = copy_of(TRAINED, tmp_path / "in")
    (rank_folder(save, 0, 1, 2) / "distrib_optim.pt").unlink()
    assert run(save, tmp_path / "out") == 2
    assert "distrib_optim.pt: missing" in capsys.readouterr().err


def test_parameters_in_another_order_are_found_out(tmp_path, capsys):
    """A buffer of the right length with two layers exchanged: the weights are not those of the
    model."""
    save = copy_of(TRAINED, tmp_path / "in")
    path = rank_folder(save, 0, 1, 2) / "distrib_optim.pt"
    saved = torch.load(path, weights_only=True)
    for buffer in saved[0][torch.float32].values():
        buffer[:5000] = buffer[:5000].flip(0)
    torch.save(saved, path)
    assert run(save, tmp_path / "out") == 2
    assert "other values than the model" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------
# the family


def atoms(save: Path) -> dict[str, torch.Tensor]:
    """The model's logical tensors by name, from the bytes that the reader points at."""
    result = {}
    for tensor, regions in registry.read(save, weights_only=True).index.shards.items():
        whole = torch.from_numpy(matrix_of(tensor, regions).view(np.int16)).view(torch.bfloat16)
        result[tensor.name] = whole.view(tensor.shape)
    return result


def test_atoms_are_what_the_model_computes_with():
    """ParallelAttention takes [head, q + k, size] apart; ParallelMLP activates the first half: the
    gate."""
    named, layer = atoms(SOURCE), model(SOURCE, 0, 2, 4)
    encoder = "language_model.encoder.layers.1."  # of stage 2, whose first layer is number 3
    fused = layer[encoder + "self_attention.get_query_key.weight"].view(4, 2, 8, 32)
    assert same_bits(named["layers.4.attention.q.weight"].view(4, 8, 32), fused[:, 0])
    assert same_bits(named["layers.4.attention.k.weight"].view(4, 8, 32), fused[:, 1])
    first, second = layer[encoder + "mlp.dense_h_to_4h.weight"].chunk(2)
    assert same_bits(named["layers.4.mlp.gate.weight"], first) and same_bits(
        named["layers.4.mlp.up.weight"], second
    )
    assert same_bits(
        named["layers.4.attention.v.weight"], layer[encoder + "self_attention.get_value.weight"]
    )
    assert same_bits(
        named["layers.4.attention.filter.conv1.weight"],
        layer[encoder + "self_attention.lf_gate.conv1.weight"],
    )


def test_what_a_complete_model_has():
    source, name = registry.read(SOURCE, weights_only=True), "layers.2.attention.qk.weight"
    assert completeness.missing(source, whole_layers=True) == []
    kept = [held for held in source.index.held if held.canonical != name]
    assert completeness.missing(replace(source, index=replace(source.index, held=kept))) == [name]
    half = ("layers.2.attention.", "layers.2.input_norm.")
    kept = [held for held in source.index.held if not held.canonical.startswith(half)]
    without = replace(source, index=replace(source.index, held=kept))
    assert completeness.missing(without) == []
    assert completeness.missing(without, whole_layers=True) == ["layers.2.attention"]


def test_the_vocabulary_is_padded_alike_in_every_layout():
    """_vocab_size_with_padding of Yuan-2.0 does not multiply by tp, Megatron-LM's does."""
    megatron = {"make_vocab_size_divisible_by": 32}
    assert [
        Facts(None, megatron | {"use_lf_gate": True}).padded_vocab(100, tp) for tp in (1, 2, 8)
    ] == [128, 128, 128]
    assert [Facts(None, megatron).padded_vocab(100, tp) for tp in (1, 2, 8)] == [128, 128, 256]


def test_mindspore_has_no_such_model(tmp_path, capsys):
    assert (
        main(["convert", str(SOURCE), str(tmp_path / "out"), "--to", "mindspore", "--weights-only"])
        == 2
    )
    error = capsys.readouterr().err
    assert "get_query_key" in error and "lf_gate" in error


# ----------------------------------------------------------------------------------------------------
# flags and the scripts

MODEL_FLAGS = [
    word
    for line in (
        "--num-layers 6 --target-num-layers 6 --hidden-size 32 --num-attention-heads 4 "
        "--seq-length 16 --use-lf-gate",
        "--max-position-embeddings 16 --lf-conv2d-group 1 --lf-conv2d-num-pad 1 "
        "--position-embedding-type rope --swiglu --bf16",
        "--flash-attn-drop 0.1 --fim-rate 0.5 --norm-dtype RMSNorm --disable-bias-linear "
        "--adam-beta1 0.9 --min-lr 1.0e-5",
        "--tokenizer-type YuanTokenizer --tokenizer-model-path /none "
        "--pipeline-model-parallel-method block --DDP-impl local",
        "--use-distributed-optimizer --no-load-optim --use-cpu-initialization --data-impl mmap",
    )
    for word in line.split()
]


def test_the_command_lines_that_users_have(tmp_path):
    assert (
        run(
            SOURCE,
            tmp_path / "out",
            "--tensor-model-parallel-size",
            "1",
            "--pipeline-model-parallel-size",
            "4",
            "--target-tensor-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-size",
            "4",
            "--pipeline-model-parallel-blocks",
            "1,2,2,1",
            "--pipeline-generate-layer",
            "0,1,2,3",
            "--process-checkpoint",
            *MODEL_FLAGS,
        )
        == 0
    )
    assert_same_models(tmp_path / "out", SPLIT, 2, 4)


def test_optimizers_stay_behind_with_no_load_optim(tmp_path):
    assert run(TRAINED, tmp_path / "out", "--no-load-optim") == 0
    assert not list((tmp_path / "out").rglob("distrib_optim.pt"))
    assert_same_models(tmp_path / "out", TRAINED, 1, 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-model-parallel-size", "2"], "tp 1"),
        (["--pipeline-model-parallel-size", "8"], "pp 4"),
        (["--pipeline-model-parallel-blocks", "2,1,2,1"], "[1, 2, 2, 1]"),
        (["--num-layers", "42"], "is 6 there"),
        (["--target-num-layers", "5"], "is 6 there"),
        (["--hidden-size", "8192"], "is 32 there"),
        (["--num-attention-heads", "64"], "is 4 there"),
        (["--target-tensor-model-parallel-size", "8"], "4 attention heads"),
        (
            [
                "--target-pipeline-model-parallel-size",
                "2",
                "--target-pipeline-model-parallel-blocks",
                "3,4",
            ],
            "7",
        ),
        (["--target-model-parallel-size", "8"], "--target-model-parallel-size: no such flag"),
        (["--pipeline-generate-layer", "0,4"], "0 to 3"),
        (
            ["--pipeline-generate-layer", "0", "--target-pipeline-model-parallel-size", "1"],
            "0 to 0",
        ),
        (["--load", "nowhere"], "no such folder"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(flags, said, tmp_path, capsys):
    assert run(SOURCE, tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def folders(save: Path) -> set[str]:
    return {path.name for path in save.glob("iter_*/*")}


def test_only_some_stages_and_then_the_others(tmp_path):
    """--pipeline-generate-layer, in the spelling with dashes at the end; the tracker comes with the
    last stage."""
    out = tmp_path / "out"
    tracker = out / "latest_checkpointed_iteration.txt"
    flags = ["--target-tensor-model-parallel-size", "2", "--pipeline-generate-layer--"]
    assert run(SOURCE, out, *flags, "1,3") == 0
    assert (
        folders(out) == {f"mp_rank_0{tp}_00{pp}" for tp in range(2) for pp in (1, 3)}
        and not tracker.exists()
    )
    assert run(SOURCE, out, *flags, "0,2") == 0
    assert tracker.read_text() == "7"
    assert_same_models(out, SPLIT, 2, 4)


def test_only_some_tensor_ranks(tmp_path):
    assert (
        run(
            SPLIT,
            tmp_path / "out",
            "--target-pipeline-model-parallel-size",
            "2",
            "--target-pipeline-model-parallel-blocks",
            "3,3",
            "--tensor-generate-layer",
            "1",
        )
        == 0
    )
    assert folders(tmp_path / "out") == {"mp_rank_01_000", "mp_rank_01_001"}


def bash(script: Path, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", script],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("script", "load", "environment", "expected"),
    [
        ("split_tp", SOURCE, {"TARGET_TP": "2"}, (SPLIT, 2, 4)),
        ("merge_tp", SPLIT, {"TOKENIZER_MODEL": "/none"}, (SOURCE, 1, 4)),
        ("merge_pp", SPLIT, {"TARGET_PP": "2", "TARGET_PP_BLOCKS": "3,3"}, (MERGED, 2, 2)),
    ],
)
def test_the_scripts(script, load, environment, expected, tmp_path):
    """As a one-liner, and after an edit of the variables at the top."""
    path = ROOT / f"examples/{script}_partitions.sh"
    paths = {"LOAD_CHECKPOINT_PATH": str(load), "SAVE_CHECKPOINT_PATH": str(tmp_path / "out")}
    bare = bash(path, {}, tmp_path)
    assert bare.returncode == 2 and "SAVE_CHECKPOINT_PATH" in bare.stderr
    done = bash(path, paths | environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_models(tmp_path / "out", *expected)
    edited = tmp_path / "examples" / path.name
    edited.parent.mkdir()
    for folder in ("convert", "parammap"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (edited.parent / "partitions.sh").symlink_to(ROOT / "examples/partitions.sh")
    values = {**paths, **environment, "SAVE_CHECKPOINT_PATH": str(tmp_path / "edited")}
    edited.write_text(
        re.sub(
            r"(?m)^(\w+)=\$\{\w+:-.*?\}",
            lambda m: f"{m[1]}={values.get(m[1], '')}" if m[1] in values else m[0],
            path.read_text(),
        )
    )
    done = bash(edited, {}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_models(tmp_path / "edited", *expected)


@pytest.mark.parametrize(("size", "stages"), [("51B", 16), ("102B", 32)])
def test_the_ready_examples_name_the_published_layout(size, stages, tmp_path):
    """They check the checkpoint that they are given; this one is another."""
    done = bash(
        ROOT / f"examples/ckpt_partitions_{size}.sh",
        {"LOAD_CHECKPOINT_PATH": str(SOURCE), "SAVE_CHECKPOINT_PATH": str(tmp_path / "out")},
        tmp_path,
    )
    assert done.returncode == 2 and f"pp 4 and not {stages}" in done.stderr
