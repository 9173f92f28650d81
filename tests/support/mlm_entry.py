"""Megatron-LM's own pretrain_gpt.py, from a git checkout of any release, training a tiny model on
the CPU.

train() is for tests: it extracts a release, patches it (or not), runs one process per rank and
returns the save root, with the live state in `truth/` beside the checkpoint (see
examples/tiny/live_state.py), its names taken from Megatron's own state dict. Run as a script this
file is one of those ranks; its arguments are Megatron's."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing.spawn
import os
import runpy
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.tiny.trained import Trained

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400

#: a tiny GPT on mock data; what a test adds comes after and wins; `--transformer-impl
#: transformer_engine`: the stand-in
TINY = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
 --micro-batch-size 2 --global-batch-size 8 --train-iters 2 --exit-interval 2 --save-interval 2 --lr 0.01 --min-lr 0.001
 --lr-decay-iters 10 --lr-warmup-fraction 0.01 --weight-decay 0.01 --clip-grad 1.0 --bf16 --use-distributed-optimizer
 --attention-dropout 0.0 --hidden-dropout 0.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
 --make-vocab-size-divisible-by 16 --num-workers 0 --split 80,10,10 --eval-iters 1 --eval-interval 1000 --log-interval 1
 --distributed-backend gloo --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
 --no-gradient-accumulation-fusion --no-persist-layer-norm --transformer-impl local"""

#: from this release on `--ckpt-format` exists and defaults to torch_dist
CKPT_FORMAT_SINCE = (0, 9)


