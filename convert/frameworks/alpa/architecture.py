"""What a folder of Alpa's weights computes: OPT or BLOOM. Its sizes are told by its tensors, its heads by the conversion's
manifest or, of OPT, by llm_serving's table of public models (alpa b8078a9, llm_serving/model/opt_model.py, get_config)."""

from __future__ import annotations

from ...architecture import BLOOM, GPT2, OPT, ROWS_BEFORE_POSITIONS, Architecture
from ...checkpoint import Checkpoint
from ...families import WORD_EMBEDDING
from ...fusion import PADDING
from ...states import States
from ...tensors import WEIGHT
from .reader import recorded
from .serving import EPS, POSITIONS, PUBLIC


def of(source: Checkpoint) -> Architecture:
    """The architecture of such a folder. One whose rows before the positions were added by the conversion is a GPT-2, with
    ReLU. Heads are None for a model that is not public and was not converted by ParamMap."""
    states = States(source)
    words, table = states.tensor(WEIGHT, WORD_EMBEDDING), states.tensors.get((WEIGHT, POSITIONS))
    family = _family(states)
    public = PUBLIC.get((source.num_layers, words.cols)) if family != BLOOM else None
    heads = recorded(source.folder).get("num_attention_heads") or (public.heads if public else None)
    return Architecture(
        family=family, layers=source.num_layers, hidden=words.cols, heads=heads, groups=heads,
        ffn=states.tensor(WEIGHT, "layers.0.mlp.fc1.weight").rows, vocab=words.rows,
        positions=table.rows - ROWS_BEFORE_POSITIONS.get(family, 0) if table else None,
        activation="gelu_new" if family == BLOOM else "relu", eps=EPS, tied=True, bias=True,
        head_size=words.cols // heads if heads else None)


def _family(states: States) -> str:
    if (WEIGHT, POSITIONS) not in states.tensors:
        return BLOOM
    return GPT2 if (WEIGHT, f"{POSITIONS}.{PADDING}") in states.tensors else OPT
