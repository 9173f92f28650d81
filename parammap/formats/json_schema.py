"""JSON Schema, as far as the schemas here use it: a schema becomes a function that checks a value.

Source: JSON Schema 2020-12 (Core, Validation). Stricter than that in one point: an
`integer` is written without a fraction and without an exponent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[Any], None]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_MAX_INTEGER = 2**63 - 1
#: what only describes
_SILENT = {"$schema", "$defs", "title", "description"}


class Mismatch(ValueError):
    """A value is not as the schema says; the message is where in the document, and what is wrong."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{where.removeprefix('.') or 'it'} {what}")
        self.what, self.where = what, where

    def within(self, key: str | int) -> Mismatch:
        """The same, of the value that has this one at `key`."""
        place = f"[{key}]" if isinstance(key, int) else f".{key[:80]}"
        return Mismatch(self.what, place + self.where)


def compiled(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> Check:
    """The check of a schema; `root` is the one whose $defs it refers to. The check raises Mismatch.

    Raises KeyError for a keyword that is not known here."""
    root = root or schema
    checks: list[Check] = []
    if "$ref" in schema:
        checks.append(compiled(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root))
    keywords = {key: value for key, value in schema.items() if key not in _SILENT | {"$ref"}}
    for names, make in _KEYWORDS.items():
        if given := {name: keywords.pop(name) for name in names if name in keywords}:
            checks.append(make(given, root))
    if keywords:
        raise KeyError(f"{', '.join(keywords)}: no keyword of a schema that is known here")
    return checks[0] if len(checks) == 1 else _all(checks)


def opened(schema: Any) -> Any:
    """The same schema, but objects may have keys that it does not know: a newer writer's."""
    if isinstance(schema, list):
        return [opened(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: opened(value)
        for key, value in schema.items()
        if not (key == "additionalProperties" and value is False)
    }


def _all(checks: list[Check]) -> Check:
    def check(value: Any) -> None:
        for one in checks:
            one(value)

    return check


def _type(given: Mapping[str, Any], _: Mapping[str, Any]) -> Check:
    names = [given["type"]] if isinstance(given["type"], str) else given["type"]
    allowed = {kind for name in names for kind in _TYPES[name]}

    def check(value: Any) -> None:
        if type(value) not in allowed:
            raise Mismatch(f"is {_short(value)} and not {' or '.join(names)}")

    return check


def _range(given: Mapping[str, Any], _: Mapping[str, Any]) -> Check:
    low, high = given.get("minimum", -_MAX_INTEGER), given.get("maximum", _MAX_INTEGER)

    def check(value: Any) -> None:
        if type(value) is int and not low <= value <= high:
            raise Mismatch(f"is {_short(value)} and not from {low} to {high}")

    return check


def _enum(given: Mapping[str, Any], _: Mapping[str, Any]) -> Check:
    allowed = given["enum"] if "enum" in given else [given["const"]]

    def check(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise Mismatch(f"is {_short(value)} and not {' or '.join(map(_short, allowed))}")

    return check


def _pattern(given: Mapping[str, Any], _: Mapping[str, Any]) -> Check:
    pattern = re.compile(given["pattern"])

    def check(value: Any) -> None:
        if isinstance(value, str) and not pattern.search(value):
            raise Mismatch(f"is {_short(value)}, which does not match {given['pattern']}")

    return check


def _object(given: Mapping[str, Any], root: Mapping[str, Any]) -> Check:
    required = given.get("required", [])
    known = {name: compiled(one, root) for name, one in given.get("properties", {}).items()}
    of_names = compiled(given["propertyNames"], root) if "propertyNames" in given else None
    rest = given.get("additionalProperties", True)
    of_rest = compiled(rest, root) if isinstance(rest, dict) else None
    at_least = given.get("minProperties", 0)

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            return
        if missing := [name for name in required if name not in value]:
            raise Mismatch(f"lacks {', '.join(missing)}")
        if len(value) < at_least:
            raise Mismatch("is empty")
        for name, one in value.items():
            if of_names:
                of_names(name)
            own = known.get(name, of_rest)
            if own is None:
                if rest is False and name not in known:
                    raise Mismatch(f"has {_short(name)}, which is not known")
                continue
            try:
                own(one)
            except Mismatch as mismatch:
                raise mismatch.within(name) from None

    return check


def _array(given: Mapping[str, Any], root: Mapping[str, Any]) -> Check:
    low, high = given.get("minItems", 0), given.get("maxItems", float("inf"))
    first = [compiled(one, root) for one in given.get("prefixItems", [])]
    rest = compiled(given["items"], root) if "items" in given else None

    def check(value: Any) -> None:
        if not isinstance(value, list):
            return
        if not low <= len(value) <= high:
            raise Mismatch(f"has {len(value)} items and not from {low} to {high}")
        number = 0
        try:
            for number, (own, one) in enumerate(zip(first, value, strict=False)):  # noqa: B007
                own(one)
            if rest:
                for number, one in enumerate(value[len(first) :], len(first)):  # noqa: B007
                    rest(one)
        except Mismatch as mismatch:
            raise mismatch.within(number) from None

    return check


def _one_of(given: Mapping[str, Any], root: Mapping[str, Any]) -> Check:
    """The alternatives here exclude each other, so the first that fits is the one. What is told is
    what the last one says, which stands for the usual case."""
    *others, last = (compiled(one, root) for one in given["oneOf"])

    def check(value: Any) -> None:
        if not _fits(others, value):
            last(value)

    return check


def _fits(checks: Iterable[Check], value: Any) -> bool:
    for check in checks:
        try:
            check(value)
        except Mismatch:
            continue
        return True
    return False


def _short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


#: keywords that are checked together, and what makes their check
_KEYWORDS: dict[tuple[str, ...], Callable[[Mapping[str, Any], Mapping[str, Any]], Check]] = {
    ("type",): _type,
    ("enum", "const"): _enum,
    ("minimum", "maximum"): _range,
    ("pattern",): _pattern,
    (
        "required",
        "properties",
        "additionalProperties",
        "propertyNames",
        "minProperties",
    ): _object,
    ("minItems", "maxItems", "prefixItems", "items"): _array,
    ("oneOf",): _one_of,
}
