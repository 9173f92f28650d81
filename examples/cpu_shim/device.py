"""Tensors and calls that name a GPU land on the CPU: factories, .cuda(), .to(), and the torch.cuda
namespace."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "eye",
    "linspace",
    "randperm",
    "empty_strided",
    "tril",
    "triu",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
)

TENSOR_TYPES = {
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "DoubleTensor": torch.float64,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


class Stream:
    """A CPU has one stream of work, always in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def record_event(self, *args: Any) -> Event:
        return Event()

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = synchronize = wait_stream


class Event:
    """Whatever was asked for has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Generators:
    """torch.cuda.default_generators: the GPU's generator is the CPU's, so Megatron's seeds per tp
    rank take effect."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _TensorType(type):
    """isinstance(t, torch.cuda.FloatTensor) is how Megatron asks for a dtype."""

    dtype: torch.dtype

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == cls.dtype


def _tensor_type(name: str, dtype: torch.dtype) -> type:
    def new(cls: type, data: Any = (), *args: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype)

    return _TensorType(name, (), {"dtype": dtype, "__new__": new})


def _on_cpu(device: Any) -> Any:
    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int) or str(device).startswith("cuda"):
        return CPU
    return device


def _factory(make: Callable) -> Callable:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return make(*args, **kwargs)

    return made


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _returns(value: Any) -> Callable:
    """A function that answers `value`, whatever it is asked."""
    return lambda *args, **kwargs: value


def install(cuda_available: bool) -> None:
    """Patch torch's factories, Tensor, Module and torch.cuda in place."""
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    _install_tensor()
    _install_cuda(cuda_available)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        if not hasattr(torch, name):  # a CPU build of torch lacks some of them
            setattr(torch, name, _tensor_type("torch." + name, TENSOR_TYPES[name]))


def _install_tensor() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_on_cpu(a) if isinstance(a, (str, int, torch.device)) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace(
            "torch.", "torch.cuda.", 1
        )  # distrib_optimizer.py compares with this spelling

    torch.Tensor.to, torch.Tensor.type = to, type_
    torch.Tensor.cuda = torch.Tensor.pin_memory = torch.nn.Module.cuda = _itself


def _install_cuda(available: bool) -> None:
    properties = types.SimpleNamespace(
        major=8, minor=0, total_memory=1 << 34, multi_processor_count=8, name="cpu"
    )
    replacements: dict[str, Any] = {
        "is_available": _returns(available),
        "is_initialized": _returns(False),
        "is_current_stream_capturing": _returns(False),
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 8)),
        "current_device": _returns(CPU),
        "device": contextlib.nullcontext,
        "get_device_properties": _returns(properties),
        "get_device_capability": _returns((8, 0)),
        "get_device_name": _returns(properties.name),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *args: Stream(),
        "default_stream": lambda *args: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "memory_stats": lambda *args: {},
        "nvtx": types.SimpleNamespace(range_push=_returns(None), range_pop=_returns(None)),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _returns(
            None
        ),  # torch.manual_seed, which calls it, has just seeded the same generator
        "default_generators": Generators(),
        "_lazy_call": lambda call, **kwargs: (
            call()
        ),  # Megatron sets the state of the generator in such a call
    }
    for name in (
        "set_device",
        "set_stream",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "_lazy_init",
    ):
        replacements[name] = _returns(None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        replacements[name] = _returns(0)
    replacements |= {
        name: _tensor_type("torch.cuda." + name, dtype) for name, dtype in TENSOR_TYPES.items()
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, replacements[name])
    if hasattr(torch._C, "_cuda_setRNGState"):
        del (
            torch._C._cuda_setRNGState
        )  # its presence makes Megatron set the state behind torch.cuda's back
