"""The save-time hook: right on real megatron-core releases, harmless whatever happens, never half a
file."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from enum import Enum
from pathlib import Path

import jsonschema
import pytest
import torch

from examples.tiny.options import command_line
from parammap import hooks
from parammap.hooks import param_facts, param_layout, param_map, sidecar_files
from tests.support import check_sidecar
from tests.support.runs import every_run
from tests.support.variants import DEFECTS, VARIANTS

SOUND = [
    name for name in VARIANTS if name not in DEFECTS
]  # Megatron itself saves the others wrongly
BYTES_PER_PARAM = 1024


@pytest.fixture(autouse=True)
def forget_what_was_said():
    sidecar_files._warned.clear()


@every_run(*SOUND)
def test_sidecars_locate_the_live_state(core, variant, trained_variant):
    assert check_sidecar.check(trained_variant(core, variant)) > 0


@every_run("moe_ep2")
def test_expert_buffers_and_chained_optimizers(core, variant, trained_variant):
    folder = trained_variant(core, variant).iteration_folder / "param_map"
    first, second = (
        json.loads((folder / f"layout_tp00_pp000_ep00{ep}.json").read_text()) for ep in (0, 1)
    )
    assert [entry["kind"] for entry in first["optimizers"]] == ["dense", "expert"]
    assert second["optimizers"][0] is None and second["optimizers"][1]["kind"] == "expert"
    assert sorted(file.name for file in folder.glob("param_map_*")) == [
        "param_map_buffer0_dp0tp0pp0vpp0ep0.json",
        "param_map_buffer1_dp0tp0pp0vpp0ep0.json",
        "param_map_buffer1_dp0tp0pp0vpp0ep1.json",
    ]


@every_run("tp2pp2")
def test_partition_facts(core, variant, trained_variant):
    layout = json.loads(
        (
            trained_variant(core, variant).iteration_folder / "param_map/layout_tp01_pp001.json"
        ).read_text()
    )
    params = {param["name"]: param for _, param in check_sidecar.layout_params(layout)}
    head, proj = (
        params["output_layer.weight"],
        params["decoder.layers.0.self_attention.linear_proj.weight"],
    )
    assert (head["partition_dim"], head["tensor_parallel"], head["tied"]) == (0, True, True)
    assert (proj["partition_dim"], proj["tensor_parallel"], proj["tied"]) == (1, True, False)
    assert params["decoder.layers.0.mlp.linear_fc2.bias"]["tensor_parallel"] is False
    assert (
        layout["chunks"][0]["pre_process"] is False and layout["chunks"][0]["post_process"] is True
    )


@every_run("tp2pp2")
def test_args_are_written_as_pickle_and_as_json(core, variant, trained_variant):
    folder = trained_variant(core, variant).iteration_folder / "param_map"
    pickled = torch.load(folder / "args_tp01_pp000.pt", weights_only=False)
    plain = json.loads((folder / "args_tp01_pp000.json").read_text())
    assert set(pickled) == set(plain) == {"args", "checkpoint_version", "iteration"}
    assert pickled["checkpoint_version"] == plain["checkpoint_version"] == 3.0
    assert pickled["iteration"] == plain["iteration"] == trained_variant(core, variant).iteration
    assert set(vars(pickled["args"])) == set(plain["args"])
    assert plain["args"]["hidden_size"] == pickled["args"].hidden_size
    assert plain["args"]["params_dtype"] == "bfloat16"


@every_run("tp2pp2")
def test_what_buckets_were_made_by_is_recorded(core, variant, trained_variant):
    layout = json.loads(
        (
            trained_variant(core, variant).iteration_folder / "param_map/layout_tp00_pp000.json"
        ).read_text()
    )
    made_by = {
        "bucket_size": 100_000,
        "overlap_grad_reduce": True,
        "pad_buckets_for_high_nccl_busbw": False,
        "num_distributed_optimizer_instances": 1,
    }
    assert layout["ddp"] == (None if core == "0.6.0" else made_by)
    assert [entry["data_parallel_group_idx"] for entry in layout["optimizers"]] == [0]


@every_run("tp2pp2", "moe_ep2")
def test_what_the_model_is_made_of_is_recorded(core, variant, trained_variant):
    layouts = (trained_variant(core, variant).iteration_folder / "param_map").glob("layout_*.json")
    for layout in (json.loads(file.read_text()) for file in layouts):
        modules = {
            param["name"]: param["module"] for _, param in check_sidecar.layout_params(layout)
        }
        assert {entry["inner_class"] for entry in layout["optimizers"] if entry} == {"FusedAdam"}
        assert all(
            module == "ColumnParallelLinear"
            for name, module in modules.items()
            if "linear_fc1" in name
        )
        assert all(
            module == "VocabParallelEmbedding"
            for name, module in modules.items()
            if "word_embeddings" in name
        )
        model = layout["model"]
        assert (
            model["transformer_impl"] == "local"
        )  # though from 0.14 on the configuration's default says otherwise
        assert model["params_dtype"] == "bfloat16" and model["activation_func"] == "gelu"
        assert model["moe_grouped_gemm"] is False and model["moe_router_topk"] == 2
        assert (
            model["multi_latent_attention"] is (None if core == "0.6.0" else False)
            and model["kv_lora_rank"] is None
        )
        assert all(chunk["frozen"] == [] for chunk in layout["chunks"])


def test_a_parameter_without_gradient_is_named_with_its_chunk():
    chunks = [
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
        for _ in range(2)
    ]
    chunks[1][0].weight.requires_grad = chunks[1][1].weight.requires_grad = False
    owners = param_layout._owners(chunks)
    described = [
        param_layout._describe_chunk(vpp, chunk, owners) for vpp, chunk in enumerate(chunks)
    ]
    assert [chunk["frozen"] for chunk in described] == [[], ["0.weight", "1.weight"]]


LAYOUT_ONLY = """
import runpy, sys
from parammap.hooks import param_layout, param_map
param_map.save_param_map = param_layout.save_param_layout
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_the_layout_alone_is_the_same_layout_and_nothing_else(ckpt_format, trained, tmp_path):
    options = {"layers": 2, "core": "0.16.1", "ckpt_format": ckpt_format}
    root = Path(hooks.__file__).resolve().parent.parent
    subprocess.run(
        [
            sys.executable,
            "-c",
            LAYOUT_ONLY,
            "examples/train_tiny.py",
            "--out",
            tmp_path,
            *command_line(options),
        ],
        cwd=root,
        check=True,
    )
    whole = trained(options.pop("core"), **options).path
    (alone,) = (file for file in tmp_path.rglob("param_map/**/*.*") if file.is_file())
    assert alone.name == "layout_tp00_pp000.json"
    assert alone.read_bytes() == (whole / alone.relative_to(tmp_path)).read_bytes()


