"""The tables of the toy study: its records averaged over clusters and compared in pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rfengine.evaluation.confidence import Interval, bootstrap_mean
from studies.toy.record import Records, Video

SHIPPED = "shipped"  # halfway between the start and WITH_EVICTION
WITH_EVICTION, WITHOUT_EVICTION = "re_dmd_0.5", "no_eviction"  # one recipe, trained in both ways
TRUE_MODEL, TRUE_SINK = "world", "true"
# up to 5 clusters all differ to one side by chance in more than 5% of the cases: 2 * 0.5**5 is 6%
LEAST_MARKED = 6

_FIRST_MODELS = ("start", "teacher", "dmd")
_FIRST_SINKS = (TRUE_SINK, "none", "frozen")
_CONTENT = ("colour", "shape", "direction")
_DRIFTS = ("exposure_drift", "contrast_drift", "colour_drift", "sharpness_drift")
_LIKENESS = ("consistency_near", "consistency_far", "copying_excess")
_CLIPS_FULL = ("reward", "flow_speed", "fidelity", "agreement", *_CONTENT, "speed", "all")
_CLIPS_OPEN = ("reward", "flow_speed", "fast", "fidelity", "agreement", *_CONTENT, "all")
_STREAMS = (
    *("reward", "flow_speed", "freeze_fraction", *_DRIFTS, *_LIKENESS, *_CONTENT),
    *("speed", "permanence"),
)
_SHARES = (*_CONTENT, "speed", "all", "fast", "agreement", "freeze_fraction", "permanence")
_HEAD = """# Toy study

Written by python studies/toy/run.py --tables
"""
_READING = f"""
Every cell is a mean with its 95% interval in brackets. A cluster is one prompt under one training seed: its
sampling seeds are averaged first, and the interval is a bootstrap over the clusters. A paired difference is
taken video by video (same training seed, prompt and sampling seed), then averaged and bootstrapped alike.
**Bold** differences have an interval without 0; below {LEAST_MARKED} clusters none is bold, since so few fall
on one side by chance too often. Nothing corrects for the number of comparisons.

