"""DeepSpeed's checkpoints read: what its own engines and tools say of them, bit for bit, and what
is refused."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parammap.cli import main
from parammap.errors import RefusedError
from parammap.families import BLOOM as BLOOM_FAMILY
from parammap.families import GPT2
from parammap.frameworks import registry
from parammap.frameworks.architecture import architecture_of
from parammap.job.conversion import convert
from parammap.job.request import Request
from parammap.tensors.logical import MAIN_PARAM, MODEL_PARAM
from tests.support.deepspeed_goldens import (
    BLOOM,
    GPT,
    PLAIN,
    change,
    elements,
    load,
    recut,
    same,
    states,
    unpack,
)

TAG = "global_step3"


@pytest.fixture(scope="module")
def goldens(tmp_path_factory) -> Callable[[str], Path]:
    """A golden's folder, to be read only."""
    folder = tmp_path_factory.mktemp("goldens")
    return lambda name: folder / name if (folder / name).is_dir() else unpack(name, folder / name)


def universal(source: Path, out: Path, **wishes) -> Path:
    """The universal checkpoint that is made of it."""
    assert convert(Request(source=source, target=out, to="deepspeed", **wishes)).status == 0
    return out / (out / "latest_universal").read_text()


# -------------------------------------------------------------------------------------------------------------
# the truth


@pytest.mark.parametrize("golden", [GPT, BLOOM, PLAIN["zero1"]])
def test_our_universal_checkpoint_is_that_of_deepspeeds_own_tool(golden, goldens, tmp_path):
    """Every file of it: each state, the steps, the optimizer's state, the mp_rank files."""
    source = goldens(golden)
    ours, theirs = universal(source, tmp_path / "out", replicas="mean"), source / "ORACLE_universal"
    names = {path.relative_to(theirs) for path in theirs.rglob("*.pt")}
    assert names == {path.relative_to(ours) for path in ours.rglob("*.pt")} and len(names) > 50
    stepped = {path.parent for path in names if path.name == "exp_avg.pt"}
    for name in names:
        mine, truth = load(ours / name), load(theirs / name)
        if name.name == "fp32.pt" and name.parent not in stepped:
            assert mine.pop("cat_dim") == 0  # theirs says nothing of how what is not stepped is cut
        assert same(mine, truth), name


@pytest.mark.parametrize("golden", PLAIN.values())
def test_plain_models_are_as_their_engine_had_them(golden, goldens, tmp_path):
    """ZeRO-1, ZeRO-2 and the BF16 optimizer; parameters straddle shards; frozen ones, a buffer and
    an alias are there."""
    truth = torch.load(goldens(golden) / "ORACLE_engine_fp32.pt")
    ours = states(universal(goldens(golden), tmp_path / "out"))
    module = load(goldens(golden) / TAG / "mp_rank_00_model_states.pt")["module"]
    assert ours.keys() == truth.keys() | module.keys() and len(truth) > 10
    for name, own in ours.items():
        expected = truth[name] if "exp_avg" in own or name not in module else module[name]
        if name == "head.weight":
            expected = truth["wte.weight"]
        assert torch.equal(own["fp32"].float(), expected.float()), name
    assert {name for name, own in ours.items() if "exp_avg" not in own} == {
        "frozen.weight",
        "frozen.bias",
        "h.0.scale",
        "h.1.scale",
        "head.weight",
    } & ours.keys()


