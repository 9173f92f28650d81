"""A framework is a folder and one line, a file format a file and one line: both are added here from
a temporary folder, through the public registries, and nothing of them remains."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from parammap.cli.main import main
from parammap.errors import RefusedError
from parammap.formats import registry as formats
from parammap.formats.format import Format
from parammap.frameworks import registry as frameworks
from parammap.frameworks.flags import Flag
from parammap.frameworks.framework import Framework
from parammap.proof.contents import entries_of, structure_at
from tests.support import paths

ADDITIONS = paths.TESTS / "support/additions"
GPT2_FOLDER = paths.TESTS / "data/merak/hf"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of somebody else's, on the path of modules."""
    shutil.copytree(ADDITIONS, tmp_path / "theirs/additions")
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    yield tmp_path / "theirs"
    for name in [name for name in sys.modules if name.split(".")[0] == "additions"]:
        del sys.modules[name]


@contextmanager
def registered() -> Iterator[tuple[Format, Framework]]:
    tray = importlib.import_module("additions.tray").FORMAT
    shelf = importlib.import_module("additions.shelf.framework").SHELF
    formats.register(tray)
    frameworks.register(shelf)
    yield tray, shelf
    frameworks.unregister("shelf")
    formats.unregister("tray")


@pytest.fixture
def additions(folder):
    with registered() as added:
        yield added


@pytest.fixture
def shelf(additions, tmp_path) -> Path:
    return converted(tmp_path / "shelf")


def converted(out: Path) -> Path:
    flags = ["--to", "shelf", "--label", "a GPT-2", "--workers", "1"]
    assert main(["convert", str(GPT2_FOLDER), str(out), *flags]) == 0
    return out


def test_it_is_written_and_read_and_verified(shelf, tmp_path, capsys):
    assert json.loads((shelf / "shelf.json").read_text())["label"] == "a GPT-2"
    assert main(["verify", str(shelf), "--against", str(GPT2_FOLDER), "--workers", "1"]) == 0
    assert main(["diff", str(shelf), str(GPT2_FOLDER), "--workers", "1"]) == 0
    flags = ["--to", "transformers", "--config", str(GPT2_FOLDER / "config.json")]
    assert main(["convert", str(shelf), str(tmp_path / "back"), *flags, "--workers", "1"]) == 0
    assert main(["diff", str(tmp_path / "back"), str(GPT2_FOLDER), "--workers", "1"]) == 0


def test_its_flags_are_those_of_its_options(shelf, tmp_path, capsys):
    command = ["convert", str(GPT2_FOLDER), str(tmp_path / "half"), "--workers", "1"]
    assert main([*command, "--to", "shelf", "--dtype", "float16"]) == 0
    assert {one.dtype for _, one in entries_of(tmp_path / "half/weights.tray")} == {"float16"}
    assert main([*command, "--to", "merak", "--label", "x"]) == 2
    assert "--label: means nothing with --to merak, only with shelf" in capsys.readouterr().err


def test_the_commands_know_it(shelf, capsys):
    capsys.readouterr()
    assert main(["formats"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert any(row[0] == "| shelf" and "weights" in row for row in rows)
    assert any(row[0] == "| from \\ to" and "shelf" in row for row in rows)
    assert main(["inspect", str(shelf)]) == 0
    assert capsys.readouterr().out.startswith("Shelf checkpoint")
    assert main(["locate", str(shelf), "layers.0.mlp.fc1.weight"]) == 0
    assert "weights.tray" in capsys.readouterr().out


def test_a_file_of_the_format_is_known_by_its_ending_and_by_its_first_bytes(shelf, tmp_path):
    weights = shelf / "weights.tray"
    assert len(entries_of(weights)) > 20
    assert structure_at(weights, 0) == "the header of a tray"
    assert formats.of(shutil.copy(weights, tmp_path / "weights")).name == "tray"


def test_nothing_remains(folder, tmp_path, capsys):
    known = [one.name for one in frameworks.frameworks()], list(frameworks.targets())
    assert main(["formats"]) == 0
    tables = capsys.readouterr().out
    with registered():
        written = converted(tmp_path / "shelf")
        assert main(["formats"]) == 0
    assert "shelf" in capsys.readouterr().out
    assert ([one.name for one in frameworks.frameworks()], list(frameworks.targets())) == known
    assert main(["formats"]) == 0 and capsys.readouterr().out == tables
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(GPT2_FOLDER), str(tmp_path / "out"), "--to", "shelf"])
    with pytest.raises(RefusedError, match=r"is no \.ckpt, .*\.bin file"):
        entries_of(written / "weights.tray")
    with pytest.raises(RefusedError, match="shelf: no such framework; known are alpa, deepspeed"):
        frameworks.framework("shelf")


def test_what_is_there_is_not_replaced(additions):
    tray, shelf = additions
    target = shelf.targets[0]
    other = replace(target, name="other", flags=(Flag("--format", "of another kind"),))
    for refused in (
        shelf,
        replace(shelf, name="other"),
        replace(shelf, name="other", targets=(other,)),
    ):
        with pytest.raises(ValueError, match="there is another one already"):
            frameworks.register(refused)
    for refused in (tray, replace(tray, name="other", suffixes=(".pt",), magic=b"")):
        with pytest.raises(ValueError, match="there is another one already"):
            formats.register(refused)


def test_installed_packages_add_theirs_by_entry_points(folder, tmp_path):
    """Which are loaded when more is asked for than a name that is built in."""
    told = folder / "shelves-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: shelves\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(
        "[parammap.frameworks]\nshelf = additions.shelf.framework:SHELF\n"
        "[parammap.formats]\ntray = additions.tray:FORMAT\n"
    )
    code = (
        "import sys; from pathlib import Path; from parammap.formats.registry import of;"
        "from parammap.frameworks.registry import framework, recognized, target;"
        "print(framework('megatron').name, target('merak').name, 'additions' in sys.modules);"
        "print(recognized(Path(sys.argv[1])).name, target('shelf').name, of(Path('x.tray')).name)"
    )
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf/shelf.json").write_text("{}")
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "shelf"],
        cwd=paths.ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "megatron merak False\nshelf shelf tray\n", run.stderr
