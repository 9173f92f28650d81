"""Alpa's training checkpoints: restored by Alpa's own rule into flax's models and optax's Adam,
which go on from there."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.execute.local import run_tasks
from parammap.execute.progress import Progress
from parammap.formats import msgpack, npy
from parammap.frameworks import registry
from parammap.frameworks.alpa import serving as alpa
from parammap.frameworks.alpa import training as alpa_training
from parammap.plan.planner import Planner
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM, TensorSpec
from tests.support import alpa_opt, paths
from tests.support.alpa import GPT, opt_weights, singleton
from tests.support.alpa_restore import BETA2, LEARNING_RATE, NEEDS, WEIGHT_DECAY, restore

DATA, DEFAULT = paths.TESTS / "data", alpa_training.Options()
SHARDS = DATA / "metaseq/mp1dp3_fp32"
PLAIN = {
    "dtype": "fp32",
    "plain": True,
    "steps": 6,
    "hidden": 64,
    "heads": 4,
    "layers": 4,
    "tp": 2,
    "pp": 2,
}
#: of a loss near 5, and of steps near 1e-2; fp32 sums in another order
ROUND_OFF = 5e-6
lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
needs_flax = pytest.mark.skipif(
    bool(lacking), reason=f"needs {', '.join(lacking)} (pip install 'parammap[dev]')"
)
needs_shards = pytest.mark.skipif(
    not list(SHARDS.glob("checkpoint_3-*.pt")),
    reason="tests/data/metaseq is not there: it is written by metaseq, which is no package",
)


def convert(source: Path, out: Path, options: alpa_training.Options = DEFAULT, **reading) -> dict:
    """Write the folder; the notes of the output."""
    checkpoint = registry.read(source, **reading)
    output = alpa_training.output(checkpoint, options)
    plan = Planner(checkpoint.index, {MAIN_PARAM: MODEL_PARAM}).plan(output.files)
    out.mkdir(parents=True)
    unused = [
        name for name in plan.unused if not name.startswith("version ") and ".padding" not in name
    ]
    assert not unused and len(list(run_tasks(plan.tasks, out, 1, Progress(1)))) == len(output.files)
    return output.notes["alpa"]


def metaseq_truth() -> dict[str, dict[str, torch.Tensor]]:
    """What FSDP itself unsharded: weight, exp_avg and exp_avg_sq by name, with q, k and v apart."""
    saved = torch.load(SHARDS / "truth-part0.pt", weights_only=True)
    states = {
        name: {"weight": value, **saved["optim"].get(name, {})}
        for name, value in saved["model"].items()
    }
    for name in [name for name in states if "qkv_proj" in name]:
        parts = {role: value.chunk(3) for role, value in states.pop(name).items()}
        for number, atom in enumerate("kvq"):
            states[name.replace("qkv", atom)] = {
                role: chunks[number] for role, chunks in parts.items()
            }
    return {name: value for name, value in states.items() if name != "decoder.version"}


def flax_opt(name: str, value: torch.Tensor) -> tuple[str, np.ndarray]:
    """A tensor of metaseq as FlaxOPTForCausalLM has it."""
    path, w = name.replace("decoder.layer_norm", "decoder.final_layer_norm").rsplit(".", 1)
    if "embed_" in path:
        return f"model.{path}.embedding", value.numpy()
    return (
        f"model.{path}.{w if w == 'bias' else 'scale' if 'norm' in path else 'kernel'}",
        value.numpy().T,
    )


@needs_flax
@needs_shards
@pytest.mark.parametrize("optimizer", alpa_training.OPTIMIZERS)
def test_opt_goes_on_where_metaseq_stopped(optimizer, tmp_path):
    """From FSDP's shards to flax's OPT: weights and moments bit for bit, HF's logits, and the step
    that torch takes next."""
    convert(SHARDS / "checkpoint_3", tmp_path / "out", alpa_training.Options(optimizer=optimizer))
    logits, sizes = (
        np.load(DATA / "alpa/mp1dp3_fp32/oracle_logits.npz"),
        json.loads((DATA / "alpa/mp1dp3_fp32/golden.json").read_text()),
    )
    state = restore(
        tmp_path,
        folder=str(tmp_path / "out"),
        step=3,
        model="opt",
        optimizer=optimizer,
        mixed=False,
        tokens=logits["tokens"].tolist(),
        config={
            "vocab_size": sizes["vocab"],
            "hidden_size": sizes["hidden"],
            "ffn_dim": sizes["ffn"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["maxpos"],
            "word_embed_proj_dim": sizes["hidden"],
        },
    )
    assert np.abs(state["logits"] - logits["hf"]).max() < 1e-5
    adam, truth = (
        {"examples": "opt_state.1.0", "adamw": "opt_state.0", "adam": "opt_state.0"}[optimizer],
        metaseq_truth(),
    )
    assert state["step"] == state[f"{adam}.count"] == 3 and state["step"].dtype == np.int32
    assert len([path for path in state if path.startswith("params.")]) == len(truth)
    for name, states in truth.items():
        for place, role in (
            ("params", "weight"),
            (f"{adam}.mu", "exp_avg"),
            (f"{adam}.nu", "exp_avg_sq"),
        ):
            path, expected = flax_opt(name, states[role])
            assert np.array_equal(state[f"{place}.{path}"], expected), (place, path)
        path, expected = flax_opt(
            name, stepped_by_torch(states, decay=0.0 if optimizer == "adam" else WEIGHT_DECAY)
        )
        assert np.abs(state[f"stepped.{path}"] - expected).max() < ROUND_OFF, path


def stepped_by_torch(states: dict[str, torch.Tensor], decay: float) -> torch.Tensor:
    """A parameter after torch's next step, with a gradient of 1e-3 times itself."""
    parameter = torch.nn.Parameter(states["weight"].clone())
    adam = torch.optim.AdamW([parameter], lr=LEARNING_RATE, betas=(0.9, BETA2), weight_decay=decay)
    adam.state[parameter] = {
        "step": torch.tensor(3.0),
        "exp_avg": states["exp_avg"].clone(),
        "exp_avg_sq": states["exp_avg_sq"].clone(),
    }
    parameter.grad = states["weight"] * 1e-3
    adam.step()
    return parameter.detach()