@pytest.mark.parametrize("golden", [GPT, BLOOM])
def test_each_rank_of_a_pipeline_is_as_its_engine_had_it(golden, goldens):
    """Weights and their 16-bit copies by rank, as the live engine gathered them over its
    data-parallel ranks."""
    checkpoint = registry.read(goldens(golden))
    there = {
        (
            held.found.place.tp,
            held.found.place.pp,
            held.found.name,
            held.found.state,
        ): held.found.stored
        for held in checkpoint.index.held
    }
    prefixes, compared = checkpoint.rank_metadata[0, 0, 0]["functions"], 0
    for *_, parameters in torch.load(goldens(golden) / "ORACLE_engine_state_by_rank.pt"):
        for name, truth in parameters.items():
            number, _, local = name.partition(".")
            prefix = "embedding" if number == "tied_modules" else prefixes[int(number)]
            own = f"{prefix}.{local.removeprefix('embed.')}"
            if prefix == "embedding" and truth["pp"]:
                own = (
                    "word_embeddings_for_head.weight"
                    if name.endswith("word_embeddings.weight")
                    else None
                )
            key = truth["tp"], truth["pp"], own
            assert ((*key, MAIN_PARAM) in there) == (own is not None)
            if own is not None:
                assert torch.equal(elements(there[*key, MAIN_PARAM]), truth["fp32"]), name
            if (*key, MODEL_PARAM) in there:
                assert torch.equal(elements(there[*key, MODEL_PARAM]), truth["lp"]), name
                compared += 1
    assert compared >= 4 * 25


@pytest.mark.parametrize("golden", [GPT, BLOOM, PLAIN["zero2"]])
def test_the_universal_checkpoint_is_read_as_what_it_was_made_of(golden, goldens, tmp_path, capsys):
    ours = universal(goldens(golden), tmp_path / "out")
    assert main.main(["verify", str(ours.parent)]) == 0
    assert main.main(["diff", str(goldens(golden)), str(ours.parent)]) == 0
    assert "none differ" in capsys.readouterr().out
    again = universal(ours.parent, tmp_path / "again")
    assert all(
        same(load(path), load(again / path.relative_to(ours))) for path in ours.rglob("*.pt")
    )


def test_weights_alone_are_the_layer_files(goldens):
    checkpoint = registry.read(goldens(GPT), weights_only=True)
    assert not checkpoint.with_optimizer and {
        tensor.dtype for tensor in checkpoint.index.shards
    } == {"bfloat16"}
    whole = registry.read(goldens(GPT))
    assert {t.name for t in checkpoint.index.shards} == {
        t.name for t in whole.index.tensors(MAIN_PARAM)
    }
    with pytest.raises(
        RefusedError, match="no optimizer's states, and by them alone DeepSpeed resumes"
    ):
        convert(
            Request(source=goldens(GPT), target=Path("nowhere"), to="deepspeed", weights_only=True)
        )


@pytest.mark.parametrize(("golden", "family"), [(GPT, GPT2), (BLOOM, BLOOM_FAMILY)])
def test_what_the_model_computes(golden, family, goldens):
    model = architecture_of(registry.read(goldens(golden)))
    assert (model.family, model.layers, model.hidden, model.heads, model.groups, model.ffn) == (
        family,
        4,
        24,
        4,
        4,
        96,
    )
    assert (model.vocab, model.positions, model.tied, model.bias, model.head_size) == (
        50,
        16,
        True,
        True,
        6,
    )
    assert (model.activation, model.eps) == (None, None)  # the golden's arguments do not say


@pytest.mark.parametrize(
    ("args", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_new"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_new"),
        ({"bias_gelu_fusion": False, "openai_gelu": False}, "gelu"),
    ],
)
def test_the_activation_is_told_by_the_arguments(args, activation, goldens, tmp_path):
    folder = unpack(GPT, tmp_path)
    for path in (folder / TAG).glob("mp_rank_*"):
        change(path, lambda content: vars(content["args"]).update(args, layernorm_epsilon=1e-6))
    model = architecture_of(registry.read(folder))
    assert (model.activation, model.eps) == (activation, 1e-6)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"glu_activation": "geglu"}, "glu_activation geglu"),
        ({"position_embedding_type": "rotary"}, "positions are rotary"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm",
        ),
    ],
)
def test_what_neither_gpt2_nor_bloom_computes_is_named(args, reason, tmp_path):
    folder = unpack(GPT, tmp_path)
    change(
        folder / TAG / "mp_rank_00_model_states.pt",
        lambda content: vars(content["args"]).update(args),
    )
    with pytest.raises(RefusedError, match=reason):
        architecture_of(registry.read(folder))


