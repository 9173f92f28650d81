"""A stand-in for Transformer Engine 2.x, so that Megatron trains with `transformer_impl`
transformer_engine on a CPU.

Modules, parameter names and shapes, their order of registration, their attributes of tensor
parallelism and the extra states are those of transformer_engine.pytorch (TransformerEngine, release
2.6); the arithmetic is torch's. Call `install()` after cpu_shim.install() and before megatron is
imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from examples.cpu_shim import stubs

VERSION = "2.6.0"

#: what get_extra_state() gives, by the name of the case: without fp8, of release 2.x ("empty") and
#: 1.x ("none"); the state of fp8's scaling, of 1.x up to 1.13 ("bytesio") and later ("fp8")
EXTRA_STATES: dict[str, Callable[[], Any]] = {
    "empty": lambda: torch.empty(0, dtype=torch.uint8),
    "none": lambda: None,
    "bytesio": lambda: _torch_saved(_scaling()),
    "fp8": lambda: torch.frombuffer(bytearray(pickle.dumps(_scaling())), dtype=torch.uint8),
}


def _scaling() -> dict[str, Any]:
    return {
        "scale_fwd": torch.ones(3),
        "scale_bwd": torch.ones(2),
        "amax_history_fwd": torch.zeros(16, 3),
        "amax_history_bwd": torch.zeros(16, 2),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1},
    }


def _torch_saved(state: dict[str, Any]) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream


class WithExtraState:
    """A module's key `_extra_state` in the checkpoint."""

    extra_state: Callable[[], Any] = EXTRA_STATES["empty"]

    def get_extra_state(self) -> Any:
        return WithExtraState.extra_state()

    def set_extra_state(self, state: Any) -> None:
        """Nothing here computes in fp8."""


class Base(WithExtraState, torch.nn.Module):
    """TransformerEngineBaseModule."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group


class Norm(WithExtraState):
    """`hidden_size` is the older name of `normalized_shape`."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        hidden_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size or normalized_shape, eps, **options)


class LayerNorm(Norm, stubs.LayerNorm):
    """weight, bias"""


class RMSNorm(Norm, stubs.RMSNorm):
    """weight"""


def parallel(param: torch.nn.Parameter, dim: int) -> torch.nn.Parameter:
    """Mark a parameter as Transformer Engine marks it, whether or not the module is cut at all."""
    param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, dim, 1
    return param


class Gemms(Base):
    """What Linear and GroupedLinear have in common: weight{suffix} [out, in] and bias{suffix} [out]
    for each suffix."""

    def __init__(
        self,
        suffixes: list[str],
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        tp_size: int,
        sequence_parallel: bool,
        init_method: Any,
        params_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias, self.apply_bias = (
            bias,
            return_bias,
            bias and not return_bias,
        )
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        for suffix in suffixes:
            weight = torch.empty(self.out_features, self.in_features, dtype=params_dtype)
            if init_method is not None:
                init_method(weight)
            self.register_parameter(
                f"weight{suffix}",
                parallel(torch.nn.Parameter(weight), 1 if parallel_mode == "row" else 0),
            )
            self._add_bias(f"bias{suffix}", params_dtype)

    def _add_bias(self, name: str, dtype: torch.dtype | None) -> None:
        if not self.use_bias:
            setattr(self, name, torch.empty(0, dtype=dtype))
            return
        self.register_parameter(
            name, torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype))
        )
        if self.parallel_mode == "row":
            getattr(self, name).sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            parallel(getattr(self, name), 0)


class Linear(Gemms):
    """weight, bias"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            [""],
            in_features,
            out_features,
            bias=bias,
            return_bias=return_bias,
            parallel_mode=parallel_mode,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            init_method=init_method,
            params_dtype=params_dtype,
        )

    def forward(
        self, inputs: torch.Tensor, is_first_microbatch: bool | None = None, **options: Any
    ) -> Any:
        output = self._reduced(F.linear(self._gathered(inputs), self.weight))
        if self.apply_bias:
            output = output + self.bias
        return (output, self.bias) if self.return_bias else output

    def _gathered(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode != "column" or self.tp_size == 1:
            return inputs
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(inputs)
        return mappings.copy_to_tensor_model_parallel_region(inputs)

    def _reduced(self, output: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode != "row" or self.tp_size == 1:
            return output
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(output)
        return mappings.reduce_from_tensor_model_parallel_region(output)


class LayerNormLinear(Linear):
    """layer_norm_weight, layer_norm_bias (not of RMSNorm), weight, bias"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            **options,
        )
        self.eps = eps
        norm = {"layer_norm_weight": torch.ones(in_features, dtype=params_dtype)}
        if normalization == "LayerNorm":
            norm["layer_norm_bias"] = torch.zeros(in_features, dtype=params_dtype)
        params = {name: torch.nn.Parameter(value) for name, value in norm.items()}
        for param in params.values():
            param.sequence_parallel = sequence_parallel
        self._parameters = params | self._parameters  # the norm's come first

    def forward(
        self, inputs: torch.Tensor, is_first_microbatch: bool | None = None, **options: Any
    ) -> Any:
        weight, bias = self.layer_norm_weight, getattr(self, "layer_norm_bias", None)
        if bias is None:
            normed = F.rms_norm(inputs.float(), weight.shape, weight.float(), self.eps)
        else:
            normed = F.layer_norm(
                inputs.float(), weight.shape, weight.float(), bias.float(), self.eps
            )
        return super().forward(normed.to(inputs.dtype))


