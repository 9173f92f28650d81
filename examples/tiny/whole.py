"""The live state of a run as another layout holds it: put together over its ranks and cut anew,
with numpy alone.

`cut_for` reads the truth of a run (tiny/live_state.py), puts each parameter together, cuts it again
by the rule of megatron-core's parallel layers, and writes a truth folder of the same form. Nothing
of the converter is used: the rules are written down here once more, from megatron-core's
tensor_parallel/layers.py, transformer/mlp.py, transformer/moe/experts.py and
transformer/multi_latent_attention.py. A column-parallel layer is cut by rows, a row-parallel one by
columns; q, k and v lie group after group, so that their rows are cut like any others; of a gated
MLP the two halves are cut, each for itself; GroupedMLP keeps [expert, in, out] in a tensor that
claims another shape; the down-projections of latent attention are whole on every rank. Where the
padded vocabulary grows, its last row is repeated; where it shrinks, padding is cut off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.tiny.options import VOCAB_DIVISOR
from examples.tiny.trained import Trained, Truth

ROLES = ("weight", "main", "exp_avg", "exp_avg_sq")
ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight",
)
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
TIED, TIED_COPY = VOCABULARY
LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")
GATED = re.compile(r"linear_fc1\.(weight|bias)\d*$")

State = dict[
    tuple[str, str], np.ndarray
]  # (role, name with global layer and expert numbers): the whole parameter


class Sizes(NamedTuple):
    """A parallel layout; `stage_layers` counts the layers of each stage, or of each chunk in the
    order in which data passes them, where they are not the same."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    dp: int = 1
    cp: int = 1
    stage_layers: tuple[int, ...] = ()

    def layers(self, stage: int, chunk: int, total: int) -> list[int]:
        """The global numbers of a chunk's layers: chunks go round the stages."""
        chunks = self.pp * self.vpp
        counts = self.stage_layers or (total // self.pp,) * self.pp
        if len(counts) != chunks:
            counts = tuple(count // self.vpp for count in counts) * self.vpp
        number = chunk * self.pp + stage
        return list(range(sum(counts[:number]), sum(counts[: number + 1])))


class Shape(NamedTuple):
    """How a parameter of a rank is to be looked at, so that tp and ep each cut along one axis;
    None: not cut."""

    view: tuple[int, ...]
    tp_axis: int | None
    ep_axis: int | None = None


def shape_of(name: str, shape: tuple[int, ...], args: dict[str, Any], local_experts: int) -> Shape:
    gates = (2,) if args["swiglu"] else ()
    if name.endswith("experts.weight1"):
        return Shape((local_experts, args["hidden_size"], *gates, -1), 2 + len(gates), 0)
    if name.endswith("experts.weight2"):
        return Shape((local_experts, -1, args["hidden_size"]), 1, 0)
    if gates and GATED.search(name):
        return Shape((2, shape[0] // 2, *shape[1:]), 1)
    tensor = name.rstrip("0123456789")  # the number of an expert
    axis = 0 if tensor.endswith(ROWS) else 1 if tensor.endswith(COLUMNS) else None
    return Shape(shape, axis)


def whole(run: Trained, folder: str = "truth") -> State:
    """Every parameter of the model, put together; copies on several ranks have to be equal. Gated
    and grouped ones keep the view of `shape_of`; the tied copy on the last stage is left out."""
    parts: dict[tuple[str, str], dict[tuple[int, int], np.ndarray]] = {}
    shapes: dict[str, Shape] = {}
    truths = [Truth(file) for file in sorted((run.path / folder).glob("tp*.npz"))]
    args = truths[0].meta["args"]
    local_experts = experts_of_rank(args, args["expert_model_parallel_size"])
    for truth in truths:
        tp, _, ep = truth.place
        for chunk, local_name in truth.names():
            fact = truth.meta["params"][f"{chunk}/{local_name}"]
            if fact["tied_copy"]:
                continue
            name = globally(local_name, truth.meta["layers"][chunk], ep, local_experts)
            shapes[name] = shape_of(name, tuple(fact["shape"]), args, local_experts)
            for role in ROLES:
                value = truth.array(chunk, local_name, role).reshape(shapes[name].view)
                copies = parts.setdefault((role, name), {})
                at = (
                    tp if shapes[name].tp_axis is not None else 0,
                    ep if shapes[name].ep_axis is not None else 0,
                )
                if at in copies:
                    assert same(copies[at], value), (
                        f"{truth.file.name}: {local_name}: ranks hold different copies"
                    )
                copies[at] = value
    return {key: join(copies, shapes[key[1]]) for key, copies in parts.items()}


def experts_of_rank(args: dict[str, Any], ep: int) -> int:
    return (args["num_experts"] or 0) // ep


def globally(name: str, layers: list[int], ep: int, local_experts: int) -> str:
    name = LAYER.sub(lambda match: str(layers[int(match[0])]), name)
    return EXPERT.sub(lambda match: str(ep * local_experts + int(match[0])), name)


def join(copies: dict[tuple[int, int], np.ndarray], shape: Shape) -> np.ndarray:
    rows = [
        [copies[tp, ep] for tp in sorted({at[0] for at in copies})]
        for ep in sorted({at[1] for at in copies})
    ]
    over_tp = [
        row[0] if shape.tp_axis is None else np.concatenate(row, shape.tp_axis) for row in rows
    ]
    return over_tp[0] if shape.ep_axis is None else np.concatenate(over_tp, shape.ep_axis)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether dtype, shape and every bit agree."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


def cut_for(run: Trained, sizes: Sizes, out: Path, divisor: int = VOCAB_DIVISOR) -> Trained:
    """Write OUT/truth/tp*_pp*_ep*.npz: what each rank of the layout has to hold of the run's state.
    The vocabulary is padded to a multiple of `divisor` · tp rows."""
    state, source = whole(run), run.truths()
    (out / "truth").mkdir(parents=True)
    for tp in range(sizes.tp):
        for pp in range(sizes.pp):
            for ep in range(sizes.ep):
                arrays, meta = rank_truth(state, source, sizes, (tp, pp, ep), divisor)
                np.savez(
                    out / "truth" / f"tp{tp:02}_pp{pp:03}_ep{ep:03}.npz",
                    meta=np.array(json.dumps(meta)),
                    **arrays,
                )
    return Trained(out)


def rank_truth(
    state: State, source: list[Truth], sizes: Sizes, place: tuple[int, int, int], divisor: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the meta of one rank; what the layout does not change is taken from the
    source's rank 0. Experts have parameter groups of their own with ep > 1 only; of a source that
    has none, the layout has to have none."""
    meta, (tp, pp, ep) = source[0].meta, place
    args = relaid_args(meta["args"], sizes, divisor)
    layers = [sizes.layers(pp, chunk, args["num_layers"]) for chunk in range(sizes.vpp)]
    arrays, params = {}, {}
    for chunk, local_name, name in names_of_rank(state, args, layers, sizes, place):
        for role in ROLES:
            arrays[f"{chunk}/{local_name}/{role}"] = cut(
                name, state[role, name], args, sizes, tp, ep
            )
        params[f"{chunk}/{local_name}"] = {"tied_copy": local_name == TIED_COPY != name}
    groups = [
        group
        for group in meta["param_groups"]
        if sizes.ep > 1 or not group.get("is_expert_parallel")
    ]
    return arrays, {
        **meta,
        "args": args,
        "place": {"tp": tp, "pp": pp, "ep": ep},
        "layers": layers,
        "params": params,
        "param_groups": groups,
    }


def relaid_args(args: dict[str, Any], sizes: Sizes, divisor: int) -> dict[str, Any]:
    multiple = divisor * sizes.tp
    return {
        **args,
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if sizes.vpp > 1 else None,
        "expert_model_parallel_size": sizes.ep,
        "data_parallel_size": sizes.dp,
        "context_parallel_size": sizes.cp,
        "world_size": sizes.tp * sizes.pp * sizes.dp * sizes.cp,
        "padded_vocab_size": -(-args["vocab_size"] // multiple) * multiple,
    }


def names_of_rank(
    state: State,
    args: dict[str, Any],
    layers: list[list[int]],
    sizes: Sizes,
    place: tuple[int, int, int],
) -> Iterator[tuple[int, str, str]]:
    """(chunk, name on the rank, name in `state`) of every parameter that a rank holds."""
    _, pp, ep = place
    local_experts = experts_of_rank(args, sizes.ep)
    is_first, is_last = pp == 0, pp == sizes.pp - 1
    for name in [name for role, name in state if role == "weight"]:
        layer, expert = LAYER.search(name), EXPERT.search(name)
        if expert and int(expert[0]) // local_experts != ep:
            continue
        local_name = EXPERT.sub(lambda match: str(int(match[0]) % local_experts), name)
        if layer:
            for chunk, numbers in enumerate(layers):
                if int(layer[0]) in numbers:
                    yield chunk, LAYER.sub(str(numbers.index(int(layer[0]))), local_name), name
        elif name.startswith("embedding.") and is_first:
            yield 0, name, name
        elif not name.startswith("embedding.") and is_last:
            yield sizes.vpp - 1, name, name
    if is_last and sizes.pp > 1 and not args["untie_embeddings_and_output_weights"]:
        yield sizes.vpp - 1, TIED_COPY, TIED


def cut(
    name: str, value: np.ndarray, args: dict[str, Any], sizes: Sizes, tp: int, ep: int
) -> np.ndarray:
    """A rank's part of a whole parameter, in the shape that the rank's own has."""
    if name in VOCABULARY:
        kept = value[: args["padded_vocab_size"]]
        value = np.pad(kept, [(0, args["padded_vocab_size"] - len(kept)), (0, 0)], mode="edge")
    shape = shape_of(name, value.shape, args, experts_of_rank(args, sizes.ep))
    if shape.ep_axis is not None:
        value = np.split(value, sizes.ep, shape.ep_axis)[ep]
    if shape.tp_axis is not None:
        value = np.split(value, sizes.tp, shape.tp_axis)[tp]
    value = np.ascontiguousarray(value)
    if name.endswith("experts.weight1"):
        return value.reshape(args["hidden_size"], -1)
    if name.endswith("experts.weight2"):
        return value.reshape(-1, args["hidden_size"])
    return value.reshape(-1, *value.shape[2:]) if args["swiglu"] and GATED.search(name) else value