@needs_flax
@needs_shards
def test_mixed_precision_keeps_a_master_copy(tmp_path):
    convert(SHARDS / "checkpoint_3", tmp_path / "out", alpa_training.Options(dtype="float16"))
    sizes = json.loads((DATA / "alpa/mp1dp3_fp32/golden.json").read_text())
    state = restore(
        tmp_path,
        folder=str(tmp_path / "out"),
        step=3,
        model="opt",
        optimizer="examples",
        mixed=True,
        tokens=[[2, 3, 4]],
        config={
            "vocab_size": sizes["vocab"],
            "hidden_size": sizes["hidden"],
            "ffn_dim": sizes["ffn"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["maxpos"],
            "word_embed_proj_dim": sizes["hidden"],
        },
    )
    for name, states in metaseq_truth().items():
        path, expected = flax_opt(name, states["weight"])
        assert np.array_equal(state[f"master_copy.{path}"], expected)
        assert np.array_equal(
            state[f"params.{path}"].view(np.uint16), expected.astype(np.float16).view(np.uint16)
        )
    assert (
        state["dynamic_scale.fin_steps"] == 0 and state["dynamic_scale.scale"].dtype == np.float32
    )


def gathered(run, name: str, role: str, dim: int | None) -> np.ndarray:
    """A parameter of the live run, by its name in the first layer or outside layers, whole."""
    pieces = [
        truth.array(chunk, found, role)
        for truth in run.truths()
        for chunk, found in truth.names()
        if found == name and (truth.place[1] == 0)
    ]
    return pieces[0] if dim is None else np.concatenate(pieces, dim)


@needs_flax
@pytest.mark.parametrize("case", [{}, {"untie": True}, {"core": "0.6.0"}])
def test_gpt2_computes_megatrons_losses(case, trained, tmp_path):
    """From flat buckets with a sidecar to flax's GPT-2: the losses that megatron-core computed, and
    its moments."""
    run = trained(**{"core": "0.16.1", **PLAIN, **case})
    notes = convert(run.path, tmp_path / "out")
    truth, args = np.load(run.path / "truth/losses_dp000.npz"), run.truths()[0].meta["args"]
    tokens = truth["tokens"].reshape(-1, truth["tokens"].shape[-1])
    state = restore(
        tmp_path,
        folder=str(tmp_path / "out"),
        step=run.iteration,
        model="gpt2",
        optimizer="examples",
        mixed=False,
        tokens=tokens[:, :-1].tolist(),
        config={
            "vocab_size": notes["vocab_size"],
            "n_positions": args["max_position_embeddings"],
            "n_embd": args["hidden_size"],
            "n_layer": args["num_layers"],
            "n_head": args["num_attention_heads"],
            "activation_function": notes["activation"],
            "tie_word_embeddings": "untie" not in case,
        },
    )
    logits = state["logits"].astype(np.float64)
    losses = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    )
    assert (
        np.abs(losses - truth["evaluated"].reshape(losses.shape)).max()
        < ROUND_OFF
        < 0.05
        < truth["evaluated"].std()
    )
    assert state["step"] == run.iteration and state["opt_state.1.0.count"] == run.iteration
    for path, name, dim in (
        ("wte.embedding", "embedding.word_embeddings.weight", 0),
        ("h.0.mlp.c_fc.kernel", "decoder.layers.0.mlp.linear_fc1.weight", 0),
        ("h.0.mlp.c_proj.kernel", "decoder.layers.0.mlp.linear_fc2.weight", 1),
        ("h.0.attn.c_proj.bias", "decoder.layers.0.self_attention.linear_proj.bias", None),
    ):
        for place, role in (
            ("params", "main"),
            ("opt_state.1.0.mu", "exp_avg"),
            ("opt_state.1.0.nu", "exp_avg_sq"),
        ):
            assert np.array_equal(
                state[f"{place}.transformer.{path}"], gathered(run, name, role, dim)
            ), (place, path)


