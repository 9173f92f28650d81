"""Megatron-LM's torch_dist checkpoints, saved by real megatron-core: each digest as of the same run
in torch format."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from examples.tiny.trained import Trained
from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.formats import frames, torch_dist
from parammap.frameworks import registry
from parammap.tensors.logical import MAIN_PARAM, TensorSpec
from tests.support.torch_dist import DENSE, EXPERTS, LLAMA, digests
from tests.support.views import matrix_of

ONE_BUCKET = 10**8

#: release, options, how the optimizer is sharded; padded buckets are saved wrongly by core 0.15 to
#: 0.19 (see below)
RUNS = {
    "fully_reshardable": ("0.16.1", {**DENSE, "bucket": ONE_BUCKET}, "fully_reshardable"),
    "dp_reshardable": ("0.16.1", DENSE, "dp_reshardable"),
    "dp_reshardable-dp3": ("0.16.1", {"dp": 3, "layers": 2}, "dp_reshardable"),
    "dp_reshardable-experts": ("0.16.1", EXPERTS, "dp_reshardable"),
    "fully_reshardable-experts": ("0.16.1", {**EXPERTS, "bucket": ONE_BUCKET}, "fully_reshardable"),
    "fully_reshardable-llama": ("0.16.1", {**LLAMA, "bucket": ONE_BUCKET}, "fully_reshardable"),
    "dp_reshardable-llama": ("0.16.1", LLAMA, "dp_reshardable"),
    "model_space": ("0.12.3", {"tp": 2, "dp": 2, "layers": 2}, "fully_sharded_model_space"),
    "model_space-vpp": ("0.12.3", {"pp": 4, "vpp": 2}, "fully_sharded_model_space"),
    "model_space-experts": ("0.12.3", EXPERTS, "fully_sharded_model_space"),
}
QUICK = ("fully_reshardable", "dp_reshardable", "model_space", "dp_reshardable-experts")


def every_save(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full])
            for name in names or RUNS
        ],
    )


@pytest.fixture
def saved(trained):
    """saved(name): the run of that name in format torch_dist."""

    def run(name: str) -> Trained:
        core, options, sharding = RUNS[name]
        return trained(core, **options, ckpt_format="torch_dist", dist_optim=sharding)

    return run


@every_save()
def test_every_digest_is_that_of_the_same_run_in_torch_format(saved, trained, name):
    core, options, _ = RUNS[name]
    found, expected = digests(saved(name).path), digests(trained(core, **options).path)
    assert found == expected and len(found) > 100


@every_save("fully_reshardable", "dp_reshardable", "model_space-vpp")
def test_it_is_the_live_state(saved, name):
    """Nothing of the torch format's reader: values as the live parameters and optimizer shards have
    them."""
    run = saved(name)
    checkpoint = registry.read(run.path)
    shards = {(t.state, t.name): (t, regions) for t, regions in checkpoint.index.shards.items()}
    for truth in run.truths():
        layers = truth.meta["layers"]
        for chunk, name in truth.names():
            if not name.endswith("mlp.linear_fc2.weight"):
                continue
            layer = layers[chunk][int(name.split(".")[2])]
            for role, live_role in (
                ("weight", "main"),
                ("exp_avg", "exp_avg"),
                ("exp_avg_sq", "exp_avg_sq"),
            ):
                live = truth.array(chunk, name, live_role)
                tensor, regions = shards[role, f"layers.{layer}.mlp.fc2.weight"]
                whole = matrix_of(tensor, regions).view(np.float32)
                first = truth.place[0] * live.shape[1]
                assert np.array_equal(whole[:, first : first + live.shape[1]], live), (name, role)


def test_it_is_presented_as_one_rank(saved):
    checkpoint = registry.read(saved("dp_reshardable").path)
    assert (checkpoint.layout.tp, checkpoint.layout.pp, checkpoint.num_layers) == (1, 1, 4)
    assert (checkpoint.trained.tp, checkpoint.trained.pp) == (2, 2)
    (structure,) = checkpoint.structures[0, 0, 0]
    names = [name for name in structure if not name.endswith("_extra_state")]
    assert names[0] == "embedding.word_embeddings.weight" and names[-1].startswith(
        "decoder.final_layernorm."
    )
    assert structure["decoder.layers.3.self_attention.linear_qkv.weight"].shape == (384, 128)
    assert (
        "decoder.layers.0.input_layernorm.weight" in structure
    )  # the run's own name; the key is linear_qkv's
    meta = checkpoint.rank_metadata[0, 0, 0]
    assert (
        meta["iteration"] == 3
        and meta["opt_param_scheduler"]["num_steps"] == 12
        and len(meta["rng_state"]) == 1
    )
    assert [group["step"] for group in meta["optimizer"]["optimizer"]["param_groups"]] == [3, 3]
    slots = {
        slot.name: slot.shape
        for buffer in checkpoint.sidecar.ranks[0, 0, 0].optimizers[0]
        for slot in buffer.slots
    }
    assert slots == {name: spec.shape for name, spec in structure.items() if name in names}


def test_without_a_sidecar_tensors_of_the_models_shapes_can_be_read(saved, tmp_path):
    run = saved("fully_reshardable")
    source = Path(shutil.copytree(run.path, tmp_path / "source"))
    shutil.rmtree(source / "param_map")
    assert digests(source) == digests(run.path)


def test_without_a_sidecar_buckets_are_refused(saved, tmp_path):
    source = Path(shutil.copytree(saved("dp_reshardable").path, tmp_path / "source"))
    sidecar = shutil.move(source / "param_map" / "iter_0000003", tmp_path / "sidecar")
    shutil.rmtree(source / "param_map")
    with pytest.raises(RefusedError, match="no layout_.*nobody knows"):
        registry.read(source)
    assert digests(source, sidecar=sidecar) == digests(saved("dp_reshardable").path)
    assert {role for role, *_ in digests(source, weights_only=True)} == {MAIN_PARAM}


def test_a_sidecar_of_another_run_is_refused(saved, trained, tmp_path):
    other = trained("0.16.1", dp=3, layers=2, ckpt_format="torch_dist", dist_optim="dp_reshardable")
    with pytest.raises(RefusedError, match="different runs|wrong positions"):
        registry.read(saved("dp_reshardable").path, sidecar=other.path / "param_map")


def test_what_megatron_saved_from_wrong_positions_is_refused(trained, tmp_path, capsys):
    """NVIDIA/Megatron-LM#5077. Without a sidecar the copy finds it: the model's weights are not the
    optimizer's."""
    run = trained("0.16.1", **DENSE, ckpt_format="torch_dist", dist_optim="fully_reshardable")
    with pytest.raises(
        RefusedError,
        match="12 parameters.*wrong positions.*#5077.*embedding.word_embeddings.weight",
    ):
        registry.read(run.path)
    bare = Path(shutil.copytree(run.path, tmp_path / "bare"))
    shutil.rmtree(bare / "param_map")
    sound = digests(trained("0.16.1", **DENSE).path)
    wrong = {
        name
        for (role, name, *_), digest in digests(bare).items()
        if role == "exp_avg"
        and digest not in [d for (r, n, *_), d in sound.items() if (r, n) == (role, name)]
    }
    assert {name.split(".")[0] for name in wrong} == {"layers", "embedding"}
    assert {name for name in wrong if name.startswith("layers.")} == {
        n for n in wrong if n.startswith("layers.0.")
    }
    assert main(["convert", str(bare), str(tmp_path / "out"), "--to", "mindspore"]) == 2
    assert "other values than the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("__0_0.distcp", None, "missing; copy the whole checkpoint"),
        ("__0_0.distcp", b"", "ends before"),
        ("common.pt", None, "common.pt: missing"),
        (".metadata", b"\x80\x04N.", "not the metadata of a distributed checkpoint"),
        (".metadata", pickle.dumps(print), "names builtins.print"),
    ],
)
def test_damage_is_refused(saved, tmp_path, name, content, said):
    source = Path(shutil.copytree(saved("fully_reshardable").path, tmp_path / "source"))
    file = source / "iter_0000003" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RefusedError, match=said):
        registry.read(source)