Shares are in per cent, their differences in percentage points. Reward: motion of the named objects, 1 being
the world's top speed and 1.5 the most. Flow speed: % of the shorter side a frame. Fast: moving scenes that
move nearer to fast than to slow. Fidelity: energy distance of the latents to the teacher's, lower is nearer,
the mean over sampling seeds with their range in round brackets; the teacher's own is the floor. Drifts: the
last quarter against the first chunk, sharpness in octaves. Consistency: likeness one chunk apart (near) and
half a video apart (far). Copying excess: likeness of late frames to the own first chunk beyond that to those
of other videos. The true videos show what a world without any model scores.
"""


@dataclass(frozen=True, slots=True)
class Samples:
    """Values by (training seed, prompt, sampling seed), fidelity by (training seed, place of the seed)."""

    values: dict[tuple[int, int, int], dict[str, float]] = field(default_factory=dict)
    fidelity: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Table:
    """place: of its rows in the summary. compared: its rows are differences."""

    place: tuple[str, ...]
    title: str
    columns: tuple[str, ...]
    rows: dict[str, Samples]
    compared: bool = False


def model_place(model: str) -> tuple[int, float, str]:
    """What models are sorted by: start, teacher, dmd, re_dmd of falling beta, no_eviction, others."""
    if model in _FIRST_MODELS:
        return _FIRST_MODELS.index(model), 0.0, ""
    found = re.fullmatch(r"re_dmd_(\d+(?:\.\d+)?)", model)
    if found:
        return len(_FIRST_MODELS), -float(found[1]), ""
    return len(_FIRST_MODELS) + (1 if model == WITHOUT_EVICTION else 2), 0.0, model


def sink_place(sink: str) -> tuple[int, float, str]:
    """What sinks are sorted by: true, none, frozen, ema of rising alpha, the same in bf16, others."""
    if sink in _FIRST_SINKS:
        return _FIRST_SINKS.index(sink), 0.0, ""
    found = re.fullmatch(r"ema_(\d+(?:\.\d+)?)(_bf16)?", sink)
    if found:
        return len(_FIRST_SINKS) + (1 if found[2] else 0), float(found[1]), ""
    return len(_FIRST_SINKS) + 2, 0.0, sink


def clip_samples(records: Records, captions: str) -> dict[str, Samples]:
    """The clips under one kind of captions by model, training seeds together, in the order of the tables."""
    found: dict[str, Samples] = {}
    for clips in sorted(records.clips, key=lambda clips: model_place(clips.model)):
        videos = [video for video in clips.videos if video.captions == captions]
        if videos:
            samples = found.setdefault(clips.model, Samples())
            _add(samples, clips.training_seed, videos)
            for place, value in enumerate(clips.fidelity.get(captions, ())):
                samples.fidelity[clips.training_seed, place] = value
    return found


def stream_samples(records: Records) -> dict[tuple[str, int], dict[str, Samples]]:
    """The streams by (model, seconds), in each by sink, the true videos first, in the order of the tables."""
    found: dict[tuple[str, int], dict[str, Samples]] = {}
    for streams in sorted(records.streams, key=lambda streams: sink_place(streams.sink)):
        place = found.setdefault((streams.model, streams.seconds), {})
        _add(place.setdefault(streams.sink, Samples()), streams.training_seed, streams.videos)
    models = sorted(found, key=lambda place: (model_place(place[0]), place[1]))
    return {
        (model, seconds): found.get((TRUE_MODEL, seconds), {}) | found[model, seconds]
        for model, seconds in models
        if model != TRUE_MODEL
    }


def _add(samples: Samples, training_seed: int, videos: Iterable[Video]) -> None:
    for video in videos:
        samples.values[training_seed, video.prompt, video.seed] = video.values


def difference(samples: Samples, other: Samples) -> Samples:
    """`samples` minus `other` in every value of every video that both have."""
    values = {
        key: {
            name: value - other.values[key][name]
            for name, value in found.items()
            if name in other.values[key]
        }
        for key, found in samples.values.items()
        if key in other.values
    }
    shared = samples.fidelity.keys() & other.fidelity.keys()
    return Samples(values, {key: samples.fidelity[key] - other.fidelity[key] for key in shared})


def measure(samples: Samples, name: str) -> Interval | None:
    """The mean of a value over clusters (training seed, prompt) with its 95% interval; None without any.

    The interval of "fidelity" is the range of its values, since they belong to no prompt.
    """
    if name == "fidelity":
        values = list(samples.fidelity.values())
        if not values:
            return None
        ends = (min(values), max(values)) if len(values) > 1 else (None, None)
        return Interval(sum(values) / len(values), *ends, len(values))
    clusters = _clusters(samples, name)
    if not clusters:
        return None
    return bootstrap_mean([sum(clusters[key]) / len(clusters[key]) for key in sorted(clusters)])


def _clusters(samples: Samples, name: str) -> dict[tuple[int, int], list[float]]:
    clusters: dict[tuple[int, int], list[float]] = {}
    for (training_seed, prompt, _), values in samples.values.items():
        if name in values:
            clusters.setdefault((training_seed, prompt), []).append(values[name])
    return clusters


def render(records: Records) -> str:
    """The text of tables.md; records that are missing leave out their rows and tables."""
    text, section = _HEAD, ""
    for table in _tables(records):
        text += _READING if not section else ""
        if table.place[0] != section:
            section = table.place[0]
            text += f"\n## {section}\n"
        text += f"\n### {table.title}\n\n" + "\n".join(_lines(table)) + "\n"
    return text if section else text + "\nNo record is there yet.\n"


def summary(records: Records) -> dict[str, Any]:
    """Every number of the tables, by section, table, row and value: mean, low, high and count of clusters.

    Shares are from 0 to 1; low and high are None for a single cluster and the range for "fidelity".
    """
    result: dict[str, Any] = {}
    for table in _tables(records):
        place = result
        for name in table.place:
            place = place.setdefault(name, {})
        for row, samples in table.rows.items():
            found = {name: measure(samples, name) for name in table.columns}
            place[row] = {
                name: {"mean": one.mean, "low": one.low, "high": one.high, "count": one.count}
                for name, one in found.items()
                if one
            }
    return result


def _tables(records: Records) -> Iterator[_Table]:
    """The tables that have rows, each with the columns that some row has."""
    for table in (*_clip_tables(records), *_sink_tables(records), *_eviction_tables(records)):
        names = {
            row: {name for values in samples.values.values() for name in values}
            | ({"fidelity"} if samples.fidelity else set())
            for row, samples in table.rows.items()
        }
        rows = {row: samples for row, samples in table.rows.items() if names[row] & {*table.columns}}
        columns = tuple(name for name in table.columns if any(name in names[row] for row in rows))
        if rows:
            yield _Table(table.place, table.title, columns, rows, table.compared)


def _clip_tables(records: Records) -> Iterator[_Table]:
    section, kinds = "DMD against Re-DMD", {"full": _CLIPS_FULL, "open": _CLIPS_OPEN}
    found = {kind: clip_samples(records, kind) for kind in kinds}
    for kind, columns in kinds.items():
        yield _Table((section, kind), f"{kind.capitalize()} captions", columns, found[kind])
    for kind, columns in kinds.items():
        models = [model for model in found[kind] if model.startswith("re_dmd_")]
        pairs = [*((model, "dmd") for model in models), (WITHOUT_EVICTION, WITH_EVICTION)]
        pairs += [("dmd", "start"), (SHIPPED, "start")]
        title = f"Paired differences, {kind} captions"
        yield _Table((section, f"{kind}, differences"), title, columns, _paired(found[kind], pairs), True)


def _sink_tables(records: Records) -> Iterator[_Table]:
    for (model, seconds), sinks in stream_samples(records).items():
        place, title = ("Sinks", model), f"{model}, {seconds} s"
        yield _Table((*place, f"{seconds}s"), title, _STREAMS, sinks)
        ema = [sink for sink in sinks if sink.startswith("ema_")]
        pairs = [(sink, other) for other in ("frozen", "none") for sink in ema]
        pairs += [(sink, sink.removesuffix("_bf16")) for sink in ema if sink.endswith("_bf16")]
        rows = _paired(sinks, pairs)
        yield _Table(
            (*place, f"{seconds}s, differences"), f"Paired differences, {title}", _STREAMS, rows, True
        )


def _eviction_tables(records: Records) -> Iterator[_Table]:
    section, streams = "Trained with eviction against without", stream_samples(records)
    for model, seconds in streams:
        if model == WITH_EVICTION:
            others = streams.get((WITHOUT_EVICTION, seconds), {})
            rows = {
                sink: difference(samples, others[sink])
                for sink, samples in streams[model, seconds].items()
                if sink in others and sink != TRUE_SINK
            }
            title = f"Paired differences, {WITH_EVICTION} minus {WITHOUT_EVICTION}, {seconds} s"
            yield _Table((section, f"{seconds}s"), title, _STREAMS, rows, True)


def _paired(found: dict[str, Samples], pairs: Sequence[tuple[str, str]]) -> dict[str, Samples]:
    return {
        f"{one} minus {other}": difference(found[one], found[other])
        for one, other in pairs
        if one in found and other in found
    }


def _lines(table: _Table) -> Iterator[str]:
    unit = "points" if table.compared else "%"
    heads = [
        name.replace("_", " ") + (f", {unit}" if name in _SHARES else "") for name in ("", *table.columns)
    ]
    yield f"| {' | '.join(heads).strip()} |"
    yield "| --- |" + " ---: |" * len(table.columns)
    for row, samples in table.rows.items():
        cells = [_cell(name, measure(samples, name), table.compared) for name in table.columns]
        yield f"| {' | '.join((row, *cells))} |"
    yield ""
    yield _sizes(table)


def _cell(name: str, found: Interval | None, compared: bool) -> str:
    if found is None:
        return "-"
    style = ".1f" if name in _SHARES else {"flow_speed": ".2f", "fidelity": ".3g"}.get(name, ".3f")
    scale, style = 100 if name in _SHARES else 1, f"{'+' if compared else ''}z{style}"
    mean = format(scale * found.mean, style)
    if found.low is None or found.high is None:
        return mean
    low, high = (format(scale * end, style) for end in (found.low, found.high))
    if name == "fidelity":
        return f"{mean} ({low} to {high})"
    apart = found.low > 0 or found.high < 0
    marked = compared and apart and found.count >= LEAST_MARKED
    return f"{f'**{mean}**' if marked else mean} [{low}, {high}]"


def _sizes(table: _Table) -> str:
    """The sentence under a table: how many clusters and sampling seeds its rows and columns have."""
    rows: dict[str, list[str]] = {}
    for row, samples in table.rows.items():
        whole = _size(Counter(key[:2] for key in samples.values))
        told = [whole] if samples.values else []
        for name in table.columns:
            size = _size({key: len(found) for key, found in _clusters(samples, name).items()})
            if name == "fidelity" and samples.fidelity:
                count = len(samples.fidelity)
                told.append(f"fidelity from {count} value{'s' if count > 1 else ''}")
            elif size not in ("", whole):
                told.append(f"{name.replace('_', ' ')} {size}")
        rows.setdefault(", ".join(told), []).append(row)
    parts = [
        f"{told} in every row" if len(rows) == 1 else f"{', '.join(of)}: {told}" for told, of in rows.items()
    ]
    return f"n, clusters x sampling seeds: {'; '.join(parts)}."


def _size(counts: dict[tuple[int, int], int]) -> str:
    if not counts:
        return ""
    least, most = min(counts.values()), max(counts.values())
    return f"{len(counts)} x {least}" + (f" to {most}" if most > least else "")
