"""The patches are what hooks/ says, and git and patch both accept them. (On real releases:
test_megatron_lm.py.)"""

from __future__ import annotations

import ast
import subprocess

import pytest

from patches import make_patches
from tests.support import paths

ROOT = paths.ROOT
PATCH = ROOT / "patches/param_map.patch"
BEFORE = [
    "def save_checkpoint():",
    "    args = None",
    "",
    "    # Collect args, model, RNG.",
    "    return args",
    "",
]
CALL = [
    "    from megatron.training.param_map import save_param_map",
    "    save_param_map(args, iteration, model, optimizer, checkpoint_name)",
    "",
]
COPYRIGHT = "# Copyright (c) 2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved."
COMMANDS = {"git": ["git", "apply"], "patch": ["patch", "-p1", "--no-backup-if-mismatch", "-i"]}


def test_patches_have_not_drifted_from_hooks():
    assert make_patches.main(["--check"]) == 0, "run: python patches/make_patches.py"


def test_drift_is_seen(monkeypatch, capsys):
    monkeypatch.setitem(make_patches.PATCHES, "param_map.patch", lambda: "something else")
    assert make_patches.main(["--check"]) == 1
    assert "param_map.patch" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("lines_before", [280, 290, 786])
def test_it_adds_one_call_and_the_files_of_the_hook(command, lines_before, tmp_path):
    training = tmp_path / "megatron/training"
    training.mkdir(parents=True)
    padding = [f"# {number}" for number in range(lines_before)]
    (training / "checkpointing.py").write_text("\n".join(padding + BEFORE))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([*COMMANDS[command], PATCH], cwd=tmp_path, check=True, capture_output=True)
    expected = padding + BEFORE[:3] + CALL + BEFORE[3:]
    assert (training / "checkpointing.py").read_text().splitlines() == "\n".join(
        expected
    ).splitlines()
    assert {file.name for file in training.iterdir()} == {
        "checkpointing.py",
        *make_patches.MEGATRON_FILES,
    }
    for name in make_patches.MEGATRON_FILES:
        header, rest = (training / name).read_text().split("\n", 1)
        assert header == COPYRIGHT
        assert rest == (ROOT / "hooks" / name).read_text()


@pytest.mark.parametrize("hook", ["param_map.py", "metaseq_param_map.py"])
def test_a_hook_imports_no_neighbour_that_its_patch_leaves_out(hook):
    installed = {
        "param_map.py": make_patches.MEGATRON_FILES,
        "metaseq_param_map.py": make_patches.METASEQ_FILES,
    }[hook]
    for file in installed.values():
        imports = [
            node
            for node in ast.walk(ast.parse((ROOT / "hooks" / file).read_text()))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert {f"{node.module}.py" for node in imports} <= set(installed)