def test_a_model_of_no_known_family_is_no_gpt(goldens):
    with pytest.raises(RefusedError, match="no table of names knows"):
        architecture_of(registry.read(goldens(PLAIN["zero2"])))


# ----------------------------------------------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("dp", [1, 12])
@pytest.mark.parametrize("golden", [GPT, PLAIN["zero2"]])
def test_any_number_of_data_parallel_ranks(golden, dp, goldens, tmp_path):
    """Synthetic: the golden's shards, cut anew over 12 files by the format's rule, padding marked;
    some hold nothing but padding. Ranks are ordered by number (10 after 9), and none is lost for
    having two digits."""
    folder = unpack(golden, tmp_path / "recut")
    recut(folder / TAG, dp)
    assert len(list((folder / TAG).glob("zero_pp_rank_*"))) == dp * (4 if golden == GPT else 1)
    ours, before = (
        states(universal(source, tmp_path / name))
        for source, name in ((folder, "a"), (goldens(golden), "b"))
    )
    assert same(ours, before) and registry.read(folder).layout.dp == dp


def test_files_of_older_releases(goldens, tmp_path):
    """Without checkpoint_parallel_dimensions and param_slice_mappings, shards named without the
    last underscore."""
    folder = unpack(GPT, tmp_path / "old")
    for path in (folder / TAG).glob("mp_rank_*"):
        change(path, lambda content: content.pop("checkpoint_parallel_dimensions"))
    for path in (folder / TAG).glob("*zero_*"):
        change(path, lambda content: content["optimizer_state_dict"].pop("param_slice_mappings"))
        path.rename(path.with_name(path.name.replace("_optim", "optim")))
    checkpoint = registry.read(folder)
    assert (checkpoint.layout.tp, checkpoint.layout.pp, checkpoint.layout.dp) == (2, 2, 2)
    assert same(
        states(universal(folder, tmp_path / "a")), states(universal(goldens(GPT), tmp_path / "b"))
    )


def test_alignment_padding_behind_parameters_and_elastic_states(goldens, tmp_path):
    """Synthetic: 4 elements of padding behind each parameter, as round_robin_bit16_padding says;
    the base optimizer's states as the list that an elastic checkpoint has, without the padding at
    the end."""
    folder = unpack(PLAIN["zero2"], tmp_path / "gaps")
    recut(folder / TAG, 1)
    shapes = load(folder / TAG / "mp_rank_00_model_states.pt")["param_shapes"]

    def spread(flat: torch.Tensor, group: dict) -> torch.Tensor:
        parts = flat[: sum(shape.numel() for shape in group.values())].split(
            [shape.numel() for shape in group.values()]
        )
        return torch.cat([torch.nn.functional.pad(part, (0, 4), value=9.0) for part in parts])

    def spread_all(content: dict) -> None:
        state = content["optimizer_state_dict"]
        own = state["base_optimizer_state"]["state"]
        state["base_optimizer_state"] = [
            {
                key: spread(value, group) if value.dim() else value
                for key, value in own[number].items()
            }
            for number, group in enumerate(shapes)
        ]
        fp32 = state["single_partition_of_fp32_groups"]
        state["single_partition_of_fp32_groups"] = [
            spread(flat, group) for flat, group in zip(fp32, shapes, strict=True)
        ]
        state["param_alignment_paddings"] = [[4] * len(group) for group in shapes]

    change(folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt", spread_all)
    assert same(
        states(universal(folder, tmp_path / "a")),
        states(universal(goldens(PLAIN["zero2"]), tmp_path / "b")),
    )


def test_replicas_that_drift_are_refused_or_chosen_among(goldens, tmp_path):
    """A norm that tensor-parallel ranks keep apart: the fp32 weight of rank 1 differs."""
    folder = unpack(GPT, tmp_path / "drift")
    for path in (folder / TAG).glob("*zero_pp_rank_*_mp_rank_01_*"):
        change(
            path,
            lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].data.add_(
                2**-12
            ),
        )
    name = "3.input_layernorm.weight"
    with pytest.raises(RefusedError, match=r"layers\.0\.input_norm\.weight"):
        universal(folder, tmp_path / "refused", accept_stale=True)
    universal(folder, tmp_path / "first", replicas="first", accept_stale=True)
    truth = states(goldens(GPT) / "ORACLE_universal")[name]["fp32"]
    assert torch.equal(states(tmp_path / "first/global_step3_universal")[name]["fp32"], truth)
    universal(folder, tmp_path / "mean", replicas="mean", accept_stale=True)
    mean = states(tmp_path / "mean/global_step3_universal")[name]["fp32"]
    assert torch.equal(mean, (truth + (truth + 2**-12)) / 2) and not torch.equal(mean, truth)


