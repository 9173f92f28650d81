"""Run a Megatron-LM training script with the save-time hook, without patching Megatron-LM.

torchrun [torchrun's options] -m parammap.hooks.run pretrain_gpt.py [its arguments], where parammap
is installed, or this repository on PYTHONPATH."""

from __future__ import annotations

import os
import runpy
import sys

from parammap.hooks import install


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m {__spec__.name} SCRIPT [ARGUMENTS]")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
