"""The save-time hook for those who do not patch: `from parammap import hooks; hooks.install()`,
before anything of Megatron.

install() makes Python load megatron.training.checkpointing with the same call at the same place as
patches/param_map.patch; no file of Megatron-LM changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

TARGET = "megatron.training.checkpointing"

#: stands once in save_checkpoint(), Megatron-LM core_r0.6.0 to main; a comment, so the call can
#: take its line
MARKER = "    # Collect args, model, RNG.\n"
CALL = "    save_param_map(args, iteration, model, optimizer, checkpoint_name)\n"


class _HookedLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        from .param_map import save_param_map

        vars(module)["save_param_map"] = save_param_map
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname) or ""
        if source.count(MARKER) == 1:
            source = source.replace(MARKER, CALL)
        else:
            print(
                f"param_map: no sidecars: {self.path} does not have the line '{MARKER.strip()}' "
                f"once",
                flush=True,
            )
        code: CodeType = compile(source, self.path, "exec", dont_inherit=True)
        return code


class _HookedFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == TARGET else None
        if spec is not None and spec.origin is not None:
            spec.loader = _HookedLoader(fullname, spec.origin)
        return spec


def install() -> None:
    """Have every save of this process write its sidecars.

    Raises RuntimeError if megatron.training.checkpointing is already imported: it would save
    without them."""
    if TARGET in sys.modules:
        raise RuntimeError(
            f"install() comes too late: {TARGET} is imported; call it before importing Megatron"
        )
    if not any(isinstance(finder, _HookedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookedFinder())