def test_fused_kernels_are_those_that_the_server_makes(trained, tmp_path):
    """llm_serving's own model: its parameters are what its loader makes of the folder of weights,
    and moments lie alike."""
    run = trained(**GPT, no_args=True)
    convert(
        run.path, tmp_path / "out", alpa_training.Options(model="llm_serving", activation="relu")
    )
    checkpoint = registry.read(run.path)
    serving = alpa.output(checkpoint, alpa.Options(dtype="float32", activation="relu"))
    (tmp_path / "np").mkdir()
    list(
        run_tasks(
            Planner(checkpoint.index).plan(serving.files).tasks, tmp_path / "np", 1, Progress(1)
        )
    )
    fused = alpa_opt.fused(tmp_path / "np", 2)
    assert {path.name for path in (tmp_path / "out").glob("state.params.*")} == {
        f"state.params.{path}" for path in fused
    }
    for path, expected in fused.items():
        there = np.load(tmp_path / f"out/state.params.{path}/shard_0.0")
        assert there.flags.c_contiguous and np.array_equal(there, expected), path
    folder = (
        "state.opt_state.1.0.nu.params.transformers.encoder.0.attention.self.qkv_combined.kernel"
    )
    kernel = np.load(tmp_path / "out" / folder / "shard_0.0")
    rows = gathered(
        run, "decoder.layers.0.self_attention.linear_qkv.weight", "exp_avg_sq", 0
    ).reshape(4, 3, 16, 64)
    assert np.array_equal(kernel, rows.transpose(3, 0, 2, 1).reshape(64, -1))


REFUSED = {
    "gelu": ({}, {"model": "opt"}, "cannot be flax's opt: its activation is gelu and not relu"),
    "llama": (
        {"rmsnorm": True, "swiglu": True, "rope": True, "no_bias": True},
        {},
        "is a model of the llama family, and Alpa.s training has",
    ),
    "a cut vocabulary": (
        {},
        {"vocab_size": 100},
        "has a vocabulary of 250, of which 100 rows would cut off a part",
    ),
    "bfloat16": ({}, {"dtype": "bfloat16"}, "numpy has no bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, trained, tmp_path):
    training, options, message = REFUSED[case]
    with pytest.raises(RefusedError, match=message):
        convert(trained(**GPT, **training).path, tmp_path / "out", alpa_training.Options(**options))


def test_a_state_without_moments_is_refused(trained, tmp_path):
    with pytest.raises(
        RefusedError, match="holds no exp_avg and exp_avg_sq, which Alpa.s training state has"
    ):
        convert(trained(**GPT).path, tmp_path / "out", weights_only=True)


def test_opts_positions_are_not_gpt2s(tmp_path):
    with pytest.raises(
        RefusedError, match="cannot be flax's gpt2: its positions begin with rows of padding"
    ):
        convert(
            singleton(tmp_path, opt_weights()),
            tmp_path / "out",
            alpa_training.Options(model="gpt2"),
        )


@pytest.mark.parametrize(
    ("folder", "dtype", "shape"),
    [
        ("state.lr", "int32", ()),
        ("state.opt.0", "float16", (8, 12)),
        ("state.step", "float32", (12,)),
    ],
)
def test_arrays_are_stored_as_alpa_stores_them(folder, dtype, shape):
    """Against files that alpa.serialization wrote."""
    theirs, spec = DATA / "alpa/serialization/unsharded" / folder, TensorSpec("x", dtype, shape)
    meta = pickle.loads((theirs / "metadata_0").read_bytes())
    ours = pickle.loads(alpa_training._metadata(spec))
    assert ours == meta and type(ours["global_shape"]) is tuple and list(ours) == list(meta)
    assert (theirs / "shard_0.0").read_bytes().startswith(npy.frame(spec)[0].data)


def test_the_tree_is_packed_as_alpa_packs_it():
    tree = {
        "lr": 0.5,
        "opt": {"0": "state.params.encoder.0.bias", "1": None},
        "params": {"encoder": {"0": {"bias": "state.step", "kernel": "state.opt.0"}}},
        "step": "state.lr",
    }
    assert msgpack.packb(tree) == (DATA / "alpa/serialization/unsharded/checkpoint_3").read_bytes()


def test_every_kind_of_value_is_packed_as_msgpack_packs_it():
    theirs = pytest.importorskip("msgpack", reason="needs msgpack (pip install 'parammap[dev]')")
    for value in (
        True,
        False,
        None,
        0,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**32 - 1,
        2**32,
        2**64 - 1,
        0.1,
        "",
        "é" * 15,
        "a" * 31,
        "a" * 32,
        "a" * 255,
        "a" * 256,
        "a" * 65536,
        {},
        {str(n): n for n in range(15)},
        {str(n): n for n in range(16)},
        {str(n): {} for n in range(65536)},
    ):
        assert msgpack.packb({"x": value}) == theirs.packb({"x": value}), str(value)[:20]


@pytest.mark.parametrize("tree", [-1, b"bytes", [1], {1: 2}, np.float32(1)])
def test_nothing_else_is_packed(tree):
    with pytest.raises(TypeError, match="has no place in such a tree"):
        msgpack.packb({"x": tree})


def test_what_is_not_read_is_said(trained, tmp_path, capsys):
    convert(trained(**GPT).path, tmp_path / "out", DEFAULT)
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert (
        "training checkpoints of Alpa, which are written here and not read"
        in capsys.readouterr().err
    )
