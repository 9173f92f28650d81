"""Generate the patches of this folder from hooks/, the single source of what they install.

`python patches/make_patches.py` rewrites them; `--check` only says (exit status 1) which one has drifted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: the one call, before a line that Megatron-LM has exactly once, in save_checkpoint(), from core_r0.6.0 to main.
#: One context line each side, and core_r0.6.0's line number, make the same hunk fit all of them.
CALL_HUNK = """\
--- a/megatron/training/checkpointing.py
+++ b/megatron/training/checkpointing.py
@@ -292,2 +292,5 @@
\x20
+    from megatron.training.param_map import save_param_map
+    save_param_map(args, iteration, model, optimizer, checkpoint_name)
+
     # Collect args, model, RNG.
"""


def new_file(path: str, content: str) -> str:
    """The diff that adds `path` with this content."""
    lines = content.splitlines()
    added = "".join(f"+{line}\n" for line in lines)
    return (f"diff --git a/{path} b/{path}\nnew file mode 100644\n"
            f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{len(lines)} @@\n{added}")


def param_map_patch() -> str:
    """patches/param_map.patch, for Megatron-LM core_r0.6.0 to main."""
    changed = "diff --git a/megatron/training/checkpointing.py b/megatron/training/checkpointing.py\n" + CALL_HUNK
    return changed + new_file("megatron/training/param_map.py", (ROOT / "hooks/param_map.py").read_text())


PATCHES = {"param_map.patch": param_map_patch}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a patch has drifted")
    check = parser.parse_args(argv).check
    drifted = []
    for name, make in PATCHES.items():
        path = ROOT / "patches" / name
        if path.exists() and path.read_text() == make():
            continue
        drifted.append(name)
        if not check:
            path.write_text(make())
    print(f"{'drifted' if check else 'written'}: {', '.join(drifted)}" if drifted else "patches are up to date")
    return 1 if check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
