"""Metaseq checkpoints, read: those that metaseq wrote, and those that fairscale writes here,
against what FSDP unshards.

Named after a defect of metaseq's own tools (distributed/stitch_fsdp_ckpt.py,
scripts/reshard_fsdp.py, scripts/reshard_mp.py, main f7ffa5f) are the tests of what those get wrong.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parammap import families
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.errors import RefusedError
from parammap.formats import torch_zip
from parammap.formats.pickles import Opaque
from parammap.frameworks import registry
from parammap.frameworks.framework import ReadOptions
from parammap.frameworks.metaseq import reader as metaseq
from parammap.tensors.logical import EXP_AVG, EXP_AVG_SQ, ITEMSIZE, MAIN_PARAM, Stored
from parammap.tensors.region import Region
from tests.support import opt175b, paths
from tests.support.views import matrix_of

DATA = paths.TESTS / "data" / "metaseq"
FP32, FP16 = DATA / "mp1dp3_fp32", DATA / "mp2dp2_fp16"
HEAD = "decoder.output_projection.weight"

#: options of tests/support/fsdp.py
VARIANTS = {
    "one_shard": {"shards": 1},
    "nested": {"parts": 2, "shards": 3},
    "unnested_fp16": {"nested": False, "parts": 2, "shards": 2, "dtype": "float16"},
    "empty_root_bf16": {"empty_root": True, "shards": 5, "dtype": "bfloat16"},
    "shards_of_padding_only": {"empty_root": True, "shards": 5, "hidden": 4, "ffn": 4, "parts": 2},
    "unflattened": {"flatten": False, "shards": 3, "parts": 2, "dtype": "float16"},
    "unflattened_one_shard": {"flatten": False, "shards": 1, "tied": False},
    "untied": {"tied": False, "shards": 2},
    "sinusoidal": {"sinusoidal": True, "parts": 2},
    "legacy_norm": {"legacy_norm": True, "parts": 2, "nested": False},
    "twelve_parts": {"parts": 12, "shards": 1, "heads": 12, "ffn": 24, "layers": 1},
    "no_optimizer": {"optimizer": False},
}


def read(source, **options):
    return metaseq.read(source, ReadOptions(**options))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint by fairscale's FSDP for each variant; to be read only."""
    folder = tmp_path_factory.mktemp("fsdp")
    options = [{"folder": str(folder / name), **given} for name, given in VARIANTS.items()]
    (folder / "options.json").write_text(json.dumps(options))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.fsdp", str(folder / "options.json")],
        check=True,
        cwd=paths.ROOT,
        timeout=900,
    )
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path):
    """copied(variant): a checkpoint of its own to spoil."""
    return lambda variant: Path(shutil.copytree(written / variant, tmp_path / variant))


def edit(path: Path, change) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def edit_all(folder: Path, change) -> None:
    for path in folder.glob("*.pt"):
        edit(path, change)


def loaded(stored: Stored) -> torch.Tensor:
    content = bytearray()
    for extent in stored.extents:
        with open(extent.file, "rb") as stream:
            stream.seek(extent.offset)
            content += stream.read(extent.nbytes)
    return torch.frombuffer(content, dtype=getattr(torch, stored.dtype)).view(stored.shape)


def of_part(checkpoint: Checkpoint, part: int) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (held.found.state, held.found.name): loaded(held.found.stored)
        for held in checkpoint.index.held
        if held.found.place.tp == part
    }