def test_torch_dist_finds_its_folder_empty_and_its_sidecars_beside_it(trained):
    """dist_checkpointing.save() raises up to core 0.11, and warns later, where the iteration folder
    holds anything."""
    run = trained(
        "0.16.1", tp=2, pp=2, layers=4, ckpt_format="torch_dist", dist_optim="dp_reshardable"
    )
    folder = run.path / "param_map" / run.iteration_folder.name
    assert not (run.iteration_folder / "param_map").exists()
    layouts = sorted(folder.glob("layout_*.json"))
    assert [file.name for file in layouts] == [
        f"layout_tp0{tp}_pp00{pp}.json" for tp in (0, 1) for pp in (0, 1)
    ]
    for file in layouts:
        layout = json.loads(file.read_text())
        jsonschema.validate(layout, check_sidecar.SCHEMA)
        assert layout["checkpoint_format"] == "torch_dist" and layout["iteration"] == run.iteration
        assert (
            layout["optimizers"][0]["data_parallel_group_idx"]
            == layout["rank"]["pp"] * 2 + layout["rank"]["tp"]
        )
    latest = {file.name: file.read_bytes() for file in folder.parent.iterdir() if file.is_file()}
    assert latest == {file.name: file.read_bytes() for file in folder.iterdir()}


@every_run("no_args")
def test_without_args_the_model_tells_what_it_knows(core, variant, trained_variant):
    folder = trained_variant(core, variant).iteration_folder / "param_map"
    assert not list(folder.glob("args_*"))
    model = json.loads((folder / "layout_tp00_pp000.json").read_text())["model"]
    assert (model["num_layers"], model["hidden_size"], model["swiglu"]) == (2, 128, False)
    assert model["padded_vocab_size"] == 256 and model["vocab_size"] is None
    assert model["untie_embeddings_and_output_weights"] is False


