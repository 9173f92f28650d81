"""What is written loads with torch.load(weights_only=True), as the frameworks call it, unless the
source itself does not."""

import importlib

import numpy as np
import pytest
import torch

from tests.support import output_matrix

#: what Megatron-LM registers with torch (core_r0.16.0, megatron/core/safe_globals.py)
MEGATRON = {
    "argparse.Namespace",
    "io.BytesIO",
    "_io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
}
_TP2PP2 = "megatron/cac60ce4_patched_legacy_tp2pp2"
SAMPLE = [
    (_TP2PP2, "mindspore"),
    (_TP2PP2, "megatron --tp 1 --pp 1"),
    (_TP2PP2, "megatron-dist"),
    (_TP2PP2, "deepspeed"),
    (_TP2PP2, "merak"),
    (_TP2PP2, "transformers --format bin"),
    (f"mindspore of {_TP2PP2}", "megatron"),
    ("megatron/torch_dist_in_order_of_keys", "megatron-dist"),
    ("deepspeed/mds_gpt_pp2tp2dp2_bf16", "deepspeed"),
    ("deepspeed/mds_gpt_pp2tp2dp2_bf16", "megatron"),
    ("metaseq/mp2dp2_fp16", "metaseq --tp 4 --dp 1"),
    ("merak/ds_gpt_to_merak_tp2pp2", "megatron"),
    ("merak/hf", "merak"),
    ("yuan/trained_tp1pp2dp3", "megatron"),
    ("alpa/mp2dp2_fp16/alpa_np", "alpa"),
]


#: what numpy's records need beside the names that they hold; Megatron-LM registers it as well
DTYPES = [type(np.dtype("uint32"))]


class Stub:
    """Stands for a class whose package is not installed here."""

    def __init__(self, *_args):
        pass

    def __setstate__(self, state):
        pass


def _safe(name):
    """The object of that name for torch to call; where it is not installed here, a stub."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute), name
    except ImportError:
        return Stub, name


def _unsafe(folder):
    """The files that torch.save wrote, with the globals of each that torch does not load unasked."""
    files = [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    return {path: set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) for path in files}


def _check(source, flags, scratch):
    out = scratch / "out"
    to, *more = flags.split()
    needed = next((its for start, its in output_matrix.NEEDED.items() if start in str(source)), [])
    status, said = output_matrix._quiet(
        ["convert", str(source), str(out), "--to", to, *needed, *more]
    )
    assert status in (0, 1, 2) and out.exists() == (status < 2), said
    known = MEGATRON.union(*_unsafe(source).values())
    for path, unsafe in _unsafe(out).items():
        assert unsafe <= known, path
        with torch.serialization.safe_globals([*map(_safe, unsafe), *DTYPES]):
            torch.load(path, weights_only=True)
    return status < 2


@pytest.mark.parametrize(("name", "flags"), SAMPLE, ids=str)
def test_an_output_loads_without_running_code(name, flags, tmp_path):
    assert _check(output_matrix.source(name, tmp_path / "source"), flags, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("to", output_matrix.TARGETS)
def test_every_output_loads_without_running_code(to, tmp_path):
    done = 0
    for number, (_, source) in enumerate(output_matrix._sources(tmp_path / "sources")):
        folder = tmp_path / str(number)
        folder.mkdir()
        done += _check(source, to, folder)
    assert done
