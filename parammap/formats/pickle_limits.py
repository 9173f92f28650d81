"""What a pickle may build: bounds that keep a small file from taking all memory, time or stack.

Python hashes nested tuples by recursion in C, without a limit of its own; a list that holds another
one twice, which holds a third one twice, and so on, is small in memory and endless to walk; and
whatever can be iterated can be asked for more than there is memory."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, dropwhile
from typing import Any, ClassVar

#: values inside of one key of a dict or element of a set; those of real checkpoints hold up to 5
MAX_KEY_NODES = 1000
#: how deep values may be nested; real checkpoints reach 14, Python's own recursion ends at 1000
MAX_DEPTH = 100
#: containers that are begun before one is filled: Python's pickler fills a list after each 1,000
#: items, so that only a tuple of very many containers comes near
MAX_BEGUN = 100_000
#: how often a walk of the tree may meet a value, for each byte of the pickle: a value takes a byte
#: or more, so that real checkpoints stay below 1
MAX_NODES_PER_BYTE = 16
#: what any pickle may have, however short
FREE_NODES = 100_000

#: the values inside of a value, by its type
Parts = Callable[[Any], Iterable[object]]
CONTAINERS: dict[type, Parts] = {
    **dict.fromkeys((list, tuple, set, frozenset), iter),
    dict: lambda node: chain(node, node.values()),
    OrderedDict: lambda node: chain(node, node.values(), vars(node).values()),
}
_TOO_DEEP = f"nests values more than {MAX_DEPTH} deep"


class Refusal(Exception):
    """What is wrong with the pickle, without the file's name."""


