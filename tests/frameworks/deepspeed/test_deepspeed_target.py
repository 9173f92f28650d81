"""Universal checkpoints of ours: DeepSpeed's own engines resume from them in other layouts, and
Megatron's become them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from convert import deepspeed_to_transformers, inspect_deepspeed_checkpoint
from parammap.checkpoint.index import StoredTensor
from parammap.cli import main
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.job.conversion import convert
from parammap.job.request import Request
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, MAIN_PARAM
from tests.support import paths
from tests.support.deepspeed_goldens import BLOOM, GPT, elements, load, same, states, unpack

HERE = paths.TESTS
MEGATRON = HERE / "data/megatron/cac60ce4_patched_legacy_tp2pp2"
#: the files of a universal checkpoint by role
KEYS = {MAIN_PARAM: "fp32", EXP_AVG: "exp_avg", EXP_AVG_SQ: "exp_avg_sq"}
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
#: a run: its options, and those with which it is resumed from our universal checkpoint
RUNS = {
    "zero1": ({"dp": 3, "zero": 1, "frozen": True}, [{"dp": 2}]),
    "zero2": ({"dp": 2, "zero": 2, "dtype": "bf16", "frozen": True}, [{"dp": 2}]),
    "pipe": ({"dp": 2, "stages": 2, "dtype": "bf16"}, [{"dp": 3, "stages": 1}]),
}
STEPS, MORE = 3, 2


def work(folder: Path, jobs: list[dict]) -> None:
    """Run jobs of tests/support/deepspeed_train.py."""
    meeting = Path(tempfile.mkdtemp(dir=folder))
    (folder / "jobs.json").write_text(
        json.dumps(
            [{"rendezvous": str(meeting / str(number)), **job} for number, job in enumerate(jobs)]
        )
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "support/deepspeed_train.py"), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Each run of RUNS saved after STEPS, its universal checkpoint by deepspeed's own tool and by
    us."""
    folder = tmp_path_factory.mktemp("runs")
    work(
        folder,
        [
            {
                "truth": f"{folder}/{name}.pt",
                "save": f"{folder}/{name}",
                "steps": STEPS,
                "more": MORE,
                **options,
            }
            for name, (options, _) in RUNS.items()
        ]
        + [
            {
                "universal": True,
                "input": f"{folder}/{name}/global_step{STEPS}",
                "output": f"{folder}/{name}/theirs",
            }
            for name in RUNS
        ],
    )
    for name in RUNS:
        request = Request(
            source=folder / name, target=folder / f"{name}-ours", to="deepspeed", replicas="first"
        )
        assert convert(request).status == 0
    return folder


def truth(path: Path, ranks: int) -> dict:
    """What all ranks of a job said: losses, and the states by name, of the first stage that has
    them."""
    parts = [torch.load(f"{path}.{rank}") for rank in range(ranks)]
    return {
        "losses": parts[0]["losses"],
        **{
            key: {name: state for part in reversed(parts) for name, state in part[key].items()}
            for key in ("states", "loaded")
            if key in parts[0]
        },
    }


def ranks_of(options: dict) -> int:
    return options["dp"] * max(options.get("stages", 0), 1)


@pytest.mark.parametrize("name", RUNS)
def test_states_are_those_of_the_live_engine(name, runs):
    """Gathered by deepspeed.utils from the running engine just before it saved."""
    expected = truth(runs / f"{name}.pt", ranks_of(RUNS[name][0]))["states"]
    ours = {
        parameter: own
        for parameter, own in states(runs / f"{name}-ours/global_step3_universal").items()
        if "exp_avg" in own
    }
    assert ours.keys() == expected.keys() and len(ours) > 8
    for parameter, own in ours.items():
        assert all(
            torch.equal(own[key], expected[parameter][key])
            for key in ("fp32", "exp_avg", "exp_avg_sq")
        ), parameter


