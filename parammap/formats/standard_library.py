"""What of Python's standard library a pickle may name."""

from __future__ import annotations

EVERY = "*"


def _names(written: str, read: str = "") -> dict[str, bool]:
    return dict.fromkeys(read.split(), False) | dict.fromkeys(written.split(), True)


#: module: name: whether a pickle of ours may name it as well, or only one that is read; EVERY stands
#: for all other names of the module
NAMES: dict[str, dict[str, bool]] = {
    "_codecs": _names("encode"),
    "_io": _names("BytesIO", read="StringIO"),
    "argparse": _names("Namespace"),
    "builtins": _names(
        "Ellipsis bool bytearray bytes complex dict float frozenset int list object range set slice "
        "str tuple",
        read="getattr type",
    ),
    "collections": _names("Counter OrderedDict defaultdict deque"),
    "copyreg": _names("_reconstructor"),
    "datetime": _names("date datetime time timedelta timezone", read=EVERY),
    "decimal": _names("", read="Decimal"),
    "enum": _names("", read=EVERY),
    "fractions": _names("", read="Fraction"),
    "functools": _names("", read="partial"),
    "io": _names("", read="BytesIO StringIO"),
    "pathlib": _names("Path PosixPath PurePath PurePosixPath", read=EVERY),
    "re": _names("", read="_compile"),
    "signal": _names("SIGHUP SIGINT SIGTERM SIGUSR1 SIGUSR2", read="Signals"),
    "types": _names("SimpleNamespace"),
    "uuid": _names("", read="UUID"),
}


def may_be_read(module: str, name: str) -> bool:
    """Whether such a global may stand in a pickle that is read, where it stays inert."""
    top = module.partition(".")[0]
    names = NAMES.get(top, {})
    return EVERY in names or (module == top and name in names)


#: what a pickle of ours may name, by module
WRITTEN = {
    module: frozenset(name for name, is_written in names.items() if is_written)
    for module, names in NAMES.items()
    if any(names.values())
}
