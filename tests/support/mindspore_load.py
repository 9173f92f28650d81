"""Load checkpoint files with the real mindspore.load_checkpoint and keep what it loaded as numpy
files.

Runs in its own process, since importing mindspore changes protobuf for the whole process: `python
tests/support/mindspore_load.py OUT FILE…` writes OUT/0.npz, OUT/1.npz … in the order of the files.
bfloat16 is kept as its bits (uint16), under the key "bf16:" + name."""

import subprocess
import sys
from pathlib import Path


def load(files: list[Path], out: Path) -> list[dict]:
    """What MindSpore loads from each file: {name: numpy array}, bfloat16 as uint16 bits under
    "bf16:" + name."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [sys.executable, __file__, str(out), *map(str, files)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [dict(np.load(out / f"{number}.npz")) for number in range(len(files))]


def _main(out: str, files: list[str]) -> None:
    import mindspore
    import numpy as np

    for number, file in enumerate(files):
        form = "safetensors" if file.endswith(".safetensors") else "ckpt"
        arrays = {}
        for name, parameter in mindspore.load_checkpoint(file, format=form).items():
            if parameter.dtype == mindspore.bfloat16:
                arrays["bf16:" + name] = parameter.asnumpy().view(np.uint16)
            else:
                arrays[name] = parameter.asnumpy()
        np.savez(Path(out) / f"{number}.npz", **arrays)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
