"""A small GPT in mindspore.nn, its cells named as MindSpeed-Core-MS r0.1.0 names them, that loads
what was converted.

Runs in its own process, since importing mindspore changes protobuf for the whole process: `python
tests/support/mindspore_gpt.py CONVERTED ARGS.json LOSSES.npz OUT.npz`, where ARGS are the arguments
of the Megatron run and LOSSES what examples/tiny/losses.py wrote. OUT has the loss of each label,
[m, b, s]: `right` by the checkpoint, and by the same checkpoint with rows of attention.qkv_proj
read as [q, k, v], each of all heads: `wrong`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

#: how tensor parallel ranks' pieces go together: by rows, by columns, or they are copies of one
#: another
ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "qkv_proj.weight",
    "qkv_proj.bias",
    "mapping.weight",
    "mapping.bias",
)
COLS = ("out_proj.weight", "projection.weight")
HEAD, EMBEDDING = (
    "language_model.output_layer.weight",
    "language_model.embedding.word_embeddings.weight",
)


def run(
    converted: Path, args: dict[str, Any], losses: Path, scratch: Path
) -> dict[str, np.ndarray]:
    """What the process wrote to OUT. Raises AssertionError with its last words where it fails."""
    (scratch / "args.json").write_text(json.dumps(args))
    command = [
        sys.executable,
        __file__,
        converted,
        scratch / "args.json",
        losses,
        scratch / "out.npz",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(scratch / "out.npz"))


def merged(ranks: list[list[dict[str, np.ndarray]]], args: dict[str, Any]) -> dict[str, np.ndarray]:
    """One rank's tensors of ranks[pp][tp], without optimizer states and scalars, put together."""
    whole: dict[str, np.ndarray] = {}
    for stage in ranks:
        for name in stage[0]:
            if "." in name and not name.startswith("exp_avg"):
                tensor = joined(name, [rank[name] for rank in stage], args["swiglu"])
                assert np.array_equal(whole.setdefault(name, tensor), tensor), name
    if not args["untie_embeddings_and_output_weights"] and HEAD in whole:
        assert np.array_equal(whole.pop(HEAD), whole[EMBEDDING]), (
            "the last stage's copy of a tied embedding"
        )
    return whole


def joined(name: str, pieces: list[np.ndarray], is_gated: bool) -> np.ndarray:
    if (
        is_gated and "mlp.mapping." in name
    ):  # each rank has rows of the gate, then as many of the value
        return np.concatenate(
            [half for part in (0, 1) for half in (np.split(piece, 2)[part] for piece in pieces)]
        )
    if name.endswith(ROWS):
        return np.concatenate(pieces)
    if name.endswith(COLS):
        return np.concatenate(pieces, axis=1)
    assert all(np.array_equal(piece, pieces[0]) for piece in pieces), name
    return pieces[0]


def with_wrong_heads(
    tensors: dict[str, np.ndarray], groups: int, per_group: int
) -> dict[str, np.ndarray]:
    """qkv_proj as it would have to be, were its rows q of all heads, then k, then v."""

    def regrouped(tensor: np.ndarray) -> np.ndarray:
        size = tensor.shape[0] // (groups * (per_group + 2))
        q, k, v = np.split(tensor, [groups * per_group * size, groups * (per_group + 1) * size])
        grouped = [part.reshape(groups, -1, *tensor.shape[1:]) for part in (q, k, v)]
        return np.concatenate(grouped, axis=1).reshape(tensor.shape)

    return {
        name: regrouped(value) if "qkv_proj" in name else value for name, value in tensors.items()
    }


