"""Repairing an output: the bytes of its wrong tensors are written again from the source, and no others."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import RefusedError
from ..index import Index
from ..publish import sync
from ..tensors import Box
from .compare import Pair, read_both
from .stream import Files, View, copies_of, runs
from .verify import Manifest, Request, Verdict, read_output, read_source, verify, wrong_archives


def repair(request: Request, verdict: Verdict, into: Path | None) -> Verdict:
    """Repair what `verdict` found wrong: in a copy that is to be `into`, or in place (None). Returns the new verdict.

    Raises RefusedError if `into` exists; a copy appears whole and verified, or, if it still is wrong, not at all.
    """
    if into is None:
        return _repaired(request, verdict)
    if into.exists():
        raise RefusedError(f"{into}: exists; choose another folder for the repaired copy")
    staged = into.parent / f".{into.name}.parammap"
    if staged.exists() or into.resolve().is_relative_to(request.output.resolve()):
        raise RefusedError(f"{staged if staged.exists() else into}: is in the way; choose another folder for the copy")
    try:
        _copy(request.output, staged)
        after = _repaired(replace(request, output=staged), verdict)
        if not after.problems:
            os.rename(staged, into)
        return after
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """A copy of a folder in which files that were one by hard links still are."""
    names: dict[int, Path] = {}
    for folder, _, files in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        for name in files:
            inode = os.stat(Path(folder) / name).st_ino
            if inode in names:
                os.link(names[inode], there / name)
            else:
                names[inode] = there / name
                shutil.copy2(Path(folder) / name, there / name)


def _repaired(request: Request, verdict: Verdict) -> Verdict:
    """Write the wrong tensors of `request.output` anew and verify it again, its archives' checksums too."""
    manifest, touched = Manifest.of(request.output), set()
    output, source = read_output(request, manifest), read_source(request, manifest)
    for pair, found in verdict.wrong:
        if found.apart is None:
            touched |= _rewrite(pair, output.index, source.index)
    for file in touched:
        sync(file)
    after = verify(request)
    archives = [Path(file) for file in sorted(touched) if file.endswith(".pt")]
    after.problems += [problem for problem in wrong_archives(archives) if problem not in after.problems]
    return after


def _rewrite(pair: Pair, output: Index, source: Index) -> set[str]:
    """Write the bands of every copy of a tensor that are not as the source has them; returns the files written to."""
    touched = set()
    boxes = output.boxes[pair.a], source.boxes[pair.b]
    with Files() as files:
        for number in range(max(map(copies_of, boxes))):
            there, right = View(pair.a, boxes[0], number), View(pair.b, boxes[1], number)
            for band, wrong_bits, bits in read_both(pair, there, right, files):
                if not np.array_equal(wrong_bits, bits):
                    touched |= _write_band(there, band, bits)
    return touched


def _write_band(view: View, band: Box, bits: np.ndarray) -> set[str]:
    matrix, touched = bits.reshape(band.rows, band.cols), set()
    for piece, part in view.parts(band):
        rows = matrix[part.row - band.row:part.row - band.row + part.rows,
                      part.col - band.col:part.col - band.col + part.cols]
        for run, start in runs(piece, part):
            _write_at(piece.file, piece.offset_of(run.row, run.col), rows.reshape(-1)[start:start + run.numel])
        touched.add(piece.file)
    return touched


def _write_at(file: str, offset: int, content: np.ndarray) -> None:
    data = memoryview(content.reshape(-1).view(np.uint8))
    try:
        descriptor = os.open(file, os.O_WRONLY)
        try:
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RefusedError(f"{file}: cannot be written ({error.strerror}); repair into a copy, with --into") from error
