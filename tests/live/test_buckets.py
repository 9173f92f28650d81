"""The rule by which megatron-core lays out buffers and buckets gives what the releases themselves
made of real models.

The order of parameters comes from the checkpoint's model file, whose keys stand in the order of
named_parameters(). Where it does not, it is that of descending positions. This says the same: a
buffer depends on the order of its own parameters only, and how those of several buffers follow one
another decides but over which buffer comes first.

Run as a program (`python -m tests.live.test_buckets FOLDER`), this file is the oracle: it lays out
the cases on its standard input with the buffer class of the megatron-core in FOLDER."""

import inspect
import json
import random
import runpy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from examples.fetch_core import fetch_core
from parammap.checkpoint.sidecar import Bucket, Buffer, Slot, read
from parammap.errors import RefusedError
from parammap.frameworks.megatron.buckets import Rule
from parammap.tensors.layout import Layout, Place
from tests.support import paths
from tests.support.prototype_map import translated
from tests.support.runs import every_run
from tests.support.torch_load import torch_load
from tests.support.variants import CORES, QUICK_CORES, VARIANTS

ROOT = paths.ROOT
DATA = ROOT / "tests/data/megatron"
BF16 = {"bfloat16": "float32"}


def ddp(bucket_size, pad=False):
    """What the hook records of DistributedDataParallelConfig (not of core 0.6, which has none)."""
    return {
        "bucket_size": bucket_size,
        "overlap_grad_reduce": True,
        "pad_buckets_for_high_nccl_busbw": pad,
    }


def recorded_by(core, bucket_size=None, **parallel):
    return {
        "framework": {"core_version": core},
        "ddp": bucket_size and ddp(bucket_size),
        "parallel": {"tp": 1, "pp": 1, "dp": 1, "cp": 1, **parallel},
    }


def slots_of(optimizers):
    return {
        (buffer.chunk, slot.name): slot
        for buffers in optimizers
        for buffer in buffers or ()
        for slot in buffer.slots
    }


def unplaced(slot, **changed):
    return replace(slot, start=0, end=0, bucket=0, **changed)


# -----------------------------------------------------------------------------------------------
# runs of megatron-core


@every_run()
def test_a_real_run_is_laid_out_as_it_was(trained_variant, core, variant):
    run = trained_variant(core, variant)
    sidecar = read(run.iteration_folder / "param_map")
    assert sidecar.ranks.keys() == {truth.place for truth in run.truths()}
    for truth in run.truths():
        tp, pp, ep = truth.place
        known, dense = sidecar.ranks[truth.place], sidecar.ranks[tp, pp, 0]
        slots = slots_of(dense.optimizers) | slots_of(known.optimizers)
        content = torch_load(run.rank_folder(truth) / "model_optim_rng.pt")
        args = vars(content["args"]) if "args" in content else {}
        recorded = {**known.layout}
        if not recorded.get("ddp"):
            recorded["ddp"] = ddp(100_000, VARIANTS[variant].get("pad_busbw", False))
        rule = Rule.of(
            recorded,
            args,
            Layout(**{name: recorded["parallel"][name] for name in Layout.__dataclass_fields__}),
        )
        assert rule.experts_apart == any(slot.expert for slot in slots.values())
        grad_dtypes = {
            buffer.param_dtype: buffer.grad_dtype
            for buffers in dense.optimizers
            for buffer in buffers
        }
        assert (
            rule.optimizers(in_order(content, slots), Place(tp, pp, ep), grad_dtypes)
            == known.optimizers
        )


def in_order(content, slots):
    """The slots of each chunk, by the keys of the model file."""
    models = (
        [content["model"]]
        if "model" in content
        else [content[f"model{chunk}"] for chunk in range(2)]
    )
    chunks = [
        [unplaced(slots[chunk, name]) for name in model if (chunk, name) in slots]
        for chunk, model in enumerate(models)
    ]
    assert sum(map(len, chunks)) == len(slots)
    return chunks