@every_run(*SOUND)
def test_layouts_stay_small(core, variant, trained_variant):
    for file in (trained_variant(core, variant).iteration_folder / "param_map").glob(
        "layout_*.json"
    ):
        params = list(check_sidecar.layout_params(json.loads(file.read_text())))
        assert file.stat().st_size <= BYTES_PER_PARAM * len(params)


# ------------------------------------------------------------------------------------------------------
# harmlessness


class DistributedOptimizer:
    """Has Megatron's name for it and nothing else."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class LayerWiseDistributedOptimizer(DistributedOptimizer):
    def __init__(self) -> None:
        super().__init__(chained_optimizers=[Float16OptimizerWithFloat16Params()])


class Float16OptimizerWithFloat16Params:
    pass


TORCH_FILE = "save/iter_0000001/mp_rank_00/model_optim_rng.pt"
UNKNOWN = {
    "fsdp_dtensor": (
        Namespace(ckpt_format="fsdp_dtensor"),
        DistributedOptimizer(),
        "save/iter_0000001",
        "fsdp_dtensor",
    ),
    "zarr": (
        Namespace(dist_ckpt_format="zarr"),
        DistributedOptimizer(),
        "save/iter_0000001",
        "zarr",
    ),
    "no_optimizer": (Namespace(), None, TORCH_FILE, "no optimizer"),
    "no_save_optim": (
        Namespace(no_save_optim=True),
        DistributedOptimizer(),
        TORCH_FILE,
        "no optimizer",
    ),
    "not_distributed": (
        Namespace(),
        Float16OptimizerWithFloat16Params(),
        TORCH_FILE,
        "Float16OptimizerWithFloat16",
    ),
    "layer_wise": (
        Namespace(),
        LayerWiseDistributedOptimizer(),
        TORCH_FILE,
        "Float16OptimizerWithFloat16Params",
    ),
    "fsdp": (
        Namespace(),
        DistributedOptimizer(ddp_config=Namespace(use_megatron_fsdp=True)),
        TORCH_FILE,
        "sharded",
    ),
    "nvfp4": (
        Namespace(),
        DistributedOptimizer(buffers=[Namespace(has_nvfp4_params=True)]),
        TORCH_FILE,
        "NVFP4",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_it_does_not_know_it_names_in_one_line(case, tmp_path, caplog):
    args, optimizer, name, word = UNKNOWN[case]
    for _ in range(2):
        param_map.save_param_map(args, 1, [torch.nn.Linear(1, 1)], optimizer, str(tmp_path / name))
    (line,) = caplog.messages
    assert line.startswith("param_map: no sidecar") and word in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "optimizer", [DistributedOptimizer(), DistributedOptimizer(data_parallel_group=3)]
)
def test_a_failure_is_said_once_and_training_goes_on(optimizer, tmp_path, caplog):
    for _ in range(2):
        param_map.save_param_map(
            Namespace(), 1, [torch.nn.Linear(1, 1)], optimizer, str(tmp_path / TORCH_FILE)
        )
    (line,) = caplog.messages
    assert "training goes on" in line and "Error" in line


def test_the_environment_turns_it_off(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SAVE_PARAM_MAP", "0")
    param_map.save_param_map(
        Namespace(), 1, [torch.nn.Linear(1, 1)], DistributedOptimizer(), str(tmp_path / TORCH_FILE)
    )
    assert not caplog.messages and not list(tmp_path.iterdir())


def test_ranks_whose_files_would_have_one_name_are_refused(monkeypatch):
    """Megatron names files by tp, pp and ep: with etp > tp two ranks hold experts of one name."""
    sizes = {"tensor_model": 1, "context": 1, "data": 2, "pipeline_model": 1, "expert_tensor": 2}
    mpu = Namespace(
        **{
            f"get_{name}_parallel_world_size": lambda size=size: size
            for name, size in sizes.items()
        }
    )
    monkeypatch.setitem(sys.modules, "megatron", Namespace())
    monkeypatch.setitem(sys.modules, "megatron.core", Namespace(parallel_state=mpu))
    with pytest.raises(sidecar_files.NoSidecar, match="expert tensor parallel size 2 > 1"):
        param_facts.parallel_sizes(1)


@contextlib.contextmanager
def no_file_may_grow_beyond(nbytes):
    """The kernel refuses more, as a full disk or a quota does. Lifted before pytest writes to its
    own log."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    target = tmp_path / "layout_tp00_pp000.json"
    target.write_bytes(b"old")
    with no_file_may_grow_beyond(1024), pytest.raises(OSError):
        sidecar_files.write_atomically(str(target), b"new" * 1024)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("can_link", [True, False])
