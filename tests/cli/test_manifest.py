"""The manifest: its form is the published one, earlier versions are read, and what is damaged or of
a later version is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from parammap.checkpoint import manifest as manifests
from parammap.checkpoint.manifest import MANIFEST, VERSION
from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.job.conversion import convert
from parammap.job.request import Request
from tests.support import paths
from tests.support.archives import reseal
from tests.support.manifests import rewrite

DATA = paths.TESTS / "data"
MEGATRON, METASEQ = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2", DATA / "metaseq/mp1dp3_fp32"
MERAK = DATA / "merak/adamw_tp1pp3"
MERAK_CONFIG = str(DATA / "merak/hf/config.json")
MOE = DATA / "megatron/cac60ce4_patched_mcore_moe_ep2dp2"
EARLIER = DATA / "manifests"
SCHEMA = json.loads((paths.ROOT / "parammap/schemas/manifest.schema.json").read_text())

CONVERSIONS = {
    "mindspore": (MEGATRON, "--to", "mindspore"),
    "mindspore cast": (MEGATRON, "--to", "mindspore", "--weights-only", "--dtype", "float32"),
    "megatron": (MEGATRON, "--to", "megatron", "--tp", "1"),
    "megatron-dist": (MEGATRON, "--to", "megatron-dist"),
    "deepspeed": (MEGATRON, "--to", "deepspeed"),
    "links": (MEGATRON, "--to", "mindspore", "--dp", "2", "--generate-all-dp-cp"),
    "dropped": (MOE, "--to", "mindspore", "--drop", "experts"),
    "alpa": (METASEQ, "--to", "alpa"),
    "alpa-training": (MERAK, "--to", "alpa-training", "--activation", "gelu_new"),
    "metaseq": (METASEQ, "--to", "metaseq", "--tp", "2"),
    "transformers": (METASEQ, "--to", "transformers"),
    "merak": (DATA / "merak/stock_hf_to_tp1pp2", "--to", "merak", "--config", MERAK_CONFIG),
}


def content_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def part(target: Path, pp: int, **rest: object) -> Request:
    return Request(
        source=MEGATRON,
        target=target,
        to="megatron",
        sizes={"tp": 1, "pp": 2},
        weights_only=True,
        only_pp=frozenset({pp}),
        workers=1,
        **rest,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert main(["convert", str(MEGATRON), str(out), "--to", "mindspore", "--weights-only"]) == 0
    return out


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


@pytest.mark.parametrize("case", CONVERSIONS)
def test_it_is_of_the_published_form_and_read_as_it_was_written(tmp_path, case):
    source, *flags = CONVERSIONS[case]
    assert main(["convert", str(source), str(tmp_path / "out"), *flags]) == 0
    content = content_of(tmp_path / "out")
    jsonschema.validate(content, SCHEMA)
    assert content["version"] == VERSION
    assert manifests.read_whole(tmp_path / "out").to_json() == content


def test_findings_are_of_the_published_form(tmp_path):
    """Copies of a norm that differ between ranks, made one; and a weight that is not the cast."""
    source = shutil.copytree(MEGATRON, tmp_path / "source")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    file = source / "iter_0000002/mp_rank_01_000/distrib_optim.pt"
    checkpoint = registry.read(source)
    held = next(
        one
        for one in checkpoint.index.held
        if one.canonical == "layers.0.input_norm.weight"
        and one.found.state == "weight"
        and one.found.place.tp == 1
    )
    (extent,) = held.found.stored.extents
    assert Path(extent.file) == file
    with open(file, "r+b") as stream:
        stream.seek(extent.offset)
        stream.write(b"\x00\x00\xc0\x7f")
    reseal(file)
    status = main(
        ["convert", str(source), str(tmp_path / "out"), "--to", "mindspore", "--tp", "1"]
        + ["--replicas", "first", "--accept-permuted"]
    )
    content = content_of(tmp_path / "out")
    jsonschema.validate(content, SCHEMA)
    assert status in (0, 1) and content["replicas_merged"]


def test_parts_of_a_conversion(tmp_path):
    """Each part's manifest is of the form, and the last makes the output whole."""
    out = tmp_path / "out"
    for number, pp in enumerate((1, 0)):
        assert convert(part(out, pp)).status == 0
        content = content_of(out)
        jsonschema.validate(content, SCHEMA)
        assert content["is_whole"] == bool(number) and len(content["fingerprints"]) == number + 1
        assert bool(content["digests_of_parts"]) != bool(number) or content["digests"]
    assert main(["verify", str(out)]) == 0


# ------------------------------------------------------------------------------------------------
# earlier versions


