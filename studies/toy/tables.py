"""The tables of the toy study: its records averaged over clusters and compared in pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rfengine.evaluation.report import Interval, bootstrap_mean
from studies.toy.record import Record
from studies.toy.setting import STREAMED, WITH_EVICTION, WITHOUT_EVICTION, split_model, trained_sink

TRUE_MODEL, TRUE_SINK = "world", "true"
_SINKS = (TRUE_SINK, "none", "frozen", "ema")
# up to 5 clusters all differ to one side by chance in more than 5% of the cases: 2 * 0.5**5 is 6%
LEAST_MARKED = 6

_CONTENT = ("colour", "shape", "direction", "camera")
_DRIFTS = ("exposure_drift", "contrast_drift", "colour_drift", "sharpness_drift")
_LIKENESS = ("consistency_near", "consistency_far", "copying_excess")
_SWITCHES = ("right_after_2", "right_after_4", "old_scene")
_CLIPS = {
    "full": ("reward", "flow_speed", "fidelity", "agreement", *_CONTENT, "speed", "all"),
    "open": ("reward", "flow_speed", "fast", "mixed", "fidelity", "agreement", *_CONTENT, "all"),
}
_STREAMS = ("reward", "right", "camera", *_SWITCHES, "flow_speed", "freeze_fraction", *_DRIFTS, *_LIKENESS)
_SHARES = (*_CONTENT, *_SWITCHES, "speed", "all", "right", "fast", "mixed", "agreement", "freeze_fraction")
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
move nearer to fast than to slow; mixed: captions of which some sampling seeds do and others do not. Right:
windows of three chunks in which all that the text says is seen; after 2, after 4: switches that are right by
the second and by the fourth chunk; old scene: windows that show a colour or the background of a scene that is
over. Fidelity: energy distance of the latents to the teacher's, lower is nearer,
the mean over sampling seeds with their range in round brackets; the teacher's own is the floor. Drifts: the
last quarter against the first chunk, sharpness in octaves. Consistency: likeness one chunk apart (near) and
half a video apart (far). Copying excess: likeness of late frames to the own first chunk beyond that to those
of other videos. The true videos show what a world without any model scores.
"""

Samples = dict[tuple[int, int | None, int], dict[str, float]]
"""Values by (training seed, prompt, sampling seed); "fidelity" belongs to no prompt."""


class Table(NamedTuple):
    """rows: the samples of each. compared: they are differences."""

    section: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, Samples]
    compared: bool = False


def model_place(model: str) -> tuple[int, float, str]:
    """What models are sorted by: start, teacher, dmd, re_dmd of falling beta, those of a sink in the order of
    the sinks, no_eviction."""
    place, number = _place(model, ("start", "teacher", "dmd", "re_dmd", STREAMED, WITHOUT_EVICTION))
    if model.startswith(STREAMED):
        sink, alpha = _place(trained_sink(model), _SINKS)
        return place, sink + alpha, model
    return place, -number, model


def sink_place(sink: str) -> tuple[int, float, str]:
    """What sinks are sorted by: true, none, frozen, ema of rising alpha, the same in bf16, others."""
    name = sink.removesuffix("_bf16")
    place, number = _place(name, _SINKS)
    return place + (name != sink), number, sink


def _place(name: str, order: Sequence[str]) -> tuple[int, float]:
    """Where `name` stands among the beginnings of `order`, and the number at its end."""
    place = next((index for index, first in enumerate(order) if name.startswith(first)), len(order))
    number = re.search(r"[\d.]+$", name)
    return place, float(number[0]) if number else 0.0


def clip_samples(records: Sequence[Record], captions: str) -> dict[str, Samples]:
    """The clips under one kind of captions by model, training seeds together, in the order of the tables."""
    found: dict[str, Samples] = {}
    for record in records:
        if record["kind"] == "clips" and (samples := _samples(record, captions)):
            seed = split_model(record["model"])[1]
            fidelity = record["fidelity"].get(captions, ())
            samples |= {(seed, None, place): {"fidelity": value} for place, value in enumerate(fidelity)}
            found.setdefault(split_model(record["model"])[0], {}).update(samples)
    return dict(sorted(found.items(), key=lambda entry: model_place(entry[0])))


def stream_samples(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, Samples]]:
    """The streams by (model, scenario), in each by sink, the true videos first, as the tables have them."""
    found: dict[tuple[str, str], dict[str, Samples]] = {}
    for record in records:
        if record["kind"] == "streams":
            sinks = found.setdefault((split_model(record["model"])[0], record["scenario"]), {})
            sinks.setdefault(record["sink"], {}).update(_samples(record, ""))
    return {
        (model, scenario): found.get((TRUE_MODEL, scenario), {})
        | dict(sorted(found[model, scenario].items(), key=lambda entry: sink_place(entry[0])))
        for model, scenario in sorted(found, key=lambda place: (model_place(place[0]), place[1]))
        if model != TRUE_MODEL
    }


def _samples(record: Record, captions: str) -> Samples:
    seed = split_model(record["model"])[1]
    return {
        (seed, video["prompt"], video["seed"]): {
            name: value for name, value in video["values"].items() if value is not None
        }
        for video in record["videos"]
        if video.get("captions", "") == captions
    }


def difference(samples: Samples, other: Samples) -> Samples:
    """`samples` minus `other` in every value of every video that both have."""
    return {
        key: {name: value - other[key][name] for name, value in values.items() if name in other[key]}
        for key, values in samples.items()
        if key in other
    }


