"""ParamMap: the whole training state of large models, in another framework or parallel layout, bit
for bit.

What Python programs use is named here and imported when it is first asked for, so that the hooks
load nothing else in a training, whose Python may be 3.8 and without numpy (docs/api.md)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from parammap.version import __version__

if TYPE_CHECKING:
    from parammap.api.checkpoint import Checkpoint, open
    from parammap.api.commands import convert, diff, digest, verify
    from parammap.api.state_dict import StateDict
    from parammap.api.tensor import Tensor
    from parammap.checkpoint.manifest import TensorDigest
    from parammap.checkpoint.training_state import TrainingState
    from parammap.errors import RefusedError, TaskError
    from parammap.job.request import Report
    from parammap.proof.diff import Comparison
    from parammap.proof.verify import Verdict
    from parammap.tensors.region import Region
else:
    _MODULES = {
        "Checkpoint": "api.checkpoint",
        "Comparison": "proof.diff",
        "RefusedError": "errors",
        "Region": "tensors.region",
        "Report": "job.request",
        "StateDict": "api.state_dict",
        "TaskError": "errors",
        "Tensor": "api.tensor",
        "TensorDigest": "checkpoint.manifest",
        "TrainingState": "checkpoint.training_state",
        "Verdict": "proof.verify",
        "convert": "api.commands",
        "diff": "api.commands",
        "digest": "api.commands",
        "open": "api.checkpoint",
        "verify": "api.commands",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module 'parammap' has no attribute {name!r}")
        value = getattr(import_module(f"parammap.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES})


__all__ = [
    "Checkpoint",
    "Comparison",
    "RefusedError",
    "Region",
    "Report",
    "StateDict",
    "TaskError",
    "Tensor",
    "TensorDigest",
    "TrainingState",
    "Verdict",
    "__version__",
    "convert",
    "diff",
    "digest",
    "open",
    "verify",
]
