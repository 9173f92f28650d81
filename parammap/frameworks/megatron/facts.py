"""What a Megatron-LM run says of itself: in the sidecar's layout files, else in the arguments saved
with the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.sidecar import Buffer, Sidecar
from parammap.formats.pickles import Opaque
from parammap.frameworks.framework import Recorded
from parammap.frameworks.megatron.buckets import release_of
from parammap.tensors.arrangement import Sizes
from parammap.tensors.layout import RANK_ORDER, Layout, number_layers

#: our sizes by the names of Megatron-LM's arguments
_SIZE_ARGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
}
#: the first release whose Transformer Engine layers keep the down-projections whole
_WHOLE_DOWNS = (0, 14)


def args_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The arguments saved with a model, by name; {} where none were (bare megatron-core)."""
    args = meta.get("args")
    return args.attributes if isinstance(args, Opaque) else {}


@dataclass(frozen=True, slots=True)
class Facts:
    """The sidecar's layout file if there is one, and the arguments."""

    recorded: dict[str, Any] | None
    args: dict[str, Any]

    @classmethod
    def of(cls, sidecar: Sidecar | None, meta: dict[str, Any]) -> Facts:
        return cls(sidecar.any_layout() if sidecar else None, args_of(meta))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Facts:
        return cls.of(checkpoint.sidecar, checkpoint.common_metadata)

    def layout(self, found: dict[str, int]) -> Layout:
        """The parallel sizes; those that nobody recorded are as `found`, by name, or 1."""
        if self.recorded:
            return Layout(
                **{
                    key: value
                    for key, value in self.recorded["parallel"].items()
                    if key in Layout.__dataclass_fields__ and value is not None
                }
            )
        sizes = {key: self.args.get(name) or found.get(key, 1) for key, name in _SIZE_ARGS.items()}
        if self.args.get("expert_tensor_parallel_size") is None:
            sizes["etp"] = sizes["tp"]
        return Layout(
            **sizes, order="tp-cp-ep-pp-dp" if self.args.get("use_tp_pp_dp_mapping") else RANK_ORDER
        )

    @property
    def model(self) -> dict[str, Any]:
        """What is known of the model, by the names that the layout file and the arguments share."""
        return self.recorded["model"] if self.recorded else self.args

    def sizes(self) -> Sizes:
        """Heads and groups, unless the attention is of a kind whose rows are in another order;
        vocabulary; experts."""
        heads = self.model.get("num_attention_heads")
        if self.model.get("attention_output_gate") or self.model.get("multi_latent_attention"):
            heads = None
        grouped = self.recorded is not None or self.model.get("group_query_attention")
        groups = (grouped and self.model.get("num_query_groups")) or heads
        gated = bool(self.model.get("swiglu") or self.model.get("gated_linear_unit"))
        return Sizes(
            heads,
            groups if heads else None,
            self._vocab(),
            self.model.get("num_experts"),
            gated,
            *self._downs(),
        )

    def _downs(self) -> tuple[int | None, int | None, bool | None]:
        """The rows of multi-latent attention's down-projections of q and kv, and whether the
        release keeps them whole on every rank: with Transformer Engine it does from core 0.14 on;
        local layers are cut."""
        said = {**self.args, **self.model}
        q, kv, rotary = (
            said.get(name) for name in ("q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim")
        )
        if not said.get("multi_latent_attention"):
            return None, None, None
        in_te = {"transformer_engine": True, "local": False}.get(said.get("transformer_impl", ""))
        since = in_te and (release_of(self.recorded) >= _WHOLE_DOWNS if self.recorded else None)
        return q, kv + rotary if kv and rotary else None, since

    def _vocab(self) -> int | None:
        """The tokenizer's vocabulary. Megatron-LM's argument is its size before the end-of-document
        token, and None where the tokenizer knows better; it counts if padding it gives the table's
        rows."""
        if self.recorded:
            return self.model.get("vocab_size")
        vocab = (self.args.get("vocab_size") or 0) + (
            self.args.get("tokenizer_type") == "NullTokenizer"
        )
        padded = self.padded_vocab(vocab, self.args.get("tensor_model_parallel_size") or 1)
        return vocab if vocab and padded == self.args.get("padded_vocab_size") else None

    def padded_vocab(self, vocab: int | None, tp: int, divisor: int | None = None) -> int | None:
        """The rows of a vocabulary's table in a layout (Megatron-LM, _vocab_size_with_padding,
        core_r0.6.0 … main). Yuan-2.0, which is the one that knows --use-lf-gate, pads alike in
        every layout (megatron/tokenizer/tokenizer.py)."""
        divisor = divisor or self.model.get("make_vocab_size_divisible_by")
        if not vocab or not divisor:
            return None
        multiple = divisor * (1 if "use_lf_gate" in self.args else tp)
        return -(-vocab // multiple) * multiple

    def tied(self) -> bool | None:
        """Whether the output layer is the word embedding."""
        untied = self.model.get("untie_embeddings_and_output_weights")
        return None if untied is None else not untied

    def num_layers(self) -> int | None:
        return self.model.get("num_layers")


def tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the output layer is the word embedding, as far as the run recorded it."""
    return Facts.of_checkpoint(checkpoint).tied()


def recorded(checkpoint: Checkpoint) -> Recorded:
    """What `parammap inspect` tells of the run."""
    facts = Facts.of_checkpoint(checkpoint)
    return Recorded(
        settings=facts.model or facts.args, sizes=facts.sizes(), with_args=bool(facts.args)
    )


def grad_dtype(buffer: Buffer, args: dict[str, Any]) -> str:
    """The dtype of a buffer's gradients: as recorded, or as Megatron-LM chooses it: float32 for
    bf16 parameters always."""
    param = buffer.param_dtype or buffer.slots[0].dtype
    in_fp32 = param == "bfloat16" or args.get("accumulate_allreduce_grads_in_fp32")
    return buffer.grad_dtype or ("float32" if in_fp32 else param)


def is_gated(groups: Iterable[dict[str, tuple[int, ...]]], dialect: str) -> bool:
    """Whether the MLP has gate and up halves: then fc1 has twice as many rows as fc2 has columns.

    `groups` are the shapes by name of tensors that lie together, such as a rank's chunk.
    """
    for group in groups:
        shapes = {
            row.canonical: shape
            for name, shape in group.items()
            if (row := families.find(name, dialect))
        }
        for name, shape in shapes.items():
            if name.endswith("fc1.weight"):
                return shape[0] == 2 * shapes[name.replace("fc1", "fc2")][1]
    return False


def experts_per_rank(names: Iterable[str]) -> int | None:
    return (
        1 + max((e for name in names if (e := families.expert_of(name)) is not None), default=-1)
        or None
    )


def global_layers(
    chunks: Iterable[tuple[tuple[int, int], Iterable[str]]],
) -> dict[tuple[int, int], dict[str, list[int]]]:
    """Global layer numbers by (pp, vpp) and path of the layer list, counted from the names that
    each chunk holds."""
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