@pytest.mark.parametrize(
    ("name", "version"),
    [("version0_mindspore", 0), ("version0_alpa", 0), ("version1_part", 1)],
)
def test_earlier_ones_are_read(name, version):
    content = json.loads((EARLIER / f"{name}.json").read_text())
    manifest = manifests.read(EARLIER / f"{name}.json")
    assert "version" not in content and manifest.version == version
    assert {one.digest for one in manifest.digests} == {one["digest"] for one in content["digests"]}
    assert manifest.files == {file["path"]: file["bytes"] for file in content["files"]}
    again = manifest.to_json()
    again.pop("version")
    assert again == {name: value for name, value in content.items() if name != "says_ranks"}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("version0_mindspore", (MEGATRON, "--to", "mindspore", "--weights-only")),
        ("version0_alpa", (METASEQ, "--to", "alpa")),
    ],
)
def test_outputs_are_proved_by_the_manifests_of_earlier_versions(tmp_path, capsys, name, flags):
    source, *rest = flags
    assert main(["convert", str(source), str(tmp_path / "out"), *rest]) == 0
    shutil.copyfile(EARLIER / f"{name}.json", tmp_path / "out" / MANIFEST)
    assert main(["verify", str(tmp_path / "out")]) == 0
    content = content_of(tmp_path / "out")
    known = "digests_of_casts" if content["digests_of_casts"] else "digests"
    content[known][3]["digest"] = "0" * 16
    rewrite(tmp_path / "out", **{known: content[known]})
    assert main(["verify", str(tmp_path / "out")]) == 1


def test_only_outputs_of_version_0_may_say_the_ranks_of_their_source():
    folder = DATA / "megatron/torch_dist_in_order_of_keys"
    before = manifests.read(folder / MANIFEST)
    assert (before.version, before.keeps_ranks_of_source) == (0, True)
    assert not manifests.read(EARLIER / "version0_mindspore.json").keeps_ranks_of_source
    assert not manifests.read(EARLIER / "version1_part.json").keeps_ranks_of_source


# ------------------------------------------------------------------------------------------------
# refusals

SPOILED = {
    "is cut": lambda text: text[: len(text) // 2],
    "is no object": lambda text: "[]",
    "lacks its digests": lambda text: text.replace('"digests":', '"digest":'),
    "has an entry without a name": lambda text: text.replace('"name":', '"called":', 1),
    "has files without sizes": lambda text: text.replace('"bytes":', '"size":'),
    "has a version that is none": lambda text: text.replace('"version": 3', '"version": "two"'),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_one_is_refused(copied, capsys, how):
    text = (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(SPOILED[how](text))
    assert (copied / MANIFEST).read_text() != text
    for command in (
        ["verify", str(copied)],
        ["convert", str(MEGATRON), str(copied), "--to", "mindspore", "--weights-only"],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{copied / MANIFEST}: is damaged (" in line and line.endswith("; convert again")


def test_one_of_a_later_version_is_refused(copied, capsys):
    rewrite(copied, version=VERSION + 1, parammap="9.9.0")
    for command in (
        ["verify", str(copied)],
        ["convert", str(MEGATRON), str(copied), "--to", "mindspore", "--weights-only"],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is of version {VERSION + 1}" in line and "9.9.0" in line


def test_a_damaged_one_does_not_keep_from_overwriting(copied):
    (copied / MANIFEST).write_text("{")
    flags = ["--to", "mindspore", "--weights-only", "--overwrite"]
    assert main(["convert", str(MEGATRON), str(copied), *flags]) == 0
    assert main(["verify", str(copied)]) == 0


def test_no_part_goes_on_from_a_damaged_one(tmp_path):
    out = tmp_path / "out"
    assert convert(part(out, 0)).status == 0
    (out / MANIFEST).write_text("{")
    with pytest.raises(RefusedError, match="is damaged"):
        convert(part(out, 1))
    assert convert(part(out, 1, overwrite=True)).status == 0


def test_a_damaged_journal_begins_anew(tmp_path):
    """A run that was killed leaves its journal behind; one that cannot be read is no reason to stop."""
    journal = tmp_path / ".out.parammap/journal"
    (tmp_path / ".out.parammap/out").mkdir(parents=True)
    for line in ("{\n", "[]\n", '{"fingerprint": 1}\n{}\n', ""):
        journal.write_text(line)
        flags = ["--to", "mindspore", "--weights-only", "--overwrite"]
        assert main(["convert", str(MEGATRON), str(tmp_path / "out"), *flags]) == 0
        (tmp_path / ".out.parammap/out").mkdir(parents=True)
