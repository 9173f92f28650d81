"""Let MindSpore itself load checkpoint files and save what it loaded in their place.

Runs in its own process, since importing mindspore changes protobuf for the whole process:
`python tests/support/mindspore_resave.py FILE…`
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def resave(files: Iterable[Path]) -> None:
    run = subprocess.run(
        [sys.executable, __file__, *map(str, files)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def _main(files: list[str]) -> None:
    import mindspore

    for file in map(Path, files):
        parameters = mindspore.load_checkpoint(str(file))
        file.unlink()
        mindspore.save_checkpoint(
            [{"name": name, "data": value} for name, value in parameters.items()], str(file)
        )


if __name__ == "__main__":
    _main(sys.argv[1:])
