"""Where the API meets the frameworks that can be written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.cli.target_options import options_of
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.plan.plan import Output
from parammap.tensors.layout import SIZES

#: frameworks whose files hold a model's tensors by the names of its state dict, and the options
#: with which they hold them whole
DIALECTS: dict[str, dict[str, object]] = {
    "transformers": {},
    "megatron": {},
    "mindspore": {},
    "metaseq": {"form": "singleton"},
    "merak": {},
    "alpa": {},
}


def model_files(source: Checkpoint, dialect: str, given: Mapping[str, object]) -> Output:
    """The files of a model's weights as one rank of a framework would hold them. Raises
    RefusedError where a conversion would."""
    if dialect not in DIALECTS:
        raise RefusedError(
            f"{dialect}: is no dialect of state dicts; choose one of {', '.join(DIALECTS)}"
        )
    target = registry.target(dialect)
    options = options_of(dialect, {**DIALECTS[dialect], **given}, weights_only=True)
    sizes = dict.fromkeys(SIZES if target.resharded else target.sizes, 1)
    weights = replace(source, with_optimizer=False)
    return target.files(target.wanted(weights, options, sizes, (), None), options, sizes)
