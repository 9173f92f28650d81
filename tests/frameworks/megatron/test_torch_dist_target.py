"""Checkpoints written in format torch_dist: what megatron-core's own dist_checkpointing loads is
the live state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parammap.errors import RefusedError
from parammap.frameworks.megatron.chunks import Stack
from parammap.frameworks.megatron_dist import target as megatron_dist_target
from parammap.job import conversion
from parammap.job.request import Request
from tests.support.dist_checkpointing import assert_same_arrays, resume
from tests.support.torch_dist import DENSE, EXPERTS, LLAMA, digests


def write(source: Path, target: Path, **options) -> Path:
    assert (
        conversion.convert(
            Request(source=source, target=target, to="megatron-dist", **options)
        ).status
        == 0
    )
    return target


def test_megatron_loads_the_live_state(trained, tmp_path):
    run = trained("0.16.1", **DENSE)
    written = write(run.path, tmp_path / "written")
    assert digests(written) == digests(run.path)
    assert_same_arrays(run.path / "truth", resume(written, tmp_path / "again", **DENSE) / "resumed")


@pytest.mark.parametrize(
    ("core", "saved", "loaded"),
    [
        pytest.param(
            "0.12.3",
            {"tp": 2, "pp": 2},
            {"pp": 2, "vpp": 2, "dp": 2},
            id="0.12.3-tp2pp2-to-pp2vpp2dp2",
        ),
        pytest.param(
            "0.16.1",
            LLAMA,
            {**LLAMA, "tp": 4, "pp": 1},
            id="llama-tp2pp2-to-tp4",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "0.16.1",
            EXPERTS,
            {**EXPERTS, "tp": 1, "pp": 2},
            id="experts-tp2-to-pp2",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "0.6.0",
            {"pp": 4, "vpp": 2},
            {"tp": 2},
            id="0.6.0-pp4vpp2-to-tp2",
            marks=pytest.mark.full,
        ),
    ],
)
def test_megatron_loads_it_in_another_layout(trained, tmp_path, core, saved, loaded):
    run = trained(core, **saved)
    written = write(run.path, tmp_path / "written")
    assert digests(written) == digests(run.path)
    assert digests(resume(written, tmp_path / "again", **loaded)) == digests(run.path)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [pytest.param(2, 1, id="2-to-1"), pytest.param(1, 2, id="1-to-2", marks=pytest.mark.full)],
)
def test_megatron_loads_experts_into_another_number_of_optimizers(trained, tmp_path, saved, loaded):
    run = trained("0.16.1", **{**EXPERTS, "tp": 1, "ep": saved})
    written = write(run.path, tmp_path / "written", sizes={"ep": loaded})
    again = resume(written, tmp_path / "again", **{**EXPERTS, "tp": 1, "ep": loaded})
    assert digests(again) == digests(run.path)
    with pytest.raises(RefusedError, match="4 experts cannot be divided over ep 3"):
        write(run.path, tmp_path / "other", sizes={"ep": 3})


def test_what_is_no_tensor(trained, tmp_path):
    """Scheduler, iteration, groups and content metadata in common.pt; random states and extra
    states as objects."""
    run = trained("0.16.1", **DENSE)
    folder = write(run.path, tmp_path / "written") / "iter_0000003"
    common = torch.load(folder / "common.pt", weights_only=False)
    saved = torch.load(
        run.iteration_folder / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False
    )
    assert (
        common["iteration"] == 3 and common["opt_param_scheduler"] == saved["opt_param_scheduler"]
    )
    assert common["optimizer"]["optimizer"] == saved["optimizer"]["optimizer"]
    assert vars(common["args"]) == vars(saved["args"])
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    listed = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {f"rng_state/shard_{pp}.{tp}_2.2" for pp in (0, 1) for tp in (0, 1)} <= set(listed)
    assert {f"decoder.layers.mlp.linear_fc1._extra_state/shard_{i}_4" for i in range(4)} <= set(
        listed
    )
    state = {"rng_state/shard_1.0_2.2": None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    own = torch.load(
        run.iteration_folder / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=False
    )["rng_state"]
    ((found,),) = state["rng_state/shard_1.0_2.2"]
    assert torch.equal(found["torch_rng_state"], own[0]["torch_rng_state"])


def test_weights_alone(trained, tmp_path):
    folder = (
        write(trained("0.16.1", **DENSE).path, tmp_path / "written", weights_only=True)
        / "iter_0000003"
    )
    listed = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert not [key for key in listed if key.startswith("optimizer.")]
    assert "optimizer" not in torch.load(folder / "common.pt", weights_only=False)


def test_keys_of_layers_that_are_not_alike_keep_their_numbers():
    alike = {f"decoder.layers.{i}.mlp.linear_fc1.weight": (8, 4) for i in (0, 1)}
    unlike = {
        "decoder.layers.0.mlp.linear_fc1.weight": (8, 4),
        **{
            f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc1.weight": (8, 4)
            for e in (0, 1, 2)
        },
    }
    names = list(unlike)
    assert megatron_dist_target._Stacks.of(alike).place(
        "decoder.layers.1.mlp.linear_fc1.weight"
    ) == ("decoder.layers.mlp.linear_fc1.weight", (1,), (2,))
    stacks = megatron_dist_target._Stacks.of(unlike)
    assert stacks.place(names[0]) == (names[0], (), ())
    key, numbers, sizes = stacks.place(names[3])
    assert (key, numbers, sizes) == (
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        (2,),
        (3,),
    )
    assert Stack(key, (*sizes, 8, 4)).name(numbers) == names[3] and Stack(
        key, (*sizes, 8, 4)
    ).inner == (8, 4)
