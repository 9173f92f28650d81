"""Training states as `alpa.restore_checkpoint` reads them: parameters and Adam's moments, for the
models that Alpa trains.

`checkpoint_{step}` is a MessagePack tree, the flax state dict of a TrainState, with the name of a
folder for each array. The folder holds `metadata_0`, a pickle of the array's shape, dtype and shard
names, and here one shard, `shard_0.0`, a numpy file: whoever restores cuts it as its own mesh
wants. Alpa itself pairs the names of folders with arrays in another order than it writes the tree
(names as dicts were filled, arrays by sorted keys), so that a kernel can lie in a folder called
`…bias`; here all keys are sorted, and both orders are one.

Sources: alpa b8078a9 (alpa/serialization.py, alpa/model/model_util.py's TrainState); the trees of
the models, transformers 4.49 (models/gpt2/modeling_flax_gpt2.py, models/opt/modeling_flax_opt.py)
and alpa's examples/llm_serving/model/opt_model.py; of optimizers, optax 0.2. Alpa's own
alpa/model/gpt_model.py is no target: it is BERT with a head, its norms stand behind attention and
MLP and there is one on the embedding, so that no GPT's weights make it compute the same."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.families import GPT2, HEAD, OPT, WORD_EMBEDDING
from parammap.families.opt import BUFFERS
from parammap.formats import msgpack, npy
from parammap.formats.frames import Literal
from parammap.formats.pickle_writer import dumps
from parammap.formats.pickles import Global, Opaque
from parammap.frameworks.alpa.serving import (
    POSITIONS,
    check_names,
    checked_opt,
    described,
    parts_of,
    rows_to_add,
    states_of,
)
from parammap.frameworks.architecture import architecture_for
from parammap.plan.plan import Output, Wanted, WantedFile, in_a_row, interleaved
from parammap.plan.source_tensors import SourceTensors
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM, TensorSpec


@dataclass(frozen=True, slots=True)
class Leaf:
    """A parameter of a flax model: the canonical tensors whose rows make it up, one after the
    other; if `transposed`, [in, out], with the columns of several interleaved (column 3·r + k is
    row r of the k-th), as vectors are, too."""

    names: tuple[str, ...]
    transposed: bool = False


def _norm(path: str, name: str) -> dict[str, Leaf]:
    return {f"{path}.scale": Leaf((f"{name}.weight",)), f"{path}.bias": Leaf((f"{name}.bias",))}


def _dense(path: str, *names: str) -> dict[str, Leaf]:
    """flax's Dense, whose kernel is [in, out]."""
    return {
        f"{path}.kernel": Leaf(tuple(f"{name}.weight" for name in names), True),
        f"{path}.bias": Leaf(tuple(f"{name}.bias" for name in names), len(names) > 1),
    }


def _conv1d(path: str, *names: str) -> dict[str, Leaf]:
    """transformers' FlaxConv1D, whose kernel is [out, in]."""
    return {
        f"{path}.kernel": Leaf(tuple(f"{name}.weight" for name in names)),
        f"{path}.bias": Leaf(tuple(f"{name}.bias" for name in names)),
    }


@dataclass(frozen=True, slots=True)
class FlaxModel:
    """The parameters of a flax model by path, `{i}` standing for the layer; `head` is that of one
    that is not tied, '' if there is none. One of OPT's family has rows of padding before its
    positions, and ReLU."""

    leaves: dict[str, Leaf]
    head: str
    family: str


