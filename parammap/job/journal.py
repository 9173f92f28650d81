"""The journal of a staging folder: which of its files are durable, and what was found out about
them.

The first line holds the fingerprint of the conversion, each further one an Outcome. A line begins
with the CRC-32 of the rest of it: one that was cut or damaged counts for nothing, and its file is
written again."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from parammap.execute.checks import Misfit, NonFinite, Overflown, Unequal
from parammap.execute.durable import append
from parammap.execute.source_checksums import Run
from parammap.execute.writer import Outcome
from parammap.formats import regular_file
from parammap.tensors.logical import LogicalTensor

#: what an outcome says of elements, beside misfits
_FOUND = {"unequal": Unequal, "non_finite": NonFinite, "overflown": Overflown}


class Journal:
    """A file at `path`, if there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, fingerprint: str) -> None:
        """Make it anew."""
        self.path.unlink(missing_ok=True)
        append(self.path, _line({"fingerprint": fingerprint}))

    def record(self, outcome: Outcome) -> None:
        """Note a file that is durable. The note itself need not be: without it the file is written
        again."""
        append(self.path, b"\n" + _line(_entry(outcome)))

    def outcomes(self, fingerprint: str) -> dict[str, Outcome]:
        """What was recorded of this conversion, by path; nothing of another one. Raises
        RefusedError for what is no file."""
        if not self.path.exists():
            return {}
        with regular_file.opened(self.path) as stream:
            if _content(stream.readline()) != {"fingerprint": fingerprint}:
                return {}
            found = [outcome for line in stream if (outcome := _outcome(_content(line)))]
        return {outcome.path: outcome for outcome in found}


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x " % zlib.crc32(text) + text


def _content(line: bytes) -> Any:
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if crc == b"%08x" % zlib.crc32(text) else None


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "path": outcome.path,
        "bytes": outcome.nbytes,
        "crc32": outcome.crc32,
        "runs": outcome.runs,
        "digests": [
            [*_key(tensor), replica, digest, count]
            for (tensor, replica), (digest, count) in outcome.digests.items()
        ],
        "misfits": [
            [*_key(tensor), m.count, m.positions, m.window.hex(), m.sums]
            for tensor, m in outcome.misfits.items()
        ],
        **{
            name: [
                [*_key(tensor), one.count, one.positions]
                for tensor, one in getattr(outcome, name).items()
            ]
            for name in _FOUND
        },
    }


def _key(tensor: LogicalTensor) -> list[Any]:
    return [tensor.state, tensor.name, tensor.dtype, list(tensor.shape)]


def _tensor(key: list[Any]) -> LogicalTensor:
    state, name, dtype, shape = key
    return LogicalTensor(state, name, dtype, tuple(shape))


def _outcome(entry: Any) -> Outcome | None:
    if entry is None:
        return None
    outcome = Outcome(entry["path"], entry["bytes"], entry["crc32"])
    outcome.runs = {file: [Run(*run) for run in runs] for file, runs in entry["runs"].items()}
    for *key, replica, digest, count in entry["digests"]:
        outcome.digests[_tensor(key), replica] = digest, count
    for *key, count, positions, window, sums in entry["misfits"]:
        tensor = _tensor(key)
        outcome.misfits[tensor] = Misfit(
            tensor, count, [tuple(p) for p in positions], bytes.fromhex(window), tuple(sums)
        )
    for name, kind in _FOUND.items():
        for *key, count, positions in entry[name]:
            getattr(outcome, name)[_tensor(key)] = kind(
                _tensor(key), count, [tuple(p) for p in positions]
            )
    return outcome