@pytest.mark.parametrize("core", ["0.12.3", pytest.param("0.8.0", marks=pytest.mark.full)])
def test_what_the_release_refuses_is_refused(trained, core):
    """Up to 0.12 a tied embedding must not follow an odd number of 64 elements, here because of 31
    positions."""
    options = {"tp": 2, "pp": 2, "layers": 2, "hidden": 64, "seq": 31}
    with pytest.raises(RuntimeError, match="each param only belongs to a single bucket"):
        trained(core, **options)
    run = trained("0.16.1", **options)
    known = read(run.iteration_folder / "param_map").ranks[0, 0, 0]
    chunk = [unplaced(slot) for slot in reversed(slots_of(known.optimizers).values())]
    layout = Layout(tp=2, etp=2, pp=2)
    assert Rule.of(known.layout, {}, layout).optimizers([chunk], Place(), BF16) == known.optimizers
    with pytest.raises(
        RefusedError,
        match=r"^embedding.word_embeddings.weight: .* 0\.(8|12) cannot give this "
        r"tied",
    ):
        Rule.of(recorded_by(core, 100_000), {}, layout).optimizers([chunk], Place(), BF16)


# ----------------------------------------------------------------------------------- runs of
# Megatron-LM's own script

#: checkpoint: release, and elements at which the run's buckets closed (those of 0.6 were trained
#: with a changed default)
RECORDED = {
    "cac60ce4_mcore_pp2dp2_llama": ("0.6.0", 20_000),
    "cac60ce4_patched_legacy_pp2dp3_untied_padded": ("0.6.0", 10_000),
    "cac60ce4_patched_legacy_pp4vpp2": ("0.6.0", 20_000),
    "cac60ce4_patched_legacy_tp2pp2": ("0.6.0", 20_000),
    "cac60ce4_patched_mcore_moe_ep2dp2": ("0.6.0", 20_000),
    "core_r0.8.0_repo_legacy_tp2pp2_hook": ("0.8.0", 20_000),
    "core_r0.12.0_repo_mcore_tp2pp2_hook": ("0.12.0", 20_000),
}


def test_every_recorded_checkpoint_is_looked_at():
    saved = {
        path.name for path in DATA.iterdir() if (path / "truth").is_dir() or "_hook" in path.name
    }
    assert RECORDED.keys() == saved


@pytest.mark.parametrize("name", RECORDED)
def test_a_run_of_megatron_lm_is_laid_out_as_it_was(name, tmp_path):
    """By truth/rank*.json, the index maps of the live buffers, or by the prototype's maps where
    there is none."""
    core, bucket_size = RECORDED[name]
    live = live_truth(name) if (DATA / name / "truth").is_dir() else live_prototype(name, tmp_path)
    for (tp, pp, ep), optimizers in live.items():
        args = model_args(name, tp, pp or ep)
        layout = Layout(
            tp=args["tensor_model_parallel_size"],
            pp=args["pipeline_model_parallel_size"],
            ep=args["expert_model_parallel_size"],
            etp=args["tensor_model_parallel_size"],
            dp=args["data_parallel_size"],
        )
        if core == "0.6.0":
            rule = Rule.of(recorded_by(core, bucket_size), args, layout)
        else:
            rule = Rule.of(recorded_by(core), args, layout)
            assert rule.bucket_size == bucket_size
        optimizers = [
            tuple(with_ties(buffer, args) for buffer in buffers) for buffers in optimizers
        ]
        chunks = [
            [
                unplaced(slot)
                for buffers in optimizers
                for buffer in buffers
                if buffer.chunk == chunk
                for slot in reversed(buffer.slots)
            ]
            for chunk in range(args["virtual_pipeline_model_parallel_size"] or 1)
        ]
        if ep:  # its file lacks the dense optimizer, which the rank itself has
            optimizers[0] = None
        assert rule.optimizers(chunks, Place(tp, pp, ep), BF16) == tuple(optimizers)