_L = "layers.{i}."
_QKV = tuple(f"{_L}attention.{atom}" for atom in "qkv")
MODELS = {
    "gpt2": FlaxModel(
        {
            "transformer.wte.embedding": Leaf((WORD_EMBEDDING,)),
            "transformer.wpe.embedding": Leaf((POSITIONS,)),
            **_norm("transformer.h.{i}.ln_1", _L + "input_norm"),
            **_conv1d("transformer.h.{i}.attn.c_attn", *_QKV),
            **_conv1d("transformer.h.{i}.attn.c_proj", _L + "attention.out"),
            **_norm("transformer.h.{i}.ln_2", _L + "post_attention_norm"),
            **_conv1d("transformer.h.{i}.mlp.c_fc", _L + "mlp.fc1"),
            **_conv1d("transformer.h.{i}.mlp.c_proj", _L + "mlp.fc2"),
            **_norm("transformer.ln_f", "final_norm"),
        },
        "lm_head.kernel",
        GPT2,
    ),
    "opt": FlaxModel(
        {
            "model.decoder.embed_tokens.embedding": Leaf((WORD_EMBEDDING,)),
            "model.decoder.embed_positions.embedding": Leaf((POSITIONS,)),
            **_norm("model.decoder.layers.{i}.self_attn_layer_norm", _L + "input_norm"),
            **_dense("model.decoder.layers.{i}.self_attn.q_proj", _L + "attention.q"),
            **_dense("model.decoder.layers.{i}.self_attn.k_proj", _L + "attention.k"),
            **_dense("model.decoder.layers.{i}.self_attn.v_proj", _L + "attention.v"),
            **_dense("model.decoder.layers.{i}.self_attn.out_proj", _L + "attention.out"),
            **_norm("model.decoder.layers.{i}.final_layer_norm", _L + "post_attention_norm"),
            **_dense("model.decoder.layers.{i}.fc1", _L + "mlp.fc1"),
            **_dense("model.decoder.layers.{i}.fc2", _L + "mlp.fc2"),
            **_norm("model.decoder.final_layer_norm", "final_norm"),
        },
        "lm_head.kernel",
        OPT,
    ),
    "llm_serving": FlaxModel(
        {
            "params.transformers.embeddings.word_embeddings.embedding": Leaf((WORD_EMBEDDING,)),
            "params.transformers.embeddings.position_embeddings.embedding": Leaf((POSITIONS,)),
            **_norm("params.transformers.encoder.{i}.attention.layer_norm", _L + "input_norm"),
            **_dense("params.transformers.encoder.{i}.attention.self.qkv_combined", *_QKV),
            **_dense("params.transformers.encoder.{i}.attention.dense", _L + "attention.out"),
            **_norm("params.transformers.encoder.{i}.ffn.layer_norm", _L + "post_attention_norm"),
            **_dense("params.transformers.encoder.{i}.ffn.fc1", _L + "mlp.fc1"),
            **_dense("params.transformers.encoder.{i}.ffn.fc2", _L + "mlp.fc2"),
            **_norm("params.transformers.layer_norm", "final_norm"),
        },
        "",
        OPT,
    ),
}

_ADAM, _COUNT = object(), object()
#: the states of optimizers; "examples" is that of alpa's examples/{gpt2,opt_finetune}:
#: chain(clip_by_global_norm, adamw with a schedule and a mask)
OPTIMIZERS = {
    "examples": {"0": {}, "1": {"0": _ADAM, "1": {"inner_state": {}}, "2": {"count": _COUNT}}},
    "adamw": {"0": _ADAM, "1": {}, "2": {}},
    "adam": {"0": _ADAM, "1": {}},
}
#: DynamicScale's own start (alpa, model_util.py)
_FIRST_SCALE = 65536.0


@dataclass(frozen=True, slots=True)
class Options:
    """`dtype` is the dtype that the model computes in; one that is not float32 has a float32 master
    copy and a dynamic loss scale beside it. `model` and `optimizer` name a table above; model '' is
    opt for an OPT and gpt2 for others."""

    dtype: str = "float32"
    model: str = ""
    optimizer: str = "examples"
    vocab_size: int | None = None
    activation: str | None = None


def output(target: Checkpoint, options: Options = Options()) -> Output:
    """Plan the folder. Raises RefusedError for a model of another architecture or without its
    optimizer's state."""
    architecture = architecture_for(target, (GPT2, OPT), "Alpa's training", options.activation)
    states = states_of(target, options.vocab_size)
    name = options.model or ("opt" if architecture.family == OPT else "gpt2")
    model, rows_before = MODELS[name], rows_to_add(architecture)
    leaves = dict(_leaves(model, states))
    check_names(states, {part for leaf in leaves.values() for part in leaf.names}, f"flax's {name}")
    if model.family == OPT:
        checked_opt(states, options.activation, f"flax's {name}")
    elif not rows_before:
        raise RefusedError(
            f"{target.folder}: cannot be flax's {name}: its positions begin with rows of padding"
        )
    if missing := sorted({EXP_AVG, EXP_AVG_SQ} - target.index.states()):
        raise RefusedError(
            f"{target.folder}: holds no {' and '.join(missing)}, which Alpa's training state has "
            "of every parameter; --to alpa takes weights alone"
        )
    writer = _StateWriter(states, leaves, rows_before if model.family == OPT else 0)
    tree = _train_state(writer, options)
    manifest = WantedFile(
        f"checkpoint_{target.iteration}", (Literal(msgpack.packb(tree)),), (), completes=True
    )
    return Output(
        [*writer.files, manifest],
        [(folder, "") for folder in target.rank_folders.values()],
        [],
        {
            "alpa": {
                **described(states, architecture),
                "model": name,
                "optimizer": options.optimizer,
                "dtype": options.dtype,
                "activation": architecture.activation,
            }
        },
        ignorable=BUFFERS,
    )


