"""The public API against what torch, transformers and the live state of the goldens say: values bit
for bit, and no byte read that nobody asked for."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import parammap
from parammap.cli.main import main
from parammap.execute import gather
from tests.support import hub, paths
from tests.support.goldens import joined
from tests.support.logical import content_offset
from tests.support.torch_load import torch_load
from tests.support.transformers_folders import COMPUTED, LAID_OUT, megatron

DATA = paths.TESTS / "data"
GOLDEN = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
HEADS, SIZE = 4, 16
STATES = {"weight": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}
MOE = DATA / "megatron/core_r0.16.0_te_moe_ep2.tar.xz"


@pytest.fixture(scope="module")
def golden():
    return parammap.open(GOLDEN)


@pytest.fixture(scope="module")
def live():
    """The golden's whole state, of the live buffers: {MindSpore name: array}."""
    return joined(GOLDEN)


@pytest.fixture
def read_bytes(monkeypatch):
    """The sizes of all reads of tensors."""
    sizes: list[int] = []
    preadv = os.preadv

    def count(descriptor, buffers, offset):
        sizes.append(got := preadv(descriptor, buffers, offset))
        return got

    monkeypatch.setattr(gather.os, "preadv", count)
    return sizes


# --------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("state", STATES)
def test_weights_and_moments_are_those_of_the_live_run(golden, live, state):
    dialect = golden.state_dict("mindspore", state=state)
    prefix = STATES[state]
    expected = {
        name.removeprefix(prefix): array
        for name, array in live.items()
        if name.startswith(prefix or "language_model.")
    }
    del expected["language_model.output_layer.weight"]  # the last stage's copy of the words
    assert dialect.keys() == expected.keys() and len(expected) == 52
    for name, tensor in dialect.items():
        assert tensor.dtype == "float32" and tensor.shape == expected[name].shape
        assert np.array_equal(tensor.numpy(), expected[name]), name


@pytest.mark.parametrize("state", STATES)
def test_a_fused_tensor_stands_apart_by_canonical_names(golden, live, state):
    fused = live[f"{STATES[state]}language_model.encoder.layers.2.attention.qkv_proj.weight"]
    for number, part in enumerate("qkv"):
        tensor = golden.tensor(f"layers.2.attention.{part}.weight", state)
        expected = fused.reshape(HEADS, 3, SIZE, -1)[:, number].reshape(HEADS * SIZE, -1)
        assert tensor.state == state and tensor.shape == (64, 64)
        assert np.array_equal(tensor.numpy(), expected)
        assert torch.equal(tensor.torch(), torch.from_numpy(expected))


def test_bfloat16_is_float32_in_numpy_and_itself_in_torch(golden):
    """As torch.load has it, of the two tensor-parallel ranks' files."""
    shards = [
        torch_load(GOLDEN / f"iter_0000002/mp_rank_{tp:02}_001/model_optim_rng.pt")["model"][
            "language_model"
        ]["encoder"]["layers.0.mlp.dense_h_to_4h.weight"]
        for tp in range(2)
    ]
    tensor, expected = golden.tensor("layers.2.mlp.fc1.weight", "model_weight"), torch.cat(shards)
    assert tensor.dtype == "bfloat16" and tensor.bits().dtype == np.uint16
    assert torch.equal(tensor.torch(), expected) and tensor.torch().dtype == torch.bfloat16
    assert tensor.numpy().dtype == np.float32
    assert np.array_equal(tensor.numpy(), expected.float().numpy())
    assert torch.equal(torch.from_numpy(tensor.bits().view("i2")).view(torch.bfloat16), expected)


def test_megatrons_own_names_are_its_model_file_of_one_rank(golden, tmp_path):
    parammap.convert(GOLDEN, tmp_path / "one", to="megatron", tp=1, pp=1)
    saved = torch_load(tmp_path / "one/iter_0000002/mp_rank_00/model_optim_rng.pt")
    saved = saved["model"]["language_model"]
    dialect = golden.state_dict("megatron")
    for name, tensor in dialect.items():
        _, part, *rest = name.split(".", 2)
        there = saved[part]
        for key in [".".join(rest)] if part == "encoder" else rest[0].split("."):
            there = there[key]
        assert torch.equal(tensor.torch(), there) and tensor.dtype == "bfloat16"
    assert len(dialect) == 52


def test_metaseqs_shards_are_what_fsdp_itself_gathers():
    folder = DATA / "metaseq/mp2dp2_fp16"
    opened = parammap.open(folder)
    whole = torch.load(folder / "up/stitched.pt", weights_only=False)["model"]
    for layer in range(3):
        name = f"decoder.layers.{layer}.fc1.weight"
        assert torch.equal(opened[f"layers.{layer}.mlp.fc1.weight"].torch(), whole[name])
        assert torch.equal(opened.state_dict("metaseq")[name].torch(), whole[name])