def resolve(repo: str | Path, ref: str) -> str:
    """The commit that a branch or commit name means in a checkout or in a clone of one."""
    for name in (f"refs/heads/{ref}", f"refs/remotes/origin/{ref}", ref):
        found = subprocess.run(
            ["git", "-C", repo, "rev-parse", "-q", "--verify", f"{name}^{{commit}}"],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return found.stdout.strip()
    raise LookupError(f"{repo} has no branch or commit {ref}")


def extract(repo: str | Path, ref: str, folder: Path, patched: bool) -> Path:
    """The tree of `ref` in a new folder, with patches/param_map.patch applied or as it is."""
    folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", repo, "archive", resolve(repo, ref), "--", ".", ":!tests", ":!docs"],
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    if patched:
        with open(ROOT / "patches/param_map.patch") as patch:
            subprocess.run(["patch", "-p1", "-s", "-d", folder], stdin=patch, check=True)
    return folder


def train(
    repo: str | Path,
    branch: str,
    outdir: Path,
    nproc: int,
    extra_args: list[str],
    bucket: int | None,
    launcher: str | None = None,
) -> Trained:
    """Train two iterations on `nproc` processes and save into `outdir`/save.

    bucket: elements per bucket (Megatron has no flag for it), None for its default. launcher: None
    runs the patched release; "parammap.hooks.run" the release as it is, by `python -m
    parammap.hooks.run`. Raises RuntimeError with the end of the log of the first rank that failed.
    """
    tree = extract(repo, branch, outdir / "megatron", patched=launcher is None)
    save, logs = outdir / "save", outdir / "logs"
    logs.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "MLM_REPO": str(tree),
        "MLM_BUCKET": str(bucket or ""),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [
        sys.executable,
        *(["-m", launcher] if launcher else []),
        str(Path(__file__).resolve()),
        *TINY.split(),
        *_ckpt_format(tree),
        "--save",
        str(save),
        *extra_args,
    ]
    ranks = []
    for rank in range(nproc):
        with open(logs / f"rank{rank}.log", "w") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=outdir,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, code in enumerate(codes):
        if code:
            raise RuntimeError(
                f"rank {rank} exited {code}:\n{(logs / f'rank{rank}.log').read_text()[-3000:]}"
            )
    return Trained(save)


def _ckpt_format(tree: Path) -> list[str]:
    facts = runpy.run_path(str(tree / "megatron/core/package_info.py"))
    return (
        ["--ckpt-format", "torch"] if (facts["MAJOR"], facts["MINOR"]) >= CKPT_FORMAT_SINCE else []
    )


# -----------------------------------------------------------------------------------------------------------
# one rank


def run_rank() -> None:
    repo = os.environ["MLM_REPO"]
    minor = runpy.run_path(os.path.join(repo, "megatron/core/package_info.py"))["MINOR"]
    import torch.utils.cpp_extension  # noqa: F401  (looks for CUDA at import, so before the shim says there is one)

    from examples import cpu_shim

    cpu_shim.install(transformer_engine=minor < 8, triton=minor >= 16, cuda_available=True)
    if sys.argv[sys.argv.index("--transformer-impl") :].count("transformer_engine"):
        from examples.cpu_shim import transformer_engine

        transformer_engine.install()
    sys.path.insert(0, repo)
    _shim_repository()
    cpu_shim.patch_megatron()
    if os.environ["MLM_BUCKET"]:
        _lower_bucket_size(int(os.environ["MLM_BUCKET"]))
    _record_truth()
    sys.argv[0] = os.path.join(repo, "pretrain_gpt.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def _shim_repository() -> None:
    """What only the repository, not the wheel, asks of a GPU, a compiler or Python."""
    import torch

    if not hasattr(torch._C, "_jit_set_nvfuser_enabled"):
        torch._C._jit_set_nvfuser_enabled = lambda *args: None
    _replace_index_helper()
    _spawn_without_the_script()
    for module, compiler in (
        ("megatron.legacy.fused_kernels", "load"),
        ("megatron.core.datasets.utils", "compile_helpers"),
    ):
        try:
            setattr(importlib.import_module(module), compiler, lambda *args, **kwargs: None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # not this release's lack of it
                raise


def _spawn_without_the_script() -> None:
    """A process that Megatron spawns, to save torch_dist, would import pretrain_gpt.py, where
    nothing leads to the CPU."""
    prepare = multiprocessing.spawn.get_preparation_data
    multiprocessing.spawn.get_preparation_data = lambda name: {
        key: value for key, value in prepare(name).items() if not key.startswith("init_main")
    }


def _replace_index_helper() -> None:
    """The C++ extension of megatron/core/datasets, as far as mock data needs it: where each
    sample's tokens start."""
    import numpy

    def build_sample_idx(
        sizes: numpy.ndarray,
        documents: numpy.ndarray,
        sequence_length: int,
        num_epochs: int,
        tokens_per_epoch: int,
        drop_last: bool = True,
        extra_token: int = 1,
    ) -> numpy.ndarray:
        samples = (num_epochs * tokens_per_epoch - int(extra_token)) // sequence_length
        starts = numpy.concatenate([[0], numpy.cumsum(sizes[documents])])
        positions = numpy.arange(samples + 1) * sequence_length
        document = numpy.searchsorted(starts, positions, side="right") - 1
        return numpy.stack([document, positions - starts[document]], axis=1).astype(numpy.int32)

    import megatron.core.datasets as datasets

    has_wrapper = os.path.exists(os.path.join(datasets.__path__[0], "helpers.py"))  # 0.11 on
    name = "helpers_cpp" if has_wrapper else "helpers"
    extension = types.ModuleType(name)
    for function in ("build_sample_idx", "build_sample_idx_int32", "build_sample_idx_int64"):
        setattr(extension, function, build_sample_idx)
    sys.modules[f"megatron.core.datasets.{name}"] = extension
    setattr(datasets, name, extension)


def _lower_bucket_size(bucket: int) -> None:
    """pretrain_gpt.py has no flag for it before 0.10: lower the default, of whichever of the two
    holds it."""
    from megatron.core import distributed

    ddp = distributed.DistributedDataParallel.__init__
    defaults = [p for p in inspect.signature(ddp).parameters.values() if p.default is not p.empty]
    ddp.__defaults__ = tuple(bucket if p.name == "bucket_size" else p.default for p in defaults)
    config = getattr(distributed, "DistributedDataParallelConfig", None)
    if hasattr(config, "bucket_size"):
        config.__setattr__ = lambda self, name, value: object.__setattr__(
            self, name, bucket if name == "bucket_size" else value
        )


def _record_truth() -> None:
    from megatron.training import checkpointing, get_args, training

    save_checkpoint = checkpointing.save_checkpoint

    def save_and_record(
        iteration: int, model: list, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any
    ) -> None:
        save_checkpoint(iteration, model, optimizer, scheduler, *args, **kwargs)
        from megatron.core import package_info

        from examples.tiny import live_state

        live_state.write(
            Path(get_args().save) / "truth",
            get_args(),
            [Chunk(ddp) for ddp in model],
            optimizer,
            scheduler,
            package_info.__version__,
        )

    checkpointing.save_checkpoint = training.save_checkpoint = save_and_record


class Chunk:
    """A model chunk as live_state reads it, with the names that its parameters have in the
    checkpoint."""

    def __init__(self, ddp: Any) -> None:
        self.model = ddp
        while hasattr(self.model, "module"):
            self.model = self.model.module
        self.decoder = (
            self.model.decoder
            if hasattr(self.model, "decoder")
            else self.model.language_model.encoder
        )

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        import torch

        for name, value in flatten(self.model.state_dict_for_save_checkpoint(keep_vars=True)):
            if isinstance(value, torch.nn.Parameter):
                yield name, value


def flatten(state: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a legacy model's nested state dict, or of a flat one, by their dotted path."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


if __name__ == "__main__":
    run_rank()