@pytest.mark.parametrize("name", RUNS)
def test_the_universal_checkpoint_is_that_of_deepspeeds_own_tool(name, runs):
    ours, theirs = (
        states(runs / f"{name}-ours/global_step3_universal"),
        states(runs / name / "theirs"),
    )
    assert ours.keys() == theirs.keys()
    for parameter, own in theirs.items():
        if (
            "exp_avg" not in own and parameter != "head.weight"
        ):  # theirs is always float32, and rounded for an alias
            ours[parameter]["fp32"] = ours[parameter]["fp32"].float()
        assert parameter == "head.weight" or same(ours[parameter], own), parameter


def test_deepspeed_resumes_in_other_layouts(runs):
    """All states are as they were, and the next losses are those of the run that was not
    interrupted: the same bits in the same layout, the same up to the order of sums in others."""
    jobs = [
        (
            name,
            {
                **options,
                **target_layout,
                "truth": f"{runs}/{name}-resumed{number}.pt",
                "load": f"{runs}/{name}-ours",
                "load_universal": True,
                "steps": MORE,
                "skip": STEPS,
            },
        )
        for name, (options, wishes) in RUNS.items()
        for number, target_layout in enumerate(wishes)
    ]
    work(runs, [job for _, job in jobs])
    for name, job in jobs:
        before = truth(runs / f"{name}.pt", ranks_of(RUNS[name][0]))
        resumed = truth(Path(job["truth"]), ranks_of(job))
        assert resumed["loaded"].keys() == before["states"].keys()
        for parameter, own in resumed["loaded"].items():
            assert same(own, before["states"][parameter]), (name, parameter)
        if job["dp"] == RUNS[name][0]["dp"]:
            assert resumed["losses"] == before["losses"][STEPS:], name
        else:
            tolerance = {"rtol": 0, "atol": 1e-5 if job.get("dtype") is None else 5e-3}
            torch.testing.assert_close(
                torch.tensor(resumed["losses"]), torch.tensor(before["losses"][STEPS:]), **tolerance
            )


# -----------------------------------------------------------------------------------------------------
# other frameworks


@pytest.fixture(scope="module")
def of_megatron(tmp_path_factory) -> Path:
    """The universal checkpoint of a run of Megatron-LM with its optimizer, at tp 2 · pp 2."""
    out = tmp_path_factory.mktemp("megatron") / "out"
    assert convert(Request(source=MEGATRON, target=out, to="deepspeed")).status == 0
    return out


def name_of(held: StoredTensor) -> str:
    """What Megatron-DeepSpeed calls a tensor of Megatron-LM's model of 4 layers."""
    name = held.found.name.removeprefix("language_model.")
    name = name.replace("input_norm", "input_layernorm").replace(
        "post_attention_norm", "post_attention_layernorm"
    )
    name = re.sub(r"encoder\.layers\.\d+\.", f"{3 + (held.layer or 0)}.", name)
    name = re.sub(r"encoder\.final_(layer)?norm\.", "8.", name)
    return name.replace("embedding.", "tied_modules.embed.")


