"""What the object in a pickle must be, said once and checked where its file is read, before anybody
uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from parammap.errors import RefusedError
from parammap.formats.pickles import Opaque

#: Gives the faults of a value that is found at a place: what it is and is not.
Schema: TypeAlias = Callable[[Any, str], Iterator[str]]
#: how far a file counts samples, tokens and elements
MAX_COUNT = 1 << 53
#: how many layers, heads, experts and ranks it may speak of, which are gone through one by one
MAX_SIZE = 1 << 22


def check(tree: Any, schema: Schema, file: object) -> None:
    """Raises RefusedError that names the file and the first value that is not as the schema says."""
    for fault in schema(tree, ""):
        raise RefusedError(
            f"{file}: {fault}; the file is damaged, or of a release that is not known"
        )


def kind(*types: type) -> Schema:
    """A value of one of the types; a bool is no int."""

    def faults(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, types) or isinstance(value, bool) and bool not in types:
            yield _fault(value, where, " or ".join(one.__name__ for one in types))

    return faults


def _count_up_to(limit: int) -> Schema:
    def faults(value: Any, where: str) -> Iterator[str]:
        if type(value) is not int or not 0 <= value <= limit:
            yield f"{where or 'its content'} is not a count: a whole number from 0 to {limit}"

    return faults


count, size = _count_up_to(MAX_COUNT), _count_up_to(MAX_SIZE)


def optional(schema: Schema) -> Schema:
    """None, or what the schema says."""
    return lambda value, where: iter(()) if value is None else schema(value, where)


def list_of(schema: Schema) -> Schema:
    def faults(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, (list, tuple)):
            yield _fault(value, where, "list")
        else:
            for number, item in enumerate(value):
                yield from schema(item, f"{where}[{number}]")

    return faults


def dict_of(key: Schema, schema: Schema) -> Schema:
    """A dict all of whose keys and values are alike."""

    def faults(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _fault(value, where, "dict")
        else:
            for name, item in value.items():
                yield from key(name, f"a key of {where or 'its content'}")
                yield from schema(item, f"{where}[{_said(name)}]")

    return faults


def record(fields: Mapping[Any, Schema], required: tuple[str, ...] = ()) -> Schema:
    """A dict with fields of its own each, which may be absent unless required; any other may be
    there."""

    def faults(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _fault(value, where, "dict")
            return
        for name in required:
            if name not in value:
                yield f"{where or 'its content'} has no {name}"
        for name in fields.keys() & value.keys():
            yield from fields[name](value[name], f"{where}[{_said(name)}]")

    return faults


def namespace(fields: Mapping[str, Schema]) -> Schema:
    """An object such as an argparse.Namespace, whose attributes are as in a record."""
    attributes = record(fields)

    def faults(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, Opaque):
            yield _fault(value, where, "Namespace")
        else:
            yield from attributes(value.attributes, where)

    return faults


def either(*schemas: tuple[type, Schema]) -> Schema:
    """What the schema says that stands by the value's type."""

    def faults(value: Any, where: str) -> Iterator[str]:
        for type_, schema in schemas:
            if isinstance(value, type_):
                yield from schema(value, where)
                return
        yield _fault(value, where, " or ".join(type_.__name__ for type_, _ in schemas))

    return faults


def anything(value: Any, where: str) -> Iterator[str]:
    return iter(())


def _fault(value: Any, where: str, wanted: str) -> str:
    return f"{where or 'its content'} is a {type(value).__name__} and not a {wanted}"


def _said(name: Any) -> str:
    return f"{name!r:.80}" if isinstance(name, (str, int)) else type(name).__name__
