"""Proving an output: what is on disk is read again by its own framework's reader, and its digests
are compared with those that the copier took of the source on its way; with the source at hand,
element by element."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path

from parammap import families
from parammap.checkpoint import manifest as manifests
from parammap.checkpoint.checkpoint import Checkpoint
from parammap.checkpoint.index import is_padding
from parammap.checkpoint.manifest import MANIFEST, Choices, Manifest, TensorDigest
from parammap.errors import RefusedError
from parammap.frameworks import registry
from parammap.proof.compare import (
    Difference,
    Pair,
    as_embedding,
    casts_of_weights,
    differences,
    is_tied,
    pair,
    told,
)
from parammap.proof.coverage import Coverage, coverage
from parammap.proof.digests import Summed, digests
from parammap.proof.files import Problem, damaged, missing_files, wrong_scalars
from parammap.proof.replicas import unequal
from parammap.proof.training_state import training_state_differences
from parammap.tensors.arrangement import PADDING
from parammap.tensors.logical import ITEMSIZE, MODEL_PARAM, LogicalTensor
from parammap.tensors.names import shorten_names


@dataclass(slots=True)
class Verdict:
    """What was found wrong, what is worth knowing, the tensors compared, those that differ from the
    source's, those that a cast rounded, which no digest of the source can prove, and those of which
    ranks keep copies that are not equal; which bytes fit which checksums."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: set[LogicalTensor] = field(default_factory=set)
    wrong: list[tuple[Pair, Difference]] = field(default_factory=list)
    rounded: set[LogicalTensor] = field(default_factory=set)
    unequal: list[Difference] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What to verify, and against which source, read how; `cast` is a dtype that weights may have
    been cast to. Without a source, `iteration`, `sidecar` and `metadata_from` are the output's;
    `output_metadata_from` always is. `replicas` asks for the copies that ranks keep to be
    compared."""

    output: Path
    against: Path | None = None
    iteration: int | None = None
    sidecar: Path | None = None
    metadata_from: Path | None = None
    output_metadata_from: Path | None = None
    weights_only: bool = False
    drop: frozenset[str] = frozenset()
    cast: str | None = None
    replicas: bool = False
    workers: int = 1


def verify(request: Verification) -> Verdict:
    """Check an output. Raises RefusedError if it or the source is no checkpoint, or nothing could
    be compared."""
    verdict, found = Verdict(), manifests.find(request.output)
    root, manifest = found or (request.output, None)
    if manifest is not None:
        verdict.problems += missing_files(root, manifest)
        if verdict.problems:
            return verdict
    try:
        output = read_output(request, manifest)
    except RefusedError:
        if not found:
            raise
        verdict.coverage = coverage(root, found, request.workers)
        verdict.problems += damaged(verdict.coverage)
        if not verdict.problems:
            raise
        return verdict
    if all(held.row is None for held in output.index.held):
        verdict.notes.append(
            f"{output.folder}: is of no family whose tensors are known, so its names were not "
            f"checked"
        )
    casts = {dtype for dtype in (manifest and manifest.options.cast, request.cast) if dtype}
    framework = registry.framework(output.framework)
    verdict.problems += [
        *_missing_heads(output),
        *starmap(Problem, framework.contradictions(output).items()),
        *starmap(Problem, framework.wrong_order(output, manifest is not None)),
    ]
    if manifest is None:
        verdict.notes.append(
            f"{request.output}: has no {MANIFEST}, so there are no digests to compare with"
            + (
                ""
                if request.against or request.replicas
                else ": only its structure was checked, and the checksums that its files carry"
            )
        )
    else:
        verdict.problems += wrong_scalars(root, manifest)
        verdict.problems += _wrong_digests(output, manifest, casts, request.workers, verdict)
        _check_own_casts(output, request, verdict)
    if request.replicas:
        _compare_replicas(output, request, verdict)
    if request.against:
        _compare(output, read_source(request, manifest), request, manifest, casts, verdict)
    elif verdict.rounded:
        verdict.notes.append(
            f"{len(verdict.rounded)} tensors were rounded by a cast, so no digest of the source "
            f"fits them: "
            "only their shapes were checked; compare with the source: --against SRC"
        )
    at = request.output if request.output.is_file() else output.folder
    verdict.coverage = coverage(at, found, request.workers)
    verdict.problems += _wrong_files(verdict, output, manifest)
    if not (verdict.compared or verdict.rounded or verdict.problems or request.replicas):
        if manifest or request.against:
            raise RefusedError(
                f"{request.output}: no tensor could be compared; compare with the source: "
                "--against SRC"
            )
        if not verdict.coverage.records:
            raise RefusedError(
                f"{request.output}: has no {MANIFEST}, and its files carry no checksums, so "
                "nothing was compared; compare with the source: --against SRC"
            )
    return verdict


def read_output(request: Verification, manifest: Manifest | None) -> Checkpoint:
    """The output; one that was made of weights alone is read so, as it has no sidecar."""
    is_alone = request.against is None
    return registry.read(
        request.output,
        iteration=request.iteration if is_alone else None,
        sidecar=request.sidecar if is_alone else None,
        metadata_from=request.output_metadata_from or (request.metadata_from if is_alone else None),
        weights_only=request.weights_only or bool(manifest and manifest.options.weights_only),
        drop=request.drop,
    )


def read_source(request: Verification, manifest: Manifest | None) -> Checkpoint:
    """The source, read with the flags given, else with those of the conversion."""
    if request.against is None:
        raise RefusedError(f"{request.output}: name its source: --against SRC")
    options = manifest.options if manifest else Choices()
    return registry.read(
        request.against,
        iteration=request.iteration,
        sidecar=request.sidecar,
        metadata_from=request.metadata_from,
        weights_only=request.weights_only or options.weights_only,
        drop=request.drop or frozenset(options.drop),
    )


def _missing_heads(output: Checkpoint) -> Iterator[Problem]:
    """Copies of the word embedding that the last stage's ranks lack; the first stage's make it
    complete without them. That it lacks nothing else, its reader found."""
    if output.layout.pp == 1 or not is_tied(output):
        return
    ranks: dict[bool, set[tuple[str, int, int]]] = {False: set(), True: set()}
    for held in output.index.held:
        if held.canonical == families.WORD_EMBEDDING:
            ranks[held.is_tied_head].add(
                (held.found.state, held.found.place.ep, held.found.place.tp)
            )
    for state, ep, tp in sorted(ranks[False] - ranks[True]):
        yield Problem(
            str(output.folder),
            f"lacks the output layer's copy of {families.WORD_EMBEDDING} ({state}) of tp {tp}"
            + (f" ep {ep}" if output.layout.ep > 1 else ""),
        )


def _wrong_files(
    verdict: Verdict, output: Checkpoint, manifest: Manifest | None
) -> Iterator[Problem]:
    """Archives with records that do not fit their checksums; and files that are not as they were
    written, where no tensor or scalar in them is a problem already."""
    yield from damaged(verdict.coverage)
    names = {problem.name for problem in verdict.problems}
    told = {str(path) for path, _ in verdict.coverage.damaged}
    told.update(
        shard.view.file
        for tensor, regions in output.index.shards.items()
        if str(tensor) in names
        for shards in regions.values()
        for shard in shards
    )
    for group in manifest.scalars if manifest else ():
        if names & group["values"].keys():
            told.update(str(output.folder / path) for path in group["files"])
    for path in verdict.coverage.other:
        if str(path) not in told:
            yield Problem(str(path), "is not as it was written: it does not fit its checksum")


# -------------------------------------------------------------------------------------------------------------
# digests


def _wrong_digests(
    output: Checkpoint, manifest: Manifest, casts: set[str], workers: int, verdict: Verdict
) -> Iterator[Problem]:
    there = {(tensor.state, tensor.name): tensor for tensor in output.index.shards}
    copied = {(one.state, one.name): one for one in manifest.digests}
    listed = {key: key if key in copied else as_embedding(key) for key in there}
    declared = {
        (one.state, one.name, one.dtype): one
        for one in manifest.digests_of_casts
        if one.dtype in casts
    }
    known = {
        there[key]: declared.get((*other, there[key].dtype), copied[other])
        for key, other in listed.items()
        if other in copied
        and (not is_padding(there[key]) or there[key].shape == copied[other].shape)
    }
    extra = {
        (tensor.state, tensor.name)
        for tensor in output.index.shards
        if tensor not in known and tensor.state != MODEL_PARAM and not is_padding(tensor)
    }
    lacking = {key for key in copied.keys() - there.keys() if not key[1].endswith(f".{PADDING}")}
    for what, keys in (("is missing", lacking), ("is not of the source", extra)):
        yield from (Problem(f"{name} ({state})", what) for state, name in sorted(keys))
    cast = {
        tensor: entry.dtype
        for tensor, entry in known.items()
        if tensor.dtype in casts - {entry.dtype}
    }
    narrow = {
        tensor: dtype for tensor, dtype in cast.items() if ITEMSIZE[tensor.dtype] > ITEMSIZE[dtype]
    }
    verdict.rounded |= {
        tensor for tensor in cast.keys() - narrow.keys() if tensor.shape == known[tensor].shape
    }
    chosen = [tensor for tensor in known if tensor not in verdict.rounded]
    for tensor, found in digests(output.index, workers, narrow, chosen).items():
        yield from _wrong_digest(tensor, found, known[tensor], narrow, verdict)


def _wrong_digest(
    tensor: LogicalTensor,
    found: Summed,
    entry: TensorDigest,
    narrow: dict[LogicalTensor, str],
    verdict: Verdict,
) -> Iterator[Problem]:
    name = f"{tensor.name} ({tensor.state})"
    if tensor.shape != entry.shape:
        yield Problem(name, f"has the shape {list(tensor.shape)} and not {list(entry.shape)}")
    elif tensor.dtype != entry.dtype and tensor not in narrow:
        yield Problem(
            name,
            f"is {tensor.dtype}, was {entry.dtype} in the source, and the manifest names no "
            f"such cast",
        )
    else:
        verdict.compared.add(tensor)
        known = {entry.digest, *entry.others}
        wrong = [digest for digest in found.digests if f"{digest:016x}" not in known]
        if wrong or found.inexact:
            yield Problem(
                name,
                f"differs from what was copied (digest {(wrong or found.digests)[0]:016x}, "
                f"the source's is {entry.digest})",
            )


def _check_own_casts(output: Checkpoint, request: Verification, verdict: Verdict) -> None:
    """The model's own copies of weights, of which the source had none, must be the casts of the
    weights beside them."""
    pairs = casts_of_weights(output.index, output.index)
    verdict.compared |= {one.a for one in pairs}
    for found in (
        differences(output.index, output.index, pairs, workers=request.workers) if pairs else []
    ):
        verdict.problems.append(
            Problem(found.name, f"is not the cast of the optimizer's weight: {told(found)}")
        )


def _compare_replicas(output: Checkpoint, request: Verification, verdict: Verdict) -> None:
    copied, verdict.unequal = unequal(output.index, request.workers)
    verdict.compared |= set(copied)
    verdict.problems += [
        Problem(found.name, f"copies that must be equal are not: {told(found)}")
        for found in verdict.unequal
    ]
    if not copied:
        verdict.notes.append(
            f"{output.folder}: holds each element once, so there are no replicas to compare"
        )


# ------------------------------------------------------------------------------------------------------
# with the source


def _compare(
    output: Checkpoint,
    source: Checkpoint,
    request: Verification,
    manifest: Manifest | None,
    casts: set[str],
    verdict: Verdict,
) -> None:
    absent = source.index.states() - output.index.states()
    left_out = absent - {one.state for one in manifest.digests} if manifest else set()
    if left_out:
        verdict.notes.append(f"left out by the conversion: {', '.join(sorted(left_out))}")
    verdict.problems += [
        Problem(str(output.folder), f"has no {state}") for state in sorted(absent - left_out)
    ]
    pairs = _expected_pairs(output, source, casts, verdict)
    expected = {(one.a, one.b): one for one in pairs}
    verdict.compared |= {one.a for one in pairs}
    for found in differences(output.index, source.index, pairs, workers=request.workers):
        verdict.wrong.append((expected[found.a, found.b], found))
        verdict.problems.append(Problem(found.name, told(found)))
    verdict.problems += [
        Problem("metadata", line) for line in training_state_differences(output, source)
    ]


def _expected_pairs(
    output: Checkpoint, source: Checkpoint, casts: set[str], verdict: Verdict
) -> list[Pair]:
    """Each tensor of the output with the one of the source it must equal: in dtype too, unless the
    cast is declared."""
    pairing = pair(output, source)
    weights = {one.a: one for one in casts_of_weights(output.index, source.index)}
    verdict.problems += [
        Problem(f"{tensor.name} ({tensor.state})", "is not in the source")
        for tensor in pairing.only_a
        if tensor not in weights
    ]
    verdict.problems += [
        Problem(f"{tensor.name} ({tensor.state})", "is missing")
        for tensor in pairing.only_b
        if tensor.state in output.index.states() | {MODEL_PARAM}
    ]
    if pairing.padding:
        verdict.notes.append(
            "padding of the vocabulary, which has another number of rows in the source, was not "
            "compared "
            f"with it: {shorten_names(f'{tensor.name} ({tensor.state})' for tensor in pairing.padding)}"
        )
    pairs = [
        Pair(one.a, one.b, cast=one.a.dtype != one.b.dtype and one.a.dtype in casts)
        for one in pairing.pairs
    ]
    kept = {tensor.name for tensor in source.index.tensors(MODEL_PARAM)}
    return pairs + [one for tensor, one in weights.items() if tensor.name not in kept]
