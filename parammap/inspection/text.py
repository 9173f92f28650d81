"""An inspection's facts as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from parammap.frameworks import registry
from parammap.frameworks.framework import Inspection
from parammap.tensors.names import shorten_names

STATES = {
    "weight": "weight",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "model_weight": "model's own weight",
}
SIDECARS = {"layout": "layout files", "maps": "bare maps"}
BOUNDS = {
    "layout": "the layout file",
    "file": "distrib_optim.pt",
    "map": "the map alone, without the last one's padding",
}
#: what a fact of the model reads as, by its name
_MODEL: dict[str, Callable[[Any], str]] = {
    "num_layers": lambda v: counted(v, "layer"),
    "hidden_size": lambda v: f"hidden {v}",
    "ffn_hidden_size": lambda v: f"ffn {v}",
    "num_attention_heads": lambda v: f"{v} heads",
    "num_query_groups": lambda v: f"{v} query groups",
    "kv_channels": lambda v: f"head size {v}",
    "vocab_size": lambda v: f"vocabulary {v}",
    "padded_vocab_size": lambda v: f"padded vocabulary {v}",
    "max_position_embeddings": lambda v: f"{v} positions",
    "position_embedding_type": lambda v: f"{v} positions",
    "activation": str,
    "normalization": str,
    "swiglu": lambda v: "SwiGLU" if v else "no SwiGLU",
    "add_bias_linear": lambda v: "biases" if v else "no biases",
    "num_experts": lambda v: f"{v} experts",
    "untie_embeddings_and_output_weights": lambda v: (
        "untied output layer" if v else "tied output layer"
    ),
}
_SIZES = ("bytes", "kB", "MB", "GB", "TB", "PB")


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as a table of labels and values, and the tree of tensors if the facts have it."""
    width = max(len(label) for label, _ in table(facts)) + 2
    result = [title(facts)]
    for label, values in table(facts):
        result += [
            f"  {label if number == 0 else '':<{width}}{value}"
            for number, value in enumerate(values)
        ]
    return result + list(_tree(facts.get("tensors", ())))


def title(facts: dict[str, Any]) -> str:
    iteration = f", iteration {facts['iteration']}" if facts["iteration"] else ""
    return f"{asked(facts).title or facts['framework']} checkpoint{iteration}"


def asked(facts: dict[str, Any]) -> Inspection:
    """What the framework that the facts are of has to say."""
    return registry.framework(facts["framework"]).inspection


