"""Restore an Alpa training checkpoint into flax's own models and optax's own optimizers, and
compute with them.

Alpa itself cannot be installed any more (its jaxlib is gone), so its `restore_checkpoint` is
followed step by step: the MessagePack tree goes through flax's from_state_dict into a fresh
TrainState, and each array is loaded from the folder that its leaf names. Runs in its own process,
as jax and mindspore do not share one: `python tests/support/alpa_restore.py REQUEST.json OUT.npz`.
OUT holds each array of the state by its flax path, `logits` of the request's tokens, and
`stepped.{path}`: the parameters after one more step with gradients of 1e-3 times the parameters.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

NEEDS = ("jax", "flax", "optax", "msgpack", "transformers")
LEARNING_RATE, BETA2, WEIGHT_DECAY = 1e-2, 0.95, 0.1


def restore(out: Path, **request: Any) -> dict:
    """`folder`, `step`, `model` (gpt2 or opt), its `config`, `optimizer`, `tokens`, and whether it
    is `mixed`: fp16 with a master copy. {path: array}."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    (out / "request.json").write_text(json.dumps(request))
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            str(out / "request.json"),
            str(out / "state.npz"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(np.load(out / "state.npz"))


def _model(request: dict) -> Any:
    import transformers

    if request["model"] == "gpt2":
        return transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**request["config"]))
    return transformers.FlaxOPTForCausalLM(transformers.OPTConfig(**request["config"]))


def _optimizer(name: str) -> Any:
    import jax
    import optax

    adamw = {"b1": 0.9, "b2": BETA2, "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    if name == "examples":
        schedule = optax.join_schedules(
            [optax.constant_schedule(0.0), optax.constant_schedule(LEARNING_RATE)], [1]
        )
        return optax.chain(
            optax.clip_by_global_norm(1e9),
            optax.adamw(
                schedule,
                **adamw,
                mask=lambda params: jax.tree_util.tree_map(lambda _: True, params),
            ),
        )
    return (
        optax.adamw(LEARNING_RATE, **adamw)
        if name == "adamw"
        else optax.adam(LEARNING_RATE, b2=BETA2)
    )


def _fresh(request: dict) -> tuple[Any, Any]:
    """A TrainState with the fields that Alpa adds to flax's, as its examples make it, and the
    model."""
    import jax
    import jax.numpy as jnp
    from flax import struct
    from flax.training import train_state

    class DynamicScale(struct.PyTreeNode):
        growth_interval: int = struct.field(pytree_node=False, default=2000)
        fin_steps: Any = 0
        scale: Any = 65536.0

    class TrainState(train_state.TrainState):
        master_copy: Any
        dynamic_scale: DynamicScale | None

    model, tx = _model(request), _optimizer(request["optimizer"])
    cast = {
        kind: jax.tree_util.tree_map(lambda x, kind=kind: jnp.asarray(x, kind), model.params)
        for kind in (jnp.float32, jnp.float16)
    }
    mixed = request["mixed"]
    return model, TrainState(
        step=jnp.int32(0),
        apply_fn=model.__call__,
        params=cast[jnp.float16 if mixed else jnp.float32],
        master_copy=cast[jnp.float32] if mixed else None,
        tx=tx,
        opt_state=tx.init(cast[jnp.float32]),
        dynamic_scale=DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(65536))
        if mixed
        else None,
    )


def _load(folder: Path) -> Any:
    """An array as alpa.serialization.load_sharded_array loads one that is not sharded."""
    import numpy as np

    meta = pickle.loads((folder / "metadata_0").read_bytes())
    assert (
        set(meta) == {"global_shape", "dtype", "shard_names", "shard_indices"}
        and meta["shard_indices"] is None
    )
    array = np.load(folder / meta["shard_names"][0])
    assert (array.shape, array.dtype) == (meta["global_shape"], meta["dtype"])
    return array


def _main(request_file: str, out: str) -> None:
    import jax
    import msgpack
    import numpy as np
    import optax
    from flax.serialization import from_state_dict, to_state_dict
    from flax.traverse_util import flatten_dict

    request = json.loads(Path(request_file).read_text())
    folder = Path(request["folder"])
    model, fresh = _fresh(request)
    tree = msgpack.unpackb((folder / f"checkpoint_{request['step']}").read_bytes())
    assert all(
        name == f"state.{'.'.join(path)}"
        for path, name in flatten_dict(tree).items()
        if name is not None
    )
    assert list(flatten_dict(tree)) == sorted(flatten_dict(tree)), (
        "Alpa numbers arrays by sorted keys"
    )
    state = jax.tree_util.tree_map(lambda name: _load(folder / name), from_state_dict(fresh, tree))
    for ours, its in zip(
        jax.tree_util.tree_leaves(state), jax.tree_util.tree_leaves(fresh), strict=True
    ):
        assert (ours.shape, ours.dtype) == (its.shape, its.dtype), (
            ours.shape,
            its.shape,
            ours.dtype,
            its.dtype,
        )
    arrays = {
        ".".join(path): np.asarray(leaf)
        for path, leaf in flatten_dict(to_state_dict(state)).items()
        if leaf is not None
    }
    params = state.master_copy if request["mixed"] else state.params
    arrays["logits"] = np.asarray(model(np.asarray(request["tokens"]), params=params).logits)
    updates, _ = state.tx.update(
        jax.tree_util.tree_map(lambda x: x * 1e-3, params), state.opt_state, params
    )
    stepped = to_state_dict(optax.apply_updates(params, updates))
    arrays |= {
        f"stepped.{'.'.join(path)}": np.asarray(leaf)
        for path, leaf in flatten_dict(stepped).items()
    }
    np.savez(out, **arrays)


if __name__ == "__main__":
    _main(*sys.argv[1:])
