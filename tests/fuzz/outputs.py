"""What an output may hold, said once more and apart from the program that writes it."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

#: all that a pickle of ours names, in words other than parammap/formats/allowed.py
_HARMLESS = re.compile(
    r"torch( [a-z]+\d+(_e\dm\d(fn)?)?| bool| Size| device| [A-Z][A-Za-z0-9]+Storage)"
    r"|torch\.storage UntypedStorage|torch\._utils _rebuild_tensor_v[23]"
    r"|torch\.serialization _get_layout"
    r"|torch\.distributed\.checkpoint\.(metadata|filesystem) _?[A-Z][A-Za-z_]+"
    r"|collections (OrderedDict|defaultdict|deque|Counter)|argparse Namespace|types SimpleNamespace"
    r"|(_codecs encode|copyreg _reconstructor|_io BytesIO|signal [A-Z][A-Za-z0-9]+)"
    r"|(builtins|__builtin__) (set|frozenset|bytearray|bytes|complex|slice|x?range|object|int|float"
    r"|bool|str|unicode|list|dict|tuple|Ellipsis)"
    r"|pathlib (Pure)?(Posix)?Path|datetime (date|datetime|time|timedelta|timezone)"
    r"|numpy(\._?core\.multiarray)? (dtype|ndarray|_reconstruct|scalar)"
    r"|(megatron|deepspeed|metaseq|omegaconf|Merak|transformers)\.[a-z0-9_.]+ [A-Z][A-Za-z0-9]+"
)


class Armed(AssertionError):
    """A pickle of an output names what a loader should not."""


def check_pickles(folder: Path) -> None:
    """Raises Armed if a pickle in a file of the folder names what is not known to be harmless."""
    for path in folder.rglob("*"):
        if path.is_file():
            for data in _pickles(path):
                for named in globals_of(data):
                    if not _HARMLESS.fullmatch(named):
                        raise Armed(f"{path}: names {named}")


def globals_of(data: bytes) -> set[str]:
    """The globals of a pickle of protocol 2: "module name"."""
    return {
        str(argument)
        for opcode, argument, _ in pickletools.genops(data)
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
    }


def _pickles(path: Path) -> list[bytes]:
    if path.suffix in (".metadata", ".pkl") or path.name in (".metadata", "metadata_0"):
        return [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return []
