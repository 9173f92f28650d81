"""Objects of classes that ParamMap does not know: refused by name before anything is written, or
kept where the user names their module; never what runs code."""

import contextlib
import io
import pickle
import shutil
import zipfile

import pytest

from parammap.cli.main import main
from tests.support import output_matrix

_TP2PP2 = "megatron/cac60ce4_patched_legacy_tp2pp2"


@pytest.fixture(scope="module")
def mindspore(tmp_path_factory):
    return output_matrix.source(f"mindspore of {_TP2PP2}", tmp_path_factory.mktemp("ms") / "out")


def _named(module: str, name: str) -> bytes:
    """The opcodes of a global, as protocol 4 writes it: without Python's renaming of protocol 2."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"".join(texts) + b"\x93"


def _arm(folder, opcodes: bytes):
    """Add an argument with this value to the arguments that go along with a checkpoint."""
    for path in sorted((folder / "pt_meta").glob("args*.pt")):
        with zipfile.ZipFile(path) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records:
                if name.endswith("/data.pkl"):
                    assert content.endswith(b"u.")
                    added = b"X\x04\x00\x00\x00evil" + opcodes
                    content = b"\x80\x04" + content[2:-2] + added + b"u."
                archive.writestr(name, content)
    return folder


def _convert(source, out, *flags):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["convert", str(source), str(out), "--to", "megatron", *flags])
    return status, said.getvalue()


@pytest.fixture
def armed(mindspore, tmp_path):
    def arm(opcodes):
        folder = tmp_path / "source"
        shutil.copytree(mindspore, folder)
        (folder / "parammap_manifest.json").unlink()
        return _arm(folder, opcodes)

    return arm


CALL = b"\x8c\x031+1\x85R"
#: opcodes, and what the refusal names
FOREIGN = {
    "eval under its old name": (_named("__builtin__", "eval") + CALL, "builtins.eval"),
    "the name alone": (_named("__builtin__", "eval"), "builtins.eval"),
    "getoutput": (_named("commands", "getoutput") + CALL, "subprocess.getoutput"),
    "torch.hub": (_named("torch.hub", "load") + CALL, "torch.hub.load"),
    "torch.utils": (_named("torch.utils.collect_env", "run") + CALL, "torch.utils.collect_env.run"),
    "numpy.testing": (_named("numpy.testing", "runstring") + CALL, "numpy.testing.runstring"),
    "a member of a member": (
        _named("builtins", "getattr") + _named("torch", "os") + b"\x8c\x06system\x86R" + CALL,
        "torch.os",
    ),
    "a known class that is called": (
        _named("Merak.utils.merak_args", "MerakArguments") + CALL,
        "Merak.utils.merak_args.MerakArguments",
    ),
    "an enumeration made anew": (
        _named("megatron.core.enums", "ModelType") + b"\x8c\x01A\x8c\x01b\x86R",
        "megatron.core.enums.ModelType",
    ),
}
MINE = _named("mine.config", "Settings")


@pytest.mark.parametrize("flags", [(), ("--keep-foreign-objects", "mine.config")])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_runs_code_is_refused_by_name(case, flags, armed, tmp_path):
    opcodes, named = FOREIGN[case]
    status, said = _convert(armed(opcodes), tmp_path / "out", *flags)
    assert status == 2 and named in said and "args" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "opcodes", [MINE, MINE + b"\x8c\x01x\x85R", MINE + b")\x81}\x8c\x01x\x88sb"]
)
def test_objects_of_a_named_module_are_kept(opcodes, armed, tmp_path):
    source = armed(opcodes)
    status, said = _convert(source, tmp_path / "out")
    assert status == 2 and "mine.config.Settings" in said and "--keep-foreign-objects" in said
    status, said = _convert(
        source, tmp_path / "out", "--keep-foreign-objects", "mine.models,mine.config"
    )
    assert status == 0, said
    written = next((tmp_path / "out").rglob("model_optim_rng.pt"))
    with zipfile.ZipFile(written) as archive:
        assert b"cmine.config\nSettings\n" in archive.read(f"{written.stem}/data.pkl")


@pytest.mark.parametrize("name", ["Settings.load", "x\nos\nsystem", "é x"])
def test_a_kept_module_has_nothing_but_plain_names(name, armed, tmp_path):
    source = armed(_named("mine.config", name))
    status, said = _convert(source, tmp_path / "out", "--keep-foreign-objects", "mine.config")
    assert status == 2 and said.count("\n") == 1


@pytest.mark.parametrize(
    "module",
    ["os", "builtins", "__builtin__", "subprocess", "torch.hub", "numpy.testing", "x y", ""],
)
def test_modules_that_are_never_kept(module, mindspore, tmp_path):
    status, said = _convert(mindspore, tmp_path / "out", "--keep-foreign-objects", module)
    assert status == 2 and "no module whose objects can be kept" in said


def test_plain_python_may_still_load_such_a_source(armed):
    """The premise: what is armed here is harmless to load where it lies."""
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(b"\x80\x04" + _named("__builtin__", "eval") + b".")
