"""What stands around the core: locks, targets, the system's errors, and documents and files that are
not what they should be. Each case is one line, and a status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from parammap.cli import main as cli
from parammap.cli.main import main
from parammap.execute.writer import Writer
from parammap.job import conversion as job
from parammap.job.request import Request
from parammap.job.staging import Staging
from tests.support import paths

ROOT, DATA = paths.ROOT, paths.TESTS / "data"
LLAMA = DATA / "transformers/llama_hf"
MEGATRON = DATA / "megatron/cac60ce4_patched_legacy_tp2pp2"
RECORDED = DATA / "megatron/torch_dist_in_order_of_keys"


def convert(source, out, *flags, to="megatron"):
    return main(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags])


def line(capsys):
    """The one line that was said beside progress."""
    lines = [one for one in capsys.readouterr().err.splitlines() if one.startswith("parammap:")]
    assert len(lines) == 1, lines
    return lines[0]


def refused(capsys, status, *said):
    assert status == 2
    text = line(capsys)
    assert all(str(word) in text for word in said), text


# ------------------------------------------------------------------------------------------------
# locks and processes

SLOW = (
    "import parammap.execute.writer as e, time; w = e.Writer._fill\n"
    "def slow(*a):\n    time.sleep(0.3)\n    yield from w(*a)\n"
    "e.Writer._fill = slow\nimport sys; from parammap.cli.main import main; "
    "sys.exit(main(sys.argv[1:]))"
)


@contextmanager
def running(out, *flags):
    """A conversion with two workers that takes long, once its first files are begun."""
    command = ["convert", str(MEGATRON), str(out), "--to", "mindspore", "--workers", "2", *flags]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], cwd=ROOT)
    try:
        staged = out.with_name(f".{out.name}.parammap")
        deadline = time.monotonic() + 600
        while len(list(staged.rglob("*.tmp"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    """Whether a process still runs: one that ended may wait for somebody to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_parent_that_is_killed_takes_its_workers_along(tmp_path):
    out = tmp_path / "out"
    with running(out) as process:
        workers = children(process.pid)
        assert len(workers) == 2 and all(map(is_alive, workers))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert convert(MEGATRON, out, to="mindspore") == 0
        assert not any(map(is_alive, workers))


def test_workers_end_with_the_pipe_where_there_is_no_death_signal(tmp_path, monkeypatch):
    """As on a system without prctl: the pipe alone."""
    code = SLOW.replace("import sys;", "import sys; sys.platform = 'other';", 1)
    monkeypatch.setitem(globals(), "SLOW", code)
    with running(tmp_path / "out") as process:
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_alive, workers))


def test_a_run_that_goes_on_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    with running(out) as process:
        refused(capsys, convert(MEGATRON, out, to="mindspore"), out, f"process {process.pid} on")
        assert process.poll() is None


def test_a_lock_that_nobody_holds_is_taken_over(tmp_path):
    staged = tmp_path / ".out.parammap"
    staged.mkdir()
    (staged / "lock").write_text("process 1 on elsewhere, since 2020-01-01 00:00:00")
    assert convert(LLAMA, tmp_path / "out") == 0
    assert not staged.exists()


