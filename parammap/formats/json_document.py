"""JSON documents: the one place that reads them. What it returns has been checked.

A document is held in memory whole, so its size and its depth are bounded; its types and numbers are
those that a schema says (parammap/schemas, formats/json_schema.py)."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.formats.json_schema import Check, Mismatch, compiled

#: a manifest has 250 bytes per tensor and state: this is one of a million
MAX_NBYTES = 256 << 20
#: layout files are 8 deep; what walks over one later needs no bound of its own
MAX_DEPTH = 64

SCHEMAS = Path(__file__).parents[1] / "schemas"


def schema(name: str) -> dict[str, Any]:
    """The schema `name`, such as "layout", of parammap/schemas."""
    content: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    return content


@cache
def check_of(name: str) -> Check:
    """The check by that schema."""
    return compiled(schema(name))


def read(
    path: str | os.PathLike[str], check: Check, remedy: str, *, is_followed: bool = False
) -> Any:
    """The document in a file, which `check` accepts; `is_followed`: other bytes may stand behind
    it. Raises RefusedError, with the remedy, if it is damaged, or does not exist."""
    with regular_file.opened(path) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_NBYTES:
            raise RefusedError(
                f"{os.fsdecode(path)}: has more than {MAX_NBYTES >> 20} MiB; {remedy}"
            )
        text = stream.read(MAX_NBYTES)
    return parse(text, os.fsdecode(path), check, remedy, is_followed=is_followed)


def parse(
    text: bytes,
    where: str,
    check: Check,
    remedy: str,
    *,
    is_followed: bool = False,
    unique: bool = False,
) -> Any:
    """The same, of a document at hand; `unique`: no key of an object may occur twice."""
    try:
        decoder = json.JSONDecoder(object_pairs_hook=_unique if unique else None)
        words = text.decode()
        content = decoder.raw_decode(words)[0] if is_followed else decoder.decode(words)
        _check_depth(content)
        check(content)
    except RecursionError as error:
        raise RefusedError(
            f"{where}: is damaged (not valid JSON: nested too deeply); {remedy}"
        ) from error
    except Mismatch as error:
        raise RefusedError(f"{where}: is damaged ({error}); {remedy}") from error
    except ValueError as error:
        raise RefusedError(f"{where}: is damaged (not valid JSON: {error}); {remedy}") from error
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise Mismatch(f"is more than {MAX_DEPTH} levels deep")
