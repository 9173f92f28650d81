"""patches/metaseq_param_map.patch adds one call and two files, to metaseq main and to all its
branches but one."""

from __future__ import annotations

import subprocess

import pytest

from patches.make_patches import METASEQ_FILES
from tests.support.metaseq_checkout import CHECKOUT, PATCH, ROOT, needs_checkout

BEFORE = [
    "class Trainer:",
    "    def save_checkpoint(self):",
    "        for filename, state_dict in state_dicts.items():",
    '            state_dict["extra_state"].update(extra_state)',
    "            if self.should_save_checkpoint_on_current_rank:",
    "                pass",
]
CALL = [
    "            from metaseq.param_map import save_param_map",
    "",
    "            save_param_map(self, state_dict, filename)",
]
COMMANDS = {"git": ["git", "apply"], "patch": ["patch", "-p1", "--no-backup-if-mismatch", "-i"]}

#: branch -> why the patch does not apply to it
EXCEPTIONS = {
    "resilient": "it completes the file's content in get_state(), which does not know the file's "
    "name"
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("lines_before", [373, 382, 464])
def test_it_adds_one_call_and_the_files_of_the_hook(command, lines_before, tmp_path):
    package = tmp_path / "metaseq"
    package.mkdir()
    padding = [f"# {number}" for number in range(lines_before)]
    (package / "trainer.py").write_text("\n".join([*padding, *BEFORE, ""]))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([*COMMANDS[command], PATCH], cwd=tmp_path, check=True, capture_output=True)
    assert (package / "trainer.py").read_text().splitlines() == padding + BEFORE[
        :4
    ] + CALL + BEFORE[4:]
    assert {file.name for file in package.iterdir()} == {"trainer.py", *METASEQ_FILES}
    for name, hook in METASEQ_FILES.items():
        assert (package / name).read_bytes() == (ROOT / "hooks" / hook).read_bytes()


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", CHECKOUT, *arguments], check=True, capture_output=True, text=True
    ).stdout


@needs_checkout
def test_it_applies_to_every_branch_but_the_known_exception(tmp_path):
    package = tmp_path / "metaseq"
    package.mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    refused, seen = set(), set()
    for ref in git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes").split():
        branch = ref.split("/", 2 if ref.startswith("refs/heads/") else 3)[-1]
        seen.add(branch)
        (package / "trainer.py").write_text(git("show", f"{ref}:metaseq/trainer.py"))
        applied = subprocess.run(
            ["git", "apply", "--check", PATCH], cwd=tmp_path, capture_output=True
        )
        if applied.returncode:
            refused.add(branch)
    assert "main" in seen
    assert refused == set(EXCEPTIONS) & seen
