"""Loads a converted checkpoint with the real mindspore.load_checkpoint and compares it with the
live training state.

  python -m examples.mindspore_proof SAVE_ROOT CONVERTED [--tp 8 --pp 4 …]

SAVE_ROOT is a run of examples/train_tiny.py; the sizes are those that it was converted to, where
they are not its own. Exit status 1 if anything differs. Nothing of the converter is used: which
rank holds what, and under which name, is written down here once more, from MindSpeed-Core-MS
r0.1.0, and so is the live state in another layout (tiny/whole.py). To be run in a process of its
own: MindSpore refuses to be imported after protobuf."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.tiny.options import VOCAB_DIVISOR
from examples.tiny.trained import Trained, Truth
from examples.tiny.whole import Sizes, cut_for

#: megatron-core's module path after `decoder.layers.N.` and the model's path after
#: `language_model.encoder.layers.N.`
LAYER_MODULES = {
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "attention.qkv_proj",
    "self_attention.linear_proj": "attention.out_proj",
    "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.mapping",
    "mlp.linear_fc2": "mlp.projection",
    "mlp.router": "mlp.router.gating",
}
EXPERT_MODULES = {"linear_fc1": "mapping", "linear_fc2": "projection"}
MODULES = {
    "embedding.word_embeddings": "language_model.embedding.word_embeddings",
    "embedding.position_embeddings": "language_model.embedding.position_embeddings",
    "decoder.final_layernorm": "language_model.encoder.final_norm",
    "output_layer": "language_model.output_layer",
}
LAYER_NORM_LEAVES = {"weight": "gamma", "bias": "beta"}
PREFIXES = {"main": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}

GROUP_NAMES = {"lr": "learning_rate"}
LR_STYLES = ("constant", "WSD", "linear", "cosine", "inverse-square-root")
WD_STYLES = ("constant", "linear", "cosine")
SCHEDULE = {
    "max_lr": np.float64,
    "min_lr": np.float64,
    "start_wd": np.float64,
    "end_wd": np.float64,
    "lr_warmup_steps": np.int64,
    "num_steps": np.int64,
    "lr_decay_steps": np.int64,
    "wd_incr_steps": np.int64,
}


@dataclass
class Proof:
    """What was compared, and what was found wrong."""

    files: int = 0
    tensors: int = 0
    elements: int = 0
    scalars: int = 0
    not_compared: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def mindspore_name(name: str, layers: list[int], layer_norm: bool) -> str:
    """The name in MindSpeed-Core-MS of a megatron-core parameter; `layers` are the chunk's global
    layer numbers."""
    module, leaf = name.rsplit(".", 1)
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        target = MODULES[module]
    else:
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", layer[2])
        inner = (
            f"mlp.experts.local_experts.{expert[1]}.{EXPERT_MODULES[expert[2]]}"
            if expert
            else LAYER_MODULES[layer[2]]
        )
        target = f"language_model.encoder.layers.{layers[int(layer[1])]}.{inner}"
    if layer_norm and target.endswith("_norm"):
        leaf = LAYER_NORM_LEAVES[leaf]
    return f"{target}.{leaf}"


def expected_tensors(truth: Truth) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that the rank's file must hold: fp32 main weight under the bare name, and both
    moments."""
    layer_norm = truth.meta["args"]["normalization"] == "LayerNorm"
    for chunk, name in truth.names():
        target = mindspore_name(name, truth.meta["layers"][chunk], layer_norm)
        for role, prefix in PREFIXES.items():
            yield prefix + target, truth.array(chunk, name, role)


def expected_scalars(truth: Truth) -> dict[str, np.ndarray]:
    """The scalars that the live optimizer and its scheduler know."""
    groups, schedule = truth.meta["param_groups"], truth.meta["scheduler"]
    scalars: dict[str, Any] = {"state_step": np.array([groups[0]["step"]], np.float32)}
    for index, group in enumerate(groups):
        for name, value in group.items():
            if name != "step":
                scalars[f"{GROUP_NAMES.get(name, name)}_group_{index}"] = np.float64(value)
    if schedule is not None:
        scalars |= {name: kind(schedule[name]) for name, kind in SCHEDULE.items()}
        scalars["lr_decay_style"] = np.int64(LR_STYLES.index(schedule["lr_decay_style"]))
        scalars["wd_incr_style"] = np.int64(WD_STYLES.index(schedule["wd_incr_style"]))
    return {name: np.asarray(value) for name, value in scalars.items()}


def lowest_rank(truth: Truth) -> int:
    """The global rank whose folder holds (tp, pp, ep): order tp-cp-ep-dp-pp, data-parallel rank
    0."""
    args, (tp, pp, ep) = truth.meta["args"], truth.place
    return (pp * args["data_parallel_size"] + ep) * args["tensor_model_parallel_size"] + tp


