"""What a pickle of ours may name: the classes and functions that honest checkpoints of the known
frameworks hold.

Whoever loads an output with open unpickling imports what it names and calls it, so a global that is
not listed here is refused, whatever the source did with it. None of those listed runs code that its
arguments hold, opens a file or starts a program. Names are those after Python's own renaming for
pickles of protocol 2 (`fix_imports`)."""

from __future__ import annotations

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
            "_MEM_FORMAT_ENCODING",
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


def check(target: Global) -> None:
    """Refuse a global that no pickle of ours may name."""
    if renamed(target.module, target.name) != target or not (
        _is_in(GLOBALS, target) or _is_in(ENUMS, target)
    ):
        raise _refusal(target)


def check_call(record: Opaque) -> None:
    """Refuse the call of anything but a listed global; `getattr` may only take a member of a listed
    enumeration."""
    if record.target == GETATTR:
        owner, member = record.args
        if not isinstance(owner, Global) or not _is_in(ENUMS, owner) or not member.isidentifier():
            raise _refusal(_root_of(owner), f".{member}")
    elif isinstance(record.target, Global):
        check(record.target)
    else:
        raise _refusal(_root_of(record.target), "(…)")


def _is_in(table: dict[str, frozenset[str]], target: Global) -> bool:
    return target.name in table.get(target.module, ())


def _root_of(target: Global | Opaque) -> Global:
    """What a chain of calls and attributes starts from."""
    while isinstance(target, Opaque):
        target = target.args[0] if target.target == GETATTR else target.target
    return target


def _refusal(target: Global, member: str = "") -> RefusedError:
    return RefusedError(
        f"{target.file or 'the checkpoint'}: its pickle names {target}{member}, which is not on "
        f"the list of "
        "what ParamMap writes (parammap/formats/allowed.py), as loading it would run foreign code; "
        "put a "
        "plain value in its place with the program that saved the file, and convert again"
    )
