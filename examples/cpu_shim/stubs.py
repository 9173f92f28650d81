"""The GPU-only packages that Megatron imports, as far as it uses them; and what newer torch and
Python have dropped."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import typing
from typing import Any

import torch
import torch.nn.functional as F


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state of apex's and Transformer Engine's FusedAdam: `step` in the group, two
    moments per parameter.

    torch.optim.Adam would do the arithmetic, but keeps `step` per parameter, and what is saved
    would look different."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        grad, state, (beta1, beta2) = param.grad.float(), self.state[param], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(param).detach() for _ in range(2)
            )
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        update = (state["exp_avg"] / correction1) / (
            (state["exp_avg_sq"] / correction2).sqrt() + group["eps"]
        )
        param.add_(update + group["weight_decay"] * param, alpha=-group["lr"])


class LayerNormFunction:
    """apex's fused layer norm, which keeps its weight and bias in whatever dtype they have."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Any,
        weight: Any,
        bias: Any,
        normalized_shape: Any,
        eps: Any,
        memory_efficient: bool = False,
    ) -> None:
        """Megatron reads this signature to see whether memory_efficient is known."""

    @staticmethod
    def apply(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        shape: Any,
        eps: float,
        *options: Any,
    ) -> torch.Tensor:
        return F.layer_norm(input.float(), tuple(shape), weight.float(), bias.float(), eps).to(
            input.dtype
        )


class LayerNorm(torch.nn.Module):
    """Transformer Engine's LayerNorm: in megatron-core up to 0.7 the final norm of every model is
    one."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))
        self.weight.sequence_parallel = self.bias.sequence_parallel = sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return LayerNormFunction.apply(input, self.weight, self.bias, self.weight.shape, self.eps)


class RMSNorm(torch.nn.Module):
    """Transformer Engine's RMSNorm, in the same place."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(input.float(), self.weight.shape, self.weight.float(), self.eps).to(
            input.dtype
        )


def grouped_gemm(
    tokens: torch.Tensor,
    weights: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    trans_b: bool = False,
) -> torch.Tensor:
    """grouped_gemm.ops.gmm: tokens [n, in], sorted by expert, each times the weights [experts, in,
    out] of its own."""
    if trans_b:
        weights = weights.transpose(1, 2)
    parts = torch.split(tokens, [int(count) for count in tokens_per_expert])
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


class Anything:
    """Stands for any attribute of a package that is imported but not used; as a decorator it
    changes nothing."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getitem__(self, index: Any) -> Anything:
        return Anything()


class AnyModule(types.ModuleType):
    """A module that has every attribute."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


def multi_tensor_applier(operation: Any, overflow: Any, tensor_lists: Any, *args: Any) -> Any:
    return operation(overflow, tensor_lists, *args)


def multi_tensor_scale(overflow: Any, tensor_lists: Any, scale: Any) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    overflow: Any, tensor_lists: Any, per_tensor: bool = False
) -> tuple[torch.Tensor, None]:
    norms = [tensor.float().norm(2) for tensor in tensor_lists[0]]
    return (torch.stack(norms).norm(2).view(1) if norms else torch.zeros(1)), None


def add_module(
    name: str, kind: type[types.ModuleType] = types.ModuleType, **attributes: Any
) -> None:
    """Put a module of that name, with those attributes, where `import` will find it."""
    module = kind(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def install(transformer_engine: bool, triton: bool) -> None:
    """Add the stub packages and mend what newer torch and setuptools dropped."""
    _add_apex()
    add_module("grouped_gemm")
    add_module("grouped_gemm.ops", gmm=grouped_gemm)
    if transformer_engine:
        _add_transformer_engine()
    if triton:
        add_module("triton", AnyModule, __version__="3.0.0")
        add_module("triton.language", AnyModule)
    _mend_python()


def _add_apex() -> None:
    add_module("apex")
    add_module("apex.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    add_module("apex.multi_tensor_apply", multi_tensor_applier=multi_tensor_applier)
    add_module("apex.normalization")
    add_module(
        "apex.normalization.fused_layer_norm",
        FusedLayerNormAffineFunction=LayerNormFunction,
        fused_layer_norm_affine=LayerNormFunction.apply,
    )
    add_module(
        "amp_C", multi_tensor_scale=multi_tensor_scale, multi_tensor_l2norm=multi_tensor_l2norm
    )
    add_module("fused_layer_norm_cuda")  # legacy models only check that it can be imported


def _add_transformer_engine() -> None:
    add_module("transformer_engine", __version__="0.10.0")
    add_module("transformer_engine.common")
    add_module(
        "transformer_engine.common.recipe",
        DelayedScaling=type("DelayedScaling", (), {}),
        Format=None,
    )
    add_module(
        "transformer_engine.pytorch",
        LayerNorm=LayerNorm,
        RMSNorm=RMSNorm,
        Linear=torch.nn.Module,
        LayerNormLinear=torch.nn.Module,
        DotProductAttention=torch.nn.Module,
    )
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        "0.12.0" if name.replace("_", "-") == "transformer-engine" else version(name)
    )


def _mend_python() -> None:
    load, histc = torch.load, torch.histc
    torch.load = lambda *args, **kwargs: load(
        *args, **{"weights_only": False, **kwargs}
    )  # the default until torch 2.6

    def integer_histc(
        input: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0
    ) -> torch.Tensor:
        return histc(input.float(), bins=bins, min=min, max=max).to(input.dtype)

    if not hasattr(typing, "override"):  # new in Python 3.12
        typing.override = lambda function: function
    torch.histc = (
        integer_histc  # the MoE router counts tokens with it, and the CPU's knows floats only
    )
    if (
        importlib.util.find_spec("pkg_resources") is None
    ):  # gone from setuptools 81 on; megatron-core up to 0.8 uses it
        import packaging.version

        add_module("pkg_resources", packaging=packaging)