def test_deepspeeds_loader_cuts_it_as_megatron_did(of_megatron, monkeypatch):
    """Each tensor-parallel rank's share by deepspeed's own load_hp_checkpoint_state is what
    Megatron-LM's rank had."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
    from deepspeed.utils import fragment_address

    checkpoint, compared = registry.read(MEGATRON), 0
    for held in checkpoint.index.held:
        if held.found.state not in KEYS or held.is_tied_head:
            continue
        parameter, fp32 = torch.zeros(held.found.stored.shape), torch.zeros(held.found.stored.numel)
        parameter._hp_mapping = SimpleNamespace(
            lp_fragment_address=fragment_address(start=0, numel=parameter.numel()),
            get_hp_fragment=lambda fp32=fp32: fp32,
        )
        folder = of_megatron / "global_step2_universal/zero" / name_of(held)
        assert load_hp_checkpoint_state(parameter, str(folder), held.found.place.tp, 2) == 2
        key = KEYS[held.found.state]
        cut = fp32 if key == "fp32" else parameter._hp_mapping.optim_fragment[key]
        assert torch.equal(cut.reshape(parameter.shape), elements(held.found.stored)), (
            held.found.name,
            key,
        )
        compared += 1
    assert compared == 3 * 2 * (2 + 4 * 12 + 2)


def test_what_a_resumed_run_reads_beside_the_states(of_megatron):
    folder = of_megatron / "global_step2_universal"
    state, model = (
        load(folder / "zero/optimizer_state.pt"),
        load(folder / "mp_rank_00_model_states.pt"),
    )
    own = registry.read(MEGATRON).training_state.groups[0]
    assert [group["lr"] for group in state["param_groups"]] == [own.lr] * 3
    assert all(
        group["step"] == 2 and "weight_decay" not in group for group in state["param_groups"]
    )
    assert (model["iteration"], model["global_steps"], model["checkpoint_version"]) == (2, 2, 3.0)
    args = vars(model["args"])
    assert (args["num_layers"], args["num_attention_heads"], args["position_embedding_type"]) == (
        4,
        4,
        "absolute",
    )
    saved = vars(load(MEGATRON / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")["args"])
    assert args["consumed_train_samples"] == saved["consumed_train_samples"] > 0
    assert model["lr_scheduler"]["max_lr"] == saved["lr"]


def test_all_of_it_comes_back(of_megatron, tmp_path):
    """By the reader: no tensor differs from Megatron-LM's; and by way of MindSpore the same files
    come out."""
    assert main.main(["verify", str(of_megatron)]) == 0
    assert main.main(["diff", str(MEGATRON), str(of_megatron)]) == 0
    assert convert(Request(source=MEGATRON, target=tmp_path / "ms", to="mindspore")).status == 0
    assert (
        convert(Request(source=tmp_path / "ms", target=tmp_path / "out", to="deepspeed")).status
        == 0
    )
    ours, before = (
        states(folder / "global_step2_universal") for folder in (tmp_path / "out", of_megatron)
    )
    assert same(ours, before) and len(ours) == 52


@pytest.mark.parametrize(
    ("golden", "wishes", "message"),
    [
        ("cac60ce4_patched_legacy_tp2pp2", {"weights_only": True}, "no optimizer's states"),
        (
            "cac60ce4_patched_legacy_tp2pp2",
            {"sizes": {"tp": 4}},
            "its files are the same for every layout",
        ),
        (
            "cac60ce4_patched_legacy_pp2dp3_untied_padded",
            {},
            "its head, .* is not the word embedding",
        ),
    ],
)
def test_what_megatron_deepspeed_does_not_have_is_refused(golden, wishes, message, tmp_path):
    with pytest.raises(RefusedError, match=message):
        convert(
            Request(
                source=HERE / "data/megatron" / golden,
                target=tmp_path / "out",
                to="deepspeed",
                **wishes,
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_architecture_is_refused(trained_variant, tmp_path):
    with pytest.raises(
        RefusedError, match="of the llama family, and Megatron-DeepSpeed has gpt2, bloom only"
    ):
        convert(
            Request(
                source=trained_variant("0.16.1", "llama").path,
                target=tmp_path / "out",
                to="deepspeed",
            )
        )


# ----------------------------------------------------------------------------------------------------------
# entry points


def test_deepspeed_to_transformers_writes_merak_files(tmp_path):
    """In a layout of the source's own tp: each tensor is the layer files' own, q, k and v of the
    heads apart; names and shapes are those that Merak's own script of that name gave a run of the
    same sizes, but padded vocabulary and buffers."""
    source = unpack(GPT, tmp_path / "source")
    (tmp_path / "config.json").write_text(
        json.dumps({"activation_function": "gelu", "layer_norm_epsilon": 1e-5})
    )
    flags = [
        "--input_folder",
        str(source),
        "--output_folder",
        str(tmp_path / "out"),
        "--merak_tp",
        "2",
        "--merak_pp",
        "2",
    ]
    assert (
        deepspeed_to_transformers.main(flags) == 2 and not (tmp_path / "out").exists()
    )  # nobody recorded the activation
    assert (
        deepspeed_to_transformers.main(
            [*flags, "--for_release", "--config", str(tmp_path / "config.json")]
        )
        == 0
    )
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    for tp, pp in ((0, 0), (0, 1), (1, 0), (1, 1)):
        name = f"release/mp_rank_{tp:02d}_pp_rank_{pp:03d}/partial_model_optim.pt"
        ours, theirs = (
            load(tmp_path / "out" / name),
            load(HERE / "data/merak/ds_gpt_to_merak_tp2pp2" / name),
        )
        assert (ours["args"].consumed_train_samples, theirs["args"].consumed_train_samples) == (
            0,
            18,
        )
        model, known = (
            ours["model"],
            {
                key: value
                for key, value in theirs["model"].items()
                if "attn.bias" not in key and "masked_bias" not in key
            },
        )
        assert model.keys() == known.keys()
        assert all(
            model[key].shape == known[key].shape
            for key in model
            if "wte" not in key and "lm_head" not in key
        )
        for layer in (2 * pp, 2 * pp + 1):
            own = load(
                source / f"global_step3/layer_{layer + 3:02d}-model_{tp:02d}-model_states.pt"
            )
            prefix = f"module.{layer + 2}.transformer.h.{layer}."
            qkv = (
                own["self_attention.query_key_value.weight"]
                .view(2, 3, 6, 24)
                .transpose(0, 1)
                .reshape(36, 24)
            )
            for key, expected in (
                (f"{prefix}attn.c_attn.col_linear.weight", qkv),
                (f"{prefix}mlp.c_proj.row_linear.weight", own["mlp.dense_4h_to_h.weight"]),
                (f"{prefix}ln_2.bias", own["post_attention_layernorm.bias"]),
            ):
                assert torch.equal(model[key], expected), key


def test_inspect_deepspeed_checkpoint(tmp_path, capsys):
    source = unpack(GPT, tmp_path)
    assert inspect_deepspeed_checkpoint.main([str(source)]) == 0
    told = capsys.readouterr().out
    assert "iteration 3, 4 layers, tp 2, pp 2 (layers per stage [2, 2]), dp 2" in told
    assert "12 layer files" in told and "4 mp rank files" in told and "8 zero files" in told
    norm = load(source / "global_step3/layer_05-model_01-model_states.pt")["input_layernorm.weight"]
    assert f"  input_layernorm.weight [24] bfloat16 sum {norm.double().sum().item():.9g}" in told
    assert (
        inspect_deepspeed_checkpoint.main([])
        == inspect_deepspeed_checkpoint.main([str(tmp_path / "none")])
        == 2
    )


# ------------------------------------------------------------------------------------------------
# BigScience's own script


@pytest.mark.parametrize("golden", [GPT, BLOOM])
def test_bigsciences_ds_to_universal(golden, tmp_path):
    """Its states are ours, but for what it takes from the last stage, whose copies nothing keeps in
    step."""
    checkout = os.environ.get("MEGATRON_DEEPSPEED")
    if not checkout:
        pytest.skip(
            "MEGATRON_DEEPSPEED names no checkout of bigscience-workshop/Megatron-DeepSpeed"
        )
    source = unpack(golden, tmp_path / "source")
    done = subprocess.run(
        [
            sys.executable,
            "tools/convert_checkpoint/ds_to_universal.py",
            "--input_folder",
            str(source / "global_step3"),
            "--output_folder",
            str(tmp_path / "theirs"),
            "--num_extract_workers",
            "1",
            "--num_merge_workers",
            "1",
        ],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "DS_BUILD_OPS": "0",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        convert(
            Request(source=source, target=tmp_path / "ours", to="deepspeed", replicas="mean")
        ).status
        == 0
    )
    ours, theirs = states(tmp_path / "ours/global_step3_universal"), states(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, own in ours.items():
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            is_same = torch.equal(own[key], theirs[name][key][: len(own[key])])
            assert is_same == (name not in registry.read(source).dropped), (name, key)