def test_the_latest_is_replaced_with_and_without_hard_links(can_link, tmp_path, monkeypatch):
    if not can_link:

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    source, latest = tmp_path / "source", tmp_path / "latest"
    source.write_bytes(b"new")
    latest.write_bytes(b"old")
    param_map._link_atomically(str(source), str(latest), b"new")
    assert latest.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == [latest, source]


def test_what_was_written_is_synced(tmp_path, monkeypatch, caplog):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    file = tmp_path / "file"
    file.touch()
    sidecar_files.sync_in_background([str(file), str(tmp_path / "gone"), str(tmp_path)])
    for thread in threading.enumerate():
        if thread.name == "param_map sync":
            thread.join()
    assert synced == [str(file), str(tmp_path)]
    assert "could not sync" in caplog.text


@pytest.mark.parametrize(
    "file", sorted(Path(hooks.__file__).parent.glob("*.py")), ids=lambda file: file.name
)
def test_python_3_8_can_compile_it(file):
    ast.parse(file.read_text(), feature_version=(3, 8))


# --------------------------------------------------------------------------------------------- the
# folder of the latest

SIZES = {"tp": 2, "pp": 1, "ep": 1}
RANKS = {0: {"global": 0, "tp": 0, "pp": 0, "ep": 0}, 1: {"global": 1, "tp": 1, "pp": 0, "ep": 0}}


def names_after_clearing(folder: Path, present: set[str], rank: int, keep: set[str]) -> set[str]:
    for name in present:
        (folder / name).write_text(name)
    param_map._clear_stale(str(folder), keep, {"parallel": SIZES, "rank": RANKS[rank]})
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


OF_RANK_1 = {"param_map_buffer0_dp0tp1pp0vpp0.json", "layout_tp01_pp000.json"}
STALE_OF_RANK_1 = {"param_map_buffer1_dp0tp1pp0vpp0.json", "param_map_buffer0_dp0tp1pp0vpp1.json"}
OF_NOBODY = {
    "param_map_buffer0_dp0tp0pp3vpp0.json",
    "layout_tp00_pp003.json",
    "args_tp00_pp003.pt",
    "param_map_buffer0_dp0tp0pp0vpp0ep1.json",
    "layout_tp00_pp000_ep001.json",
}


def test_a_rank_clears_its_own_place_only(tmp_path):
    left = names_after_clearing(
        tmp_path, OF_RANK_1 | STALE_OF_RANK_1 | OF_NOBODY, 1, keep=OF_RANK_1
    )
    assert left == OF_RANK_1 | OF_NOBODY