def logical(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """Each logical tensor, put together from its shards."""
    result = {}
    for tensor, regions in checkpoint.index.shards.items():
        whole = torch.from_numpy(matrix_of(tensor, regions).view(f"i{ITEMSIZE[tensor.dtype]}"))
        result[tensor.state, tensor.name] = whole.view(getattr(torch, tensor.dtype)).view(
            tensor.shape
        )
    return result


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and tensor.shape == theirs[key].shape, key
        assert torch.equal(tensor, theirs[key]), key


# ----------------------------------------------------------------------------------------------
# what metaseq itself wrote


@pytest.mark.parametrize("golden", [FP32, FP16], ids=lambda path: path.name)
def test_metaseqs_checkpoints_are_what_fsdp_unshards(golden):
    checkpoint = registry.read(golden)
    assert (checkpoint.framework, checkpoint.iteration, checkpoint.num_layers) == ("metaseq", 3, 3)
    for part in range(checkpoint.layout.tp):
        truth = torch.load(golden / f"truth-part{part}.pt")
        moments = {
            (role, name): states[role]
            for name, states in truth["optim"].items()
            for role in (EXP_AVG, EXP_AVG_SQ)
        }
        assert_equal(
            of_part(checkpoint, part),
            {(MAIN_PARAM, name): one for name, one in truth["model"].items()} | moments,
        )


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("up/stitched.pt", {}),
        ("up/rf1", {}),
        ("up/rm4", {}),
        ("up/y2022_2", {"metadata_from": FP16}),
        ("up/y2022_2", {"metadata_from": FP16 / "param_map"}),
    ],
    ids=lambda given: str(given)[:20],
)
def test_files_made_by_metaseqs_own_tools_hold_the_same_tensors(source, options):
    """A singleton, whole parts whose tensors are views of one storage, other parts with metadata of
    the old, flat files."""
    truth, ours = logical(read(FP16)), logical(read(FP16 / source, **options))
    assert len(ours) >= 53
    assert_equal(ours, {key: truth[key] for key in ours})


def test_shard_metadata_left_by_reshard_mp_is_corrected():
    metadata = read(FP16 / "up/rm4").rank_metadata[0, 0, 0]["shard_metadata"]
    assert metadata["param_metadata"][0]["params"]["flat_param_0"]["shapes"][0] == (14, 20)
    assert metadata["param_metadata"][0]["params"]["flat_param_0"]["numels"][0] == 280


def test_what_is_no_tensor_is_kept_and_needs_no_class_of_metaseqs():
    meta = read(FP32).rank_metadata[0, 0, 0]
    assert meta["last_optimizer_state"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert read(FP16).rank_metadata[1, 0, 0]["last_optimizer_state"]["loss_scale"] == 4
    assert isinstance(meta["extra_state"]["train_iterator"]["tokenization_cache"], Opaque)
    assert meta["optimizer_index"] == {
        0: "flat_param_0",
        **{1 + i: f"decoder.layers.{i}.flat_param_0" for i in range(3)},
    }
    assert metaseq.naming_of(read(FP16)).sizes.heads == 4


# --------------------------------------------------------------------------------------------------
# what FSDP writes here


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "legacy_norm"])
def test_fsdps_checkpoints_are_what_fsdp_unshards(written, variant):
    checkpoint = read(written / variant)
    options = {"parts": 1, "shards": 2, "tied": True, "optimizer": True, **VARIANTS[variant]}
    assert (checkpoint.layout.tp, checkpoint.layout.dp) == (options["parts"], options["shards"])
    assert checkpoint.with_optimizer == options["optimizer"]
    for part in range(options["parts"]):
        truth = torch.load(written / variant / "truth" / f"part{part}.pt")
        assert_equal(
            of_part(checkpoint, part),
            {
                (role, name): tensor
                for role, tensors in truth.items()
                for name, tensor in tensors.items()
                if not (options["tied"] and name == HEAD)
                and (options["optimizer"] or role == MAIN_PARAM)
            },
        )


def test_every_tensor_of_the_model_is_known(written):
    for variant in VARIANTS:
        assert [
            held.found.name for held in read(written / variant).index.held if held.kind is None
        ] == []


def test_a_shard_can_be_padding_only(written):
    contents = [
        torch.load(path, weights_only=False)
        for path in (written / "shards_of_padding_only").glob("*shard4.pt")
    ]
    sizes = [
        (content["model"][key].numel(), param["padding"])
        for content in contents
        for key, param in [
            (
                "decoder.layer_norm.flat_param_0",
                next(
                    entry["params"]["flat_param_0"]
                    for entry in content["shard_metadata"]["param_metadata"]
                    if entry["fsdp_path"] == "decoder.layer_norm"
                ),
            )
        ]
    ]
    assert sizes == [(2, 2)] * 2


def test_legacy_norms_become_the_norm_of_their_part(written):
    checkpoint = read(written / "legacy_norm")
    for part in range(2):
        truth, ours = (
            torch.load(written / "legacy_norm" / "truth" / f"part{part}.pt"),
            of_part(checkpoint, part),
        )
        for role in (MAIN_PARAM, EXP_AVG, EXP_AVG_SQ):
            for which in ("weight", "bias"):
                name = f"decoder.layers.1.ffn_layernorm.lns.{part}.{which}"
                assert torch.equal(
                    ours[role, f"decoder.layers.1.ffn_layernorm.{which}"], truth[role][name]
                )
    assert len(checkpoint.dropped) == 8 and "8 copies" in checkpoint.notes[0]


