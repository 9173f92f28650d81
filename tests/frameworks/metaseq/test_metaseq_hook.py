"""The metaseq hook: its sidecars say what the files hold, on real FSDP and in metaseq itself; it
never harms a save."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jsonschema
import pytest
import torch
import torch.distributed as dist

from parammap.hooks import metaseq_param_map as hook
from parammap.hooks import sidecar_files
from tests.support import metaseq_train, paths
from tests.support.metaseq_checkout import CHECKOUT, PATCH, needs_checkout

ROOT = paths.ROOT
SCHEMA = json.loads((ROOT / "parammap/schemas/metaseq.schema.json").read_text())
PACKAGES = os.environ.get(
    "METASEQ_PACKAGES"
)  # apart: hydra-core 1.1 breaks pytest itself on Python 3.11
needs_fairscale = pytest.mark.skipif(
    not importlib.util.find_spec("fairscale"),
    reason="fairscale is not installed (pip install fairscale==0.4.13)",
)
needs_its_packages = pytest.mark.skipif(
    not PACKAGES,
    reason="METASEQ_PACKAGES does not name a folder made by pip install --no-deps --target FOLDER "
    "fairscale==0.4.13 hydra-core==1.1.2 omegaconf==2.1.1 antlr4-python3-runtime==4.8 tokenizers "
    "iopath portalocker",
)


@pytest.fixture(autouse=True)
def forget_what_was_said():
    sidecar_files._warned.clear()


# ----------------------------------------------------------------------------------------- what
# sidecars say, and files
def described(tensors: dict) -> dict:
    return {
        key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if torch.is_tensor(value)
        else value
        for key, value in tensors.items()
    }


def as_json(value: object) -> object:
    """The file's own value in JSON's types: tuples and torch.Size as lists."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_sidecar(path: Path) -> dict:
    """Compare a checkpoint whose exp_avg were marked (metaseq_train.mark) with its sidecar; returns
    the sidecar."""
    held = torch.load(path, weights_only=False)
    layout = json.loads((path.parent / f"param_map/layout_{path.stem}.json").read_text())
    jsonschema.validate(layout, SCHEMA)
    assert (
        layout["file"] == path.name
        and layout["num_updates"] == held["optimizer_history"][-1]["num_updates"]
    )
    assert layout["shard_metadata"] == as_json(held.get("shard_metadata"))
    assert layout["model"] == described(held["model"]) and list(layout["model"]) == list(
        held["model"]
    )
    states = held["last_optimizer_state"]["state"]
    assert layout["optimizer"] == {str(index): described(state) for index, state in states.items()}
    assert set(layout["optimizer_index"]) == {str(index) for index in states}
    for index, state in states.items():
        owner = held["model"][layout["optimizer_index"][str(index)]]
        assert torch.equal(state["exp_avg"], owner.to(state["exp_avg"].dtype)), (
            f"state {index} is of another parameter"
        )
    return layout


# -------------------------------------------------------------------------------------------------
# fairscale, no metaseq
class Proxy(torch.nn.Module):
    """Wraps DistributedDataParallel, as metaseq's ModuleProxyWrapper does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def build(case: str) -> tuple[torch.nn.Module, dict]:
    """The wrapped model of a case, and what of the model a file holds."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    flatten = case != "unflattened"

    def fsdp(module: torch.nn.Module) -> torch.nn.Module:
        return FullyShardedDataParallel(
            module, compute_device=torch.device("cpu"), flatten_parameters=flatten
        )

    linear = torch.nn.Linear
    if case == "ddp":
        net = torch.nn.Sequential(linear(3, 5), linear(5, 3))
        return Proxy(torch.nn.parallel.DistributedDataParallel(net)), {"model": net.state_dict()}
    layers = {
        "unnested": lambda: [linear(3, 5), linear(5, 3)],
        "empty root": lambda: [fsdp(linear(3, 5)), fsdp(linear(5, 3))],
    }.get(
        case,
        lambda: [linear(3, 5), fsdp(linear(5, 5)), fsdp(linear(5, 3)), linear(3, 1, bias=False)],
    )()
    net = torch.nn.Sequential(*layers)
    net.register_buffer("version", torch.ones(1, dtype=torch.int64))
    return fsdp(net), {}


