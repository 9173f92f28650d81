"""GPT-2: norms before attention and MLP, learned positions, GELU. Megatron-LM's GPT is one, too.

transformers' linear maps are Conv1D, whose weights are [in, out]. Merak has transformers' names
behind the number of the pipeline module, `module.{M}.`. A single tensor-parallel rank of its holds
transformers' own weights; of several, each holds Linear's, [out, in], under names with `col_linear`
or `row_linear`, and of c_attn the rows [q; k; v] of its own heads.

Sources: transformers 4.57 (models/gpt2, pytorch_utils.py), Merak d72efe5
(tools/convert_merak_gpt2_checkpoint.py; Merak/modules/layer_proxy.py)."""

from dataclasses import replace
from functools import partial

from parammap.families import decoder
from parammap.families.family import (
    LAYER_NORM,
    LEARNED,
    Cell,
    Config,
    Family,
    ModelType,
    TableRow,
    in_layer,
    row,
)
from parammap.tensors.arrangement import SHARD_0, STACKED_QKV

_conv1d = partial(Cell, transposed=True)
_LAYER = {"transformers": "h.{i}.", "merak_cut": "h.{i}."}
_ROWS = (
    row("embedding.word.weight", transformers="wte.weight"),
    row(
        "embedding.position.weight",
        transformers="wpe.weight",
        deepspeed="embedding.position_embeddings.weight",
    ),
    *in_layer(
        _LAYER,
        row("input_norm.{w}", transformers="ln_1.{w}"),
        row(
            "attention.qkv.{w}",
            transformers=_conv1d("attn.c_attn.{w}", STACKED_QKV),
            merak_cut=Cell("attn.c_attn.col_linear.{w}", STACKED_QKV),
        ),
        row(
            "attention.out.weight",
            transformers=_conv1d("attn.c_proj.weight"),
            merak_cut="attn.c_proj.row_linear.weight",
        ),
        row(
            "attention.out.bias",
            transformers="attn.c_proj.bias",
            merak_cut="attn.c_proj.row_linear.bias",
        ),
        row("post_attention_norm.{w}", transformers="ln_2.{w}"),
        row(
            "mlp.fc1.{w}",
            transformers=_conv1d("mlp.c_fc.{w}", SHARD_0),
            merak_cut=Cell("mlp.c_fc.col_linear.{w}", SHARD_0),
        ),
        row(
            "mlp.fc2.weight",
            transformers=_conv1d("mlp.c_proj.weight"),
            merak_cut="mlp.c_proj.row_linear.weight",
        ),
        row(
            "mlp.fc2.bias",
            transformers="mlp.c_proj.bias",
            merak_cut="mlp.c_proj.row_linear.bias",
        ),
    ),
    row("final_norm.{w}", transformers="ln_f.{w}"),
    row("output.weight", transformers="lm_head.weight"),
)


def _with_merak(one: TableRow) -> TableRow:
    """Merak's names are transformers' own, but for those that are cut otherwise."""
    own = one.cells["transformers"]
    return replace(one, cells={"merak": own, "merak_cut": own, **one.cells})


_MODULE = r"module\.\d+\.(transformer\.)?"
GPT2 = Family(
    name="gpt2",
    title="GPT-2 (learned positions, GELU)",
    rows=tuple(map(_with_merak, _ROWS)),
    shares=(decoder.MEGATRON, decoder.MEGATRON_DEEPSPEED),
    prefixes={"merak": _MODULE, "merak_cut": _MODULE},
    together=decoder.TOGETHER,
    norm=LAYER_NORM,
    positions=LEARNED,
    config=Config(
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
        settings={
            "layers": ("n_layer", "num_hidden_layers"),
            "hidden": ("n_embd", "hidden_size"),
            "heads": ("n_head", "num_attention_heads"),
            "ffn": ("n_inner",),
            "vocab": ("vocab_size",),
            "positions": ("n_positions", "max_position_embeddings", "n_ctx"),
            "activation": ("activation_function",),
            "eps": ("layer_norm_epsilon",),
            "tied": ("tie_word_embeddings",),
        },
        types={
            "gpt2": ModelType(
                "GPT2LMHeadModel",
                "GPT2Model",
                defaults={
                    "tie_word_embeddings": True,
                    "activation_function": "gelu_new",
                    "layer_norm_epsilon": 1e-5,
                },
                as_family={
                    "scale_attn_weights": True,
                    "scale_attn_by_inverse_layer_idx": False,
                    "add_cross_attention": False,
                },
            )
        },
    ),
)