@pytest.mark.parametrize("is_gated", [False, True])
def test_without_a_pipeline_ranks_of_megatrons_names_come_together(is_gated, goldens, tmp_path):
    """Synthetic: the golden's layers as modules of two tensor-parallel ranks, by Megatron's names,
    with one flat partition. Gated: the first half of each rank's h_to_4h is one part, its second
    half another."""
    (tmp_path / TAG).mkdir()
    models = [_module(goldens(GPT) / TAG, tp, is_gated) for tp in range(2)]
    for tp, module in enumerate(models):
        args = {"args": Namespace(num_attention_heads=4, num_layers=4), "checkpoint_version": 3.0}
        info = {"checkpoint_info": {"original_vocab_size": 50}, "iteration": 3}
        shapes = {name: tensor.shape for name, tensor in module.items()}
        torch.save(
            {"module": module, "param_shapes": [shapes], "dp_world_size": 1, **args, **info},
            tmp_path / TAG / f"mp_rank_{tp:02d}_model_states.pt",
        )
        flat = torch.cat([tensor.flatten() for tensor in module.values()])
        state = {"exp_avg": 2 * flat, "exp_avg_sq": 3 * flat, "step": torch.tensor(3.0)}
        torch.save(
            {
                "optimizer_state_dict": {
                    "base_optimizer_state": {"state": {0: state}, "param_groups": []},
                    "single_partition_of_fp32_groups": [flat],
                    "partition_count": [1],
                    "ds_version": "0.19.8",
                }
            },
            tmp_path / TAG / f"zero_pp_rank_0_mp_rank_{tp:02d}_optim_states.pt",
        )
    ours = universal(tmp_path / TAG, tmp_path / "out")
    for name, first in models[0].items():
        second, cut = models[1][name], load(ours / "zero" / name / "fp32.pt")
        if "h_to_4h" in name and is_gated:
            expected = torch.cat(
                [
                    half
                    for number in range(2)
                    for half in (first.chunk(2)[number], second.chunk(2)[number])
                ]
            )
            assert (cut["cat_dim"], cut["param_n_sub_params"]) == (0, 2)
        elif "norm" in name or "position" in name or name.endswith(("dense.bias", "4h_to_h.bias")):
            expected = first
            assert "cat_dim" not in cut
        else:
            dim = 1 if name.endswith(("dense.weight", "4h_to_h.weight")) else 0
            expected = torch.cat([first, second], dim)
            assert cut["cat_dim"] == dim
        expected = expected[:50] if "word_embeddings" in name else expected
        for factor, key in enumerate(("fp32", "exp_avg", "exp_avg_sq"), 1):
            assert torch.equal(
                load(ours / "zero" / name / f"{key}.pt")["param"], factor * expected
            ), name


