"""The restricted unpickler: what a pickle says, without importing or running anything that it
names.

A global that the pickle names becomes a `Global` (two strings), and a call becomes an `Opaque`
record of the call. Only the few calls listed in `_VALUES` (and those a container adds) yield real
values. Globals of third parties stay inert whatever they are; globals of the standard library are
refused unless listed, as no checkpoint has a reason to name them. An `Opaque` is written back by
`pickle_writer` as it came, if all that it names is allowed there (see `allowed`)."""

from __future__ import annotations

import _compat_pickle
import io
import os
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from parammap.errors import RefusedError
from parammap.formats import regular_file
from parammap.formats.pickle_limits import (
    CONTAINERS,
    BoundedUnpickler,
    Parts,
    Refusal,
    TreeCheck,
    checked_keys,
)
from parammap.formats.standard_library import may_be_read
from parammap.tensors.logical import shape_of

MAX_PICKLE_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant by its name; torch dtypes come as Global("torch", "float32").
    `file` is the one whose pickle names it."""

    module: str
    name: str
    file: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Opaque:
    """The record of an object: `target(*args, **kwargs)`, then its state and items.

    `new` tells `target.__new__(target, *args)` from a call. `state` is what pickle's BUILD would
    have set: a dict for an argparse.Namespace. `items` and `pairs` hold what a list-like or
    dict-like object would have been filled with."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    new: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's attributes, where its state is of the kind that plain classes have; else
        empty."""
        parts = (
            self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        )
        return {
            name: value for part in parts if isinstance(part, dict) for name, value in part.items()
        }

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))


class Size(tuple[int, ...]):
    """A torch.Size."""


def _ordered_dict(pairs: list[Any] | tuple[Any, ...] = ()) -> OrderedDict[Any, Any]:
    listed = [tuple(_plain_list(pair, "pair")) for pair in _plain_list(pairs, "OrderedDict")]
    checked_keys([pair[0] for pair in listed])
    return OrderedDict(listed)


def _plain_list(items: Any, kind: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise Refusal(f"fills a {kind} from a {type(items).__name__}")
    return items


def _encoded(text: str, encoding: str) -> bytes:
    if encoding.replace("-", "").replace("_", "").lower() != "latin1":
        raise Refusal(f"calls _codecs.encode with encoding {encoding!r}")
    return text.encode("latin-1")


def _bytearray(content: bytes | str = b"", encoding: str = "latin-1") -> bytearray:
    return bytearray(
        _encoded(content, encoding) if isinstance(content, str) else memoryview(content)
    )


def _set_of(kind: type) -> Callable[..., Any]:
    def build(items: list[Any] | tuple[Any, ...] = ()) -> Any:
        return kind(checked_keys(_plain_list(items, kind.__name__)))

    return build


def _complex(*parts: float) -> complex:
    if not all(isinstance(part, (int, float)) for part in parts):
        raise Refusal("makes a complex of something that is no number")
    return complex(*parts)


def _member(owner: Any, name: str) -> Opaque:
    """How some Python releases pickle enum members and nested classes; a standard library class has
    neither here."""
    if (
        not isinstance(owner, (Global, Opaque))
        or not isinstance(name, str)
        or name.startswith("_")
        or isinstance(owner, Global)
        and owner.module.partition(".")[0] in sys.stdlib_module_names
    ):
        raise Refusal("calls builtins.getattr on something that is no third-party class")
    return Opaque(GETATTR, (owner, name))


GETATTR = Global("builtins", "getattr")

#: the calls that yield a value
_VALUES: dict[Global, Callable[..., Any]] = {
    GETATTR: _member,
    Global("_codecs", "encode"): _encoded,
    Global("builtins", "bytearray"): _bytearray,
    Global("builtins", "bytes"): lambda items=(): bytes(_plain_list(items, "bytes")),
    Global("builtins", "complex"): _complex,
    Global("builtins", "frozenset"): _set_of(frozenset),
    Global("builtins", "set"): _set_of(set),
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): lambda sizes=(): Size(shape_of(sizes)),
}


def loads(
    data: bytes,
    file: str,
    calls: Mapping[Global, Callable[..., Any]] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that a pickle of any protocol holds; `file` is named in errors.

    `calls` adds globals whose call yields a value, `persistent_load` resolves persistent ids.
    Raises RefusedError if the pickle is damaged, too large, or names a standard library global that
    is not listed."""
    if len(data) > MAX_PICKLE_NBYTES:
        raise RefusedError(
            f"{file}: its pickle has {len(data)} bytes, more than {MAX_PICKLE_NBYTES}; tensors "
            f"belong"
            " outside the pickle: save it with torch.save"
        )
    try:
        tree = _Unpickler(data, file, calls or {}, persistent_load).load()
        TreeCheck(_CONTAINERS, Opaque, len(data)).check(tree)
        return tree
    except Refusal as refusal:
        raise RefusedError(
            f"{file}: its pickle {refusal}; do not load this file if you do not trust it"
        ) from refusal
    except _DAMAGED as error:
        raise RefusedError(
            f"{file}: its pickle is damaged ({type(error).__name__}: {error}); copy the file again"
            " from its source"
        ) from error


