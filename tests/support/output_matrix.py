"""Every golden × every target × a few layouts: what each conversion writes, so that a change can
prove to change nothing.

    python -m tests.support.output_matrix record FILE [--only WORD]     what today's program writes, to a .json.xz
    python -m tests.support.output_matrix compare FILE [--only WORD]    status 1 and a list where it differs from that

A case is `source > target flags`. Its entry holds the exit status, the message of a refusal, the
first 16 hexadecimal digits of each output file's sha256, and those of the manifest without what
changes from run to run. The conversions run in this process; nothing but `command` below knows the
program."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.prototype_map import translated

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
MANIFEST = "parammap_manifest.json"
#: fields of a manifest that say when, where and by which program it was written
VOLATILE = (
    "parammap",
    "version",
    "program",
    "seconds",
    "source",
    "whole",
    "fingerprint",
    "fingerprints",
    "sha256",
)
#: folders that are sources as they lie there, and archives of such
FOLDERS = ("megatron/*", "merak/*", "metaseq/mp*", "metaseq/mp*/up/*", "transformers/*", "yuan/*")
ARCHIVES = ("deepspeed/*.tar.xz", "alpa/*/alpa_np.zip")
#: targets whose outputs are sources in turn, and of which goldens they are made
SECOND = {
    "mindspore": "megatron/*",
    "megatron-dist": "megatron/*",
    "deepspeed": "megatron/*",
    "transformers": "merak/*",
}
#: flags without which nothing of a source would be converted
NEEDED = {"deepspeed/": ["--replicas", "first"]}
UNSAID, CONFIG = ["--activation", "gelu_new"], ["--config", "tests/data/merak/hf/config.json"]
ONE, TWO = ["--tp", "1", "--pp", "1"], ["--tp", "2", "--pp", "1", "--dp", "2"]
STAGES = ["--tp", "1", "--pp", "2", "--vpp", "2"]
#: target: the flags of each of its cases
TARGETS: dict[str, tuple[list[str], ...]] = {
    "mindspore": (
        [],
        ONE,
        TWO,
        STAGES,
        ["--format", "safetensors"],
        ["--names", "megatron"],
        ["--weights-only", *ONE],
        ["--drop", "experts"],
    ),
    "megatron": (
        [],
        ONE,
        TWO,
        STAGES,
        ["--dp", "4"],
        ["--ep", "1", *ONE],
        ["--weights-only"],
        ["--weights-only", *TWO],
        ["--drop", "experts"],
    ),
    "megatron-dist": ([], ONE, ["--weights-only"]),
    "metaseq": (
        [],
        ["--tp", "1", "--dp", "3"],
        ["--tp", "4", "--dp", "1"],
        ["--form", "singleton"],
        ["--weights-only"],
    ),
    "alpa": ([], ["--dtype", "float32"], UNSAID),
    "alpa-training": ([], ["--optimizer", "adamw"], UNSAID),
    "merak": (
        [],
        ONE,
        ["--tp", "2", "--pp", "2"],
        UNSAID,
        CONFIG,
        ["--serialization", "legacy", *ONE],
    ),
    "deepspeed": ([],),
    "transformers": ([], ["--format", "bin"], UNSAID, CONFIG, ["--dtype", "float32"]),
}

Entry = dict[str, object]


def command(arguments: list[str]) -> int:
    """The command line's exit status, in this process."""
    from parammap.cli.main import main

    return main(arguments)