def test_a_chunk_that_is_another_tensor_is_refused(saved):
    contents = torch_dist.read(saved("fully_reshardable").iteration_folder)
    archive = contents.tensors["embedding.position_embeddings.weight"].chunks[0].archive
    other = torch_dist.Chunked(
        "other", "float32", (128,), (torch_dist.Chunk((0,), (128,), archive),)
    )
    with pytest.raises(RefusedError, match="is not a chunk of other"):
        other.read(other.chunks[0])


def test_file_names_cannot_lead_out_of_the_folder(tmp_path):
    chunk = torch_dist.Chunk((0,), (1,), torch_dist.Extent("../elsewhere", 0, 1))
    (tmp_path / ".metadata").write_bytes(
        torch_dist.metadata([torch_dist.Chunked("x", "float32", (1,), (chunk,))], {})
    )
    with pytest.raises(RefusedError, match="not in its folder"):
        torch_dist.read(tmp_path)


def test_torch_itself_reads_what_is_written(tmp_path):
    """torch.distributed.checkpoint.load of a tensor in two chunks, beside an object."""
    file = torch_dist.DistcpFile("__0_0.distcp")
    halves = [np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * half for half in (0, 1)]
    chunks = tuple(
        torch_dist.Chunk((2 * half, 0), (2, 3), file.add(TensorSpec(f"{half}", "float32", (2, 3))))
        for half in (0, 1)
    )
    objects = {"object": file.add({"a": [1, None, "b"]})}
    stream = io.BytesIO()
    frames.write(file.frame.segments, lambda hole: [halves[hole.tensor].tobytes()], stream)
    (tmp_path / file.name).write_bytes(stream.getvalue())
    (tmp_path / ".metadata").write_bytes(
        torch_dist.metadata([torch_dist.Chunked("t", "float32", (4, 3), chunks)], objects)
    )
    for archive in (*(chunk.archive for chunk in chunks), *objects.values()):
        part = stream.getvalue()[archive.offset : archive.offset + archive.nbytes]
        assert (
            zipfile.ZipFile(io.BytesIO(part)).testzip() is None
        )  # torch itself does not look at checksums
    state = {"t": torch.zeros(4, 3), "object": None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert np.array_equal(state["t"].numpy(), np.concatenate(halves)) and state["object"] == {
        "a": [1, None, "b"]
    }