def save_as_trainer(rank: int, world: int, folder: str, case: str) -> None:
    """One rank of a training run of one step that saves as metaseq's Trainer does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.manual_seed(1)
    torch.set_num_threads(1)
    metaseq_train.pretend_to_have_cuda_streams()
    model, state_dict = build(case)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (model.module if case == "ddp" else model)(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    for param in model.parameters():
        optimizer.state[param]["exp_avg"] = param.data.clone()
    is_fsdp = case != "ddp"
    trainer = Namespace(
        is_fsdp=is_fsdp,
        should_save_checkpoint_on_current_rank=is_fsdp or rank == 0,
        model=model,
        optimizer=optimizer,
        data_parallel_rank=rank,
        data_parallel_world_size=world,
        cfg=Namespace(common=Namespace(model_parallel_size=1)),
    )
    if is_fsdp:
        state_dict = {
            "model": model.local_state_dict(),
            "shard_metadata": model.local_metadata_dict(),
        }
    state_dict |= {
        "cfg": {"model": Namespace(decoder_layers=3)},
        "optimizer_history": [{"num_updates": 1}],
        "last_optimizer_state": optimizer.state_dict(),
    }
    path = f"{folder}/checkpoint_1{f'-shard{rank}' if is_fsdp else ''}.pt"
    hook.save_param_map(trainer, state_dict, path)
    if trainer.should_save_checkpoint_on_current_rank:
        torch.save(state_dict, path)
    dist.barrier()  # none leaves while another still speaks
    dist.destroy_process_group()


@needs_fairscale
@pytest.mark.parametrize(
    ("case", "world"),
    [
        ("nested", 1),
        ("nested", 2),
        ("nested", 5),
        ("unnested", 2),
        ("unflattened", 2),
        ("empty root", 2),
        ("ddp", 2),
    ],
)
def test_sidecars_say_what_the_shards_hold(case, world, tmp_path):
    torch.multiprocessing.spawn(save_as_trainer, (world, str(tmp_path), case), nprocs=world)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == (1 if case == "ddp" else world)
    layouts = [check_sidecar(file) for file in files]
    assert [layout["shard"] for layout in layouts] == (
        [None] if case == "ddp" else list(range(world))
    )
    assert all(layout["data_parallel_size"] == world for layout in layouts)
    assert len(list((tmp_path / "param_map").iterdir())) == len(files) + 1
    if (case, world) == (
        "nested",
        5,
    ):  # 23 elements of the root on 5 shards; 30 of the first layer, 18 of the second
        modules = layouts[4]["shard_metadata"]["param_metadata"]
        assert [module["params"]["flat_param_0"]["padding"] for module in modules] == [2, 0, 2]


# ---------------------------------------------------------------------------------------------------------
# metaseq itself
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def patched_metaseq(tmp_path_factory):
    """The package metaseq of the checkout's main, with the patch applied."""
    folder = tmp_path_factory.mktemp("metaseq")
    archive = subprocess.run(
        ["git", "-C", CHECKOUT, "archive", "f7ffa5f", "metaseq"], check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "apply", PATCH], cwd=folder, check=True)
    return folder