def measure(samples: Samples, name: str) -> Interval | None:
    """The mean of a value over clusters (training seed, prompt) with its 95% interval; None without any.

    The interval of "fidelity" is the range of its values, since they belong to no prompt.
    """
    clusters = _clusters(samples, name)
    if not clusters:
        return None
    if name == "fidelity":
        values = [value for found in clusters.values() for value in found]
        ends = (min(values), max(values)) if len(values) > 1 else (None, None)
        return Interval(sum(values) / len(values), *ends, len(values))
    return bootstrap_mean([sum(clusters[key]) / len(clusters[key]) for key in sorted(clusters)])


def _clusters(samples: Samples, name: str) -> dict[tuple[int, int | None], list[float]]:
    clusters: dict[tuple[int, int | None], list[float]] = {}
    for (training_seed, prompt, _), values in samples.items():
        if name in values:
            clusters.setdefault((training_seed, prompt), []).append(values[name])
    return clusters


def render(records: Sequence[Record]) -> str:
    """The text of tables.md; records that are missing leave out their rows and tables."""
    text, section = _HEAD, ""
    for table in tables(records):
        text += _READING if not section else ""
        if table.section != section:
            section = table.section
            text += f"\n## {section}\n"
        text += f"\n### {table.title}\n\n" + "\n".join(_lines(table)) + "\n"
    return text if section else text + "\nNo record is there yet.\n"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """The tables that have rows, each with the columns that some row has."""
    for table in (*_clip_tables(records), *_stream_tables(records)):
        names = {
            row: {name for values in samples.values() for name in values}
            for row, samples in table.rows.items()
        }
        rows = {row: samples for row, samples in table.rows.items() if names[row] & {*table.columns}}
        columns = tuple(name for name in table.columns if any(name in names[row] for row in rows))
        if rows:
            yield table._replace(columns=columns, rows=rows)


def _clip_tables(records: Sequence[Record]) -> Iterator[Table]:
    section, found = "DMD against Re-DMD", {kind: clip_samples(records, kind) for kind in _CLIPS}
    for kind, columns in _CLIPS.items():
        yield Table(section, f"{kind.capitalize()} captions", columns, found[kind])
    for kind, columns in _CLIPS.items():
        pairs = [(model, "dmd") for model in found[kind] if model.startswith("re_dmd_")]
        pairs += [("dmd", "start"), (WITH_EVICTION, "start"), ("dmd", WITH_EVICTION)]
        pairs += [(WITHOUT_EVICTION, WITH_EVICTION)]
        title = f"Paired differences, {kind} captions"
        yield Table(section, title, columns, _paired(found[kind], pairs), True)


def _stream_tables(records: Sequence[Record]) -> Iterator[Table]:
    streams = stream_samples(records)
    for (model, scenario), sinks in streams.items():
        if model != WITH_EVICTION:
            continue
        title = f"a scene that {scenario}, {model}"
        yield Table("Sinks", title, _STREAMS, sinks)
        ema = [sink for sink in sinks if sink.startswith("ema_")]
        pairs = [(sink, other) for other in ("frozen", "none") for sink in ema]
        pairs += [(sink, sink.removesuffix("_bf16")) for sink in ema if sink.endswith("_bf16")]
        yield Table("Sinks", f"Paired differences, {title}", _STREAMS, _paired(sinks, pairs), True)
    for scenario in dict.fromkeys(scenario for _, scenario in streams):
        rows = own_sinks(streams, scenario)
        title = f"a scene that {scenario}, each student under the sink that it was trained with"
        yield Table("Students of their own sink", title, _STREAMS, rows)
        pairs = [(name, WITH_EVICTION) for name in rows if name != WITH_EVICTION]
        yield Table(
            "Students of their own sink", f"Paired differences, {title}", _STREAMS, _paired(rows, pairs), True
        )


def own_sinks(streams: Mapping[tuple[str, str], Mapping[str, Samples]], scenario: str) -> dict[str, Samples]:
    """The streams of every student in a scenario, under the sink that it was trained with."""
    return {
        model: sinks[trained_sink(model)]
        for (model, of), sinks in streams.items()
        if of == scenario and trained_sink(model) in sinks
    }


def _paired(found: dict[str, Samples], pairs: Sequence[tuple[str, str]]) -> dict[str, Samples]:
    return {
        f"{one} minus {other}": difference(found[one], found[other])
        for one, other in pairs
        if one in found and other in found
    }


def _lines(table: Table) -> Iterator[str]:
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


def _sizes(table: Table) -> str:
    """The sentence under a table: how many clusters and sampling seeds its rows and columns have."""
    rows: dict[str, list[str]] = {}
    for row, samples in table.rows.items():
        whole = _size(Counter(key[:2] for key in samples if key[1] is not None))
        sizes = [whole] if whole else []
        for name in table.columns:
            counts = {key: len(found) for key, found in _clusters(samples, name).items()}
            if name == "fidelity" and counts:
                count = sum(counts.values())
                sizes.append(f"fidelity from {count} value{'s' if count > 1 else ''}")
            elif _size(counts) not in ("", whole):
                sizes.append(f"{name.replace('_', ' ')} {_size(counts)}")
        rows.setdefault(", ".join(sizes), []).append(row)
    parts = [
        f"{sizes} in every row" if len(rows) == 1 else f"{', '.join(of)}: {sizes}"
        for sizes, of in rows.items()
    ]
    return f"n, clusters x sampling seeds: {'; '.join(parts)}."


def _size(counts: dict[tuple[int, int | None], int]) -> str:
    if not counts:
        return ""
    least, most = min(counts.values()), max(counts.values())
    return f"{len(counts)} x {least}" + (f" to {most}" if most > least else "")
