"""Generate the patches of this folder from hooks/, the single source of what they install.

A file of hooks/ is installed as it is, so its imports of its neighbours are relative; into
Megatron-LM with the line on top that tools/check_copyright.py wants there.

`python patches/make_patches.py` rewrites them; `--check` only says (exit status 1) which one has
drifted."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: the one call, before a line that Megatron-LM has exactly once, in save_checkpoint(), from
#: core_r0.6.0 to main.
#: One context line each side, and core_r0.6.0's line number, make the same hunk fit all of them.
MEGATRON_CALL = """\
diff --git a/megatron/training/checkpointing.py b/megatron/training/checkpointing.py
--- a/megatron/training/checkpointing.py
+++ b/megatron/training/checkpointing.py
@@ -292,2 +292,5 @@
\x20
+    from megatron.training.param_map import save_param_map
+    save_param_map(args, iteration, model, optimizer, checkpoint_name)
+
     # Collect args, model, RNG.
"""
#: the same for metaseq: after the line that completes a file's content, which all its branches have
#: exactly once, in save_checkpoint() but for branch resilient. How they save differs from there on,
#: and so does the line number.
METASEQ_CALL = """\
diff --git a/metaseq/trainer.py b/metaseq/trainer.py
--- a/metaseq/trainer.py
+++ b/metaseq/trainer.py
@@ -386,2 +386,5 @@
             state_dict["extra_state"].update(extra_state)
+            from metaseq.param_map import save_param_map
+
+            save_param_map(self, state_dict, filename)
             if self.should_save_checkpoint_on_current_rank:
"""


def new_file(path: str, content: str) -> str:
    """The diff that adds `path` with this content."""
    lines = content.splitlines()
    added = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\nnew file mode 100644\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{len(lines)} @@\n{added}"
    )


def patch(call: str, folder: str, files: dict[str, str], header: str = "") -> str:
    """The diff that adds `files`, name in `folder` -> name in hooks/, each after `header`, and
    calls what they hold."""
    return call + "".join(
        new_file(f"{folder}/{name}", header + (ROOT / "hooks" / hook).read_text())
        for name, hook in files.items()
    )


SHARED = "sidecar_files.py"  # what the hooks of all frameworks share
MEGATRON_FILES = {
    name: name for name in ("param_facts.py", "param_layout.py", "param_map.py", SHARED)
}
METASEQ_FILES = {"param_map.py": "metaseq_param_map.py", SHARED: SHARED}
MEGATRON_HEADER = "# Copyright (c) 2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved.\n"

PATCHES = {
    "param_map.patch": partial(
        patch, MEGATRON_CALL, "megatron/training", MEGATRON_FILES, MEGATRON_HEADER
    ),
    "metaseq_param_map.patch": partial(patch, METASEQ_CALL, "metaseq", METASEQ_FILES),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a patch has drifted"
    )
    check = parser.parse_args(argv).check
    drifted = []
    for name, make in PATCHES.items():
        path = ROOT / "patches" / name
        if path.exists() and path.read_text() == make():
            continue
        drifted.append(name)
        if not check:
            path.write_text(make())
    print(
        f"{'drifted' if check else 'written'}: {', '.join(drifted)}"
        if drifted
        else "patches are up to date"
    )
    return 1 if check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
