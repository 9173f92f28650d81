"""What a folder of Alpa's weights computes: OPT or BLOOM. Its sizes are told by its tensors, its
heads by the conversion's manifest or, of OPT, by llm_serving's table of public models (alpa
b8078a9, llm_serving/model/opt_model.py, get_config)."""

from __future__ import annotations

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.families import BLOOM, FAMILIES, GPT2, OPT, WORD_EMBEDDING, Architecture
from parammap.frameworks.alpa.reader import recorded
from parammap.frameworks.alpa.serving import EPS, POSITIONS, PUBLIC
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.arrangement import PADDING
from parammap.tensors.logical import MAIN_PARAM


def of(source: Checkpoint) -> Architecture:
    """The architecture of such a folder. One whose rows before the positions were added by the
    conversion is a GPT-2, with ReLU. Heads are None for a model that is not public and was not
    converted by ParamMap."""
    states = SourceTensors(source)
    words, table = (
        states.tensor(MAIN_PARAM, WORD_EMBEDDING),
        states.tensors.get((MAIN_PARAM, POSITIONS)),
    )
    family = _family(states)
    public = PUBLIC.get((source.num_layers, words.cols)) if family != BLOOM else None
    heads = recorded(source.folder).get("num_attention_heads") or (public.heads if public else None)
    return Architecture(
        family=family,
        layers=source.num_layers,
        hidden=words.cols,
        heads=heads,
        groups=heads,
        ffn=states.tensor(MAIN_PARAM, "layers.0.mlp.fc1.weight").rows,
        vocab=words.rows,
        positions=table.rows - FAMILIES[family].rows_before_positions if table else None,
        activation="gelu_new" if family == BLOOM else "relu",
        eps=EPS,
        tied=True,
        bias=True,
        head_size=words.cols // heads if heads else None,
    )


def _family(states: SourceTensors) -> str:
    if (MAIN_PARAM, POSITIONS) not in states.tensors:
        return BLOOM
    return GPT2 if (MAIN_PARAM, f"{POSITIONS}.{PADDING}") in states.tensors else OPT