def test_several_trained_copies_of_a_norm_are_refused(copied):
    def train_both(content):
        content["model"]["flat_param_0"] += 1

    folder = copied("legacy_norm")
    edit_all(folder, train_both)
    with pytest.raises(RefusedError, match="several copies of one norm were trained"):
        read(folder)


# ---------------------------------------------------------------------------------------------
# where the metadata comes from


def test_metadata_comes_from_the_sidecar_where_the_file_has_none(copied):
    folder = copied("unflattened")
    truth = logical(read(folder))
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=False)
        part, shard = int(path.stem[-8]), int(path.stem[-1])
        keys = [key for key in content["model"] if key not in ("decoder.version", HEAD)]
        (folder / "param_map").mkdir(exist_ok=True)
        (folder / "param_map" / f"layout_{path.stem}.json").write_text(
            json.dumps(
                {
                    "schema": "parammap.metaseq",
                    "version": 1,
                    "file": path.name,
                    "num_updates": 3,
                    "model_part": part,
                    "shard": shard,
                    "model_parallel_size": 2,
                    "data_parallel_size": 3,
                    "shard_metadata": content.pop("shard_metadata"),
                    "optimizer_index": dict(enumerate(keys)),
                }
            )
        )
        torch.save(content, path)
    assert_equal(logical(read(folder)), truth)
    shutil.move(folder / "param_map", folder.parent / "elsewhere")
    with pytest.raises(RefusedError, match="--metadata-from"):
        read(folder)
    assert_equal(logical(read(folder, sidecar_folder=folder.parent / "elsewhere")), truth)
    assert_equal(logical(read(folder, metadata_from=folder.parent / "elsewhere")), truth)


def test_the_sidecar_says_which_parameter_an_optimizer_state_is_of(copied):
    folder = copied("nested")

    def swap(content):
        state = content["last_optimizer_state"]["state"]
        state[1], state[2] = state[2], state[1]

    truth = logical(read(folder))
    edit_all(folder, swap)
    assert not torch.equal(
        logical(read(folder))[EXP_AVG, "layers.0.mlp.fc1.weight"],
        truth[EXP_AVG, "layers.0.mlp.fc1.weight"],
    )
    (folder / "param_map").mkdir()
    for part in range(2):
        (folder / "param_map" / f"layout_checkpoint_3-model_part-{part}-shard0.json").write_text(
            json.dumps(
                {
                    "file": f"checkpoint_3-model_part-{part}-shard0.pt",
                    "num_updates": 3,
                    "optimizer_index": {
                        "0": "flat_param_0",
                        "1": "decoder.layers.1.flat_param_0",
                        "2": "decoder.layers.0.flat_param_0",
                    },
                }
            )
        )
    assert_equal(logical(read(folder)), truth)


def test_a_sidecar_of_another_save_is_refused_if_named_and_else_left_alone(copied):
    folder, stem = copied("one_shard"), "checkpoint_3-model_part-0-shard0"
    (folder / "param_map").mkdir()
    (folder / "param_map" / f"layout_{stem}.json").write_text(
        json.dumps({"file": f"{stem}.pt", "num_updates": 9})
    )
    assert read(folder).iteration == 3
    with pytest.raises(RefusedError, match=r"layout_.*json: is of update 9"):
        read(folder, sidecar_folder=folder / "param_map")


def test_borrowed_metadata_must_fit(written):
    with pytest.raises(RefusedError, match="do not name the same tensors"):
        read(FP16 / "up/y2022_2", metadata_from=written / "nested")
    with pytest.raises(RefusedError, match="of the 2 parts wanted"):
        read(FP16 / "up/y2022_2", metadata_from=FP32)


# ------------------------------------------------------------------------------------------------
# which files are meant


