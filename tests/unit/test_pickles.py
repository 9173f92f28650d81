"""The restricted unpickler under attack, and what it keeps of honest pickles, with Python's pickle
as the oracle."""

import argparse
import builtins
import collections
import contextlib
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parammap.errors import RefusedError
from parammap.formats import allowed, numpy_values, pickle_writer, pickles
from parammap.formats.pickles import Global, Opaque, Size

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Colour(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Plain:
    class Inner:
        def __eq__(self, other):
            return vars(self) == vars(other)

    def __eq__(self, other):
        return vars(self) == vars(other)


class Checked:
    def __init__(self, required):
        self.required = required

    def __eq__(self, other):
        return vars(self) == vars(other)


class Slotted:
    __slots__ = ("a", "b")

    def __eq__(self, other):
        return (self.a, self.b) == (other.a, other.b)


class ListLike(list):
    pass


class DictLike(dict):
    pass


def _refused(data: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        pickles.loads(data, "evil.pt")
    message = str(caught.value)
    assert message.startswith("evil.pt: ") and "\n" not in message
    return message


ATTACKS = {
    "os.system": (os.system, "touch {}"),
    "subprocess.Popen": (subprocess.Popen, "touch {}"),
    "subprocess.check_output": (subprocess.check_output, "touch {}"),
    "builtins.eval": (eval, "open('{}', 'w')"),
    "builtins.exec": (exec, "open('{}', 'w')"),
    "builtins.open": (open, "{}", "w"),
    "builtins.__import__": (builtins.__import__, "antigravity"),
    "builtins.setattr": (setattr, Colour, "x", 1),
    "builtins.map": (map, print, [1]),
    "io.open_code": (io.open_code, "{}"),
    "pty.spawn": (__import__("pty").spawn, "touch"),
    "operator.attrgetter": (__import__("operator").attrgetter, "system"),
    "importlib.import_module": (__import__("importlib").import_module, "antigravity"),
    "runpy.run_path": (__import__("runpy").run_path, "{}"),
    "functools.reduce": (functools.reduce, print, [1, 2]),
    "collections.namedtuple": (collections.namedtuple, "T", "a"),
    "pickle.loads": (pickle.loads, b"N."),
    "shutil.rmtree": (__import__("shutil").rmtree, "{}"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_globals_of_the_standard_library_are_refused(tmp_path, attack, protocol):
    function, *args = ATTACKS[attack]
    canary = tmp_path / "canary"
    args = [arg.format(canary) if isinstance(arg, str) else arg for arg in args]
    assert "names " in _refused(pickle.dumps([Calls(function, *args)], protocol))
    assert not canary.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(Vtrue\ntR.",
        b"cposix\nsystem\n(Vtrue\ntR.",
        b"cnt\nsystem\n(Vtrue\ntR.",
        b"(Vtrue\nios\nsystem\n.",
        b"(cos\nsystem\nVtrue\no.",
        b"c__builtin__\neval\n(V1\ntR.",
        b"\x80\x02c__builtin__\nexecfile\n(V1\ntR.",
        b"ccommands\ngetoutput\n(V1\ntR.",
        b"ctorch\nos.system\n(V1\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x10object.__class__\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
        b"ctypes\nCodeType\n(I0\ntR.",
        b"ctypes\nFunctionType\n(tR.",
        b"ccollections.abc\nos\n.",
        b"cargparse\n_sys.modules\n.",
    ],
)
def test_every_way_to_name_a_forbidden_global_is_refused(data):
    assert "names " in _refused(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(
            b"cbuiltins\ngetattr\n(cpathlib\nos\nVsystem\ntR.", id="through a module of the library"
        ),
        pytest.param(b"cbuiltins\ngetattr\n(cdatetime\nsys\nVmodules\ntR.", id="through another"),
        pytest.param(b"cbuiltins\ngetattr\n(cmegatron\nX\nV__globals__\ntR.", id="dunder"),
        pytest.param(b"cbuiltins\ngetattr\n((lVappend\ntR.", id="of a value"),
        pytest.param(b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.", id="codec"),
        pytest.param(b"cbuiltins\nbytearray\n(I999999999999\ntR.", id="huge bytearray"),
        pytest.param(b"cbuiltins\nbytes\n(I999999999999\ntR.", id="huge bytes"),
        pytest.param(b"cbuiltins\nset\n(cbuiltins\nrange\n(I999999999999\ntRtR.", id="huge set"),
        pytest.param(b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", id="huge BYTEARRAY8"),
        pytest.param(b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.", id="huge BINBYTES8"),
        pytest.param(b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00.", id="huge FRAME"),
        pytest.param(b"\x80\x02\x82\x01.", id="extension code"),
        pytest.param(b"Vname\n(tR.", id="call of a string"),
        pytest.param(b"cmegatron\nX\nV1\nR.", id="arguments that are no tuple"),
        pytest.param(b"cmegatron\nX\n}b.", id="state of a global"),
        pytest.param(b"cbuiltins\nint\n}b.", id="state of a builtin"),
        pytest.param(b"}}b.", id="state of a dict"),
        pytest.param(b"ccollections\nOrderedDict\n)R(N}tb.", id="slot state of an OrderedDict"),
        pytest.param(b"Pabc\n.", id="persistent id"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x02", id="no stop"),
        pytest.param(b"\xff.", id="no opcode"),
        pytest.param(b"0.", id="stack underflow"),
        pytest.param(b"g9\n.", id="no such memo"),
        pytest.param(b"\x80\x63.", id="protocol"),
    ],
)
def test_tricks_are_refused(data):
    _refused(data)


def test_a_pickle_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_NBYTES", 10)
    assert "more than 10" in _refused(pickle.dumps("x" * 100))


@pytest.mark.parametrize("name", ["hub.load", "load", "nn.Linear", "distributed.rpc.rpc_sync"])
def test_functions_of_third_parties_stay_inert(name):
    module, _, function = f"torch.{name}".rpartition(".")
    record = pickles.loads(f"c{module}\n{function}\n(Vx\ntR.".encode(), "f")
    assert record.target == Global(module, function) and record.args == ("x",)


def test_nothing_that_a_pickle_names_is_imported():
    pickles.loads(b"(cthis_module_does_not_exist\nX\n(tRcturtle_like.demo\nY\n(tRl.", "f")
    assert "turtle_like" not in sys.modules


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_read_or_refused(data):
    with contextlib.suppress(RefusedError):
        pickles.loads(data, "f")


@given(st.data())
def test_damaged_pickles_are_read_or_refused(data):
    honest = bytearray(pickle.dumps(HONEST["nested"], data.draw(st.sampled_from(PROTOCOLS))))
    for _ in range(data.draw(st.integers(1, 3))):
        honest[data.draw(st.integers(0, len(honest) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedError):
        pickles.loads(bytes(honest), "f")


def _with_state(kind, **attributes):
    value = kind()
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


_shared = [1, 2]
HONEST = {
    "scalars": [
        None,
        True,
        0,
        -1,
        2**80,
        1.5,
        float("inf"),
        1j,
        "x" * 300,
        "é",
        b"",
        b"\xff" * 300,
        ...,
    ],
    "bytearray": [bytearray(b"\xff\0"), bytearray()],
    "sets": [{1, 2}, frozenset("ab"), set()],
    "ranges": [range(3), slice(1, None, 2)],
    "nested": {"a": [(), (1,), (1, 2, 3, 4)], ("k", 1): {"b": {}}},
    "shared": [_shared, _shared],
    "ordered": collections.OrderedDict(b=1, a=2),
    "ordered with attributes": _with_state(collections.OrderedDict, _metadata={"version": 1}),
    "namespace": argparse.Namespace(lr=1e-4, name="x", tied=None),
    "simple namespace": types.SimpleNamespace(a=1),
    "enum": [Colour.RED, Flags.A | Flags.B, {Colour.RED: 1}],
    "classes": [Plain, int, float],
    "plain object": _with_state(Plain, a=1),
    "object whose class wants arguments": Checked(3),
    "slots": _with_state(Slotted, a=1, b=2),
    "list-like": ListLike([1, 2]),
    "dict-like": DictLike(a=1),
    "collections": [
        collections.defaultdict(list, a=[1]),
        collections.deque([1], 3),
        collections.Counter("aab"),
    ],
    "paths": pathlib.PurePosixPath("a/b"),
    "dates": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1)],
    "numpy": [np.float64(1.5), np.int32(3), np.bool_(True)],
    "torch constants": [torch.float32, torch.Size([2, 3]), torch.device("cpu")],
}


@pytest.fixture
def own_classes(monkeypatch):
    """This file's classes on the list of what may be written."""
    own = {"Plain", "Checked", "Slotted", "ListLike", "DictLike", "WithKeywords"}
    monkeypatch.setitem(allowed.GLOBALS, __name__, own)
    monkeypatch.setitem(allowed.ENUMS, __name__, {"Colour", "Flags"})


@pytest.mark.usefixtures("own_classes")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", HONEST)
def test_what_is_read_can_be_written_back(case, protocol):
    if case == "slots" and protocol < 2:
        pytest.skip("Python itself cannot pickle slots with this protocol")
    original = HONEST[case]
    again = pickle.loads(pickle_writer.dumps(pickles.loads(pickle.dumps(original, protocol), "f")))
    assert again == original and type(again) is type(original)
    assert getattr(again, "__dict__", None) == getattr(original, "__dict__", None)


@pytest.mark.usefixtures("own_classes")
def test_identity_survives():
    again = pickle.loads(pickle_writer.dumps(pickles.loads(pickle.dumps(HONEST["shared"]), "f")))
    assert again[0] is again[1]


@pytest.mark.usefixtures("own_classes")
def test_cycles_survive():
    cycle = _with_state(Plain)
    cycle.me = [cycle]
    again = pickle.loads(pickle_writer.dumps(pickles.loads(pickle.dumps(cycle), "f")))
    assert again.me[0] is again


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_a_buffer_survives(protocol):
    buffer = io.BytesIO(b"abc")
    buffer.seek(2)
    again = pickle.loads(pickle_writer.dumps(pickles.loads(pickle.dumps(buffer, protocol), "f")))
    assert (again.getvalue(), again.tell()) == (b"abc", 2)


@pytest.mark.usefixtures("own_classes")
def test_keyword_arguments_of_new_survive():
    data = pickle.dumps(WithKeywords(a=1), 4)
    assert pickle.loads(pickle_writer.dumps(pickles.loads(data, "f"))).a == 1


class WithKeywords:
    def __new__(cls, *, a):
        self = super().__new__(cls)
        self.a = a
        return self

    def __getnewargs_ex__(self):
        return (), {"a": self.a}

    def __getstate__(self):
        return None


def test_attributes_are_at_hand():
    args = pickles.loads(pickle.dumps(HONEST["namespace"], 2), "f")
    assert isinstance(args, Opaque) and args.target == Global("argparse", "Namespace")
    assert args.state == args.attributes == {"lr": 1e-4, "name": "x", "tied": None}
    assert pickles.loads(pickle.dumps(HONEST["slots"], 2), "f").attributes == {"a": 1, "b": 2}
    assert pickles.loads(pickle.dumps(Colour.RED, 2), "f").attributes == {}


def test_torch_values_are_at_hand():
    dtype, size, _ = pickles.loads(pickle.dumps(HONEST["torch constants"], 2), "f")
    assert dtype == Global("torch", "float32") and dtype.name == "float32"
    assert isinstance(size, Size) and size == (2, 3)


@pytest.mark.parametrize(
    "leaf", [object(), np.float32(1), Plain(), print, os, Colour.RED, ListLike(), torch.zeros(1)]
)
def test_values_of_other_types_are_not_written(leaf):
    with pytest.raises(TypeError, match="cannot be written"):
        pickle_writer.dumps({"a": [leaf]})


@pytest.mark.parametrize("protocol", range(2, 5))
@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.1),
        np.float16(2),
        np.int64(-5),
        np.uint8(255),
        np.bool_(True),
        np.str_("é"),
        np.complex64(1j),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros(0),
        np.array(3),
        np.random.RandomState(3).get_state()[1],
    ],
    ids=repr,
)
def test_numpy_values_can_be_decoded(value, protocol):
    record = pickles.loads(pickle.dumps(value, protocol), "f")
    assert numpy_values.is_numpy(record)
    decoded = numpy_values.decode(record)
    assert (
        decoded.shape == value.shape
        and decoded.dtype == value.dtype
        and decoded.tobytes() == value.tobytes()
    )
    again, expected = (
        pickle.loads(pickle_writer.dumps(record)),
        pickle.loads(pickle.dumps(value, protocol)),
    )
    assert (
        type(again) is type(value)
        and again.dtype == expected.dtype
        and again.tobytes() == expected.tobytes()
    )


@pytest.mark.parametrize(
    "value", [np.array([None]), np.zeros(2, "f4,i4"), np.datetime64("2020-01-01")]
)
def test_numpy_values_that_are_not_plain_are_refused(value):
    with pytest.raises(RefusedError):
        numpy_values.decode(pickles.loads(pickle.dumps(value, 2), "f"))


def _named(module, name):
    """A pickle of protocol 4 that names a global and calls it with the text "1+1"."""
    return b"".join(
        [
            b"\x80\x04",
            *(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)),
            b"\x93",
            b"\x8c\x031+1\x85R.",
        ]
    )


#: what Python maps to something else when it loads protocol 2
RENAMED = [
    ("__builtin__", "eval"),
    ("__builtin__", "list"),
    ("copy_reg", "_reconstructor"),
    ("commands", "getoutput"),
]
FOREIGN = [
    ("torch.hub", "load"),
    ("torch", "load"),
    ("torch.utils.collect_env", "run"),
    ("numpy.testing", "runstring"),
    ("numpy", "load"),
    ("mine.config", "Settings"),
    ("functools", "partial"),
    ("io", "StringIO"),
]


@pytest.mark.parametrize(("module", "name"), RENAMED + FOREIGN)
def test_only_what_is_listed_is_written(module, name):
    with pytest.raises(
        RefusedError, match=rf"^pt_meta/args.pt: its pickle names \S*{name}"
    ) as caught:
        pickle_writer.dumps({"args": pickles.loads(_named(module, name), "pt_meta/args.pt")})
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own_classes")
@pytest.mark.parametrize(
    "value",
    [
        Opaque(Global("builtins", "getattr"), (Global("torch", "device"), "index")),
        Opaque(Global("builtins", "getattr"), (Global("torch", "float32"), "numpy.load")),
        Opaque(Opaque(Global("builtins", "getattr"), (Global(__name__, "Colour"), "RED")), ()),
        Opaque(Opaque(Global("collections", "OrderedDict"), ()), ("x",)),
        Global("builtins", "getattr"),
        Global("torch", "serialization.load"),
        Global(__name__, "Plain.Inner"),
    ],
    ids=str,
)
def test_nothing_is_reached_through_attributes(value):
    with pytest.raises(RefusedError, match="is not on the list"):
        pickle_writer.dumps([value])


def test_what_is_listed_is_what_python_resolves():
    for table in (allowed.GLOBALS, allowed.ENUMS):
        for module, names in table.items():
            assert all(pickles.renamed(module, name) == Global(module, name) for name in names)


def test_a_bare_pickle_is_read_from_a_file(tmp_path):
    path = tmp_path / "common.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert pickles.read(path) == {"a": 1}
    with pytest.raises(RefusedError, match="missing.pkl: cannot be read"):
        pickles.read(tmp_path / "missing.pkl")


def test_the_size_of_a_long_header_cannot_exhaust_memory():
    _refused(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".")
