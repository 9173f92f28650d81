"""Which layers each stage of a pipeline holds."""

from __future__ import annotations

from parammap.errors import RefusedError
from parammap.tensors.layout import Layout, number_layers

#: global layer numbers by (pp, vpp)
Stages = dict[tuple[int, int], range]


def stages_of(
    num_layers: int,
    layout: Layout,
    given: tuple[int, ...],
    recorded: dict[tuple[int, int], int],
    empty_chunks: bool,
) -> Stages:
    """The layers of each stage's chunks: as `given`, layers per stage or per chunk in the order in
    which a micro-batch passes them; else as many as the source's stages hold (`recorded`), if it
    has the same stages; else equally many.

    `empty_chunks`: the release can have chunks without any layer, such as the embedding, or the
    output, alone in a stage.

    Raises RefusedError, with the numbers, if the layers do not divide or add up.
    """
    chunks = [(pp, vpp) for vpp in range(layout.vpp) for pp in range(layout.pp)]
    if given:
        counts = dict(zip(chunks, _per_chunk(given, layout), strict=True))
    elif recorded.keys() == set(chunks):
        counts = recorded
    elif num_layers % len(chunks):
        raise RefusedError(
            f"{num_layers} layers cannot be divided equally over pp {layout.pp} × vpp "
            f"{layout.vpp}; say how with --stage-layers N,N,…"
        )
    else:
        counts = dict.fromkeys(chunks, num_layers // len(chunks))
    said = f"--stage-layers {','.join(map(str, given or (counts[chunk] for chunk in chunks)))}"
    _check_least(said, counts, layout, empty_chunks)
    if sum(counts.values()) != num_layers:
        raise RefusedError(
            f"{said}: add up to {sum(counts.values())} and not to the model's {num_layers} layers"
        )
    return number_layers(counts)


def _check_least(
    said: str, counts: dict[tuple[int, int], int], layout: Layout, empty_chunks: bool
) -> None:
    least = min(counts.values())
    if least < 0:
        raise RefusedError(f"{said}: {least} is no number of layers of a stage")
    if not least and not empty_chunks:
        raise RefusedError(
            f"{said}: 0 is no number of layers of a stage in this release: only core 0.13 and "
            "later can have one without any"
        )
    for pp in range(1, layout.pp - 1):
        if not any(counts[pp, vpp] for vpp in range(layout.vpp)):
            raise RefusedError(
                f"{said}: stage {pp} would hold nothing at all; only the first and the last, which "
                "hold the embedding and the output, can be without layers"
            )


def _per_chunk(given: tuple[int, ...], layout: Layout) -> list[int]:
    if len(given) == layout.pp * layout.vpp:
        return list(given)
    if len(given) != layout.pp:
        raise RefusedError(
            f"--stage-layers: {len(given)} numbers for pp {layout.pp}"
            + (f" × vpp {layout.vpp}" if layout.vpp > 1 else "")
        )
    uneven = [layers for layers in given if layers % layout.vpp]
    if uneven:
        raise RefusedError(
            f"--stage-layers: {uneven[0]} layers of a stage cannot be divided over vpp "
            f"{layout.vpp}; give {layout.pp * layout.vpp} numbers, one for each chunk in the order "
            "in which data passes them"
        )
    return [layers // layout.vpp for layers in given] * layout.vpp
