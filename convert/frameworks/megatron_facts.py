"""What a Megatron-LM run says of itself: in the sidecar's layout files, else in the arguments saved with the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import families
from ..containers.pickles import Opaque
from ..fusion import Heads
from ..layout import RANK_ORDER, Layout, number_layers
from ..sidecar import Sidecar

#: our sizes by the names of Megatron-LM's arguments
_SIZE_ARGS = {
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size", "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size", "cp": "context_parallel_size", "dp": "data_parallel_size",
}


def args_of(meta: dict) -> dict:
    """The arguments saved with a model, by name; {} where none were (bare megatron-core)."""
    args = meta.get("args")
    return args.attributes if isinstance(args, Opaque) else {}


@dataclass(frozen=True, slots=True)
class Facts:
    """The sidecar's layout file if there is one, and the arguments."""

    recorded: dict | None
    args: dict

    @classmethod
    def of(cls, sidecar: Sidecar | None, meta: dict) -> Facts:
        return cls(sidecar.any_layout() if sidecar else None, args_of(meta))

    def layout(self, found: dict[str, int]) -> Layout:
        """The parallel sizes; those that nobody recorded are as `found`, by name, or 1."""
        if self.recorded:
            return Layout(**{key: value for key, value in self.recorded["parallel"].items()
                             if key in Layout.__dataclass_fields__ and value is not None})
        sizes = {key: self.args.get(name) or found.get(key, 1) for key, name in _SIZE_ARGS.items()}
        if self.args.get("expert_tensor_parallel_size") is None:
            sizes["etp"] = sizes["tp"]
        return Layout(**sizes, order="tp-cp-ep-pp-dp" if self.args.get("use_tp_pp_dp_mapping") else RANK_ORDER)

    def heads(self) -> Heads | None:
        model = self.recorded["model"] if self.recorded else self.args
        if model.get("attention_output_gate") or model.get("multi_latent_attention"):
            return None
        heads = model.get("num_attention_heads")
        grouped = self.recorded is not None or model.get("group_query_attention")
        return Heads(heads, (grouped and model.get("num_query_groups")) or heads) if heads else None

    def num_layers(self) -> int | None:
        return (self.recorded["model"] if self.recorded else self.args).get("num_layers")


def is_gated(groups: Iterable[dict[str, tuple[int, ...]]], dialect: str) -> bool:
    """Whether the MLP has gate and up halves: then fc1 has twice as many rows as fc2 has columns.

    `groups` are the shapes by name of tensors that lie together, such as a rank's chunk.
    """
    for group in groups:
        shapes = {row.canonical: shape for name, shape in group.items() if (row := families.find(name, dialect))}
        for name, shape in shapes.items():
            if name.endswith("fc1.weight"):
                return shape[0] == 2 * shapes[name.replace("fc1", "fc2")][1]
    return False


def experts_per_rank(names: Iterable[str]) -> int | None:
    return 1 + max((e for name in names if (e := families.expert_of(name)) is not None), default=-1) or None


def global_layers(chunks: Iterable[tuple[tuple[int, int], Iterable[str]]]) -> dict[tuple[int, int], dict[str, list[int]]]:
    """Global layer numbers by (pp, vpp) and path of the layer list, counted from the names that each chunk holds."""
    counts: dict[str, dict[tuple[int, int], int]] = {}
    for key, names in chunks:
        for prefix, local in filter(None, map(families.layer_of, names)):
            stage = counts.setdefault(prefix, {})
            stage[key] = max(stage.get(key, 0), local + 1)
    layers: dict[tuple[int, int], dict[str, list[int]]] = {}
    for prefix, stage in counts.items():
        for key, numbers in number_layers(stage).items():
            layers.setdefault(key, {})[prefix] = list(numbers)
    return layers
