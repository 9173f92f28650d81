"""An OPT of another framework as a metaseq checkpoint of one part, from which any parts and shards
can be made.

The order of tensors is that of metaseq's modules, as FSDP flattens them. What metaseq asks of a
file that it loads, and that no weights tell, is that of a run which has not begun (metaseq main
f7ffa5f, checkpoint_utils.py, _upgrade_state_dict; trainer.py, load_checkpoint): optimizer_history,
extra_state, no optimizer's state. `cfg` names the architecture that has learned positions and k, v,
q as one tensor (models/transformer_lm.py, transformer_lm_megatron)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import Index, TensorEntry
from parammap.checkpoint.training_state import TrainingState
from parammap.errors import RefusedError
from parammap.families import HEAD, METASEQ, OPT, Architecture
from parammap.frameworks.architecture import architecture_for
from parammap.frameworks.metaseq.architecture import ACTIVATIONS
from parammap.frameworks.metaseq.architecture import of as describe
from parammap.frameworks.metaseq.reader import naming_of
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.layout import Layout, Place
from parammap.tensors.logical import MAIN_PARAM, Stored
from parammap.tensors.names import shorten_names

ARCH = "transformer_lm_megatron"
_RANK = (0, 0, 0)
#: canonical names in metaseq's order of modules
_ROOT = (
    "embedding.word.weight",
    "embedding.position.weight",
    "final_norm.weight",
    "final_norm.bias",
    HEAD,
)
_LAYER = tuple(
    f"layers.{{i}}.{module}.{w}"
    for module in (
        "attention.qkv",
        "attention.out",
        "input_norm",
        "mlp.fc1",
        "mlp.fc2",
        "post_attention_norm",
    )
    for w in ("weight", "bias")
)


def import_model(source: Checkpoint, _: object = None) -> Checkpoint:
    """The source as metaseq's. Raises RefusedError for a model that is no OPT, and for one whose
    heads nobody recorded."""
    architecture = architecture_for(source, (OPT,), "metaseq")
    _check(source, architecture)
    empty = Checkpoint(
        "metaseq",
        source.folder,
        0,
        Layout(),
        Index([], Layout()),
        False,
        source.num_layers,
        rank_folders={_RANK: source.folder},
        rank_metadata={_RANK: _meta(architecture)},
        training_states={_RANK: TrainingState(iteration=0)},
        dropped=source.dropped,
        notes=source.notes,
        describe=describe,
    )
    naming = naming_of(empty)
    return replace(
        empty,
        index=Index([naming.hold(found) for found in _found(SourceTensors(source))], Layout()),
    )


def _check(source: Checkpoint, model: Architecture) -> None:
    reasons = {
        "nobody recorded its number of heads": model.heads is None,
        f"its activation is {model.activation}": model.activation not in ACTIVATIONS.values(),
    }
    for reason, applies in reasons.items():
        if applies:
            raise RefusedError(f"{source.folder}: cannot be metaseq's OPT: {reason}")


def _found(states: SourceTensors) -> Iterator[TensorEntry]:
    """The tensors under metaseq's names. Raises RefusedError for those that have none, and for one
    that lacks a part."""
    rows, used = families.rows_of(METASEQ), set()
    for canonical, i in [
        *((name, None) for name in _ROOT),
        *((name, i) for i in range(states.source.num_layers) for name in _LAYER),
    ]:
        name, row = rows[canonical]
        _, atoms = states.parts(canonical.format(i=i), row.arrangement)
        if canonical == HEAD and (MAIN_PARAM, HEAD) not in states.tensors:
            continue
        tensors = [states.tensor(MAIN_PARAM, atom) for atom in atoms]
        used |= set(atoms)
        shape = (sum(tensor.rows for tensor in tensors), *tensors[0].shape[1:])
        yield TensorEntry(
            name.format(i=i), Place(), MAIN_PARAM, Stored(tensors[0].dtype, shape, ())
        )
    if unplaced := sorted(states.names() - used):
        raise RefusedError(
            f"{states.source.folder}: has {len(unplaced)} tensors that have no place in metaseq's "
            f"OPT: {shorten_names(unplaced)}; the two models are of different architectures"
        )


def _meta(model: Architecture) -> dict[str, Any]:
    """A file's content but its model."""
    settings = {
        "_name": ARCH,
        "arch": ARCH,
        "decoder_layers": model.layers,
        "decoder_embed_dim": model.hidden,
        "decoder_ffn_embed_dim": model.ffn,
        "decoder_attention_heads": model.heads,
        "decoder_learned_pos": True,
        "decoder_learned_sinusoidal": False,
        "share_decoder_input_output_embed": bool(model.tied),
        "no_scale_embedding": True,
        "alibi": False,
        "disable_bias": False,
        "activation_fn": next(
            own for own, theirs in ACTIVATIONS.items() if theirs == model.activation
        ),
        "max_target_positions": model.positions,
        "tokens_per_sample": model.positions,
        "model_parallel_size": 1,
    }
    return {
        "cfg": {
            "_name": None,
            "common": {"_name": None, "model_parallel_size": 1},
            "model": settings,
        },
        "criterion": None,
        "task_state": {},
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "optimizer_index": {},
    }