def _module(folder: Path, tp: int, is_gated: bool) -> dict[str, torch.Tensor]:
    """A rank's layers, as one float32 module without a pipeline has them."""
    module = {}
    for number in (1, 3, 4, 5, 6, 8):
        prefix = {1: "embedding.", 8: "encoder.final_layernorm."}.get(
            number, f"encoder.layers.{number - 3}."
        )
        for name, tensor in load(
            folder / f"layer_{number:02d}-model_{tp:02d}-model_states.pt"
        ).items():
            wide = torch.cat([tensor, -tensor]) if is_gated and "h_to_4h" in name else tensor
            module[f"language_model.{prefix}{name}"] = wide.float()
    return module


# ---------------------------------------------------------------------------------------------------------------
# refusals


def _without(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return remove


def _state(how: Callable[[dict], object], number: int = 1) -> Callable[[Path], None]:
    return lambda folder: change(
        folder / f"bf16_zero_pp_rank_{number}_mp_rank_02_optim_states.pt",
        lambda content: how(content["optimizer_state_dict"]),
    )


def _model(how: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "mp_rank_00_model_states.pt", how)


def _layer(how: Callable[[dict], object], tp: str = "0?") -> Callable[[Path], None]:
    def every(folder: Path) -> None:
        for path in folder.glob(f"layer_04-model_{tp}-*"):
            change(path, how)

    return every


def _cut_short(state: dict) -> None:
    state["single_partition_of_fp32_groups"][0] = state["single_partition_of_fp32_groups"][0][
        :-1
    ].clone()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            _without("bf16_zero_pp_rank_1_mp_rank_02*"),
            "the first is the optimizer's shard of mp_rank 02, data-parallel rank 1",
        ),
        (
            _without("bf16_zero_*"),
            "its optimizer has no .*; copy the whole checkpoint, or convert --weights-only",
        ),
        (
            _without("bf16_zero_pp_rank_1_*"),
            "is one of 2 data-parallel shards, of which 1 are here",
        ),
        (_without("mp_rank_03*"), "3 mp_rank files are not whole stages of 2"),
        (
            _without("*mp_rank_0[23]_*"),
            "was saved with tp 2 and pp 2, and its files are of tp 2 and pp 1",
        ),
        (_without("mp_rank_01*"), "the first is mp_rank_01_model_states.pt"),
        (
            _without("layer_04-model_01*"),
            "1 files are missing, the first is layer_04-model_01-model_states.pt",
        ),
        (_without("layer_04-*"), "has the layer functions .*, and the model has 4 layers"),
        (_without("layer_06-*"), "has the layer functions .*, and the model has 4 layers"),
        (
            _without("layer_08-*"),
            "its functions with parameters are embedding, layers, and those of a GPT",
        ),
        (_without("layer_*"), "its files are of tp 4 and pp 1"),
        (
            _layer(lambda c: c.update({"mlp.gadget.weight": torch.ones(3)})),
            r"layer function 4 has .* mlp\.gadget\.weight",
        ),
        (
            _layer(lambda c: c.pop("mlp.dense_4h_to_h.bias"), "01"),
            r"model_01.* has other parameters .*dense_4h_to_h\.bias",
        ),
        (
            _layer(lambda c: c.pop("mlp.dense_4h_to_h.bias")),
            r"its optimizer steps layers\.1\.mlp\.dense_4h_to_h\.bias",
        ),
        (_layer(lambda c: c.update({"_extra_state": 5})), "holds what is no tensor: _extra_state"),
        (_state(_cut_short), r"weight of group 0 has \[4031\] elements"),
        (
            _state(lambda s: s["base_optimizer_state"]["state"][1].update(exp_avg=torch.ones(9))),
            r"exp_avg of group 1 has \[9\]",
        ),
        (
            _state(lambda s: s["base_optimizer_state"]["state"][1].pop("exp_avg_sq")),
            "group 1 has no exp_avg_sq",
        ),
        (
            _state(lambda s: s["base_optimizer_state"]["state"][1].update(trace=torch.ones(9))),
            "its optimizer keeps trace",
        ),
        (
            _state(lambda s: s["base_optimizer_state"]["state"][1].update(step=torch.tensor(9.0))),
            r"of steps \[3.0, 9.0\]",
        ),
        (
            _state(lambda s: s["single_partition_of_fp32_groups"].pop()),
            "has partitions of 1 groups, and the model file names",
        ),
        (
            _state(lambda s: s["param_slice_mappings"][0].popitem()),
            "its own map says that .* lies elsewhere",
        ),
        (
            _state(
                lambda s: (s.pop("single_partition_of_fp32_groups"), s.update(fp32_flat_groups=[]))
            ),
            "is of ZeRO stage 3",
        ),
        (
            _model(
                lambda c: c["param_shapes"][0].update(
                    {"3.mlp.dense_4h_to_h.weight": torch.Size([24, 50])}
                )
            ),
            "group 0 has .* elements, and the .* of the group's parameters over 2 shards",
        ),
        (_model(lambda c: c.update(param_shapes=None)), "has no param_shapes"),
        (
            _model(lambda c: c.update(checkpoint_version=1.0)),
            "checkpoint version 1.0, whose rows of query_key_value",
        ),
        (_model(lambda c: vars(c["args"]).update(num_layers=5)), "and the model has 5 layers"),
        (_model(lambda c: c.pop("module")), "holds no model states of DeepSpeed"),
        (
            lambda folder: (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch(),
            "is of ZeRO stage 3",
        ),
        (
            lambda folder: (folder / "layer_3_expert_0_mp_rank_00_model_states.pt").touch(),
            "is of a mixture of experts",
        ),
        (
            lambda folder: (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch(),
            "is of the same rank as bf16_zero",
        ),
        (
            lambda folder: (folder / "bf16_zero_pp_rank_0_mp_rank_04_optim_states.pt").touch(),
            "is of a rank that has no model",
        ),
    ],
)
def test_what_does_not_add_up_is_refused(how, message, tmp_path, goldens):
    folder = tmp_path / TAG
    folder.mkdir()
    for path in (goldens(GPT) / TAG).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    how(folder)
    with pytest.raises(RefusedError, match=message):
        convert(Request(source=folder, target=tmp_path / "out", to="deepspeed"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda folder: (folder / "zero/3.input_layernorm.bias/fp32.pt").unlink(),
            "fp32.pt: missing",
        ),
        (
            lambda folder: (folder / "zero/3.input_layernorm.bias/exp_avg.pt").unlink(),
            "exp_avg.pt: missing",
        ),
        (
            lambda folder: torch.save({}, folder / "zero/3.input_layernorm.bias/fp32.pt"),
            "holds no param",
        ),
        (
            lambda folder: torch.save({}, folder / "zero/optimizer_state.pt"),
            "holds no param_groups",
        ),
        (lambda folder: [p.unlink() for p in folder.glob("mp_rank_*")], "has no mp_rank"),
    ],
)
def test_a_universal_checkpoint_that_is_damaged_is_refused(how, message, tmp_path):
    folder = unpack(GPT, tmp_path) / "ORACLE_universal"
    how(folder)
    with pytest.raises(RefusedError, match=message):
        registry.read(folder)


def test_the_step_is_chosen(goldens, tmp_path):
    folder = unpack(PLAIN["zero2"], tmp_path)
    assert registry.read(folder, iteration=3).iteration == 3
    with pytest.raises(
        RefusedError, match="global_step7: no such folder; choose another step with --iteration"
    ):
        registry.read(folder, iteration=7)
    (folder / "latest").unlink()
    with pytest.raises(RefusedError, match="has no latest; choose a step with --iteration"):
        registry.read(folder)
