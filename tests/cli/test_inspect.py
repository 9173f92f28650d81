"""`parammap inspect`: what it says of real checkpoints, against torch.load and the live state of
their runs."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from parammap.cli.main import main
from tests.support import paths
from tests.support.runs import every_run
from tests.support.torch_load import torch_load

DATA = paths.TESTS / "data" / "megatron"
TP2PP2, PP4VPP2 = "cac60ce4_patched_legacy_tp2pp2", "cac60ce4_patched_legacy_pp4vpp2"
DP3, MOE = "cac60ce4_patched_legacy_pp2dp3_untied_padded", "cac60ce4_patched_mcore_moe_ep2dp2"
LLAMA = "cac60ce4_mcore_pp2dp2_llama"
HOOKED = "core_r0.12.0_repo_mcore_tp2pp2_hook"
RENAMED = {"word_embeddings.weight": "word_embeddings_for_head.weight"}
TIED_NAMES = ("word_embeddings_for_head.weight", "output_layer.weight")


def inspect(capsys, source, *flags) -> dict:
    assert main(["inspect", str(source), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def counted_by_torch(source: Path) -> tuple[int, int]:
    """(elements of the model without the tied copy, those of the tied copy): pieces of
    tensor-parallel ranks are summed unless they are equal, which only replicas are; of
    expert-parallel ranks only experts are summed."""
    pieces, tied = {}, False
    for path in sorted(source.glob("iter_*/mp_rank_*/model_optim_rng.pt")):
        saved = torch_load(path)
        numbers = [int(number) for number in path.parent.name.split("_")[2:]]
        args = saved["args"]
        tied = not args.untie_embeddings_and_output_weights
        second_is_ep = args.expert_model_parallel_size > 1
        for chunk in [key for key in saved if re.fullmatch(r"model\d*", key)]:
            for name, value in flat(saved[chunk]):
                other = numbers[1] if not second_is_ep or "experts.local_experts" in name else 0
                pieces.setdefault((chunk, name, other), {})[numbers[0]] = value
    sizes = {}
    for key, by_tp in pieces.items():
        values = list(by_tp.values())
        replicated = len(values) > 1 and all(torch.equal(values[0], value) for value in values)
        sizes[key] = values[0].numel() if replicated else sum(value.numel() for value in values)
    copy = sum(size for (_, name, _), size in sizes.items() if tied and name.endswith(TIED_NAMES))
    return sum(sizes.values()) - copy, copy


@pytest.mark.parametrize(
    "golden", [TP2PP2, PP4VPP2, DP3, MOE, LLAMA, HOOKED, "core_r0.8.0_repo_legacy_tp2pp2_hook"]
)
def test_parameters_are_counted_once(capsys, golden):
    counts = inspect(capsys, DATA / golden)["parameters"]
    assert (counts["total"], counts["tied_copy"]) == counted_by_torch(DATA / golden)
    assert sum(counts["by_kind"].values()) == counts["total"]


def test_padding_of_the_vocabulary(capsys):
    """In an embedding and a head of its own; Megatron's NullTokenizer adds a token to the
    vocabulary of the arguments."""
    args = torch_load(DATA / DP3 / "iter_0000002/mp_rank_00_000/model_optim_rng.pt")["args"]
    assert args.tokenizer_type == "NullTokenizer" and args.untie_embeddings_and_output_weights
    rows = args.padded_vocab_size - (args.vocab_size + 1)
    facts = inspect(capsys, DATA / DP3, "--tensors")
    counts, tensors = facts["parameters"], {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert rows == 13 and counts["vocab_padding"] == 2 * rows * args.hidden_size
    assert counts["without_padding"] == counts["total"] - counts["vocab_padding"]
    assert facts["model"]["padded_vocab_size"] == args.padded_vocab_size
    for name in ("embedding.word.weight", "output.weight"):
        assert tensors[name]["shape"] == [args.vocab_size + 1, args.hidden_size]
        assert tensors[f"{name}.padding"]["shape"] == [rows, args.hidden_size]


def test_a_tied_head_is_another_holder_of_the_embedding(capsys):
    tensors = {
        tensor["name"]: tensor for tensor in inspect(capsys, DATA / TP2PP2, "--tensors")["tensors"]
    }
    assert "output.weight" not in tensors
    assert {
        (held["name"], *map(tuple, held["ranks"]))
        for held in tensors["embedding.word.weight"]["held_by"]
    } == {
        ("language_model.embedding.word_embeddings.weight", (0, 0, 0), (1, 0, 0)),
        ("word_embeddings_for_head.weight", (0, 1, 0), (1, 1, 0)),
    }


def told_of(buffer: dict) -> tuple:
    """A buffer as an inspection tells it, for comparison with the live one: bounds, unpadded sizes,
    parameters."""
    buckets = buffer["buckets"]
    return (
        [[b["start"], b["end"]] for b in buckets],
        [b["numel_unpadded"] for b in buckets],
        [
            [p["name"], p["shape"], p["start"], p["end"], number]
            for number, b in enumerate(buckets)
            for p in b["params"]
        ],
    )


@pytest.mark.parametrize("golden", [TP2PP2, PP4VPP2, DP3, MOE])
def test_buffers_of_bare_maps_are_the_live_ones(capsys, golden):
    facts = inspect(capsys, DATA / golden)
    told = {
        (*rank, buffer["chunk"]): buffer for buffer in facts["buffers"] for rank in buffer["ranks"]
    }
    live = {}
    for path in sorted((DATA / golden / "truth").glob("rank*.json")):
        rank = json.loads(path.read_text())
        for chunk in rank["chunks"] if rank["dp"] == 0 else ():
            if chunk["kind"] == "dense":
                live[rank["tp"], rank["pp"], rank["ep"], chunk["chunk"]] = chunk
    assert told.keys() == live.keys()
    for key, chunk in live.items():
        names = [[name.removeprefix("module."), *rest] for name, *rest in chunk["params"]]
        assert told_of(told[key]) == (
            chunk["bucket_indices"],
            chunk["unpadded"],
            [[RENAMED.get(name, name), *rest] for name, *rest in names],
        )
        assert (
            told[key]["padding"] == chunk["numel"] - sum(chunk["unpadded"])
            and told[key]["numel"] == chunk["numel"]
        )
        assert told[key]["bounds"] == "file"


@every_run("tp2pp2", "vpp", "uneven", "dp3_padded", "moe_ep2", "fp32_own_group")
def test_buffers_of_layout_files_are_the_live_ones(trained_variant, capsys, core, variant):
    assert_live(
        trained_variant(core, variant), inspect(capsys, trained_variant(core, variant).path), core
    )


def test_gaps_between_aligned_parameters(trained, capsys, tmp_path):
    """A qkv bias of 384 / 4 elements leaves a gap before the next multiple of 64."""
    run = trained("0.16.1", tp=4, layers=1)
    facts = inspect(capsys, run.path, "--html", str(tmp_path / "page.html"))
    assert_live(run, facts, "0.16.1")
    assert {
        end - start
        for b in facts["buffers"]
        for bucket in b["buckets"]
        for start, end in bucket["gaps"]
    } == {32}
    picture = Picture()
    picture.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    for drawn, buffer in zip(picture.buffers, facts["buffers"], strict=True):
        assert sum(count for kind, count, _ in drawn if kind == "gap") == buffer["gaps"] > 0


def assert_live(run, facts, core):
    assert (
        facts["release"]["core"] == core
        and facts["iteration"] == run.iteration
        and facts["missing"] == []
    )
    told = {
        (*rank, buffer["optimizer"], buffer["buffer"]): buffer
        for buffer in facts["buffers"]
        for rank in buffer["ranks"]
    }
    seen = set()
    for truth in run.truths():
        tp, pp, ep = truth.place
        for optimizer, buffers in enumerate(truth.meta["buffers"]):
            for number, live in enumerate(buffers):
                key = tp, pp, ep, optimizer, number
                if (
                    key not in told
                ):  # an expert rank past the first does not save the dense optimizer
                    assert ep and optimizer == 0
                    continue
                seen.add(key)
                bounds, unpadded, params = told_of(told[key])
                assert bounds == [[b["start"], b["end"]] for b in live["buckets"]]
                assert unpadded == [b["numel_unpadded"] for b in live["buckets"]]
                assert {name: [start, end, bucket] for name, _, start, end, bucket in params} == {
                    name.split("/", 1)[1]: place for name, place in live["params"].items()
                }
                covered = [
                    [p["start"], p["end"]] for b in told[key]["buckets"] for p in b["params"]
                ]
                gaps = [gap for b in told[key]["buckets"] for gap in b["gaps"]]
                assert sum(end - start for start, end in covered + gaps) == sum(unpadded)
                assert told[key]["gaps"] == sum(unpadded) - sum(
                    end - start for start, end in covered
                )
    assert seen == told.keys()


@every_run("tp2pp2", "vpp", "uneven", "dp3_padded", "moe_ep2")
def test_layers_states_and_groups_are_the_live_ones(trained_variant, capsys, core, variant):
    run = trained_variant(core, variant)
    facts = inspect(capsys, run.path)
    for truth in run.truths():
        stage = facts["stages"][truth.meta["place"]["pp"]]
        assert [chunk["layers"] for chunk in stage["chunks"]] == truth.meta["layers"]
    saved = torch.load(run.rank_folder(run.truths()[0]) / "distrib_optim.pt", weights_only=True)
    coalesced = "buckets_coalesced" in (saved[0] if isinstance(saved, list) else saved)
    assert facts["optimizer"]["generation"] == (
        "coalesced unpadded buckets" if coalesced else "padded bucket lists"
    )
    assert (
        facts["optimizer"]["states"] == ["exp_avg", "exp_avg_sq"] and facts["optimizer"]["readable"]
    )
    assert {group["step"] for group in facts["optimizer"]["groups"]} == {run.iteration}
    on_disk = sum(path.stat().st_size for path in run.iteration_folder.rglob("*") if path.is_file())
    assert sum(kind["bytes"] for kind in facts["files"]) == on_disk


def test_json_is_stable_and_text_says_the_same(capsys):
    first, second = (inspect(capsys, DATA / TP2PP2, "--tensors") for _ in range(2))
    assert json.dumps(first) == json.dumps(second) and (first["schema"], first["version"]) == (
        "parammap.inspection",
        1,
    )
    assert main(["inspect", str(DATA / TP2PP2)]) == 0
    said = capsys.readouterr().out
    for word in (
        "tp 2 × pp 2",
        "layers 0–1",
        "padded bucket lists",
        f"{first['parameters']['total']:,}",
        "step 2",
    ):
        assert word in said, word


def test_tree_of_tensors(capsys):
    tensors = {
        tensor["name"]: tensor for tensor in inspect(capsys, DATA / TP2PP2, "--tensors")["tensors"]
    }
    saved = dict(
        flat(torch_load(DATA / TP2PP2 / "iter_0000002/mp_rank_01_001/model_optim_rng.pt")["model"])
    )
    own = "language_model.encoder.layers.1.mlp.dense_4h_to_h.weight"
    rows, cols = saved[own].shape
    assert tensors["layers.3.mlp.fc2.weight"] == {
        "name": "layers.3.mlp.fc2.weight",
        "shape": [rows, cols * 2],
        "kind": "mlp",
        "split": "columns",
        "roles": {
            "weight": "float32",
            "exp_avg": "float32",
            "exp_avg_sq": "float32",
            "model_weight": "bfloat16",
        },
        "held_by": [{"name": own, "vpp": 0, "ranks": [[0, 1, 0], [1, 1, 0]]}],
    }
    assert tensors["layers.3.attention.q.weight"]["split"] == "rows"
    assert tensors["final_norm.weight"]["split"] == "whole"
    assert main(["inspect", str(DATA / TP2PP2), "--tensors"]) == 0
    assert f"{[rows, cols * 2]}" in capsys.readouterr().out


class Picture(HTMLParser):
    """The bars of the page: per buffer a list of (class, elements, first line of the title)."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers, self.open, self.cells = [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
        self.cells += tag == "td"
        if attributes.get("class") == "buffer":
            self.buffers.append([])
        if tag == "i" and self.buffers and attributes.get("title"):
            self.buffers[-1].append(
                (
                    attributes["class"].split()[0],
                    int(attributes["style"].removeprefix("--n:")),
                    attributes["title"].splitlines()[0],
                )
            )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("golden", [TP2PP2, PP4VPP2, DP3, MOE, LLAMA])