def table(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, lines) of all that is known; labels without a line are left out."""
    rows = [
        ("folder", [facts["folder"]]),
        ("release", [release(facts)]),
        ("layout", [layout(facts)]),
        ("stages", [f"pp {stage['pp']}: {stage_text(stage)}" for stage in facts["stages"]]),
        ("model", [", ".join(model(facts["model"]))]),
        ("parameters", list(parameters(facts["parameters"]))),
        ("states", [state(one) for one in facts["states"]]),
        ("progress", list(progress(facts["progress"]))),
        ("optimizer", list(optimizer(facts["optimizer"]))),
        ("buffers", [buffer(one) for one in facts["buffers"]]),
        ("fsdp", list(flats(facts["flat_parameters"]))),
        ("on disk", list(files(facts["files"]))),
        ("sidecar", [sidecar(facts["sidecar"])]),
        ("missing", facts["missing"] or ["nothing"]),
    ]
    return [(label, values) for label, values in rows if values]


def release(facts: dict[str, Any]) -> str:
    known = facts["release"]
    if not known:
        return "release not recorded"
    origin = "" if asked(facts).as_trained else "made from a run of Megatron-LM "
    return f"{origin}core {known['core']}, torch {known['torch']}"


def layout(facts: dict[str, Any]) -> str:
    sizes = facts["layout"]
    if describe := asked(facts).layout:
        return describe(sizes)
    shown = [f"{name} {sizes[name]}" for name in ("tp", "pp", "vpp", "ep", "dp", "cp")]
    etp = f" · etp {sizes['etp']}" if sizes["etp"] != sizes["tp"] else ""
    return f"{' × '.join(shown[:2])} · {' · '.join(shown[2:])}{etp} · order {sizes['order']}"


def stage_text(stage: dict[str, Any]) -> str:
    several = len(stage["chunks"]) > 1
    return "; ".join(chunk_text(chunk, several) for chunk in stage["chunks"])


def chunk_text(chunk: dict[str, Any], several: bool) -> str:
    """What a chunk holds, after its number where a stage has several."""
    layers = (
        [f"{'layers' if len(chunk['layers']) > 1 else 'layer'} {spans(chunk['layers'])}"]
        if chunk["layers"]
        else []
    )
    number = f"chunk {chunk['vpp']}: " if several else ""
    return number + (
        ", ".join(
            (["embedding"] if chunk["embedding"] else [])
            + layers
            + (["output layer"] if chunk["output"] else [])
        )
        or "no layers"
    )


def spans(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] → '0–2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def model(known: dict[str, Any]) -> list[str]:
    return [_MODEL[name](value) for name, value in known.items()]


def parameters(counts: dict[str, Any]) -> Iterator[str]:
    yield f"{counts['total']:,} in {counts['tensors']:,} tensors, each counted once"
    yield ", ".join(f"{kind} {size:,}" for kind, size in counts["by_kind"].items())
    if counts["tied_copy"] is None:
        yield "whether the output layer is a copy of the embedding is not recorded"
    elif counts["tied_copy"]:
        yield f"the output layer's copy of the embedding, {counts['tied_copy']:,}, is not counted"
    if counts["vocab_padding"] is None:
        yield "how many rows pad the vocabulary is not recorded"
    elif counts["vocab_padding"]:
        yield f"of these {counts['vocab_padding']:,} pad the vocabulary"
    if counts["without_padding"] not in (None, counts["total"]):
        yield f"{counts['without_padding']:,} without padding"


def state(one: dict[str, Any]) -> str:
    return (
        f"{STATES.get(one['role'], one['role'])}: {one['dtype']}, "
        f"{counted(one['tensors'], 'tensor')}, "
        f"{counted(one['elements'], 'element')}, {size(one['bytes'])}"
    )


def progress(facts: dict[str, Any]) -> Iterator[str]:
    counts = {"consumed_samples": "sample", "consumed_tokens": "token"}
    told = [counted(step, "step") for step in facts["steps"]] + [
        counted(facts[name], what) for name, what in counts.items() if facts[name]
    ]
    if told:
        dtype = facts["compute_dtype"]
        yield ", ".join([*told, f"computed in {dtype}"] if dtype else told)


def optimizer(facts: dict[str, Any]) -> Iterator[str]:
    if facts["generation"]:
        yield f"distrib_optim.pt: {facts['generation']} ({facts['written_by']})"
    if facts["reason"]:
        yield f"not read{' whole' if facts['states'] else ''}: see missing"
    if facts["name"] and facts["groups"]:
        scale = (
            "not scaled"
            if facts["loss_scale"] is None
            else f"scaled by {_short(facts['loss_scale'])}"
        )
        yield f"{facts['name']}, the loss {scale}"
    for number, group in enumerate(facts["groups"]):
        yield f"group {number}: " + ", ".join(f"{name} {_short(group[name])}" for name in group)


def _short(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def buffer_name(one: dict[str, Any]) -> str:
    kind = one["kind"] or "dense"
    return (
        f"pp {one['pp']} chunk {one['chunk']} · {kind} {one['param_dtype']} buffer {one['buffer']}"
    )


def ranks_text(ranks: list[list[int]]) -> str:
    """Which ranks, by tp and, where there are several, ep."""
    tps, eps = ({rank[axis] for rank in ranks} for axis in (0, 2))
    return f"tp {spans(tps)}" + (f", ep {spans(eps)}" if any(eps) else "")


def buffer(one: dict[str, Any]) -> str:
    return (
        f"{buffer_name(one)} on {ranks_text(one['ranks'])}: "
        f"{counted(len(one['buckets']), 'bucket')}, {counted(one['parameters'], 'parameter')}, "
        f"{counted(one['numel'], 'element')}, of these {one['gaps']:,} in gaps and "
        f"{one['padding']:,} padding (bounds by {BOUNDS[one['bounds']]})"
    )


def flats(known: list[dict[str, Any]]) -> Iterator[str]:
    """Flat parameters of one size stand together."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for one in known:
        sizes = (
            one["parameters"],
            one["numel"],
            one["shards"],
            one["chunk"],
            one["padding"],
            tuple(one["parts"]),
        )
        alike.setdefault(sizes, []).append(one["key"])
    for (count, numel, shards, chunk, padding, parts), keys in alike.items():
        yield (
            f"{shorten_names(keys)} on {'part' if len(parts) == 1 else 'parts'} {spans(parts)}: "
            f"{counted(count, 'parameter')}, {counted(numel, 'element')} in "
            f"{counted(shards, 'shard')} of {chunk:,} (padding {padding:,})"
        )


def files(kinds: list[dict[str, Any]]) -> Iterator[str]:
    for one in kinds:
        yield f"{one['kind']}: {counted(one['files'], 'file')}, {size(one['bytes'])}"
    yield f"in all {size(sum(one['bytes'] for one in kinds))}"


def sidecar(known: dict[str, Any] | None) -> str:
    if known is None:
        return "none"
    return f"{SIDECARS[known['kind']]} of {counted(known['ranks'], 'rank')} in {known['folder']}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(nbytes: float) -> str:
    for unit in _SIZES:
        if nbytes < 1000 or unit == _SIZES[-1]:
            return f"{nbytes:.3g} {unit}" if unit != "bytes" else f"{nbytes} bytes"
        nbytes /= 1000
    raise AssertionError


def _tree(tensors: list[dict[str, Any]]) -> Iterator[str]:
    """The tensors under the parts of their names; each with its shape, dtypes, split, and its names
    on the ranks."""
    above: list[str] = []
    for tensor in tensors:
        *path, leaf = tensor["name"].split(".")
        common = next(
            (depth for depth, (a, b) in enumerate(zip(path, above, strict=False)) if a != b),
            min(len(path), len(above)),
        )
        for depth in range(common, len(path)):
            yield "  " * (depth + 1) + path[depth]
        above = path
        dtypes: dict[str, list[str]] = {}
        for state, dtype in tensor["roles"].items():
            dtypes.setdefault(dtype, []).append(state)
        stored = "; ".join(f"{dtype} {' '.join(states)}" for dtype, states in dtypes.items())
        yield "  " * (len(path) + 1) + f"{leaf}  {tensor['shape']}  {stored}  {_split(tensor)}"
        for held in tensor["held_by"]:
            stages = spans(rank[1] for rank in held["ranks"])
            chunk = f" chunk {held['vpp']}" if held["vpp"] else ""
            yield (
                "  " * (len(path) + 3)
                + f"pp {stages}{chunk}, {ranks_text(held['ranks'])}: {held['name']}"
            )


def _split(tensor: dict[str, Any]) -> str:
    ranks = {tuple(rank[:1]) for held in tensor["held_by"] for rank in held["ranks"]}
    return "whole" if tensor["split"] == "whole" else f"{tensor['split']} over tp {len(ranks)}"