def live_truth(name):
    """{(tp, pp, ep): [dense buffers, expert buffers if any]} of every rank."""
    live = {}
    for path in sorted((DATA / name / "truth").glob("rank*.json")):
        rank = json.loads(path.read_text())
        kinds = {
            kind: [
                Buffer(
                    one["chunk"],
                    one["pdtype"][6:],
                    one["gdtype"][6:],
                    tuple(
                        Bucket(start, end, unpadded)
                        for (start, end), unpadded in zip(
                            one["bucket_indices"], one["unpadded"], strict=True
                        )
                    ),
                    tuple(
                        Slot(
                            key.removeprefix("module."),
                            tuple(shape),
                            one["pdtype"][6:],
                            *where,
                            expert=kind == "expert",
                        )
                        for key, shape, *where in one["params"]
                    ),
                )
                for one in rank["chunks"]
                if one["kind"] == kind
            ]
            for kind in ("dense", "expert")
        }
        live[rank["tp"], rank["pp"], rank["ep"]] = [
            buffers for buffers in kinds.values() if buffers
        ]
    return live


def live_prototype(name, tmp_path):
    folder = next(translated(DATA / name, tmp_path / "translated").glob("iter_*")) / "param_map"
    return {place: rank.optimizers for place, rank in read(folder).ranks.items()}


def model_args(name, tp, pp_or_ep):
    (file,) = (DATA / name).glob(f"iter_*/mp_rank_{tp:02}_{pp_or_ep:03}/model_optim_rng.pt")
    return vars(torch_load(file)["args"])


def with_ties(buffer, args):
    """Neither the truth nor the prototype says which parameter is a tied embedding."""
    ends = (
        ()
        if args["untie_embeddings_and_output_weights"]
        else ("word_embeddings.weight", "for_head.weight", "output_layer.weight")
    )
    return replace(
        buffer, slots=tuple(replace(slot, tied=slot.name.endswith(ends)) for slot in buffer.slots)
    )


@pytest.mark.parametrize(
    "name", [path.parent.name for path in sorted(DATA.glob("cac60ce4_*/param_map"))]
)
def test_bare_maps_count_as_core_0_6(name):
    for (tp, pp, ep), rank in read(DATA / name / "param_map").ranks.items():
        args = model_args(name, tp, pp)
        layout = Layout(
            tp=args["tensor_model_parallel_size"],
            pp=args["pipeline_model_parallel_size"],
            ep=args["expert_model_parallel_size"],
            etp=args["tensor_model_parallel_size"],
            dp=args["data_parallel_size"],
        )
        rule = Rule.of(None, args, layout)
        assert rule == Rule((0, 6), layout, bucket_size=40_000_000)
        (buffers,) = rank.optimizers
        buffers = [with_ties(buffer, args) for buffer in buffers]
        chunks = [
            [unplaced(slot) for slot in sorted(buffer.slots, key=lambda slot: -slot.start)]
            for buffer in buffers
        ]
        (laid_out,) = replace(rule, bucket_size=RECORDED[name][1]).optimizers(
            chunks, Place(tp, pp, ep), BF16
        )
        assert [set(buffer.slots) for buffer in laid_out] == [
            set(buffer.slots) for buffer in buffers
        ]


# -------------------------------------------------------------------------------------------- the
# releases' own class


@pytest.mark.parametrize(
    "core",
    [
        pytest.param(core, marks=() if core in QUICK_CORES else pytest.mark.full)
        for core in (*CORES, "0.7.0", "0.9.0", "0.13.1")
    ],
)  # each generation of the rule
def test_random_parameters_are_laid_out_as_the_release_does(core):
    cases = random_cases(busbw=core in ("0.12.3", "0.13.1", "0.16.1"))
    oracle = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.live.test_buckets", fetch_core(core)],
        cwd=ROOT,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
    )
    assert oracle.returncode == 0, oracle.stderr
    theirs = json.loads(oracle.stdout)
    refused = sum(one is None for one in theirs)
    assert (
        len(theirs) == len(cases)
        and refused < len(cases) / 2
        and (refused > 0) == (core not in ("0.13.1", "0.16.1"))
    )
    assert [laid_out(core, case) for case in cases] == theirs