def test_picture_needs_nothing_else_and_has_each_parameter_once(capsys, tmp_path, golden):
    facts = inspect(capsys, DATA / golden, "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(", page)
    picture = Picture()
    picture.feed(page)
    assert picture.open == [] and picture.cells == len(facts["ranks"])
    assert len(picture.buffers) == len(facts["buffers"])
    for drawn, buffer in zip(picture.buffers, facts["buffers"], strict=True):
        assert sum(count for _, count, _ in drawn) == buffer["numel"]
        assert sum(count for kind, count, _ in drawn if kind == "padding") == buffer["padding"]
        names = [name for kind, _, name in drawn if kind not in ("gap", "padding")]
        assert names == [p["name"] for bucket in buffer["buckets"] for p in bucket["params"]]
        assert len(set(names)) == len(names) == buffer["parameters"]


def test_names_cannot_break_out_of_the_page():
    from parammap.inspection.html import _segment

    assert _segment("mlp", 1, '"><script>x</script>').count("<") == 2


def test_without_a_sidecar_the_weights_are_inspected(capsys):
    facts = inspect(capsys, DATA / LLAMA)
    assert (
        facts["sidecar"] is None and facts["buffers"] == [] and not facts["optimizer"]["readable"]
    )
    assert "no param_map*.json or layout_*.json" in facts["optimizer"]["reason"]
    assert facts["optimizer"]["generation"] == "padded bucket lists"
    assert [state["role"] for state in facts["states"]] == ["model_weight"]
    assert (facts["model"]["num_query_groups"], facts["model"]["swiglu"]) == (2, True)