def _main(converted: str, args_file: str, losses: str, out: str) -> None:
    import mindspore
    from mindspore import Parameter, Tensor, nn, ops

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    mindspore.set_device("CPU")
    args = json.loads(Path(args_file).read_text())
    hidden, heads, groups = (
        args["hidden_size"],
        args["num_attention_heads"],
        args["num_query_groups"],
    )
    ffn, size, per_group, has_bias = (
        args["ffn_hidden_size"],
        hidden // heads,
        heads // groups,
        args["add_bias_linear"],
    )

    class Embedding(nn.Cell):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.weight = Parameter(Tensor(np.zeros((rows, hidden), np.float32)))

        def construct(self, ids):
            return self.weight[ids]

    class RMSNorm(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Parameter(Tensor(np.zeros(hidden, np.float32)))

        def construct(self, x):
            return (
                x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + args["norm_epsilon"]) * self.weight
            )

    def norm() -> nn.Cell:
        if args["normalization"] == "RMSNorm":
            return RMSNorm()
        return nn.LayerNorm((hidden,), epsilon=args["norm_epsilon"])

    def rotated(x):
        """Rotary positions on [b, groups, heads, s, size], the two halves of a head as pairs."""
        frequency = 10000.0 ** (-np.arange(0, size, 2) / size)
        angle = np.tile(np.outer(np.arange(x.shape[-2]), frequency), 2)
        cos, sin = (Tensor(function(angle).astype(np.float32)) for function in (np.cos, np.sin))
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return x * cos + ops.cat([-second, first], axis=-1) * sin

    class Attention(nn.Cell):
        """Rows of qkv_proj: [groups, q of each head in the group, k, v, size]."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Dense(hidden, groups * (per_group + 2) * size, has_bias=has_bias)
            self.out_proj = nn.Dense(hidden, hidden, has_bias=has_bias)

        def construct(self, x):
            b, s, _ = x.shape
            qkv = (
                self.qkv_proj(x).reshape(b, s, groups, per_group + 2, size).transpose(0, 2, 3, 1, 4)
            )
            q, k, v = (
                qkv[:, :, :per_group],
                qkv[:, :, per_group : per_group + 1],
                qkv[:, :, per_group + 1 :],
            )
            if args["position_embedding_type"] == "rope":
                q, k = rotated(q), rotated(k)
            scores = ops.matmul(q, k.swapaxes(-1, -2)) / size**0.5
            future = Tensor(np.triu(np.full((s, s), -1e9, np.float32), 1))
            context = ops.matmul(ops.softmax(scores + future, axis=-1), v)
            return self.out_proj(context.transpose(0, 3, 1, 2, 4).reshape(b, s, hidden))

    class Mlp(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.mapping = nn.Dense(hidden, 2 * ffn if args["swiglu"] else ffn, has_bias=has_bias)
            self.projection = nn.Dense(ffn, hidden, has_bias=has_bias)

        def construct(self, x):
            x = self.mapping(x)
            if args["swiglu"]:
                return self.projection(ops.silu(x[..., :ffn]) * x[..., ffn:])
            return self.projection(ops.gelu(x, approximate="none"))

    class Layer(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.input_norm, self.attention = norm(), Attention()
            self.post_attention_norm, self.mlp = norm(), Mlp()

        def construct(self, x):
            x = x + self.attention(self.input_norm(x))
            return x + self.mlp(self.post_attention_norm(x))

    class Embeddings(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = Embedding(args["padded_vocab_size"])
            if args["position_embedding_type"] == "learned_absolute":
                self.position_embeddings = Embedding(args["max_position_embeddings"])

        def construct(self, ids):
            x = self.word_embeddings(ids)
            if args["position_embedding_type"] == "learned_absolute":
                x = x + self.position_embeddings(Tensor(np.arange(ids.shape[1])))
            return x

    class Encoder(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.final_norm = (
                nn.CellList([Layer() for _ in range(args["num_layers"])]),
                norm(),
            )

        def construct(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.final_norm(x)

    class LanguageModel(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.encoder = Embeddings(), Encoder()
            if args["untie_embeddings_and_output_weights"]:
                self.output_layer = nn.Dense(hidden, args["padded_vocab_size"], has_bias=False)

        def construct(self, ids):
            x = self.encoder(self.embedding(ids))
            if args["untie_embeddings_and_output_weights"]:
                return self.output_layer(x)
            return ops.matmul(x, self.embedding.word_embeddings.weight.T)

    class GPTModel(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = LanguageModel()

        def construct(self, tokens):
            """The loss of each label [b, s] of tokens [b, s + 1]."""
            logits, labels = self.language_model(tokens[:, :-1]), tokens[:, 1:]
            each = ops.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
            )
            return each.reshape(labels.shape)

    def losses_of(tensors: dict[str, np.ndarray]) -> np.ndarray:
        model = GPTModel()
        parameters = {name: Parameter(Tensor(value), name=name) for name, value in tensors.items()}
        assert mindspore.load_param_into_net(model, parameters, strict_load=True) == ([], []), (
            "names differ"
        )
        model.set_train(False)
        return np.stack(
            [model(Tensor(batch.astype(np.int32))).asnumpy() for batch in np.load(losses)["tokens"]]
        )

    tp, pp, dp = (
        args[f"{axis}_parallel_size"] for axis in ("tensor_model", "pipeline_model", "data")
    )
    ranks = [
        [
            {
                name: value.asnumpy()
                for name, value in mindspore.load_checkpoint(
                    str(Path(converted) / f"rank_{stage * dp * tp + rank}/network.ckpt")
                ).items()
            }
            for rank in range(tp)
        ]
        for stage in range(pp)
    ]
    tensors = merged(ranks, args)
    np.savez(
        out, right=losses_of(tensors), wrong=losses_of(with_wrong_heads(tensors, groups, per_group))
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