# ------------------------------------------------------------------------------------------------
# states that a killed run left


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def place(tmp_path):
    """A target with an old checkpoint, and the staging folder of a run that was killed."""
    for folder in ("out", ".out.parammap"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out/old").write_text("whole")
    return tmp_path


def test_what_was_replaced_comes_back_whole(place, capsys):
    """Killed between the two renames: without --overwrite the old checkpoint is there again."""
    os.rename(place / "out", place / ".out.parammap/old")
    refused(capsys, convert(LLAMA, place / "out"), "is not empty")
    assert tree(place / "out") == {"old": b"whole"}
    assert convert(LLAMA, place / "out", "--overwrite") == 0
    assert [path.name for path in place.iterdir()] == ["out"]


def test_what_was_half_removed_never_comes_back(place):
    """The new one was moved away by its owner while the rest of the old one waited."""
    os.rename(place / "out", place / ".out.parammap/trash")
    assert convert(LLAMA, place / "out") == 0
    assert "old" not in tree(place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_what_somebody_else_put_there_is_not_replaced(place, capsys):
    """Killed between the two renames, and then another program wrote into the target."""
    shutil.copytree(place / "out", place / ".out.parammap/old")
    (place / ".out.parammap/out").mkdir()
    (place / "out/new").write_text("somebody's")
    refused(capsys, convert(LLAMA, place / "out", "--overwrite"), "has content", "move one")
    assert tree(place / "out")["new"] == b"somebody's"
    assert tree(place / ".out.parammap/old") == {"old": b"whole"}


def test_a_damaged_journal_counts_for_nothing(tmp_path):
    """Each of its lines carries a checksum, so that no digest of it can be another."""
    staging = Staging(tmp_path / "out", overwrite=False)
    journal = staging.folder / "journal"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        job.convert(_request(tmp_path / "out"))
    whole = journal.read_bytes()
    assert whole.count(b"\n") > 1
    spoiled = [
        whole[:-9],
        whole.replace(b'"digests": [[', b'"digests": {{', 1),
        whole.replace(b"0", b"1"),
        whole[: len(whole) // 2] + b"\xff\xfe" + whole[len(whole) // 2 :],
        b"[" * 100_000,
        b"",
    ]
    wanted = None
    for content in spoiled:
        shutil.copytree(staging.folder, tmp_path / "kept")
        journal.write_bytes(content)
        assert convert(LLAMA, tmp_path / "out", "--tp", "2") == 0
        wanted = wanted or tree(tmp_path / "out")
        assert tree(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")
        os.rename(tmp_path / "kept", staging.folder)


def _request(out):
    return Request(source=LLAMA, target=out, to="megatron", sizes={"tp": 2}, workers=1)


# ------------------------------------------------------------------------------------------------
# targets


@pytest.fixture
def unwritten(monkeypatch):
    """No byte is copied."""
    monkeypatch.setattr(Writer, "write", lambda _: pytest.fail("a file was begun"))


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(LLAMA, tmp_path / "src"))


def _symlink(source):
    (source.parent / "there").mkdir()
    (source.parent / "out").symlink_to("there")
    return source.parent / "out"


def _dangling(source):
    (source.parent / "out").symlink_to("nowhere")
    return source.parent / "out"


def _looping(source):
    (source.parent / "out").symlink_to("out")
    return source.parent / "out"


def _below_a_file(source):
    (source.parent / "file").write_text("")
    return source.parent / "file/out"


def _below_a_loop(source):
    return _looping(source) / "out"


TARGETS = {
    "a link to a folder": (_symlink, "is a symbolic link"),
    "a dangling link": (_dangling, "is a symbolic link"),
    "a link to itself": (_looping, "is a symbolic link"),
    "below a file": (_below_a_file, "is no folder"),
    "below a link to itself": (_below_a_loop, "is no folder"),
    "the source": (lambda source: source, "which is read"),
    "around the source": (lambda source: source.parent, "which is read"),
    "inside of the source": (lambda source: source / "sub/out", "which is read"),
    "no name": (lambda source: Path("."), "has no name"),
    "the folder above": (lambda source: source / "..", "has no name"),
    "a name too long": (lambda source: source.parent / ("n" * 250), "File name too long"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_cannot_be_made_are_found_before(source, capsys, unwritten, case):
    make, said = TARGETS[case]
    target = make(source)
    before = sorted(map(str, source.parent.rglob("*")))
    refused(capsys, convert(source, target, "--overwrite"), said)
    assert sorted(map(str, source.parent.rglob("*"))) == before


@contextmanager
def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, folder], capture_output=True).returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_mount_point_is_found_before(source, capsys, unwritten):
    out = source.parent / "out"
    with mounted(out, "-t", "tmpfs", "tmpfs"):
        refused(capsys, convert(source, out), out, "is a mount point")
    (source.parent / "there").mkdir()
    with mounted(out, "--bind", source.parent / "there"):
        refused(capsys, convert(source, out), out, "is a mount point")


def test_a_read_only_place_is_found_before(source, capsys, unwritten):
    disk = source.parent / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        refused(capsys, convert(source, disk / "out"), disk, "cannot be written to")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for others")
@pytest.mark.parametrize("case", ["parent", "target"])
def test_what_belongs_to_somebody_else_is_found_before(source, case):
    """Run by another user: a folder of root's, and one of root's in a place that all may use."""
    place = source.parent / "place"
    (place / "out").mkdir(parents=True)
    (place / "out/precious").write_text("root's")
    place.chmod(0o755 if case == "parent" else 0o1777)
    (place / "out").chmod(0o777)
    for folder in source.parents:
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)
    errors = source.parent / "errors"
    child = os.fork()
    if not child:
        status = 99
        try:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            os.setgid(65534)
            os.setuid(65534)
            status = convert(source, place / "out", "--overwrite")
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = {"parent": f"{place}: cannot be written to", "target": "belongs to somebody else"}
    assert (status, said[case] in errors.read_text()) == (2, True), errors.read_text()
    assert tree(place) == {"out/precious": b"root's"}


# ------------------------------------------------------------------------------------------------
# files that are none


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _link(to):
    def make(path):
        path.unlink()
        path.symlink_to(to)

    return make


def _folder(path):
    path.unlink()
    path.mkdir()


SPECIAL = {
    "a pipe": _pipe,
    "endless": _link("/dev/zero"),
    "dangling": _link("nowhere"),
    "looping": lambda path: _link(path)(path),
    "a folder": _folder,
}
FILES = {
    MEGATRON: (
        "latest_checkpointed_iteration.txt",
        "iter_0000002/mp_rank_00_001/model_optim_rng.pt",
        "iter_0000002/mp_rank_00_001/distrib_optim.pt",
        "param_map/param_map_buffer0_dp0tp1pp1vpp0.json",
    ),
    RECORDED: ("iter_0000003/param_map/layout_tp00_pp000.json",),
    LLAMA: ("config.json", "pytorch_model.bin"),
}


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("name", [name for names in FILES.values() for name in names])
def test_a_file_that_is_none_is_refused(tmp_path, capsys, name, case):
    whole = next(folder for folder, names in FILES.items() if name in names)
    source = Path(shutil.copytree(whole, tmp_path / "src"))
    SPECIAL[case](source / name)
    refused(
        capsys, convert(source, tmp_path / "out", to="mindspore" if whole != LLAMA else "merak")
    )


TRACKERS = [
    b"\xff\xfe",
    "²".encode(),
    b"9" * 5000,
    b"../..",
    b"",
    b"1\x001",
    b"1\n2",
    b"-1",
    b"1e3",
]


@pytest.mark.parametrize("content", TRACKERS)
def test_trackers_that_name_no_iteration_are_refused(tmp_path, capsys, content):
    source = Path(shutil.copytree(MEGATRON, tmp_path / "src"))
    (source / "latest_checkpointed_iteration.txt").write_bytes(content)
    refused(capsys, convert(source, tmp_path / "out"), "latest_checkpointed_iteration.txt: holds")


# ------------------------------------------------------------------------------------------------
# documents

WRONG = [None, True, -1, 0.5, 1e9, 10**9, 10**18, 10**30, "x", "²", [], [[]], {}, {"a": {}}]


def places(value, path=()):
    """The path of every value in a document, of lists the first item only."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(document, path, value):
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


DOCUMENTS = {
    "layout": (RECORDED, "iter_0000003/param_map/layout_tp00_pp000.json", "mindspore"),
    "map": (MEGATRON, "param_map/param_map_buffer0_dp0tp1pp1vpp0.json", "mindspore"),
    "config": (LLAMA, "config.json", "merak"),
    "metaseq": (
        DATA / "metaseq/mp1dp3_fp32",
        "param_map/param_map_checkpoint_3-model_part-0-shard0.json",
        "alpa",
    ),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_wrong_values_anywhere_in_a_document_are_told(tmp_path, capsys, case, monkeypatch):
    """Every value of a document in turn: refused in one line, or of no meaning to the conversion;
    never a defect, and no more memory or time than the bytes are worth."""
    whole, name, to = DOCUMENTS[case]
    source = Path(shutil.copytree(whole, tmp_path / "src"))
    document = json.loads((source / name).read_text())
    where = list(places(document))
    started = time.process_time()
    count = 0
    for number, path in enumerate(where[:: max(len(where) // 12, 1)]):
        for value in WRONG[number % 3 :: 3]:
            (source / name).write_text(json.dumps(changed(document, path, value)))
            assert convert(source, tmp_path / "out", "--dry-run", to=to) in (0, 2), (path, value)
            assert len(capsys.readouterr().err.splitlines()) <= 1
            count += 1
    assert (time.process_time() - started) / count < 2


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_that_are_none_are_refused(tmp_path, capsys, case):
    whole, name, to = DOCUMENTS[case]
    source = Path(shutil.copytree(whole, tmp_path / "src"))
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    for content in (b"", b"\xff", b"[" * 10**6, deep, b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"1"):
        (source / name).write_bytes(content)
        refused(capsys, convert(source, tmp_path / "out", to=to), source / name)


# ------------------------------------------------------------------------------------------------
# what nobody foresaw


def test_a_defect_is_one_line_and_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def fail(_):
        raise KeyError("of a kind\nthat nobody foresaw")

    assert cli.run(lambda: fail(0)) == 3
    text = line(capsys)
    (file,) = tmp_path.glob("parammap-*.txt")
    assert str(file) in text and "KeyError" in text
    assert "in fail" in file.read_text()
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(KeyError):
        cli.run(lambda: fail(0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_takes_no_more_is_told():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "parammap", "formats"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert (ended.returncode, ended.stderr) == (
        3,
        "parammap: standard output: No space left on device\n",
    )


def test_names_of_any_bytes_are_one_line(tmp_path, capsys):
    refused(capsys, convert(tmp_path / "no\nsuch\x1b[2Jfolder", tmp_path / "out"), "no\\nsuch\\x1b")