def random_cases(busbw, number=200):
    draw = random.Random(number)
    sizes = [1, 32, 64, 64, 96, 128, 128, 192, 256, 1000, 1024, 4096]
    cases = []
    for _ in range(number):
        numels = draw.choices(
            sizes[draw.choice((0, 2)) :: draw.choice((1, 2))], k=draw.randint(1, 12)
        )
        tied = [False] * len(numels)
        tied[draw.choice((0, 0, -1, len(numels) // 2))] = draw.random() < 0.5
        cases.append(
            {
                "numels": numels,
                "tied": tied,
                "dp": draw.choice((1, 2, 3, 4, 6, 8)),
                "bucket_size": draw.choice((None, 100, 1000, 5000)),
                "pad": busbw and draw.random() < 0.3,
            }
        )
    return cases


def laid_out(core, case):
    layout = Layout(pp=2, dp=case["dp"])
    rule = replace(
        Rule.of(recorded_by(core), {}, layout),
        bucket_size=case["bucket_size"],
        pad_for_busbw=case["pad"],
    )
    params = [
        Slot(str(number), (numel,), "bfloat16", 0, 0, 0, tied=tied)
        for number, (numel, tied) in enumerate(zip(case["numels"], case["tied"], strict=True))
    ]
    try:
        ((buffer,),) = rule.optimizers([params], Place(), BF16)
    except RefusedError:
        return None
    assert [slot.name for slot in buffer.slots] == [slot.name for slot in reversed(params)]
    return {
        "buckets": [[one.start, one.end, one.numel_unpadded] for one in buffer.buckets],
        "params": [[slot.start, slot.end, slot.bucket] for slot in reversed(buffer.slots)],
    }


# ------------------------------------------------------------------------------------------------
# what a run says

NO_OVERLAP, OVERLAP = (
    {"overlap_grad_reduce": False},
    {"overlap_grad_reduce": True, "ddp_bucket_size": None},
)


@pytest.mark.parametrize(
    ("core", "ddp_recorded", "args", "expected"),
    [
        ("0.6.0", None, {}, None),
        ("0.6.0", None, NO_OVERLAP, None),
        ("0.6.0", None, OVERLAP, 40_000_000),
        ("0.7.0", None, OVERLAP, 64_000_000),
        ("0.11.0", None, OVERLAP, 64_000_000),
        ("0.12.3", None, OVERLAP, 128_000_000),
        ("0.12.3", None, {**OVERLAP, "ddp_bucket_size": 7}, 7),
        ("0.12.3", None, {**NO_OVERLAP, "ddp_bucket_size": 7}, None),
        ("0.16.1", {"bucket_size": None, "overlap_grad_reduce": False}, {}, None),
        ("0.16.1", ddp(7), {}, 7),
        ("0.16.1", ddp(7), OVERLAP, 7),
        ("0.16.1", ddp(48_000_000), {}, 64_000_000),
        ("0.16.1", ddp(96_000_000), OVERLAP, 128_000_000),
        ("0.16.1", ddp(96_000_000), {**OVERLAP, "ddp_bucket_size": 96_000_000}, 96_000_000),
    ],
)
def test_the_bucket_size_is_the_runs_or_the_releases(core, ddp_recorded, args, expected):
    """The run had 48 data-parallel and 2 context-parallel ranks; the new layout has 64 and 2."""
    recorded = {**recorded_by(core, dp=48, cp=2), "ddp": ddp_recorded}
    assert Rule.of(recorded, args, Layout(dp=64, cp=2)).bucket_size == expected


def test_only_the_first_chunk_of_the_first_stage_is_cut():
    chunks = [
        [Slot(f"{chunk}.{number}", (128,), "bfloat16", 0, 0, 0) for number in range(4)]
        for chunk in range(2)
    ]

    def buckets(pp, **args):
        rule = Rule.of(recorded_by("0.12.3", 256, pp=2, vpp=2), args, Layout(pp=2, vpp=2))
        return [
            [len(buffer.buckets) for buffer in buffers]
            for buffers in rule.optimizers(chunks, Place(pp=pp), BF16)
        ]

    assert buckets(0) == [[2, 1]]
    assert buckets(1) == [[1, 1]]
    assert buckets(0, ddp_num_buckets=8) == [[4, 1]]
    assert buckets(0, overlap_param_gather_with_optimizer_step=True) == [[1], [1]]


def test_tied_embeddings_of_one_stage_have_no_bucket_of_their_own():
    params = [
        Slot(name, (128,), "bfloat16", 0, 0, 0, tied=name == "tied") for name in ("tied", "a", "b")
    ]
    for pp, buckets in ((1, 1), (2, 2)):
        ((buffer,),) = Rule((0, 16), Layout(pp=pp)).optimizers([params], Place(), BF16)
        assert len(buffer.buckets) == buckets


def test_buffers_come_in_the_order_in_which_their_dtypes_appear():
    params = [
        Slot("norm", (64,), "float32", 0, 0, 0),
        Slot("a", (64,), "bfloat16", 0, 0, 0),
        Slot("b", (64,), "float32", 0, 0, 0),
    ]
    (buffers,) = Rule((0, 16), Layout()).optimizers(
        [params], Place(), {"bfloat16": "float32", "float32": "float32"}
    )
    assert [(buffer.param_dtype, [slot.name for slot in buffer.slots]) for buffer in buffers] == [
        ("float32", ["b", "norm"]),
        ("bfloat16", ["a"]),
    ]


# ---------------------------------------------------------------------------------------------------
# who saves what


def held(rule, place, params, **flags):
    return [
        None if buffers is None else len(buffers)
        for buffers in rule.optimizers([params], place, BF16, **flags)
    ]


DENSE, EXPERT = (
    Slot(name, (64,), "bfloat16", 0, 0, 0, expert=name == "expert") for name in ("dense", "expert")
)


@pytest.mark.parametrize(
    ("core", "without_experts"),
    [((0, 12), {0: [1], 1: [None]}), ((0, 16), {0: [1, 0], 1: [None, 0]})],
)
def test_a_stage_without_experts(core, without_experts):
    """As 0.12.3 and 0.16.1 save a second stage without experts (moe_layer_freq [1, 0], pp 2, ep
    2)."""
    rule = Rule(core, Layout(pp=2, ep=2, dp=2))
    for ep in (0, 1):
        assert held(rule, Place(ep=ep), [DENSE, EXPERT]) == [1 if ep == 0 else None, 1]
        assert held(rule, Place(pp=1, ep=ep), [DENSE], experts_anywhere=True) == without_experts[ep]


def test_experts_with_a_tensor_parallel_size_of_their_own():
    """tp 2, etp 1, ep 2: rank 1 of a stage is tensor rank 1 and expert rank 1, and saves both of
    its optimizers."""
    rule = Rule((0, 16), Layout(tp=2, etp=1, ep=2, dp=2))
    assert rule.experts_apart and (rule.ranks_sharing(False), rule.ranks_sharing(True)) == (2, 2)
    assert {
        (tp, ep): held(rule, Place(tp=tp, ep=ep), [DENSE, EXPERT]) for tp in (0, 1) for ep in (0, 1)
    } == {(0, 0): [1, 1], (0, 1): [None, None], (1, 0): [None, None], (1, 1): [1, 1]}


@pytest.mark.parametrize(
    ("core", "layout", "apart"),
    [
        ((0, 16), Layout(tp=2, etp=2, dp=2), False),
        ((0, 18), Layout(tp=2, etp=1, dp=2), False),
        ((0, 19), Layout(tp=2, etp=1, dp=2), True),
        ((0, 6), Layout(ep=2, dp=2), True),
    ],
)
def test_when_experts_have_an_optimizer_of_their_own(core, layout, apart):
    assert Rule(core, layout).experts_apart == apart


@pytest.mark.parametrize(
    ("core", "ranks"), [((0, 17), (12, 6)), ((0, 18), (24, 12)), ((0, 19), (12, 6))]
)
def test_optimizer_instances_share_the_data_parallel_ranks(core, ranks):
    rule = Rule(core, Layout(ep=2, dp=12, cp=2), instances=2)
    assert (rule.ranks_sharing(False), rule.ranks_sharing(True)) == ranks


# --------------------------------------------------------------------------------------------------------
# the oracle


def oracle_main(core):
    from examples import cpu_shim

    sys.path.insert(0, core)
    release = runpy.run_path(f"{core}/megatron/core/package_info.py")
    cpu_shim.install(transformer_engine=(release["MAJOR"], release["MINOR"]) < (0, 8))
    cpu_shim.patch_megatron()
    print(json.dumps([oracle(case) for case in json.load(sys.stdin)]))


def oracle(case):
    """What the release makes of a case; None where it stops, or has a parameter start before its
    bucket.

    The optimizer stops on the latter when it is built (see
    test_what_the_release_refuses_is_refused)."""
    import torch
    from megatron.core.distributed import param_and_grad_buffer as module

    group = SimpleNamespace(size=lambda: case["dp"], rank=lambda: 0)
    torch.distributed.get_world_size = lambda group=None: case["dp"]
    torch.distributed.get_rank = lambda group=None: 1
    module.log_on_each_pipeline_stage = lambda *args, **kwargs: None
    if hasattr(module, "parallel_state"):
        module.parallel_state = SimpleNamespace(get_data_parallel_rank=lambda **_: 1)
    params = [
        torch.nn.Parameter(torch.empty(numel, dtype=torch.bfloat16)) for numel in case["numels"]
    ]
    for param, tied in zip(params, case["tied"], strict=True):
        param.shared_embedding = tied
    config = getattr(module, "DistributedDataParallelConfig", SimpleNamespace)(
        use_distributed_optimizer=True
    )
    config.pad_buckets_for_high_nccl_busbw = case["pad"]
    known = {
        "param_dtype": torch.bfloat16,
        "grad_dtype": torch.float32,
        "params": params,
        "data_parallel_group": group,
        "bucket_size": case["bucket_size"],
        "param_to_name": dict.fromkeys(params, ""),
        "ddp_config": config,
        "gradient_scaling_factor": 1.0,
        "overlap_grad_reduce": True,
        "use_distributed_optimizer": True,
        "check_for_nan_in_grad": False,
        "param_indices": list(range(len(params))),
        "nccl_ub": False,
        "pg_collection": SimpleNamespace(tp=group, dp_cp=group),
    }
    make = getattr(module, "_ParamAndGradBuffer", None) or module.ParamAndGradBuffer
    try:
        buffer = make(
            **{
                name: known[name]
                for name in inspect.signature(make.__init__).parameters
                if name != "self"
            }
        )
    except AssertionError:
        return None
    where = [buffer.param_index_map[param] for param in params]
    if any(start < buffer.bucket_indices[bucket][0] for start, _, bucket in where):
        return None
    return {
        "buckets": [
            [*bounds, bucket.numel_unpadded]
            for bounds, bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True)
        ],
        "params": [list(one) for one in where],
    }


if __name__ == "__main__":
    oracle_main(sys.argv[1])
