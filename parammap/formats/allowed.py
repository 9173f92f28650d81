"""What a pickle of ours may name: the classes and functions that honest checkpoints of the known
frameworks hold.

Whoever loads an output with open unpickling imports what it names and calls it, so a global that is
not listed here is refused, whatever the source did with it. None of those listed runs code that its
arguments hold, opens a file or starts a program; of third parties, only the members of enumerations
are called, and objects of other classes are made empty and then filled. Names are those after
Python's own renaming for pickles of protocol 2 (`fix_imports`).

A user may have further modules kept (`keeping`); they are called as the source calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from parammap.errors import RefusedError
from parammap.formats import standard_library
from parammap.formats.pickles import GETATTR, Global, Opaque, renamed

#: enumerations: Python pickles their members as a call with the value or, in some releases, as
#: `getattr(class, name)`
ENUMS: dict[str, frozenset[str]] = {
    "signal": frozenset({"Signals"}),
    # Megatron-LM before core and BigScience's Megatron-DeepSpeed
    "megatron.enums": frozenset({"AttnMaskType", "AttnType", "LayerType", "PositionEmbeddingType"}),
    "megatron.model.enums": frozenset(
        {"AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType"}
    ),
    # Megatron-LM core_r0.6.0 … main
    "megatron.core.enums": frozenset({"Fp4Recipe", "Fp8Recipe", "ModelType"}),
    "megatron.core.transformer.enums": frozenset(
        {
            "AttnBackend",
            "AttnMaskType",
            "AttnType",
            "CudaGraphModule",
            "CudaGraphScope",
            "InferenceCudaGraphScope",
            "LayerType",
            "ModelType",
        }
    ),
    "megatron.core.rerun_state_machine": frozenset(
        {"RerunDiagnostic", "RerunMode", "RerunState", "RerunValidationStatus"}
    ),
    "deepspeed.runtime.zero.config": frozenset({"ZeroStageEnum"}),
    "torch.distributed.checkpoint.metadata": frozenset({"_MEM_FORMAT_ENCODING"}),
    # what transformers.TrainingArguments, and with them Merak's, hold
    "transformers.trainer_utils": frozenset(
        {
            "EvaluationStrategy",
            "FSDPOption",
            "HubStrategy",
            "IntervalStrategy",
            "SaveStrategy",
            "SchedulerType",
        }
    ),
    "transformers.training_args": frozenset({"OptimizerNames"}),
}
_TORCH_DTYPES = frozenset(
    {
        "bfloat16",
        "bool",
        "complex128",
        "complex64",
        "float16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "float8_e5m2",
        "int16",
        "int32",
        "int64",
        "int8",
        "uint16",
        "uint32",
        "uint64",
        "uint8",
    }
)
_TORCH_STORAGES = frozenset(
    {
        "BFloat16Storage",
        "BoolStorage",
        "ByteStorage",
        "CharStorage",
        "DoubleStorage",
        "FloatStorage",
        "HalfStorage",
        "IntStorage",
        "LongStorage",
        "ShortStorage",
    }
)
#: classes, functions and constants by module
GLOBALS: dict[str, frozenset[str]] = {
    **standard_library.WRITTEN,
    **dict.fromkeys(
        ("numpy.core.multiarray", "numpy._core.multiarray"), frozenset({"_reconstruct", "scalar"})
    ),
    "numpy": frozenset({"dtype", "ndarray"}),
    "torch": frozenset({"Size", "device"}) | _TORCH_DTYPES | _TORCH_STORAGES,
    "torch._utils": frozenset({"_rebuild_tensor_v2", "_rebuild_tensor_v3"}),
    "torch.storage": frozenset({"UntypedStorage"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
        }
    ),
    "deepspeed.runtime.fp16.loss_scaler": frozenset({"DynamicLossScaler", "LossScaler"}),
    "deepspeed.utils.tensor_fragment": frozenset({"fragment_address"}),
    "metaseq.data.document_to_sequence": frozenset({"LockingArray"}),
    "omegaconf.base": frozenset({"ContainerMetadata", "Metadata"}),
    "omegaconf.dictconfig": frozenset({"DictConfig"}),
    "omegaconf.listconfig": frozenset({"ListConfig"}),
    "omegaconf.nodes": frozenset(
        {
            "AnyNode",
            "BooleanNode",
            "BytesNode",
            "EnumNode",
            "FloatNode",
            "IntegerNode",
            "PathNode",
            "StringNode",
        }
    ),
    "Merak.utils.merak_args": frozenset({"MerakArguments"}),
    "Merak.utils.zero1_optimizer": frozenset({"LossScaler"}),
}


#: whose functions and classes may be called, with whatever arguments
_CALLED = sys.stdlib_module_names | {"numpy", "torch"}
_KEPT: ContextVar[frozenset[str]] = ContextVar("modules of foreign objects to keep")


@contextmanager
def keeping(modules: frozenset[str]) -> Iterator[None]:
    """Write what these modules define as well, while the context lasts.

    Raises RefusedError for a module that comes with Python, numpy or torch, of which only what is
    listed is ever written."""
    for module in sorted(modules):
        top = renamed(module, "").module.partition(".")[0]
        if top in _CALLED or not _is_dotted_name(module):
            raise RefusedError(
                f"{module}: is no module whose objects can be kept; name one that is not Python's, "
                "numpy's or torch's own"
            )
    token = _KEPT.set(modules)
    try:
        yield
    finally:
        _KEPT.reset(token)


def check(target: Global) -> None:
    """Refuse a global that no pickle of ours may name."""
    if renamed(target.module, target.name) != target or not (
        _is_in(GLOBALS, target) or _is_in(ENUMS, target) or _is_kept(target)
    ):
        raise _refusal(target)


def check_call(record: Opaque) -> None:
    """Refuse the call of anything but a listed global; `getattr` may only take a member of a listed
    enumeration."""
    target = record.target
    if target == GETATTR:
        owner, member = record.args
        if not isinstance(owner, Global) or not _is_in(ENUMS, owner) or not member.isidentifier():
            raise _refusal(_root_of(owner), f".{member}")
    elif isinstance(target, Global):
        check(target)
        if not (record.new or _may_be_called(target, record)):
            raise _refusal(target, "(…)")
    else:
        raise _refusal(_root_of(target), "(…)")


def _may_be_called(target: Global, record: Opaque) -> bool:
    if _is_in(ENUMS, target):
        return len(record.args) == 1 and not record.kwargs
    return target.module.partition(".")[0] in _CALLED or _is_kept(target)


def _is_in(table: dict[str, frozenset[str]], target: Global) -> bool:
    return target.name in table.get(target.module, ())


def _is_kept(target: Global) -> bool:
    return target.module in _KEPT.get(frozenset()) and target.name.isidentifier()


def _is_dotted_name(module: str) -> bool:
    return module.isascii() and all(part.isidentifier() for part in module.split("."))


def _root_of(target: Global | Opaque) -> Global:
    """What a chain of calls and attributes starts from."""
    while isinstance(target, Opaque):
        target = target.args[0] if target.target == GETATTR else target.target
    return target


def _refusal(target: Global, member: str = "") -> RefusedError:
    can_be_kept = not member and target.module.partition(".")[0] not in _CALLED
    remedy = f", or, if you trust it, keep it with --keep-foreign-objects {target.module}"
    return RefusedError(
        f"{target.file or 'the checkpoint'}: its pickle names {str(target) + member!r:.200}, which "
        "is not on the list of what ParamMap writes (parammap/formats/allowed.py), as loading it "
        "could run foreign code; put a plain value in its place with the program that saved the "
        f"file, and convert again{remedy * can_be_kept:.200}"
    )