def test_the_first_rank_clears_the_places_that_are_gone(tmp_path):
    users_own = {"notes.txt"}
    left = names_after_clearing(
        tmp_path, OF_RANK_1 | STALE_OF_RANK_1 | OF_NOBODY | users_own, 0, keep=set()
    )
    assert left == OF_RANK_1 | STALE_OF_RANK_1 | users_own


def test_maps_of_another_tool_are_set_aside_not_lost(tmp_path):
    foreign = {"param_map_buffer0_dp0tp1pp0vpp0.json", "param_map_buffer0_dp1tp1pp0vpp0.json"}
    left = names_after_clearing(tmp_path, foreign, 1, keep=OF_RANK_1)
    assert left == {f"replaced/{name}" for name in foreign}


# ------------------------------------------------------------------------------------------------------------
# args twin


class Color(Enum):
    red = 1


def test_the_json_twin_is_json_whatever_args_hold(tmp_path):
    values = {
        "dtype": torch.bfloat16,
        "enum": Color.red,
        "inf": float("inf"),
        "tuple": (1, (2.5, None)),
        "dict": {3: True},
        "function": len,
        "text": "é",
        "nested": [Color.red, float("nan")],
    }
    assert json.loads(sidecar_files.to_json(sidecar_files.to_plain(values))) == {
        "dtype": "bfloat16",
        "enum": "red",
        "inf": "inf",
        "tuple": [1, [2.5, None]],
        "dict": {"3": True},
        "function": "<built-in function len>",
        "text": "é",
        "nested": ["red", "nan"],
    }


# ---------------------------------------------------------------------------------------------------------
# no patching

CHECKPOINTING = """\
def save_checkpoint(args, iteration, model, optimizer, checkpoint_name):
    calls = []
    {line}
    return calls
"""


@pytest.fixture
def fake_megatron(tmp_path):
    """A package with Megatron-LM's module name; the module holds the marker line, or another
    comment."""

    def make(line: str) -> list[str]:
        folder = tmp_path / "megatron/training"
        folder.mkdir(parents=True)
        for package in (folder, folder.parent):
            (package / "__init__.py").touch()
        (folder / "checkpointing.py").write_text(CHECKPOINTING.format(line=line))
        code = (
            "from parammap import hooks; hooks.install(); hooks.install()\n"
            "from megatron.training.checkpointing import save_checkpoint\n"
            "save_checkpoint(None, 1, [], None, 'save/iter_0000001/mp_rank_00/model_optim_rng.pt')"
        )
        root = str(Path(hooks.__file__).resolve().parent.parent)
        run = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])},
        )
        return run.stdout.splitlines()

    return make


def test_install_calls_the_hook_at_the_marker(fake_megatron):
    (line,) = fake_megatron("# Collect args, model, RNG.")
    assert line == "param_map: no sidecar for this checkpoint: no optimizer is saved"


def test_install_says_when_a_release_lacks_the_marker(fake_megatron):
    (line,) = fake_megatron("# another comment")
    assert "does not have the line" in line


def test_install_after_megatron_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, hooks.TARGET, sys)
    with pytest.raises(RuntimeError, match="too late"):
        hooks.install()


def test_it_works_inside_another_package(tmp_path):
    """ParamMap may install it as parammap.hooks."""
    shutil.copytree(Path(hooks.__file__).parent, tmp_path / "parammap/hooks")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom parammap.hooks import metaseq_param_map, param_map\nprint('hooks' in "
        "sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-m", "parammap.hooks.run", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert run.stdout == "False\n"


def test_launcher_runs_a_script_as_main(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; print(__name__, sys.argv[1:], sys.path[0])\n"
        "print([type(f).__name__ for f in sys.meta_path][0])"
    )
    run = subprocess.run(
        [sys.executable, "-m", "parammap.hooks.run", str(script), "--lr", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(hooks.__file__).resolve().parent.parent,
    )
    assert run.stdout.splitlines() == [f"__main__ ['--lr', '1'] {tmp_path}", "_HookedFinder"]