class BoundedUnpickler(pickle._Unpickler):
    """The standard library's own pure-Python unpickler, which fills nothing but plain containers
    and `fillable`, and begins, nests and hashes no more than the limits."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    fillable: ClassVar[tuple[type, ...]] = ()
    #: what the standard library's class has while it loads
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def load(self) -> Any:
        #: depth of each tuple that holds tuples; they are kept, for their ids to stay theirs
        self._nested: dict[int, tuple[int, tuple[Any, ...]]] = {}
        return super().load()

    def load_mark(self) -> None:
        self._check_begun(self.metastack)
        self.metastack.append(self.stack)
        self.stack = []
        self.append = self.stack.append

    def load_empty_list(self) -> None:
        self._begin([])

    def load_empty_dictionary(self) -> None:
        self._begin({})

    def load_empty_set(self) -> None:
        self._begin(set())

    def load_tuple(self) -> None:
        self._append_tuple(tuple(self.pop_mark()))

    def load_tuple1(self) -> None:
        self._append_tuple((self.stack.pop(),))

    def load_tuple2(self) -> None:
        last = self.stack.pop()
        self._append_tuple((self.stack.pop(), last))

    def load_tuple3(self) -> None:
        last, middle = self.stack.pop(), self.stack.pop()
        self._append_tuple((self.stack.pop(), middle, last))

    def load_append(self) -> None:
        self._fill_list([self.stack.pop()])

    def load_appends(self) -> None:
        self._fill_list(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill_dict(items)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._fill_dict([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._fill_dict(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._check_filled(set).update(checked_keys(items))

    def load_frozenset(self) -> None:
        keys = self.pop_mark()  # which makes another `append` the stack's own
        self.append(frozenset(checked_keys(keys)))

    def _begin(self, container: Any) -> None:
        self._check_begun(self.stack)
        self.append(container)

    def _check_begun(self, begun: list[Any]) -> None:
        if len(begun) > MAX_BEGUN:
            raise Refusal(f"begins more than {MAX_BEGUN} values before it ends one")

    def _append_tuple(self, made: tuple[Any, ...]) -> None:
        inner = [self._nested.get(id(part), (1,))[0] for part in made if type(part) is tuple]
        if inner:
            depth = 1 + max(inner)
            if depth > MAX_DEPTH:
                raise Refusal(_TOO_DEEP)
            self._nested[id(made)] = depth, made
        self.append(made)

    def _fill_list(self, items: list[Any]) -> None:
        self._check_filled(list).extend(items)

    def _fill_dict(self, items: list[Any]) -> None:
        filled = self._check_filled(dict, OrderedDict)
        for key, value in zip(checked_keys(items[::2]), items[1::2], strict=True):
            filled[key] = value

    def _check_filled(self, *kinds: type) -> Any:
        """What lies on top of the stack, if that is of a kind that may be filled so."""
        if type(self.stack[-1]) not in (*kinds, *self.fillable):
            raise Refusal(
                f"fills a {type(self.stack[-1]).__name__} as it were a {kinds[0].__name__}"
            )
        return self.stack[-1]

    for _opcode, _load in (
        (pickle.MARK, load_mark),
        (pickle.EMPTY_LIST, load_empty_list),
        (pickle.EMPTY_DICT, load_empty_dictionary),
        (pickle.EMPTY_SET, load_empty_set),
        (pickle.TUPLE, load_tuple),
        (pickle.TUPLE1, load_tuple1),
        (pickle.TUPLE2, load_tuple2),
        (pickle.TUPLE3, load_tuple3),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.DICT, load_dict),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
    ):
        dispatch[_opcode[0]] = _load


def checked_keys(keys: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """The same keys. Raises Refusal for what would take long, or much stack, to hash."""
    for key in keys:
        if not isinstance(key, (tuple, frozenset)):
            continue
        left, pending = MAX_KEY_NODES, [key]
        while pending:
            node = pending.pop()
            if isinstance(node, (tuple, frozenset)):
                left -= len(node)
                if left < 0:
                    raise Refusal(f"has a key made of more than {MAX_KEY_NODES} values")
                pending += node
    return keys


class TreeCheck:
    """Refuses what is nested too deep or holds itself, and what is much larger to walk than the
    `nbytes` of its pickle. Objects of the type `cut` may hold themselves."""

    def __init__(self, containers: dict[type, Parts], cut: type, nbytes: int) -> None:
        self._containers, self._cut = containers, cut
        self._most = FREE_NODES + MAX_NODES_PER_BYTE * nbytes
        #: the containers that are being walked, each in the one before it, by id
        self._path: dict[int, _Walk] = {}
        #: depth, and the values that a walk meets, of what is checked already
        self._known: dict[int, tuple[int, int]] = {}

    def check(self, root: object) -> None:
        """Raises Refusal. Depth first, without recursion."""
        containers, known = self._containers, self._known
        walks = [self._begin(root)] if type(root) in containers else []
        while walks:
            walk = walks[-1]
            for part in walk.left:
                if type(part) not in containers:
                    continue
                if id(part) in known:
                    walk.add(*known[id(part)])
                elif id(part) in self._path:
                    self._check_cycle(part)
                else:
                    walks.append(self._begin(part))
                    break
            else:
                walks.pop()
                self._end(walk)
                if walks:
                    walks[-1].add(*known[id(walk.node)])

    def _begin(self, node: object) -> _Walk:
        if len(self._path) >= MAX_DEPTH:
            raise Refusal(_TOO_DEEP)
        walk = self._path[id(node)] = _Walk(node, iter(self._containers[type(node)](node)))
        return walk

    def _check_cycle(self, part: object) -> None:
        inside = dropwhile(lambda walk: walk.node is not part, self._path.values())
        if not any(type(walk.node) is self._cut for walk in inside):
            raise Refusal(f"has a {type(part).__name__} that holds itself")

    def _end(self, walk: _Walk) -> None:
        del self._path[id(walk.node)]
        if walk.depth > MAX_DEPTH:
            raise Refusal(_TOO_DEEP)
        if walk.nodes > self._most:
            raise Refusal(f"unfolds to more than {self._most} containers")
        self._known[id(walk.node)] = walk.depth, walk.nodes


class _Walk:
    """A container, what is left to see of its parts, and what was seen: how deep it is, and how
    many containers a walk meets in it."""

    __slots__ = ("depth", "left", "node", "nodes")

    def __init__(self, node: object, left: Iterator[object]) -> None:
        self.node, self.left, self.depth, self.nodes = node, left, 1, 1

    def add(self, depth: int, nodes: int) -> None:
        self.depth = max(self.depth, depth + 1)
        self.nodes += nodes
