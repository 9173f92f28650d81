"""OPT as Alpa's llm_serving computes it, in numpy: the loader's fusion of q, k and v, then the
model.

Written after alpa b8078a9, examples/llm_serving/model/opt_model.py: element [c, 3·r + j] of the
fused kernel is [r, c] of the j-th of q, k, v; the tokens' positions begin at row 2; norms have eps
1e-5."""

from pathlib import Path

import numpy as np


def fused(folder: Path, num_layers: int) -> dict[str, np.ndarray]:
    """The parameters by the path that they have in Alpa's model."""

    def load(name: str) -> np.ndarray:
        return np.load(folder / name)

    top = "params.transformers."
    params = {
        top + "embeddings.word_embeddings.embedding": load("decoder.embed_tokens.weight"),
        top + "embeddings.position_embeddings.embedding": load("decoder.embed_positions.weight"),
        top + "layer_norm.scale": load("decoder.layer_norm.weight"),
        top + "layer_norm.bias": load("decoder.layer_norm.bias"),
    }
    for i in range(num_layers):
        there, here = f"decoder.layers.{i}.", f"{top}encoder.{i}."
        for key, w in (("kernel", "weight"), ("bias", "bias")):
            three = np.stack([load(f"{there}self_attn.{atom}_proj.{w}") for atom in "qkv"], axis=-1)
            turned = (
                three.transpose(1, 0, 2).reshape(three.shape[1], -1)
                if w == "weight"
                else three.reshape(-1)
            )
            params[f"{here}attention.self.qkv_combined.{key}"] = turned
            for path, name in (
                ("attention.dense", "self_attn.out_proj"),
                ("ffn.fc1", "fc1"),
                ("ffn.fc2", "fc2"),
            ):
                params[f"{here}{path}.{key}"] = load(f"{there}{name}.{w}").T
        for key, w in (("scale", "weight"), ("bias", "bias")):
            params[f"{here}attention.layer_norm.{key}"] = load(f"{there}self_attn_layer_norm.{w}")
            params[f"{here}ffn.layer_norm.{key}"] = load(f"{there}final_layer_norm.{w}")
    return params


def logits(
    params: dict[str, np.ndarray], tokens: np.ndarray, num_layers: int, heads: int
) -> np.ndarray:
    """tokens int [batch, length], none of them padding; float64 logits [batch, length,
    vocabulary]."""
    p = {
        path.removeprefix("params.transformers."): value.astype(np.float64)
        for path, value in params.items()
    }
    length = tokens.shape[1]
    words = p["embeddings.word_embeddings.embedding"]
    x = words[tokens] + p["embeddings.position_embeddings.embedding"][2 : 2 + length]
    for i in range(num_layers):
        a, f = f"encoder.{i}.attention.", f"encoder.{i}.ffn."
        qkv = _dense(p, a + "self.qkv_combined", _norm(p, a + "layer_norm", x)).reshape(
            *tokens.shape, heads, -1, 3
        )
        q, k, v = np.moveaxis(qkv, -1, 0).swapaxes(2, 3)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        seen = weights / weights.sum(-1, keepdims=True) @ v
        x = x + _dense(p, a + "dense", seen.swapaxes(1, 2).reshape(*tokens.shape, -1))
        x = x + _dense(
            p, f + "fc2", np.maximum(_dense(p, f + "fc1", _norm(p, f + "layer_norm", x)), 0)
        )
    return _norm(p, "layer_norm", x) @ words.T


def _dense(params: dict, path: str, x: np.ndarray) -> np.ndarray:
    return x @ params[path + ".kernel"] + params[path + ".bias"]


def _norm(params: dict, path: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * params[path + ".scale"]
        + params[path + ".bias"]
    )