def prove(run: Trained, converted: Path) -> Proof:
    """Compare every rank's file with the truth of that rank, bit for bit, by MindSpore's own
    loader."""
    import mindspore

    proof = Proof()
    truths = {f"rank_{lowest_rank(truth)}": truth for truth in run.truths()}
    found = {folder.name for folder in converted.glob("rank_*")}
    proof.faults += [f"{converted / name}: unexpected" for name in sorted(found - set(truths))]
    for name, truth in truths.items():
        files = [
            file
            for file in (converted / name).glob("*")
            if file.suffix in (".ckpt", ".safetensors")
        ]
        if len(files) != 1:
            proof.faults.append(f"{converted / name}: {len(files)} checkpoint files instead of one")
            continue
        loaded = mindspore.load_checkpoint(str(files[0]), format=files[0].suffix[1:])
        arrays = {key: parameter.asnumpy() for key, parameter in loaded.items()}
        proof.files += 1
        compare(f"{name}/{files[0].name}", arrays, truth, proof)
    return proof


def compare(file: str, arrays: dict[str, np.ndarray], truth: Truth, proof: Proof) -> None:
    """Add what one file proves to `proof`."""
    tensors = dict(expected_tensors(truth))
    scalars = expected_scalars(truth)
    expected = tensors | scalars
    proof.faults += [f"{file}: {name} is missing" for name in sorted(set(expected) - set(arrays))]
    for name in sorted(set(arrays) - set(expected)):
        if arrays[name].size == 1:
            proof.not_compared.add(name)
        else:
            proof.faults.append(f"{file}: {name} is not of the model")
    for name in sorted(set(expected) & set(arrays)):
        fault = difference(arrays[name], expected[name])
        if fault:
            proof.faults.append(f"{file}: {name}: {fault}")
        elif name in tensors:
            proof.tensors += 1
            proof.elements += arrays[name].size
        else:
            proof.scalars += 1


def difference(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """None if dtype, shape and every bit agree."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return f"{actual.dtype} {actual.shape} instead of {expected.dtype} {expected.shape}"
    bits = f"u{actual.itemsize}"
    unequal = np.flatnonzero(
        np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    )
    if unequal.size:
        first = unequal[0]
        return (
            f"{unequal.size:,} of {actual.size:,} elements differ, the first at {first}: "
            f"{actual.flat[first]} instead of {expected.flat[first]}"
        )
    return None


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The flags of `parammap convert` that say the layout of its output."""
    for size in ("tp", "pp", "vpp", "ep", "dp", "cp"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--stage-layers", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--make-vocab-size-divisible-by", type=int)


def layout_flags(args: argparse.Namespace) -> list[str]:
    """The same, as they were given."""
    given = {name: getattr(args, name) for name in (*Sizes._fields, "make_vocab_size_divisible_by")}
    given["stage_layers"] = given["stage_layers"] and ",".join(map(str, given["stage_layers"]))
    return [
        word
        for name, value in given.items()
        if value
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def sizes_of(run: Trained, args: argparse.Namespace) -> Sizes:
    """The run's own, but for those that were given."""
    truth = run.truths()[0]
    own = truth.meta["args"]
    counts = {
        (chunk, other.place[1]): len(layers)
        for other in run.truths()
        for chunk, layers in enumerate(other.meta["layers"])
    }
    sizes = {
        "tp": own["tensor_model_parallel_size"],
        "pp": own["pipeline_model_parallel_size"],
        "vpp": len(truth.meta["layers"]),
        "ep": own["expert_model_parallel_size"],
        "dp": own["data_parallel_size"],
        "cp": own["context_parallel_size"],
    }
    given = {name: value for name in Sizes._fields if (value := getattr(args, name))}
    if (
        given.get("pp", sizes["pp"]) == sizes["pp"]
        and given.get("vpp", sizes["vpp"]) == sizes["vpp"]
    ):
        sizes["stage_layers"] = tuple(counts[chunk] for chunk in sorted(counts))
    return Sizes(**sizes | given)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("save_root", type=Path)
    parser.add_argument("converted", type=Path)
    add_layout(parser)
    args = parser.parse_args()
    trained = Trained(args.save_root)
    with tempfile.TemporaryDirectory() as scratch:
        run = trained
        if layout_flags(args):
            run = cut_for(
                trained,
                sizes_of(trained, args),
                Path(scratch),
                args.make_vocab_size_divisible_by or VOCAB_DIVISOR,
            )
        return tell(prove(run, args.converted), len(run.truths()))


def tell(proof: Proof, ranks: int) -> int:
    """Print what was proved; returns the exit status."""
    if proof.faults or not (
        proof.files == ranks and proof.tensors and proof.elements and proof.scalars
    ):
        print("\n".join(proof.faults[:20]))
        print(f"NOT proved: {len(proof.faults)} faults in {proof.files} of {ranks} rank files")
        return 1
    print(
        f"proved: mindspore.load_checkpoint loaded {proof.files} rank files; {proof.tensors:,} "
        f"tensors with "
        f"{proof.elements:,} elements (weights and both Adam moments) equal the live training "
        f"state, bit for bit"
    )
    print(
        f"        {proof.scalars} scalars equal too; not compared: "
        f"{', '.join(sorted(proof.not_compared)) or 'none'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
