"""Which pipeline modules each stage of Merak holds: cut lists, as its --partition_method makes
them.

A GPT-2 of L layers has L + 3 modules: the words, the positions, each layer, and the last norm with
the head. Source: Merak d72efe5 (Merak/modules/module.py, _partition_layers;
tools/convert_merak_gpt2_checkpoint.py)."""

from __future__ import annotations

from itertools import pairwise

from parammap.errors import RefusedError
from parammap.families import WORD_EMBEDDING, layer_of

UNIFORM, UNIFORM_FLOOR, CUSTOM = "uniform", "uniform_floor", "custom"
METHODS = (UNIFORM, UNIFORM_FLOOR, CUSTOM)
#: modules beside the layers: words and positions before them, the last norm and the head after them
BEFORE, AFTER = 2, 1
_FIRST = {WORD_EMBEDDING: 0, "embedding.position.weight": 1}


def module_of(canonical: str, num_layers: int) -> int:
    """The number of the module that a tensor belongs to, counted over the whole pipeline."""
    if layer := layer_of(canonical):
        return BEFORE + layer[1]
    return _FIRST.get(canonical, num_layers + BEFORE)


def cuts(method: str, num_layers: int, pp: int, custom: tuple[int, ...] = ()) -> tuple[int, ...]:
    """pp + 1 module numbers: stage s holds the modules from the s-th on and before the next.

    Raises RefusedError for a cut list that is none of this model's, and where a stage would hold
    nothing."""
    modules = num_layers + BEFORE + AFTER
    if (method == CUSTOM) != bool(custom):
        raise RefusedError(
            f"--partition-method {method}: a cut list goes with custom, and with custom only"
        )
    if method == CUSTOM:
        _check_custom(custom, modules, pp)
        return custom
    size = modules // pp if method == UNIFORM_FLOOR else -(-modules // pp)
    found = (*(min(size * stage, modules) for stage in range(pp)), modules)
    empty = [stage for stage, (low, high) in enumerate(pairwise(found)) if low == high]
    if modules < pp:
        raise RefusedError(
            f"--pp {pp}: {num_layers} layers are {modules} modules, so that {pp - modules} stages "
            f"would be empty; take --pp {modules} at most"
        )
    if empty:
        raise RefusedError(
            f"--pp {pp}: {modules} modules cut uniformly at {','.join(map(str, found))} leave "
            f"stage {empty[0]} empty; take --pp {-(-modules // size)}, or another "
            f"--partition-method: {UNIFORM_FLOOR}, {CUSTOM}"
        )
    return found


def _check_custom(custom: tuple[int, ...], modules: int, pp: int) -> None:
    said = f"--custom-partition {','.join(map(str, custom))}"
    if len(custom) != pp + 1:
        raise RefusedError(f"{said}: has {len(custom)} numbers; --pp {pp} takes {pp + 1}")
    if custom[0] != 0 or custom[-1] != modules:
        raise RefusedError(
            f"{said}: must begin with 0 and end with {modules}, the modules of "
            f"{modules - BEFORE - AFTER} layers"
        )
    if any(low >= high for low, high in pairwise(custom)):
        raise RefusedError(
            f"{said}: each number must be greater than the one before, or a stage would be empty"
        )
