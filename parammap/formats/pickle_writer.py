"""Writes the object trees that `pickles` reads: inert records go back as the globals and calls that
they record.

Pickle protocol 2, as torch.save writes, so that every Python and torch that reads the source reads
the result. Only what `allowed` lists is named."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parammap.formats import allowed
from parammap.formats.pickles import GETATTR, Global, Opaque, Size

PROTOCOL = 2
_SIZE = Global("torch", "Size")
_PLAIN_TYPES = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        tuple,
        list,
        dict,
        set,
        frozenset,
        slice,
        range,
        OrderedDict,
    }
)
#: what Python pickles some of the plain types through
_PLAIN_CALLABLES = (codecs.encode, *_PLAIN_TYPES)


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A leaf written as a persistent id, which the reader's `persistent_load` resolves."""

    value: tuple[Any, ...]


def dumps(tree: Any, substitutes: Mapping[type, Callable[[Any], Opaque]] | None = None) -> bytes:
    """The pickle of `tree`: plain Python values, Global, Opaque, Size, PersistentId.

    A leaf of a type in `substitutes` is written as the record that its function gives. Raises
    RefusedError for a record of what is not allowed, and TypeError for a value of any other type.
    """
    stream = io.BytesIO()
    _Pickler(stream, substitutes or {}).dump(tree)
    return stream.getvalue()


class _Pickler(pickle._Pickler):
    """The standard library's pure-Python pickler, for plain types and the record types only."""

    #: the standard library's own, which its stub leaves out
    memo: dict[int, tuple[int, Any]]
    memoize: Callable[[Any], None]
    save: Callable[[Any], None]
    save_pers: Callable[[Any], None]
    write: Callable[[bytes], Any]
    _batch_appends: Callable[[list[Any]], None]
    _batch_setitems: Callable[[list[tuple[Any, Any]]], None]

    def __init__(
        self, stream: io.BytesIO, substitutes: Mapping[type, Callable[[Any], Opaque]]
    ) -> None:
        super().__init__(stream, protocol=PROTOCOL)
        self._substitutes = substitutes
        records: dict[type, Callable[..., None]] = {
            Global: _Pickler._save_global,
            Opaque: _Pickler._save_opaque,
            Size: _Pickler._save_size,
            PersistentId: _Pickler._save_persistent,
            **dict.fromkeys(substitutes, _Pickler._save_substitute),
        }
        self._types = _PLAIN_TYPES | records.keys()
        vars(self)["dispatch"] = {**pickle._Pickler.dispatch, **records}

    def reducer_override(self, obj: Any) -> Any:
        """Only a gate; which way an allowed value is written is left to `dispatch`."""
        if type(obj) in self._types or any(obj is allowed for allowed in _PLAIN_CALLABLES):
            return NotImplemented
        raise TypeError(
            f"a {type(obj).__module__}.{type(obj).__qualname__} cannot be written into a checkpoint"
        )

    def _save_global(self, target: Global) -> None:
        allowed.check(target)
        self._write_global(target)
        self.memoize(target)

    def _write_global(self, target: Global) -> None:
        self.write(pickle.GLOBAL + f"{target.module}\n{target.name}\n".encode("ascii"))

    def _save_opaque(self, record: Opaque) -> None:
        allowed.check_call(record)
        if record.target == GETATTR:
            self._write_global(GETATTR)
        else:
            self.save(record.target)
        self.save(record.args)
        if record.kwargs:
            self.save(record.kwargs)
            self.write(pickle.NEWOBJ_EX)
        else:
            self.write(pickle.NEWOBJ if record.new else pickle.REDUCE)
        self.memoize(record)
        self._batch_appends(record.items)
        self._batch_setitems(record.pairs)
        if record.state is not None:
            self.save(record.state)
            self.write(pickle.BUILD)

    def _save_size(self, size: Size) -> None:
        self._save_as(size, Opaque(_SIZE, (tuple(size),)))

    def _save_persistent(self, leaf: PersistentId) -> None:
        self.save_pers(leaf.value)

    def _save_substitute(self, leaf: Any) -> None:
        self._save_as(leaf, self._substitutes[type(leaf)](leaf))

    def _save_as(self, obj: Any, record: Opaque) -> None:
        """Write `record`, and let later mentions of `obj` refer to it."""
        self.save(record)
        self.memo[id(obj)] = (self.memo[id(record)][0], obj)
