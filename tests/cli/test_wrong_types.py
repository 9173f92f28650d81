"""Pickled values of another type or size than the frameworks write: refused by file and place."""

import contextlib
import io
import shutil
import zipfile

import pytest

from parammap.cli.main import main
from parammap.formats import pickle_writer, pickles
from parammap.formats.pickle_writer import PersistentId
from tests.support import output_matrix

CORE = "megatron/torch_dist_in_order_of_keys"
MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
_TP2PP2 = "megatron/cac60ce4_patched_legacy_tp2pp2"
GROUPS = "optimizer", "optimizer", "param_groups"
#: source, target, file, keys that lead to a value (an object's attributes are keys), the value
CASES = {
    "layers in words": (CORE, "mindspore", MODEL, ("args", "num_layers"), "two"),
    "a thousand million layers": (CORE, "mindspore", MODEL, ("args", "num_layers"), 10**9),
    "heads that are negative": (CORE, "mindspore", MODEL, ("args", "num_attention_heads"), -4),
    "a size that is true": (CORE, "mindspore", MODEL, ("args", "tensor_model_parallel_size"), True),
    "a million million ranks": (CORE, "mindspore", MODEL, ("args", "data_parallel_size"), 10**12),
    "arguments that are a list": (CORE, "mindspore", MODEL, ("args",), []),
    "an optimizer that is a number": (CORE, "mindspore", MODEL, ("optimizer",), 3),
    "groups that are a number": (CORE, "mindspore", MODEL, GROUPS, 3),
    "a group that is a number": (CORE, "mindspore", MODEL, GROUPS, [1.5]),
    "a schedule that is a list": (CORE, "mindspore", MODEL, ("opt_param_scheduler",), [1]),
    "a state that is a text": (CORE, "mindspore", OPTIMIZER, (0, None, "exp_avg"), "x"),
    "states without weights": (CORE, "mindspore", OPTIMIZER, (0, None), {}),
    "lengths of buckets": (CORE, "mindspore", OPTIMIZER, ("per_bucket_numel",), [{}]),
    "an update that is a text": (
        "metaseq/mp2dp2_fp16",
        "metaseq",
        "checkpoint_3-model_part-0-shard0.pt",
        ("optimizer_history",),
        [{"num_updates": "3"}],
    ),
    "states of moments that are a list": (
        "metaseq/mp2dp2_fp16",
        "metaseq",
        "checkpoint_3-model_part-0-shard0.pt",
        ("last_optimizer_state", "state"),
        [1],
    ),
    "a shape of texts": (
        f"mindspore of {_TP2PP2}",
        "megatron",
        "args_tp00_pp000.pt",
        ("parammap_model_structure",),
        [{"a": ("tensor", "float32", ("2", {}))}],
    ),
    "no groups of parameters": (
        "merak/zero_tp2pp2dp2",
        "alpa-training",
        "zero_dp_rank_0_mp_rank_0_pp_rank_0_opt_states.pt",
        ("optimizer_state_dict", "base_optimizer_state"),
        {"state": {}},
    ),
}


def _set(tree, keys, value):
    for key in keys[:-1]:
        tree = tree.state if hasattr(tree, "state") else tree
        tree = tree[next(iter(tree)) if key is None else key]
    tree = tree.state if hasattr(tree, "state") else tree
    tree[next(iter(tree)) if keys[-1] is None else keys[-1]] = value


def _rewrite(path, keys, value):
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            if name.endswith("/data.pkl"):
                tree = pickles.loads(content, str(path), persistent_load=PersistentId)
                _set(tree, keys, value)
                content = pickle_writer.dumps(tree)
            archive.writestr(name, content)


@pytest.mark.parametrize("case", CASES)
def test_a_value_of_another_type_is_refused(case, tmp_path):
    name, to, file, keys, value = CASES[case]
    shutil.copytree(output_matrix.source(name, tmp_path / "made"), tmp_path / "source")
    path = next((tmp_path / "source").rglob(file))
    _rewrite(path, keys, value)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", to])
    assert status == 2 and said.getvalue().count("\n") == 1
    assert str(path) in said.getvalue() and not (tmp_path / "out").exists()