def train(metaseq: Path, save: Path, parts: int = 1, shards: int = 1, **options: object) -> str:
    """Train and save with metaseq's own Trainer in parts × shards processes; returns what they
    printed."""
    save.mkdir(exist_ok=True)
    given = save.parent / f"{save.name}.json"
    given.write_text(
        json.dumps(
            {
                "metaseq": str(metaseq),
                "save": str(save),
                "port": free_port(),
                "mark": True,
                "parts": parts,
                "shards": shards,
                **options,
            }
        )
    )
    env = {**os.environ, "PYTHONPATH": PACKAGES}
    ranks = [
        subprocess.Popen(
            [sys.executable, metaseq_train.__file__, given, str(rank)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(parts * shards)
    ]
    printed = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(printed)
    return "".join(printed)


RUNS = {
    "two parts, two shards, fp16": {"parts": 2, "shards": 2, "dtype": "float16"},
    "three shards, mixed precision": {"shards": 3, "arguments": ["--fp16"]},
    "unnested": {"shards": 2, "arguments": ["--min-params-to-wrap", "100000000"]},
    "not sharded": {"arguments": ["--ddp-backend", "pytorch_ddp"]},
}


@needs_checkout
@needs_its_packages
@pytest.mark.parametrize("run", RUNS)
def test_metaseq_writes_them_at_every_save(run, patched_metaseq, tmp_path):
    printed = train(patched_metaseq, tmp_path / "save", **RUNS[run])
    assert "param_map:" not in printed
    files = sorted((tmp_path / "save").glob("*.pt"))
    layouts = [check_sidecar(file) for file in files]
    parts, shards = RUNS[run].get("parts", 1), RUNS[run].get("shards", 1)
    shard_numbers = [None] if run == "not sharded" else range(shards)
    assert [(layout["model_part"], layout["shard"]) for layout in layouts] == [
        (part, shard) for part in range(parts) for shard in shard_numbers
    ]
    assert {
        (layout["model_parallel_size"], layout["data_parallel_size"]) for layout in layouts
    } == {(parts, shards)}
    for file in files[::shards]:
        args = json.loads((file.parent / f"param_map/args_{file.stem}.json").read_text())
        assert args == {"cfg": as_json(torch.load(file, weights_only=False)["cfg"])}
        assert args["cfg"]["model"]["decoder_attention_heads"] == 4


@needs_checkout
@needs_its_packages
def test_metaseq_trains_and_saves_on_when_the_hook_cannot(patched_metaseq, tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    (save / "param_map").write_text("in the way")
    printed = train(patched_metaseq, save)
    said = [line for line in printed.splitlines() if "param_map:" in line]
    assert len(said) == 1 and "training goes on" in said[0]
    assert torch.load(save / "checkpoint_3-model_part-0-shard0.pt", weights_only=False)[
        "optimizer_history"
    ]


# ------------------------------------------------------------------------------------------------------
# harmless whatever
def standing_in(**changes: object) -> Namespace:
    """A trainer of a model that is not sharded."""
    model = torch.nn.Linear(2, 2)
    return Namespace(
        **{
            "is_fsdp": False,
            "should_save_checkpoint_on_current_rank": True,
            "model": model,
            "optimizer": torch.optim.Adam(model.parameters()),
            "data_parallel_rank": 0,
            "data_parallel_world_size": 1,
            "cfg": Namespace(common=Namespace(model_parallel_size=1)),
            **changes,
        }
    )


def contents(trainer: Namespace, **changes: object) -> dict:
    return {
        "cfg": {},
        "model": trainer.model.state_dict(),
        "optimizer_history": [{"num_updates": 7}],
        "last_optimizer_state": {"state": {0: {"step": 7}}},
        **changes,
    }


NOT_OF_THE_MODEL = torch.optim.Adam([torch.nn.Parameter(torch.zeros(6))])
SILENT = {
    "gathered": (
        standing_in(is_fsdp=True),
        {"last_optimizer_state": -1},
        "no sidecar.*use-sharded-state",
    ),
    "two optimizers": (
        standing_in(optimizer=[1, 2]),
        {"last_optimizer_state": [{}, {}]},
        "no sidecar.*param_groups",
    ),
    "flat fp32 copy": (
        standing_in(optimizer=NOT_OF_THE_MODEL),
        {},
        "training goes on.*state 0 .*memory-efficient",
    ),
    "other names": (
        standing_in(),
        {"model": {"other": torch.zeros(1)}},
        "training goes on.*has no weight",
    ),
    "no history": (standing_in(), {"optimizer_history": []}, "training goes on.*IndexError"),
    "no trainer": (Namespace(), {"model": {}}, "training goes on.*AttributeError"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_it_cannot_describe_it_names_in_one_line(case, tmp_path, caplog):
    trainer, changes, pattern = SILENT[case]
    state_dict = contents(standing_in(), **changes)
    for _ in range(2):
        hook.save_param_map(trainer, state_dict, str(tmp_path / "checkpoint_7.pt"))
    (line,) = caplog.messages
    assert re.match(f"param_map: .*{pattern}", line)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_saves_nothing_writes_nothing(tmp_path, caplog):
    trainer = standing_in(should_save_checkpoint_on_current_rank=False)
    hook.save_param_map(trainer, contents(trainer), str(tmp_path / "checkpoint_7.pt"))
    assert not list(tmp_path.iterdir()) and not caplog.messages


@pytest.mark.parametrize(
    "saved", [{"last_optimizer_state": None}, {"last_optimizer_state": {"state": {}}}]
)
def test_a_save_without_optimizer_has_an_empty_index(saved, tmp_path):
    trainer = standing_in(
        optimizer=None if saved["last_optimizer_state"] is None else standing_in().optimizer
    )
    hook.save_param_map(trainer, contents(trainer, **saved), str(tmp_path / "checkpoint_7.pt"))
    layout = json.loads((tmp_path / "param_map/layout_checkpoint_7.json").read_text())
    jsonschema.validate(layout, SCHEMA)
    assert layout["optimizer_index"] == layout["optimizer"] == {} and layout["shard"] is None


def test_the_next_save_replaces_the_last(tmp_path):
    trainer = standing_in()
    for updates in (7, 8):
        hook.save_param_map(
            trainer,
            contents(trainer, optimizer_history=[{"num_updates": updates}]),
            str(tmp_path / "checkpoint_last.pt"),
        )
    folder = tmp_path / "param_map"
    assert json.loads((folder / "layout_checkpoint_last.json").read_text())["num_updates"] == 8
    assert sorted(file.name for file in folder.iterdir()) == [
        "args_checkpoint_last.json",
        "layout_checkpoint_last.json",
    ]


def test_args_are_json_whatever_the_configuration_holds(tmp_path):
    trainer = standing_in()
    cfg = {
        "model": Namespace(dtype=torch.float16, betas=(0.9, 0.95)),
        "inf": math.inf,
        3: None,
        "function": len,
    }
    hook.save_param_map(trainer, contents(trainer, cfg=cfg), str(tmp_path / "checkpoint_7.pt"))
    assert json.loads((tmp_path / "param_map/args_checkpoint_7.json").read_text()) == {
        "cfg": {
            "model": {"dtype": "float16", "betas": [0.9, 0.95]},
            "inf": "inf",
            "3": None,
            "function": "<built-in function len>",
        }
    }