def _leaves(model: FlaxModel, states: SourceTensors) -> Iterator[tuple[str, Leaf]]:
    for path, leaf in model.leaves.items():
        for i in range(states.source.num_layers) if "{i}" in path else [None]:
            yield (
                path.format(i=i),
                Leaf(tuple(name.format(i=i) for name in leaf.names), leaf.transposed),
            )
    if model.head and (MAIN_PARAM, HEAD) in states.tensors:
        yield model.head, Leaf((HEAD,), True)


def _train_state(writer: _StateWriter, options: Options) -> object:
    source = writer.states.source
    state = source.training_state
    step, is_mixed = source.steps_taken(), options.dtype != "float32"
    adam = {
        "count": lambda path: writer.scalar(path, "int32", step),
        "mu": lambda path: writer.tree(path, EXP_AVG, "float32"),
        "nu": lambda path: writer.tree(path, EXP_AVG_SQ, "float32"),
    }
    scale = _FIRST_SCALE if state.loss_scale is None else state.loss_scale
    dynamic_scale = {
        "fin_steps": lambda path: writer.scalar(path, "int32", 0),
        "scale": lambda path: writer.scalar(path, "float32", scale),
    }
    return writer.walk(
        "state",
        {
            "dynamic_scale": dynamic_scale if is_mixed else None,
            "master_copy": (lambda path: writer.tree(path, MAIN_PARAM, "float32"))
            if is_mixed
            else None,
            "opt_state": _filled(
                OPTIMIZERS[options.optimizer], {_ADAM: adam, _COUNT: adam["count"]}
            ),
            "params": lambda path: writer.tree(path, MAIN_PARAM, options.dtype),
            "step": lambda path: writer.scalar(path, "int32", source.iteration),
        },
    )


def _filled(tree: object, values: dict[object, object]) -> object:
    return (
        {key: _filled(value, values) for key, value in tree.items()}
        if isinstance(tree, dict)
        else values[tree]
    )


class _StateWriter:
    """Collects the files of arrays; a path is that of an array in the tree and the name of its
    folder."""

    def __init__(
        self, states: SourceTensors, leaves: dict[str, Leaf], positions_before: int
    ) -> None:
        self.states, self.leaves, self.positions_before = states, leaves, positions_before
        self.files: list[WantedFile] = []

    def walk(self, path: str, tree: object) -> object:
        """The tree, sorted, with what its functions make of their paths."""
        if isinstance(tree, dict):
            return {key: self.walk(f"{path}.{key}", tree[key]) for key in sorted(tree)}
        return tree(path) if callable(tree) else tree

    def tree(self, path: str, state: str, dtype: str) -> object:
        """All parameters, or one of their moments."""
        nested: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            *parents, last = name.split(".")
            inner = nested
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = lambda path, leaf=leaf: self.parameter(path, state, leaf, dtype)
        return self.walk(path, nested)

    def parameter(self, path: str, state: str, leaf: Leaf, dtype: str) -> str:
        panels = [parts_of(self.states, state, name, self.positions_before) for name in leaf.names]
        rows = sum(part.region.sizes[0] for panel in panels for part in panel)
        rest = self.states.tensor(state, leaf.names[0]).shape[1:]
        spec = TensorSpec(path, dtype, (*rest, rows) if leaf.transposed else (rows, *rest))
        parts = (
            interleaved(panels)
            if leaf.transposed
            else in_a_row(part for panel in panels for part in panel)
        )
        return self._array(Wanted(spec, parts))

    def scalar(self, path: str, dtype: str, value: float) -> str:
        data = struct.pack({"int32": "<i", "float32": "<f"}[dtype], value)
        return self._array(Wanted(TensorSpec(path, dtype, (), data)))

    def _array(self, wanted: Wanted) -> str:
        spec = wanted.spec
        self.files += [
            WantedFile(f"{spec.name}/shard_0.0", tuple(npy.frame(spec)), (wanted,)),
            WantedFile(f"{spec.name}/metadata_0", (Literal(_metadata(spec)),), ()),
        ]
        return spec.name


def _metadata(spec: TensorSpec) -> bytes:
    """alpa/serialization.py, _save_unsharded_array; the dtype as numpy 1.22 … 2.2 pickle it."""
    dtype = npy.numpy_dtype(spec.dtype)
    pickled = Opaque(
        Global("numpy", "dtype"),
        (dtype.str[1:], False, True),
        state=(3, "<", None, None, None, -1, -1, 0),
    )
    return dumps(
        {
            "global_shape": tuple(spec.shape),
            "dtype": pickled,
            "shard_names": ["shard_0.0"],
            "shard_indices": None,
        }
    )