class GroupedLinear(Gemms):
    """weight0, bias0, weight1, …: a matrix of its own for each expert of the rank"""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            [str(number) for number in range(num_gemms)],
            in_features,
            out_features,
            bias=bias,
            return_bias=return_bias,
            parallel_mode=parallel_mode,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            init_method=init_method,
            params_dtype=params_dtype,
        )
        self.num_gemms = num_gemms

    def forward(
        self, inputs: torch.Tensor, m_splits: Any, is_first_microbatch: bool | None = None
    ) -> Any:
        parts = torch.split(inputs, [int(rows) for rows in m_splits])
        biases = [getattr(self, f"bias{number}") for number in range(self.num_gemms)]
        output = torch.cat(
            [
                F.linear(
                    part,
                    getattr(self, f"weight{number}"),
                    biases[number] if self.apply_bias else None,
                )
                for number, part in enumerate(parts)
            ]
        )
        return (output, biases) if self.return_bias else output


class DotProductAttention(Base):
    """Causal attention; with context parallelism every rank holds two of 2·cp chunks of the
    sequence, one from each end."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        softmax_scale: float | None = None,
        cp_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale, self.cp_group = softmax_scale, cp_group

    def set_context_parallel_group(self, group: Any, *options: Any) -> None:
        self.cp_group = group

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *options: Any,
        **more: Any,
    ) -> torch.Tensor:
        """[sequence, batch, heads, channels] each; returns [sequence, batch, heads · channels of a
        value]."""
        size, rank = (
            (dist.get_world_size(self.cp_group), dist.get_rank(self.cp_group))
            if self.cp_group
            else (1, 0)
        )
        if size > 1:
            key, value = Gathered.apply(key, self.cp_group), Gathered.apply(value, self.cp_group)
        positions = [chunk_positions(len(query), place, size) for place in range(size)]
        mask = positions[rank][:, None] >= torch.cat(positions)[None]
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        key, value = (
            part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value)
        )
        output = F.scaled_dot_product_attention(query, key, value, mask, scale=self.softmax_scale)
        return output.permute(2, 0, 1, 3).flatten(2)


def chunk_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """The positions in the whole sequence of the `length` tokens that a rank of context parallelism
    holds."""
    if size == 1:
        return torch.arange(length)
    half = torch.arange(length // 2)
    return torch.cat([half + rank * len(half), half + (2 * size - 1 - rank) * len(half)])


class Gathered(torch.autograd.Function):
    """All ranks' parts, one after the other along dimension 0; the gradient of each is the sum over
    the ranks."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [
            torch.empty_like(part, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        part = total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        return part.to(gradient.dtype), None


class CudaRNGStatesTracker:
    """Named states; Megatron derives its own tracker from it, and uses that only where it is asked
    to."""

    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def get_states(self) -> dict[str, Any]:
        return self.states_

    def set_states(self, states: dict[str, Any]) -> None:
        self.states_ = states

    def reset(self) -> None:
        self.states_ = {}

    def add(self, name: str, seed: int) -> None:
        self.states_[name] = seed


class FP8GlobalStateManager:
    """fp8 is off."""

    is_fp8_enabled = is_fp8_calibration = staticmethod(lambda: False)
    get_fp8_recipe = reset = staticmethod(lambda: None)


def general_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    workspace: Any = None,
    out_dtype: torch.dtype | None = None,
    layout: str = "TN",
    **options: Any,
) -> list[torch.Tensor]:
    """b · a, each transposed as its letter in `layout` says, accumulated in fp32; the MoE router
    calls it."""
    left, right = (
        tensor.float().t() if letter == "T" else tensor.float()
        for letter, tensor in zip(layout, (a, b), strict=True)
    )
    return [(right @ left).to(out_dtype or b.dtype)]


def install(extra_state: str = "empty") -> None:
    """Put the stand-in where `import transformer_engine` finds it. `extra_state`: a name in
    EXTRA_STATES."""
    WithExtraState.extra_state = staticmethod(EXTRA_STATES[extra_state])
    add = stubs.add_module
    add("transformer_engine", stubs.AnyModule, __version__=VERSION)
    add("transformer_engine.common")
    add(
        "transformer_engine.common.recipe",
        stubs.AnyModule,
        DelayedScaling=type("DelayedScaling", (), {}),
    )
    add(
        "transformer_engine.pytorch",
        LayerNorm=LayerNorm,
        RMSNorm=RMSNorm,
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        GroupedLinear=GroupedLinear,
        DotProductAttention=DotProductAttention,
        fp8_autocast=contextlib.nullcontext,
        fp8_model_init=contextlib.nullcontext,
    )
    add(
        "transformer_engine.pytorch.fp8",
        FP8GlobalStateManager=FP8GlobalStateManager,
        fp8_autocast=contextlib.nullcontext,
        fp8_model_init=contextlib.nullcontext,
    )
    add(
        "transformer_engine.pytorch.tensor",
        QuantizedTensor=type("QuantizedTensor", (torch.Tensor,), {}),
    )
    add(
        "transformer_engine.pytorch.float8_tensor",
        Float8Tensor=type("Float8Tensor", (torch.Tensor,), {}),
    )
    add(
        "transformer_engine.pytorch.distributed",
        stubs.AnyModule,
        CudaRNGStatesTracker=CudaRNGStatesTracker,
    )
    add("transformer_engine.pytorch.ops", stubs.AnyModule, Sequential=torch.nn.Sequential)
    add("transformer_engine.pytorch.module")
    add(
        "transformer_engine.pytorch.module.base",
        TransformerEngineBaseModule=Base,
        get_workspace=lambda: None,
    )
    add("transformer_engine.pytorch.cpp_extensions", general_gemm=general_gemm)
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        VERSION if name.replace("_", "-") == "transformer-engine" else version(name)
    )
