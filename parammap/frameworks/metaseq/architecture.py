"""What an OPT of metaseq computes, by its settings and its tensors.

Sources: metaseq main f7ffa5f and 809e49c of 2022-05-09 (models/transformer_lm.py,
models/transformer_decoder.py, modules/transformer_decoder_layer.py, modules/layer_norm.py,
modules/activation_functions.py)."""

from __future__ import annotations

from functools import partial

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import FAMILIES, HEAD, OPT, WORD_EMBEDDING, Architecture
from parammap.frameworks.metaseq import reader as metaseq
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.logical import MAIN_PARAM

#: settings that change what a model computes, as OPT has them
_AS_OPT = {
    "no_scale_embedding": True,
    "alibi": False,
    "decoder_learned_pos": True,
    "decoder_learned_sinusoidal": False,
    "disable_bias": False,
    "disable_affine_ln": False,
    "attn_variant": "default",
}
#: metaseq's activations by transformers' names; its gelu was exact until 2022, and is computed by
#: tanh since
ACTIVATIONS = {"relu": "relu", "gelu_accurate": "gelu_new", "tanh": "tanh"}
_EPS = 1e-5


def of(source: Checkpoint) -> Architecture:
    """The architecture of a metaseq checkpoint. One without settings is taken for OPT; heads and
    whether its head is tied are then None. Raises RefusedError for a model that computes otherwise
    than OPT."""
    states = SourceTensors(source)
    setting = partial(metaseq.setting, source.common_metadata)
    said = {name: value for name in _AS_OPT if (value := setting(name)) is not None}
    unlike = [name for name, value in said.items() if value != _AS_OPT[name]]
    if unlike:
        raise RefusedError(
            f"{source.folder}: it was trained with {unlike[0]} {said[unlike[0]]}, as no OPT is"
        )
    activation = setting("activation_fn") or "relu"
    if activation not in ACTIVATIONS:
        raise RefusedError(
            f"{source.folder}: its activation is {activation}, which OPT has not, or metaseq's "
            "releases compute differently; only metaseq's own format can take it"
        )
    heads = setting("decoder_attention_heads")
    query = states.tensor(MAIN_PARAM, "layers.0.attention.q.weight")
    table = states.tensors.get((MAIN_PARAM, "embedding.position.weight"))
    return Architecture(
        family=OPT,
        layers=source.num_layers,
        hidden=query.cols,
        heads=heads,
        groups=heads,
        ffn=states.tensor(MAIN_PARAM, "layers.0.mlp.fc1.weight").rows,
        vocab=states.tensor(MAIN_PARAM, WORD_EMBEDDING).rows,
        positions=table.rows - FAMILIES[OPT].rows_before_positions if table else None,
        activation=ACTIVATIONS[activation],
        eps=_EPS,
        tied=HEAD not in states.names(),
        bias=True,
        head_size=query.rows // heads if heads else None,
    )
