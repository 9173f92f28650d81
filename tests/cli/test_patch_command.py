"""`parammap patch`: the very patches of this repository, from wherever the package is installed."""

import subprocess
import sys
import zipfile

import pytest

from parammap.cli.main import main
from parammap.cli.patch import patches
from tests.support.paths import ROOT

PATCHES = {name: patch.file for name, patch in patches().items()}


@pytest.mark.parametrize("framework", PATCHES)
def test_prints_the_patch_byte_for_byte(framework, capsys):
    assert main(["patch", framework]) == 0
    assert capsys.readouterr().out == (ROOT / "patches" / PATCHES[framework]).read_text()


def test_lists_all(capsys):
    assert main(["patch", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PATCHES)


def test_without_a_framework_it_says_which_there_are(capsys):
    assert main(["patch"]) == 2
    assert "megatron or metaseq" in capsys.readouterr().err


def test_the_wheel_holds_the_package_and_nothing_generic(tmp_path):
    """Patches, schemas and the hooks are in it; `convert` and `hooks` are no names of its own."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
        timeout=900,
    )
    (wheel,) = tmp_path.glob("parammap-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"parammap"}
    assert {f"parammap/patches/{patch}" for patch in PATCHES.values()} <= set(names)
    assert {
        "parammap/schemas/layout.schema.json",
        "parammap/schemas/manifest.schema.json",
        "parammap/hooks/run.py",
        "parammap/py.typed",
    } <= set(names)
    assert not [name for name in names if name.endswith("make_patches.py")]