def record(only: str = "") -> dict[str, Entry]:
    """The entries of all cases whose name has `only` in it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return {
            case: _entry(source, to, flags, folder)
            for case, source, to, flags in _cases(folder)
            if only in case
        }


def compare(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """A line for each case that only one of them has, or that differs."""
    return [
        f"{case}: {_difference(before.get(case), after.get(case))}"
        for case in sorted({*before, *after})
        if before.get(case) != after.get(case)
    ]


def _difference(before: Entry | None, after: Entry | None) -> str:
    if before is None or after is None:
        return "is new" if before is None else "is gone"
    if before["status"] != after["status"] or "files" not in before:
        return f"{before['status']} {before.get('error', '')} → {after['status']} {after.get('error', '')}"
    files = [{**one["files"], MANIFEST: one["manifest"]} for one in (before, after)]
    names = sorted(
        name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name)
    )
    return f"{len(names)} of {len(files[0])} files differ: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"


def _cases(scratch: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """(name, source, target, flags) of each case."""
    for name, source in _sources(scratch):
        needed = next((flags for start, flags in NEEDED.items() if name.startswith(start)), [])
        for to, variants in TARGETS.items():
            for flags in variants:
                yield " ".join([name, ">", to, *flags]), source, to, [*needed, *flags]


def _sources(scratch: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of each source; what is unpacked, translated or converted for it lies in
    `scratch`."""
    for pattern in FOLDERS:
        for folder in sorted(DATA.glob(pattern)):
            if folder.is_dir() and folder.name not in ("param_map", "up"):
                yield str(folder.relative_to(DATA)), folder
    for pattern in ARCHIVES:
        for archive in sorted(DATA.glob(pattern)):
            name = str(archive.relative_to(DATA)).split(".")[0]
            yield name, _unpacked(archive, scratch / "sources" / name)
    for folder in sorted(DATA.glob("megatron/*")):
        if any(
            folder.glob("iter_*/*/param_map.json")
        ):  # what the hook's prototype wrote, said as the hook says it
            name = f"translated {folder.relative_to(DATA)}"
            yield name, translated(folder, scratch / "sources" / name.replace(" ", "_"))
    for to, pattern in SECOND.items():
        for folder in sorted(DATA.glob(pattern)):
            name = f"{to} of {folder.relative_to(DATA)}"
            made = scratch / "sources" / name.replace(" ", "_")
            if (
                folder.is_dir()
                and _quiet(["convert", str(folder), str(made), "--to", to, "--workers", "1"])[0]
                == 0
            ):
                yield name, made


def source(name: str, scratch: Path) -> Path:
    """One source by its name, without the others; "mindspore of megatron/…" is made in `scratch`."""
    to, _, golden = name.rpartition(" of ")
    if to:
        assert _quiet(["convert", str(DATA / golden), str(scratch), "--to", to])[0] == 0
        return scratch
    archives = list(DATA.glob(f"{golden}.*"))
    return _unpacked(archives[0], scratch) if archives else DATA / golden


def _unpacked(archive: Path, folder: Path) -> Path:
    if archive.suffix == ".zip":
        zipfile.ZipFile(archive).extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    inner = list(folder.iterdir())
    return (
        inner[0] if len(inner) == 1 and inner[0].is_dir() and archive.suffix == ".zip" else folder
    )


def _entry(source: Path, to: str, flags: list[str], scratch: Path) -> Entry:
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    status, error = _quiet(["convert", str(source), str(out), "--to", to, "--workers", "1", *flags])
    if not out.exists():
        return {
            "status": status,
            "error": error.replace(str(scratch), "SCRATCH").replace(str(ROOT), "ROOT"),
        }
    files = {
        str(path.relative_to(out)): _short(path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return {"status": status, "files": files, "manifest": _manifest(out, scratch)}


def _quiet(arguments: list[str]) -> tuple[int | str, str]:
    """A command's status (or the name of what it raised) and what it said of the error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            return command(arguments), said.getvalue().strip()
        except SystemExit as error:  # argparse
            return f"exit {error.code}", said.getvalue().strip().splitlines()[-1]
        except Exception as error:
            return f"raised {type(error).__name__}", traceback.format_exception_only(error)[
                -1
            ].strip()


def _manifest(out: Path, scratch: Path) -> str:
    manifest = json.loads((out / MANIFEST).read_text())
    kept = {name: value for name, value in manifest.items() if name not in VOLATILE}
    for file in kept["files"]:
        file.pop("crc32", None)
    text = (
        json.dumps(kept, sort_keys=True).replace(str(scratch), "SCRATCH").replace(str(ROOT), "ROOT")
    )
    return _short(text.encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="a .json.xz file")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="the cases whose name has this in it"
    )
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    entries = record(args.only)
    done = sum("files" in entry for entry in entries.values())
    print(f"{len(entries)} cases, {done} of them conversions, {len(entries) - done} refused")
    if args.what == "record":
        args.file.write_bytes(
            lzma.compress(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
        )
        return 0
    before = json.loads(lzma.decompress(args.file.read_bytes()))
    lines = compare({case: entry for case, entry in before.items() if args.only in case}, entries)
    print("\n".join(lines) or "all the same")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
