"""torch.load of a Megatron-LM model file without Megatron: inert stand-ins take the place of its
classes."""

import pickle
import types
from functools import cache
from pathlib import Path

import torch


class StandIn:
    """An object of a class that is not here: what it was made of, and the state that was set."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __eq__(self, other):
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self):
        return hash((type(self).__name__, str(vars(self))))


@cache
def stand_in(module: str, name: str) -> type:
    return type(f"{module}.{name}", (StandIn,), {})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        is_framework = module.partition(".")[0] in ("megatron", "metaseq")
        return stand_in(module, name) if is_framework else super().find_class(module, name)


def torch_load(path: Path) -> dict:
    module = types.ModuleType("pickle_with_stand_ins")
    module.Unpickler, module.load = _Unpickler, pickle.load
    return torch.load(path, weights_only=False, pickle_module=module)