def test_a_prefix_a_pattern_a_file_and_an_iteration_name_a_checkpoint(copied):
    folder = copied("nested")
    for path in list(folder.glob("*.pt")):
        shutil.copy(path, folder / path.name.replace("checkpoint_3", "checkpoint_last"))
    each = r"checkpoint_%s-model_part-\{0-1\}-shard\{0-2\}.pt"
    with pytest.raises(RefusedError, match=rf"several checkpoints \({each % 3}; {each % 'last'}\)"):
        registry.read(folder)
    for source in (
        folder / "checkpoint_last",
        folder / "checkpoint_last.pt",
        folder / "checkpoint_last-model_part-*.pt",
    ):
        assert registry.read(source).layout.tp == 2
    assert registry.read(folder, iteration=3).layout.dp == 3
    with pytest.raises(RefusedError, match="no metaseq checkpoint of iteration 4"):
        registry.read(folder, iteration=4)
    alone = registry.read(folder / "checkpoint_last-model_part-1-shard*.pt")
    assert (alone.layout.tp, alone.layout.dp) == (1, 3)
    assert_equal(of_part(alone, 0), of_part(registry.read(folder / "checkpoint_3"), 1))


def test_the_first_part_is_not_the_tenth(written):
    """find_num_parts and consolidate_model_parallel take `part-1` for a part of `part-10`, too."""
    checkpoint, folder = read(written / "twelve_parts"), written / "twelve_parts"
    for part in (1, 10, 11):
        truth = torch.load(folder / "truth" / f"part{part}.pt")[MAIN_PARAM][
            "decoder.layers.0.fc1.weight"
        ]
        assert torch.equal(
            of_part(checkpoint, part)[MAIN_PARAM, "decoder.layers.0.fc1.weight"], truth
        )
    alone = read(folder / "checkpoint_3-model_part-1-shard*.pt")
    assert (alone.layout.tp, alone.layout.dp) == (1, 1)


# ---------------------------------------------------------------------------------- defects of
# metaseq's tools, and damage


def test_padding_of_optimizer_states_is_removed():
    """reshard_fsdp leaves 3585 elements for 3584; its own files are read right all the same."""
    shapes = {held.found.state: [] for held in read(FP32).index.held}
    for held in read(FP32).index.held:
        if held.layer == 0:
            shapes[held.found.state].append(held.found.stored.numel)
    assert {role: sum(numels) for role, numels in shapes.items()} == {
        MAIN_PARAM: 3584,
        EXP_AVG: 3584,
        EXP_AVG_SQ: 3584,
    }
    theirs = FP32 / "up/rf_n1"
    state = torch_zip.read(next(theirs.glob("*.pt")))["last_optimizer_state"]["state"]
    assert state[1][EXP_AVG].shape == (3585,)
    assert_equal(logical(read(theirs)), logical(read(FP32)))


def test_a_missing_shard_is_refused(copied):
    """consolidate_shard_weights accepts 500 of 1000 elements where strict is off."""
    for gone in (0, 1, 2):
        folder = copied("nested")
        for path in folder.glob(f"*-shard{gone}.pt"):
            path.unlink()
        with pytest.raises(RefusedError, match="a shard is missing|files are missing"):
            read(folder)
        shutil.rmtree(folder)


def test_a_missing_shard_of_flat_files_without_metadata_is_refused(tmp_path):
    for path in (FP16 / "up/y2022_2").glob("*-shard0.pt"):
        shutil.copyfile(path, tmp_path / path.name)
    with pytest.raises(RefusedError, match="hold 500 elements.* have 1000"):
        read(tmp_path, metadata_from=FP16)


