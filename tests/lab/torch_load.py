"""torch.load of a Megatron-LM model file, with empty stand-ins for the classes of Megatron that its arguments name."""

import enum
import sys
import types
from pathlib import Path

import torch

CLASSES = {module: enum.Enum(name, {f"m{number}": number for number in range(8)}) for module, name in {
    "megatron.core.enums": "ModelType", "megatron.core.transformer.enums": "AttnBackend"}.items()}


def torch_load(path: Path) -> dict:
    """What torch.load gives; the stand-ins are gone again afterwards, so that a real Megatron can be imported."""
    before = dict(sys.modules)
    try:
        for module, kind in CLASSES.items():
            for count in range(1, module.count(".") + 2):
                part = ".".join(module.split(".")[:count])
                sys.modules.setdefault(part, types.ModuleType(part))
            setattr(sys.modules[module], kind.__name__, kind)
        return torch.load(path, weights_only=False)
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith("megatron"):
                del sys.modules[name]