def test_a_map_without_experts_is_inspected_without_their_states(capsys):
    facts = inspect(capsys, DATA / MOE)
    assert "experts" in facts["optimizer"]["reason"] and not facts["optimizer"]["readable"]
    states = {state["role"]: state for state in facts["states"]}
    assert (
        states["model_weight"]["elements"]
        == facts["parameters"]["total"]
        > states["exp_avg"]["elements"]
    )


def test_a_checkpoint_saved_without_its_optimizer(capsys, tmp_path):
    shutil.copytree(
        DATA / TP2PP2, tmp_path / "src", ignore=shutil.ignore_patterns("distrib_optim.pt")
    )
    facts = inspect(capsys, tmp_path / "src")
    assert "saved without its optimizer" in facts["missing"][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "mp_rank_01_001"), "tp1 pp1"),
        (
            lambda folder: (folder / "mp_rank_01_001/distrib_optim.pt").unlink(),
            "distrib_optim.pt: missing",
        ),
        (
            lambda folder: (folder / "mp_rank_00_001/model_optim_rng.pt").write_bytes(b"PK"),
            "model_optim_rng.pt",
        ),
    ],
)
def test_damage_is_refused_in_one_line(capsys, tmp_path, damage, said):
    source = Path(shutil.copytree(DATA / TP2PP2, tmp_path / "src"))
    damage(source / "iter_0000002")
    assert main(["inspect", str(source), "--html", str(tmp_path / "page.html")]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not (tmp_path / "page.html").exists()


def test_a_truncated_optimizer_without_a_sidecar_is_refused(capsys, tmp_path):
    source = Path(shutil.copytree(DATA / LLAMA, tmp_path / "src"))
    path = source / "iter_0000002/mp_rank_00_001/distrib_optim.pt"
    path.write_bytes(path.read_bytes()[:-4000])
    assert main(["inspect", str(source)]) == 2
    assert str(path) in capsys.readouterr().err


def test_what_cannot_be_written_is_refused(capsys, tmp_path):
    assert main(["inspect", str(DATA / TP2PP2), "--html", str(tmp_path / "no/page.html")]) == 2
    assert "page.html" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("golden", [TP2PP2, PP4VPP2, DP3])
def test_mindspore_output_tells_the_same(capsys, tmp_path, golden, form):
    assert (
        main(
            [
                "convert",
                str(DATA / golden),
                str(tmp_path / "out"),
                "--to",
                "mindspore",
                "--format",
                form,
            ]
        )
        == 0
    )
    capsys.readouterr()
    source = inspect(capsys, DATA / golden)
    target = inspect(capsys, tmp_path / "out", "--html", str(tmp_path / "page.html"))
    assert target["framework"] == "mindspore" and all(
        rank["folder"].startswith("rank_") for rank in target["ranks"]
    )
    for key in ("iteration", "layout", "parameters", "model"):
        assert target[key] == source[key], key
    assert target["optimizer"]["groups"] == source["optimizer"]["groups"]
    assert target["states"] == [
        state for state in source["states"] if state["role"] != "model_weight"
    ]
    assert [rank["elements"] for rank in target["ranks"]] == [
        rank["elements"] for rank in source["ranks"]
    ]
