"""An inspection's facts as a picture: one HTML file that needs nothing else, neither network nor
other files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from parammap.inspection import text
from parammap.inspection.kinds import KINDS
from parammap.inspection.style import CSS, SCRIPT

_UNITS = ("", " K", " M", " B", " T")
#: views of the buffers by the id of their button
_VIEWS = {
    "view1": "to scale",
    "view8": "8 × wider",
    "view64": "64 × wider",
    "viewtiles": "equal tiles",
}
#: stages whose buffers are shown unasked, and more shards than this have no ticks
_OPEN_PARAMETERS, _MOST_SHARDS = 400, 64
#: parts of a bucket above this share have a line behind them; lines would hide smaller ones
_WIDE = 0.01
#: told in the picture itself
_DRAWN = ("folder", "stages", "buffers", "missing")


def page(facts: dict[str, Any]) -> str:
    """The whole page; every parameter stands in it once for each buffer that has it."""
    body = "".join(
        (_header(facts), _missing(facts["missing"]), _grid(facts), _buffers(facts), _facts(facts))
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(text.title(facts))}</title>'
        f'<link rel="icon" href="data:,"><style>{CSS}</style></head>\n<body><main>{body}</main>'
        f'<output id="tip" hidden></output><script>{SCRIPT}</script></body></html>\n'
    )


def _header(facts: dict[str, Any]) -> str:
    sizes, counts, states = facts["layout"], facts["parameters"], facts["states"]
    more = [f"{name} {sizes[name]}" for name in ("vpp", "ep", "dp", "cp") if sizes[name] > 1]
    trained = counts["without_padding"]
    own = {one["dtype"]: None for one in states if one["role"] == "model_weight"}
    stepped = {one["dtype"]: None for one in states if one["role"] != "model_weight"}
    tiles = [
        (
            "Parameters",
            _short(counts["total"]),
            f"{trained:,} without padding"
            if trained not in (None, counts["total"])
            else f"{counts['total']:,}",
        ),
        (
            "Layout",
            f"tp {sizes['tp']} × pp {sizes['pp']}",
            " · ".join(more) or "no other parallelism",
        ),
        (
            "Layers",
            str(facts["model"]["num_layers"]),
            f"hidden {facts['model'].get('hidden_size', '?')}",
        ),
        (
            "Dtypes",
            ", ".join(own or stepped),
            f"states {', '.join(stepped)}" if own and stepped else "",
        ),
        (
            "On disk",
            text.size(sum(one["bytes"] for one in facts["files"])),
            text.counted(sum(one["files"] for one in facts["files"]), "file"),
        ),
    ]
    inner = "".join(
        f"<div><dt>{label}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in tiles
    )
    return (
        f"<header><h1>{escape(text.title(facts))}</h1><p>{escape(text.release(facts))} · "
        f"{escape(facts['folder'])}</p>"
        f"<dl class=tiles>{inner}</dl></header>\n"
    )


def _missing(lines: list[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<section class=missing><h2>Missing</h2><ul>{items}</ul></section>\n" if lines else ""


def _grid(facts: dict[str, Any]) -> str:
    """Stages down, expert and tensor-parallel ranks across; a rank's bar is its part of the model
    by kind."""
    ranks = {(rank["tp"], rank["pp"], rank["ep"]): rank for rank in facts["ranks"]}
    largest = max((sum(rank["elements"].values()) for rank in ranks.values()), default=0) or 1
    sizes = facts["layout"]
    columns = [(tp, ep) for ep in range(sizes["ep"]) for tp in range(sizes["tp"])]
    corner = f"<th class=corner rowspan={2 if sizes['ep'] > 1 else 1}>stage</th>"
    tops = "".join(f"<th>tp {tp}</th>" for tp, _ in columns)
    groups = "".join(f"<th colspan={sizes['tp']}>ep {ep}</th>" for ep in range(sizes["ep"]))
    head = (
        f"<tr>{corner}{groups}</tr><tr>{tops}</tr>"
        if sizes["ep"] > 1
        else f"<tr>{corner}{tops}</tr>"
    )
    drawn = {buffer["pp"] for buffer in facts["buffers"]}
    rows = "".join(
        f"<tr>{_stage(stage, stage['pp'] in drawn)}"
        + "".join(_cell(ranks[tp, stage["pp"], ep], largest) for tp, ep in columns)
        + "</tr>"
        for stage in facts["stages"]
    )
    return (
        f"<section><h2>Layout</h2><p>Pipeline stages down, tensor-parallel ranks across. Bars: a "
        f"rank's elements by "
        f"kind, to the scale of the largest rank; below, their number and its files.</p>"
        f"{_legend(facts['parameters']['by_kind'])}"
        f"<div class=scroll><table "
        f"class=grid><thead>{head}</thead><tbody>{rows}</tbody></table></div></section>\n"
    )


def _stage(stage: dict[str, Any], drawn: bool) -> str:
    pp, several = stage["pp"], len(stage["chunks"]) > 1
    chunks = "".join(f"<span>{text.chunk_text(chunk, several)}</span>" for chunk in stage["chunks"])
    name = f"<a href=#pp{pp}>pp {pp}</a>" if drawn else f"<b>pp {pp}</b>"
    return f"<th scope=row>{name}{chunks}</th>"


def _cell(rank: dict[str, Any], largest: int) -> str:
    elements = rank["elements"]
    total = sum(elements.values())
    parts = "".join(
        _segment(kind, elements[kind], f"{kind}\n{elements[kind]:,} of {total:,} elements")
        for kind in KINDS
        if kind in elements
    )
    return (
        f'<td><div class=mini style="--w:{_percent(total, largest)}">{parts}</div>{_short(total)}'
        f"<small>{text.size(rank['bytes'])}</small><small>{escape(rank['folder'])}</small></td>"
    )


def _legend(kinds: Iterable[str], more: str = "") -> str:
    items = "".join(f"<li><i class={kind}></i>{kind}</li>" for kind in KINDS if kind in kinds)
    return f"<ul class=legend>{items}{more}</ul>"


def _buffers(facts: dict[str, Any]) -> str:
    buffers = facts["buffers"]
    if not buffers:
        return (
            "<section><h2>Optimizer buffers</h2><p>Nothing to draw: which parameter lies where in "
            "a buffer is known "
            "from a sidecar only.</p></section>\n"
        )
    views = "".join(
        f"<label><input type=radio name=view "
        f"id={view}{' checked' if view == 'view1' else ''}>{label}</label>"
        for view, label in _VIEWS.items()
    )
    kinds = {
        parameter["kind"]
        for buffer in buffers
        for bucket in buffer["buckets"]
        for parameter in bucket["params"]
    }
    origin = (
        "" if text.asked(facts).as_trained else " of the Megatron-LM run that this was made from"
    )
    ticks = (
        "; ticks below a bar are the data-parallel ranks' shards"
        if any(map(_shards, buffers))
        else ""
    )
    return (
        f"<section id=buffers><h2>Optimizer buffers{origin}</h2><p>A bar is a bucket, its parts "
        f"are the parameters in "
        f"their order, to scale within a buffer{ticks}. Point at a part, or move with the arrow "
        f"keys, for its name and "
        f"range.</p>{_legend(kinds, '<li><i class=gap></i>gap</li><li><i class=padding></i>padding</li>')}"
        f'<fieldset aria-label="width of the bars">{views}</fieldset>'
        + "".join(_stage_buffers(facts, stage) for stage in facts["stages"])
        + "</section>\n"
    )


def _stage_buffers(facts: dict[str, Any], stage: dict[str, Any]) -> str:
    own = [buffer for buffer in facts["buffers"] if buffer["pp"] == stage["pp"]]
    if not own:
        return ""
    total = sum(buffer["parameters"] for buffer in facts["buffers"])
    is_open = (
        " open"
        if total <= _OPEN_PARAMETERS or stage["pp"] == min(b["pp"] for b in facts["buffers"])
        else ""
    )
    note = f"{text.counted(len(own), 'buffer')}, {text.counted(sum(b['parameters'] for b in own), 'parameter')}"
    return (
        f"<details{is_open}><summary>pp {stage['pp']} <small>{text.stage_text(stage)} · "
        f"{note}</small></summary>"
        f"<div id=pp{stage['pp']}>{''.join(map(_buffer, own))}</div></details>"
    )


def _buffer(buffer: dict[str, Any]) -> str:
    largest = max(bucket["end"] - bucket["start"] for bucket in buffer["buckets"])
    shared = (
        f", spread over {buffer['data_parallel_size']} data-parallel ranks"
        if _shards(buffer)
        else ""
    )
    rows = "".join(
        _bucket(number, bucket, largest, _shards(buffer))
        for number, bucket in enumerate(buffer["buckets"])
    )
    return (
        f"<div class=buffer><h3>{escape(text.buffer_name(buffer))} on "
        f"{text.ranks_text(buffer['ranks'])}</h3><p>{_counted(buffer)}{shared}; bounds by "
        f"{text.BOUNDS[buffer['bounds']]}</p><div class=buckets>{rows}</div></div>"
    )


def _shards(buffer: dict[str, Any]) -> int | None:
    """Over how many ranks a bucket is spread, if over several."""
    count = buffer["data_parallel_size"]
    return count if count and count > 1 else None


def _counted(buffer: dict[str, Any]) -> str:
    return (
        f"{text.counted(buffer['numel'], 'element')} in "
        f"{text.counted(len(buffer['buckets']), 'bucket')}: "
        f"{text.counted(buffer['parameters'], 'parameter')}, "
        f"{text.counted(buffer['gaps'], 'element')} in gaps, {buffer['padding']:,} padding"
    )


def _bucket(number: int, bucket: dict[str, Any], largest: int, shards: int | None) -> str:
    size = bucket["end"] - bucket["start"]
    padding = size - bucket["numel_unpadded"]
    gaps = sum(end - start for start, end in bucket["gaps"])
    label = (
        f"bucket {number} · {bucket['start']:,} – {bucket['end']:,}"
        + (f" · {gaps:,} in gaps" if gaps else "")
        + (f" · {padding:,} padding" if padding else "")
    )
    width = _percent(size, largest)
    ticks = (
        f'<div class=shards style="--w:{width};--shards:{shards}"></div>'
        if shards and shards <= _MOST_SHARDS
        else ""
    )
    spoken = f"{label}, {text.counted(len(bucket['params']), 'parameter')}"
    return (
        f"<div class=bucket><span>{label}</span><div class=bar tabindex=0 state=group "
        f'aria-label="{spoken}" '
        f'style="--w:{width}">{"".join(_segments(bucket))}</div>{ticks}</div>'
    )


def _segments(bucket: dict[str, Any]) -> Iterator[str]:
    """Parameters, gaps and the padding of a bucket, in their order."""
    used = bucket["start"] + bucket["numel_unpadded"]
    parts = [
        (parameter["start"], parameter["end"], parameter["kind"], _told(parameter))
        for parameter in bucket["params"]
    ]
    parts += [(start, end, "gap", "gap") for start, end in bucket["gaps"]]
    parts += [(used, bucket["end"], "padding", "padding")] if bucket["end"] > used else []
    for start, end, kind, told in sorted(parts):
        wide = end - start > _WIDE * (bucket["end"] - bucket["start"])
        yield _segment(
            kind, end - start, f"{told}\nelements {start:,} – {end:,} ({end - start:,})", wide
        )


def _told(parameter: dict[str, Any]) -> str:
    layer = "" if parameter["layer"] is None else f" · layer {parameter['layer']}"
    return f"{parameter['name']}\n{parameter['shape']} {parameter['dtype']} · {parameter['kind']}{layer}"


def _segment(kind: str, count: int, told: str, wide: bool = False) -> str:
    name = f'"{kind} wide"' if wide else kind
    return f'<i class={name} style="--n:{count}" title="{escape(told)}"></i>'


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<dt>{label}</dt><dd><div>{'<br>'.join(map(escape, lines))}</div></dd>"
        for label, lines in text.table(facts)
        if label not in _DRAWN
    )
    return f"<section><h2>Facts</h2><dl class=facts>{rows}</dl></section>\n"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f}%"


def _short(count: float) -> str:
    """434176 → '434 K'."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError
