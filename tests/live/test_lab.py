"""The tiny trainer itself: what it saves, that each element is unique, that the truth beside it is
the live state.

Values are read from the checkpoint by torch.load and by this file's own arithmetic over the live
buffers' bounds."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from examples.tiny.trained import Trained, Truth, is_intact, run_key, train_into
from tests.support.runs import every_run
from tests.support.variants import DEFECTS, VARIANTS

ROLES = ("main", "exp_avg", "exp_avg_sq")
FILE_KEYS = {"main": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
SOUND = [name for name in VARIANTS if name not in DEFECTS]


def flat(truth: Truth, role: str) -> np.ndarray:
    return np.concatenate(
        [truth.array(chunk, name, role).reshape(-1) for chunk, name in truth.names()]
    )


def as_saved_bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def cast_main(truth: Truth, chunk: int, name: str) -> np.ndarray:
    """The main weight in the model's dtype, by torch's rounding."""
    dtype = getattr(torch, truth.meta["params"][f"{chunk}/{name}"]["dtype"])
    return as_saved_bits(torch.from_numpy(truth.array(chunk, name, "main")).to(dtype))


def load(run: Trained, truth: Truth, file: str) -> Any:
    return torch.load(run.rank_folder(truth) / file, weights_only=False)


def model_states(saved: dict) -> list[dict[str, torch.Tensor]]:
    return [saved[key] for key in ("model", "model0", "model1") if key in saved]


def optimizer_slices(run: Trained, truth: Truth) -> dict[tuple[str, str], np.ndarray]:
    """{("chunk/name", role): the slice of distrib_optim.pt where the live buffers say this
    parameter lies}."""
    saved = load(run, truth, "distrib_optim.pt")
    entries = saved if isinstance(saved, list) else [saved]
    slices = {}
    for entry, buffers in zip(entries, truth.meta["buffers"], strict=True):
        if entry is None:
            continue
        for index, buffer in enumerate(buffers):
            (world,) = entry[index].values()
            for role, key in FILE_KEYS.items():
                parts = (
                    world[key] if isinstance(world[key], list) else None
                )  # 0.6: a padded tensor per bucket
                for name, (start, end, bucket) in buffer["params"].items():
                    bounds = buffer["buckets"]
                    if parts is not None:
                        values = parts[bucket][
                            start - bounds[bucket]["start"] : end - bounds[bucket]["start"]
                        ]
                    else:
                        before = sum(other["numel_unpadded"] for other in bounds[:bucket])
                        first = start - bounds[bucket]["start"] + before
                        values = world[key][first : first + end - start]
                    slices[name, role] = values.numpy()
    return slices


@every_run()
def test_every_element_is_unique(trained_variant, core, variant):
    for truth in trained_variant(core, variant).truths():
        for role in ROLES:
            values = flat(truth, role)
            assert values.size > 1000
            assert np.isfinite(values).all()
            assert np.unique(values).size == values.size, (truth.place, role)


@every_run("tp2pp2", "moe_tp2_ep2", "vpp")
def test_only_copies_are_equal_across_ranks(trained_variant, core, variant):
    """Two ranks share a value only where one parameter is a copy of another rank's, and then all of
    it."""
    truths = trained_variant(core, variant).truths()
    seen: dict[bytes, int] = {}
    for truth in truths:
        for chunk, name in truth.names():
            seen.setdefault(truth.array(chunk, name, "main").tobytes(), 0)
    distinct = np.concatenate([np.frombuffer(content, np.float32) for content in seen])
    assert np.unique(distinct).size == distinct.size


@every_run(*SOUND)
def test_model_file_holds_the_live_weights(trained_variant, core, variant):
    run = trained_variant(core, variant)
    for truth in run.truths():
        for chunk, state in enumerate(model_states(load(run, truth, "model_optim_rng.pt"))):
            weights = {
                name: value for name, value in state.items() if isinstance(value, torch.Tensor)
            }
            assert set(weights) == {name for _, name in truth.names(chunk)}
            for name, weight in weights.items():
                assert np.array_equal(as_saved_bits(weight), truth.array(chunk, name, "weight")), (
                    name
                )
                assert np.array_equal(as_saved_bits(weight), cast_main(truth, chunk, name)), name


@every_run(*SOUND, "stale")
def test_optimizer_file_holds_the_live_state(trained_variant, core, variant):
    run = trained_variant(core, variant)
    for truth in run.truths():
        slices = optimizer_slices(run, truth)
        dense_too = truth.place[2] == 0  # their state is saved once, with expert rank 0
        assert {name for name, _ in slices} == {
            name for name, facts in truth.meta["params"].items() if facts["expert"] or dense_too
        }
        for (name, role), values in slices.items():
            chunk, bare = name.split("/", 1)
            assert np.array_equal(values, truth.array(int(chunk), bare, role).reshape(-1)), (
                name,
                role,
            )


@every_run("fp32_mixed_group")
def test_mixed_group_is_saved_permuted(trained_variant, core, variant):
    """Megatron's own defect: the truth is right, what it saved is another parameter's state of the
    same size."""
    run = trained_variant(core, variant)
    truth = run.truths()[0]
    misplaced = 0
    for (name, role), values in optimizer_slices(run, truth).items():
        chunk, bare = name.split("/", 1)
        if not np.array_equal(values, truth.array(int(chunk), bare, role).reshape(-1)):
            owners = [
                other
                for other in truth.names()
                if np.array_equal(values, truth.array(*other, role).reshape(-1))
            ]
            assert len(owners) == 1, name
            misplaced += role == "main"
    assert misplaced > 4
    assert all(
        np.array_equal(truth.array(*key, "weight"), cast_main(truth, *key)) for key in truth.names()
    )


@every_run("stale")
def test_overlapped_gather_leaves_stale_weights(trained_variant, core, variant):
    truth = trained_variant(core, variant).truths()[0]
    stale = sum(
        not np.array_equal(truth.array(*key, "weight"), cast_main(truth, *key))
        for key in truth.names()
    )
    assert 0 < stale < len(list(truth.names()))


@every_run("tp2pp2", "dp3_padded", "dp2_busbw")
def test_several_buckets_with_real_padding(trained_variant, core, variant):
    (buffer,) = trained_variant(core, variant).truths()[0].meta["buffers"][0]
    assert len(buffer["buckets"]) >= 3
    padding = [
        bucket["end"] - bucket["start"] - bucket["numel_unpadded"] for bucket in buffer["buckets"]
    ]
    if (core, variant) != ("0.6.0", "tp2pp2"):  # 0.6 pads to dp only
        assert any(padding[:-1]), (
            "padding at the end of the last bucket only cannot displace anything"
        )


@every_run("tp2pp2")
def test_replicas_are_equal(trained_variant, core, variant):
    at = {truth.place: truth for truth in trained_variant(core, variant).truths()}
    for role in (*ROLES, "weight"):
        for tp in (0, 1):
            tied = at[tp, 0, 0].array(0, "embedding.word_embeddings.weight", role)
            assert np.array_equal(tied, at[tp, 1, 0].array(0, "output_layer.weight", role))
        norm = (0, "decoder.layers.1.input_layernorm.weight", role)
        assert np.array_equal(at[0, 1, 0].array(*norm), at[1, 1, 0].array(*norm))


@every_run("tp2pp2", "no_args", "vpp", "moe_ep2")
def test_model_file_is_as_megatron_writes_it(trained_variant, core, variant):
    run = trained_variant(core, variant)
    assert run.iteration == 3
    for truth in run.truths():
        saved = load(run, truth, "model_optim_rng.pt")
        assert (saved["checkpoint_version"], saved["iteration"]) == (3.0, 3)
        assert set(saved["rng_state"][0]) == {
            "random_rng_state",
            "np_rng_state",
            "torch_rng_state",
            "cuda_rng_state",
            "rng_tracker_states",
        }
        assert ("opt_param_scheduler" in saved) == (core in ("0.12.3", "0.16.1"))
        assert ("args" in saved) == (variant != "no_args")
        if "args" in saved:
            assert saved["args"].padded_vocab_size % saved["args"].tensor_model_parallel_size == 0


def test_layers_of_interleaved_stages_are_global(trained_variant):
    by_stage = {
        truth.place[1]: truth.meta["layers"] for truth in trained_variant("0.16.1", "vpp").truths()
    }
    assert by_stage == {0: [[0], [4]], 1: [[1], [5]], 2: [[2], [6]], 3: [[3], [7]]}


@every_run("uneven")
def test_layers_of_uneven_stages(trained_variant, core, variant):
    run = trained_variant(core, variant)
    by_stage = {truth.place[1]: truth.meta["layers"] for truth in run.truths()}
    assert by_stage == {0: [[0, 1, 2]], 1: [[3, 4]], 2: [[5, 6]]}
    for truth in run.truths():
        args = load(run, truth, "model_optim_rng.pt")["args"]
        assert (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) == (
            3,
            None,
        )


@pytest.mark.parametrize(
    ("core", "options", "lacks"),
    [
        ("0.6.0", {"rmsnorm": True, "layers": 1}, "normalization"),
        ("0.8.0", VARIANTS["uneven"], "num_layers_in_first_pipeline_stage"),
    ],
)
def test_an_option_that_the_release_lacks_is_refused(trained, core, options, lacks):
    with pytest.raises(RuntimeError, match=f"no option {lacks}"):
        trained(core, **options)


def test_a_run_is_made_once_and_mended(trained_variant, tmp_path):
    options = {"core": "0.16.1", **VARIANTS["tp2pp2"]}
    folder = tmp_path / "run"
    shutil.copytree(trained_variant("0.16.1", "tp2pp2").path, folder)
    model = folder / "iter_0000003/mp_rank_00_000/model_optim_rng.pt"
    before = model.stat().st_mtime_ns
    assert train_into(folder, options).path == folder
    assert model.stat().st_mtime_ns == before

    model.write_bytes(model.read_bytes()[:-1])
    assert not is_intact(folder, run_key(options))
    train_into(folder, options)
    assert is_intact(folder, run_key(options))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="something else"):
        train_into(tmp_path, {"core": "0.16.1"})
    assert (tmp_path / "thesis.tex").read_text() == "mine"