def test_a_missing_part_is_refused(copied):
    for gone in (0, 1):
        folder = copied("nested")
        for path in folder.glob(f"*part-{gone}-*.pt"):
            path.unlink()
        with pytest.raises(RefusedError, match=r"parts do not make \[12, 12\]|files are missing"):
            read(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("variant", ["nested", "unnested_fp16"])
def test_shared_parameters_are_whole(written, variant):
    """The head is the table of words: lost by the one tool, and of part 0 only by the other where
    the root is unnested."""
    whole = logical(read(written / variant))[MAIN_PARAM, families.WORD_EMBEDDING]
    truth = [
        torch.load(written / variant / "truth" / f"part{part}.pt")[MAIN_PARAM][HEAD]
        for part in range(2)
    ]
    assert torch.equal(whole, torch.cat(truth))


def test_tensors_that_the_metadata_does_not_name_are_refused_by_name(copied):
    folder = copied("nested")
    edit_all(folder, lambda content: content["model"].update(surprise=torch.ones(3)))
    with pytest.raises(RefusedError, match="do not name the same tensors: surprise"):
        read(folder)


def spoil_numels(content):
    content["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["numels"][0] += 1


def spoil_padding(content):
    content["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]["padding"] += 1


def spoil_names(content):
    content["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]["names"].pop()


def spoil_form(content):
    del content["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["shapes"]


def spoil_states(content):
    del content["last_optimizer_state"]["state"][1]


def spoil_kind_of_state(content):
    content["last_optimizer_state"]["state"][1]["max_exp_avg_sq"] = torch.ones(3)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (spoil_numels, "gives other numbers of elements"),
        (spoil_padding, "a shard is missing, or its metadata"),
        (spoil_names, "gives other numbers of elements|not of fairscale's form"),
        (spoil_form, "not of fairscale's form"),
        (spoil_states, "are not of the sizes"),
        (spoil_kind_of_state, "only Adam's"),
        (lambda content: content.update(model={}), "holds no model"),
        (lambda content: content["model"].update(other={"nested": 1}), "what is no tensor: other"),
        (lambda content: content.pop("shard_metadata"), "--metadata-from"),
    ],
)
def test_metadata_that_does_not_add_up_is_refused(copied, spoil, what):
    folder = copied("nested")
    edit_all(folder, spoil)
    with pytest.raises(RefusedError, match=what) as error:
        read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda content: content.update(optimizer_history=[{"num_updates": 4}]),
            "is of another save",
        ),
        (
            lambda content: content["model"].update(
                flat_param_0=content["model"]["flat_param_0"].half()
            ),
            "float16",
        ),
        (lambda content: content.pop("last_optimizer_state"), "is of another save"),
    ],
)
@pytest.mark.parametrize(
    "files", ["*-model_part-0-shard1.pt", "*-model_part-1-shard2.pt", "*-model_part-1-*.pt"]
)
def test_shards_of_different_saves_are_refused(copied, change, what, files):
    folder = copied("nested")
    for path in folder.glob(files):
        edit(path, change)
    with pytest.raises(RefusedError, match=what):
        read(folder)


def test_a_whole_model_without_fsdp_has_its_optimizer_states_in_order(copied):
    """As with --ddp-backend pytorch_ddp: no shard_metadata, tensors and states of the parameters'
    own shapes."""
    folder = copied("unflattened_one_shard")
    truth = logical(read(folder))
    edit_all(folder, lambda content: content.pop("shard_metadata"))
    assert_equal(logical(read(folder)), truth)

    def spoil(content):
        content["last_optimizer_state"]["state"][3]["exp_avg"] = torch.ones(5)

    edit_all(folder, spoil)
    with pytest.raises(RefusedError, match="are not of the sizes"):
        read(folder)
    assert read(folder, weights_only=True).index.states() == {MAIN_PARAM}


def test_the_moving_average_is_read_in_place_of_the_weights(copied):
    folder = copied("nested")

    def average(content):
        content["extra_state"]["ema"] = {
            name: tensor + 1 for name, tensor in content["model"].items()
        }

    with pytest.raises(RefusedError, match="no moving average"):
        read(folder, ema=True)
    truth = logical(read(folder, weights_only=True))
    edit_all(folder, average)
    assert_equal(
        logical(read(folder, ema=True)), {key: tensor + 1 for key, tensor in truth.items()}
    )


# ----------------------------------------------------------------------------------------------------------
# OPT-175B


def test_positions_of_opt_175b_lead_to_their_shard(tmp_path):
    """The 18 elements that a consolidated part 5 once had wrong: decoder.layers.15.fc1.weight
    [1537, 5172:5190] are elements 1241838 to 1241856 of decoder.layers.15.flat_param_0 in shard 51
    (known from the shards themselves). The files here have the real metadata and sizes, and no
    content."""
    opt175b.write(tmp_path, [5])
    checkpoint = read(tmp_path / "checkpoint_last-model_part-5-shard*.pt")
    held = next(
        held for held in checkpoint.index.held if held.found.name == "decoder.layers.15.fc1.weight"
    )
    (start,) = [
        shard for shard in held.shards(0) if shard.region.intersect(Region((1537, 5172), (1, 1)))
    ]
    flat = torch_zip.read(start.view.file)["model"]["decoder.layers.15.flat_param_0"].extents[0]
    assert Path(start.view.file).name == "checkpoint_last-model_part-5-shard51.pt"
    assert (start.place_of(1537, 5172) - flat.offset) // 2 == 1241838
    assert (start.place_of(1537, 5189) - flat.offset) // 2 == 1241855


def test_metadata_from_what_is_no_pt_file_is_refused():
    with pytest.raises(RefusedError, match="README.md: is no .pt file of metaseq"):
        read(FP16, metadata_from=paths.ROOT / "README.md")