# --------------------------------------------------------------------------------------------------
# regions


def _key(draw, shape):
    """Slices and numbers, fewer than there are dimensions at times, empty ones at times."""
    keys = []
    for size in shape[: draw.randrange(len(shape) + 1)]:
        low, high = sorted(draw.randrange(size + 1) for _ in range(2))
        keys.append(
            draw.choice([slice(low, high), slice(low - size, None), draw.randrange(-size, size)])
        )
    return tuple(keys)


@pytest.mark.parametrize(
    ("source", "dialect"),
    [
        (GOLDEN, None),
        (GOLDEN, "transformers"),
        (GOLDEN, "mindspore"),
        (DATA / "yuan/trained_tp1pp2dp3", None),
        (DATA / "metaseq/mp1dp3_fp32", "metaseq"),
        (DATA / "transformers/llama_hf", None),
    ],
)
def test_a_region_is_what_numpy_takes_of_the_whole(source, dialect):
    opened, draw = parammap.open(source), random.Random(5)
    tensors = opened.state_dict(dialect) if dialect else opened
    for tensor in tensors.values():
        whole = tensor.numpy()
        for _ in range(6):
            key = _key(draw, tensor.shape)
            found = tensor[key]
            assert found.shape == whole[key].shape and np.array_equal(found, whole[key]), key


def test_a_region_of_a_cast_is_that_of_the_cast_whole(golden):
    dialect = golden.state_dict("transformers", dtype="float16")
    tensor = dialect["transformer.h.1.attn.c_attn.weight"]
    assert tensor.dtype == "float16" and tensor.shape == (64, 192)
    exact = golden.state_dict("transformers")["transformer.h.1.attn.c_attn.weight"]
    assert np.array_equal(tensor[7:50, 60:130], exact.numpy().astype(np.float16)[7:50, 60:130])


@pytest.mark.parametrize(
    "region", [((0, 0), (65, 1)), ((-1, 0), (1, 1)), ((0,), (1,)), ((0, 60), (1, 5))]
)
def test_a_region_that_reaches_outside_is_refused(golden, region):
    with pytest.raises(parammap.RefusedError, match="is no region of its shape"):
        golden["layers.0.attention.q.weight"].numpy(parammap.Region(*region))


@pytest.mark.parametrize("key", [64, (0, 0, 0), slice(None, None, 2)])
def test_an_index_that_is_none_raises_index_error(golden, key):
    with pytest.raises(IndexError):
        golden["layers.0.attention.q.weight"][key]


def test_only_the_bytes_asked_for_are_read(read_bytes, monkeypatch):
    """But for gaps that are shorter than another read would take."""
    monkeypatch.setattr(gather, "GAP_BYTES", 0)
    opened = parammap.open(GOLDEN)
    dialect = opened.state_dict("transformers")
    assert [(one.name, one.shape, one.dtype) for one in (*opened.values(), *dialect.values())]
    assert dialect.config and not read_bytes
    tensor = opened["layers.0.mlp.fc1.weight"]
    tensor[250:256]
    assert sum(read_bytes) == 6 * 64 * 4
    read_bytes.clear()
    opened["layers.0.attention.q.weight"].numpy()
    assert sum(read_bytes) == 64 * 64 * 4
    read_bytes.clear()
    dialect["transformer.h.0.attn.c_attn.weight"][:, 64:128]  # all of k, none of q and v
    assert sum(read_bytes) == 64 * 64 * 4


def test_columns_far_apart_are_read_one_by_one(tmp_path, read_bytes):
    folder = hub.save("gpt2", tmp_path / "wide", n_embd=32, vocab_size=96, n_inner=32768)
    tensor = parammap.open(folder).state_dict("transformers")["transformer.h.0.mlp.c_fc.weight"]
    assert tensor.shape == (32, 32768)
    tensor[:, 100:200]
    assert sum(read_bytes) == 32 * 100 * 4


# --------------------------------------------------------------------------------------------------
# the mapping


def test_what_a_checkpoint_says_of_itself(golden):
    assert (golden.framework, golden.iteration, golden.num_layers) == ("megatron", 2, 4)
    assert (golden.layout.tp, golden.layout.pp) == (2, 2)
    assert golden.folder == GOLDEN / "iter_0000002"
    assert golden.states == ("weight", "exp_avg", "exp_avg_sq", "model_weight")
    saved = torch_load(golden.folder / "mp_rank_00_000/model_optim_rng.pt")
    state, groups = golden.training_state, saved["optimizer"]["optimizer"]["param_groups"]
    assert (state.iteration, state.consumed_samples) == (2, saved["args"].consumed_train_samples)
    assert {group.lr for group in state.groups} == {group["lr"] for group in groups}
    assert {group.step for group in state.groups} == {group["step"] for group in groups} == {2}
    assert len(golden) == len(list(golden)) == 68 and "final_norm.weight" in golden
    moments = list(golden.tensors(state="exp_avg"))
    assert [one.name for one in moments] == list(golden) and len(list(golden.tensors())) == 4 * 68
    assert {one.state for one in moments} == {"exp_avg"}
    assert "q.weight (weight) [64, 64] float32" in repr(golden["layers.0.attention.q.weight"])