def read(path: str | os.PathLike[str]) -> Any:
    """The object in a file that is one bare pickle. Raises RefusedError as `loads` does, or if the
    file is missing."""
    file = os.fspath(path)
    with regular_file.opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        return loads(stream.read(min(size, MAX_PICKLE_NBYTES + 1)), file)


#: the values that hold others
_CONTAINERS: dict[type, Parts] = {
    **CONTAINERS,
    Size: iter,
    Opaque: lambda node: (node.target, node.args, node.kwargs, node.state, node.items, node.pairs),
}

#: what a stream of arbitrary bytes can make an unpickler raise
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


class _Unpickler(BoundedUnpickler):
    """The bounded unpickler, with every operation that names or calls replaced.

    pickle.Unpickler (in C) would call whatever `find_class` returns and set state on it; here
    neither ever happens."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(BoundedUnpickler.dispatch)
    fillable = (Opaque,)
    #: what the standard library's class has while it loads
    proto: int
    read: Callable[[int], bytes]

    def __init__(
        self,
        data: bytes,
        file: str,
        calls: Mapping[Global, Callable[..., Any]],
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._file = file
        self._values = {**_VALUES, **calls}
        self._persistent_load = persistent_load
        self._globals: dict[tuple[str, str], Global] = {}
        self._nested: dict[int, tuple[int, tuple[Any, ...]]] = {}

    def persistent_load(self, pid: Any) -> Any:
        return (self._persistent_load or super().persistent_load)(pid)

    def find_class(self, module: str, name: str) -> Global:
        known = self._globals.get((module, name))
        if known is None:
            target = _checked(renamed(module, name))
            if self.proto >= 3:
                target = _checked(Global(module, name))
            known = self._globals[module, name] = replace(target, file=self._file)
        return known

    def get_extension(self, code: int) -> None:
        raise Refusal(f"uses extension code {code}")

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(self._call(klass, tuple(args), {}, new=False))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args, {}, new=False)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args, {}, new=True)

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args, kwargs, new=True)

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque) and target.state is None:
            target.state = state
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            vars(target).update(state)
        else:
            raise Refusal(f"sets the state of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: bool) -> Any:
        if not isinstance(target, (Global, Opaque)) or type(args) is not tuple:
            raise Refusal(f"calls a {type(target).__name__}")
        if type(kwargs) is not dict or not all(isinstance(name, str) for name in kwargs):
            raise Refusal("calls with keywords that are no names")
        value = self._values.get(target) if isinstance(target, Global) and not kwargs else None
        return value(*args) if value else Opaque(target, args, kwargs, new)


def renamed(module: str, name: str) -> Global:
    """Python 2's names, which pickles up to protocol 2 use (`__builtin__ xrange`), as Python 3 has
    them."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return Global(*_compat_pickle.NAME_MAPPING[module, name])
    return Global(_compat_pickle.IMPORT_MAPPING.get(module, module), name)


def _checked(target: Global) -> Global:
    top = target.module.partition(".")[0]
    through_module = not sys.stdlib_module_names.isdisjoint(target.name.split(".")[:-1])
    is_standard = top in sys.stdlib_module_names
    if through_module or is_standard and not may_be_read(target.module, target.name):
        raise Refusal(f"names {target}, which no checkpoint needs")
    return target