def test_a_name_that_is_not_there_is_answered_with_the_closest(golden):
    with pytest.raises(KeyError, match="holds no weight of layers.0.attention.qq.weight; perhaps"):
        golden["layers.0.attention.qq.weight"]
    with pytest.raises(KeyError, match="holds no exp_max, only weight, exp_avg"):
        golden.tensor("final_norm.weight", state="exp_max")
    with pytest.raises(KeyError, match="perhaps transformer.ln_f.weight"):
        golden.state_dict("transformers")["transformer.lnf.weight"]
    assert "layers.9.mlp.fc1.weight" not in golden and golden.get("nothing") is None


@pytest.mark.parametrize(
    ("dialect", "options", "said"),
    [
        ("alpa", {}, "cannot be Alpa's OPT"),
        ("deepspeed", {}, "deepspeed: is no dialect of state dicts; choose one of alpa, megatron"),
        ("transformers", {"state": "exp_max"}, "holds no exp_max of its weights"),
        ("transformers", {"dtype": "float12"}, "--dtype float12: choose one of float32"),
        (
            "transformers",
            {"form": "flat"},
            "--form: means nothing with --to transformers, only with metaseq",
        ),
        ("transformers", {"formm": "flat"}, "formm: means nothing with --to transformers; leave"),
    ],
)
def test_a_state_dict_that_cannot_be_is_refused(golden, dialect, options, said):
    with pytest.raises(parammap.RefusedError, match=said):
        golden.state_dict(dialect, **options)


# --------------------------------------------------------------------------------------------------
# a model of transformers


def _sources(tmp_path):
    yield GOLDEN
    yield DATA / "metaseq/mp2dp2_fp16"
    yield megatron(tmp_path / "llama", **LAID_OUT, **COMPUTED)
    for family in hub.MODELS:
        yield hub.save(family, tmp_path / family)


def test_a_model_is_loaded_that_says_what_the_converted_folder_says(tmp_path):
    for number, source in enumerate(_sources(tmp_path)):
        weights_only = "llama" in source.name and source.parent == tmp_path
        opened = parammap.open(source, weights_only=weights_only)
        dialect = opened.state_dict("transformers")
        config = transformers.AutoConfig.for_model(**dialect.config)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        model.load_state_dict({name: tensor.torch() for name, tensor in dialect.items()})
        out = tmp_path / f"out{number}"
        parammap.convert(source, out, to="transformers", weights_only=weights_only)
        vocab = config.vocab_size
        tokens = torch.randint(vocab, (2, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, hub.logits(out, vocab))


# --------------------------------------------------------------------------------------------------
# digests, and the commands


def test_digests_are_those_of_the_command_and_of_the_manifest(golden, tmp_path, capfd):
    report = parammap.convert(GOLDEN, tmp_path / "out", to="mindspore", tp=1, pp=1)
    assert report.status == 0 and report.lines[-1].endswith(
        "every element written once and checked"
    )
    manifest = json.loads((tmp_path / "out/parammap_manifest.json").read_text())
    listed = {(one["role"], one["name"]): one["digest"] for one in manifest["digests"]}
    written = parammap.open(tmp_path / "out")
    for state in STATES:
        for tensor in golden.tensors(state=state):
            assert tensor.digest() == listed[state, tensor.name]
            assert written.tensor(tensor.name, state).digest() == tensor.digest()
    assert not any(capfd.readouterr())
    found = parammap.digest(golden)
    assert {(one.state, one.name): one.digest for one in found}.items() >= listed.items()
    assert main(["digest", str(GOLDEN), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["digests"]
    assert [(one.state, one.name, one.digest, list(one.shape)) for one in found] == [
        (one["role"], one["name"], one["digest"], one["shape"]) for one in told
    ]


def test_experts_of_torch_dist_have_the_digests_of_the_command(tmp_path):
    with tarfile.open(MOE) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    opened = parammap.open(folder)
    assert opened.framework == "megatron-dist" and "layers.1.mlp.experts.3.fc2.weight" in opened
    digests = {(one.state, one.name): one.digest for one in parammap.digest(folder)}
    assert {(one.state, one.name): one.digest() for one in opened.tensors()} == digests


def test_verify_and_diff_say_what_is_wrong(golden, live, tmp_path, capfd):
    out = tmp_path / "out"
    parammap.convert(GOLDEN, out, to="mindspore", format="safetensors")
    assert not parammap.verify(out).problems and not parammap.verify(out, GOLDEN).problems
    same = parammap.diff(golden, out)
    assert same.is_equal and len(same.compared) == 3 * 68 and same.aside == 68
    name = "language_model.encoder.final_norm.gamma"
    path = out / "rank_2/network.safetensors"
    offset = content_offset(path, name, live[name].tobytes())
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    problem = parammap.verify(out, GOLDEN).problems[-1]
    (difference,) = (found := parammap.diff(out, golden)).differences
    assert not found.is_equal and difference.elements == 1 and difference.name == problem.name
    assert difference.positions[0].place_a == (str(path), offset)
    assert not any(capfd.readouterr())


def test_a_dry_run_writes_nothing_and_progress_is_shown_when_asked_for(tmp_path, capfd):
    report = parammap.convert(GOLDEN, tmp_path / "out", to="mindspore", dry_run=True)
    assert "nothing was written" in report.lines[-1] and not list(tmp_path.iterdir())
    parammap.convert(GOLDEN, tmp_path / "out", to="mindspore", progress=True)
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"to": "megatron", "dtype": "float16"}, ["--to", "megatron", "--dtype", "float16"]),
        ({"to": "mindspore", "dtype": "float32"}, ["--to", "mindspore", "--dtype", "float32"]),
        ({"to": "transformers", "format": "ckpt"}, ["--to", "transformers", "--format", "ckpt"]),
        ({"to": "metaseq"}, ["--to", "metaseq"]),
        ({"to": "deepspeed", "tp": 2}, ["--to", "deepspeed", "--tp", "2"]),
        ({"to": "megatron", "tp": 3}, ["--to", "megatron", "--tp", "3"]),
    ],
)
def test_refusals_are_those_of_the_command(arguments, flags, tmp_path, capsys):
    with pytest.raises(parammap.RefusedError) as error:
        parammap.convert(GOLDEN, tmp_path / "out", **arguments)
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err == f"parammap: {error.value}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "megatronn"}, "megatronn: cannot be written; what can be is alpa"),
        ({"to": "megatron", "tp": 0}, "tp 0: is not 1 or more"),
        ({"to": "megatron", "workers": 0}, "workers 0: is not 1 or more"),
        ({"to": "megatron", "replicas": "last"}, "replicas last: choose one of refuse"),
        ({"to": "megatron", "drop": ["norms"]}, "drop norms: only experts can be left out"),
        (
            {"to": "merak", "no_parallel_vocab": 1},
            "--no-parallel-vocab: is True or False and not 1",
        ),
        ({"to": "merak", "custom_partition": (0, "x")}, "--custom-partition 0,x"),
        ({"to": "transformers", "max_shard_size": "5 gigs"}, "'5 gigs' is no size such as 5GB"),
        ({"to": "alpa", "vocab_size": 0}, "--vocab-size 0: 0 is not 1 or more"),
    ],
)
def test_values_that_argparse_would_refuse_are_refused(arguments, said, tmp_path):
    with pytest.raises(parammap.RefusedError, match=said):
        parammap.convert(GOLDEN, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# the package, and its document

INIT = paths.ROOT / "parammap/__init__.py"


def test_every_public_name_is_there_for_editors_and_for_programs():
    typed = [
        alias.name
        for node in ast.walk(ast.parse(INIT.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("parammap")
        for alias in node.names
    ]
    assert sorted(typed) == sorted(parammap.__all__)
    assert {*parammap.__all__} <= {*dir(parammap)}
    for name in parammap.__all__:
        assert getattr(parammap, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        parammap.opne  # noqa: B018


@pytest.mark.parametrize("module", ["__init__.py", "version.py"])
def test_python_3_8_can_compile_it(module):
    ast.parse((INIT.parent / module).read_text(), feature_version=(3, 8))


def test_the_hooks_load_nothing_else_of_the_package():
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import parammap, parammap.hooks\n"
        "print(*sorted(name for name in sys.modules if name.startswith('parammap')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=paths.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["parammap", "parammap.hooks", "parammap.version"]


def _examples() -> list[str]:
    text = (paths.ROOT / "docs/api.md").read_text()
    return [block.partition("```")[0] for block in text.split("```python\n")[1:]]


def test_the_documents_examples_run(tmp_path, monkeypatch, capsys):
    """In order, in one program, in a folder with the golden as save/."""
    (tmp_path / "save").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, example in enumerate(_examples()):
        exec(compile(example, f"docs/api.md, example {number + 1}", "exec"), names)
    assert number > 3 and Path("out").is_dir()
