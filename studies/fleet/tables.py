"""The tables of docs/scaling.md, from the records of the study and from what is computed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rfengine.cli.serve import ServeOptions
from rfengine.costs.rates import GPUS, GPUName
from studies.fleet.arrivals import Demand
from studies.fleet.capacity import (
    CARDS_GB,
    PRECISIONS,
    VIEWERS,
    Load,
    Prices,
    memory_plan,
    points_bytes,
    streams,
)
from studies.fleet.measure import record_path
from studies.fleet.measures import percentiles
from studies.fleet.purchase import MACHINE_CARDS, Purchase, offered_for
from studies.fleet.service_times import CHUNK_FRAMES, EFFICIENCY, FPS, chunk_floor_s, computed

Records = Mapping[str, dict[str, Any]]
EFFICIENCIES = (0.3, EFFICIENCY, 0.7, 1.0)
_GPUS: tuple[GPUName, ...] = ("h100", "h200")
JOB_CHUNKS = Demand(0.0).job_chunks  # of a job of 81 frames
_BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_MEASURED = {"chunk_s": "chunk", "first_fragment_s": "first fragment"}
_CITED_BITS = 1.43e6  # between Apple's 1,100 and 2,000 kbit/s for 768 x 432 and 960 x 540, by pixels


def tables(records: Records) -> dict[str, str]:
    """Every table by its name in the document."""
    return {
        "memory": _memory(),
        "compute": _compute(),
        "network": _network(),
        "storage": _storage(),
        "cost": _cost(),
        "have": _have(),
        "want": _want(),
        "tiny": _tiny(records["tiny"]),
        "card": _card(records["card"]),
        "admission": _admission(records["admission"]),
        "day": _day(records["day"]),
        "loss": _loss(records["loss"], records["ten_thousand"]),
    }


def place(document: str, found: Mapping[str, str]) -> str:
    """`document` with each table between its two marks. Raises ValueError where a table has no place, or a
    place no table."""
    names = [match["name"] for match in _BLOCK.finditer(document)]
    if sorted(names) != sorted(found):
        raise ValueError(
            f"the document has places for the tables {', '.join(sorted(names))} and the study makes "
            f"{', '.join(sorted(found))}; mark one place for each with <!-- table: NAME --> and <!-- end -->"
        )
    return _BLOCK.sub(
        lambda match: f"<!-- table: {match['name']} -->\n{found[match['name']]}<!-- end -->", document
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _memory() -> str:
    head = ["precision", "shared, GiB", "a session, GiB"]
    head += [f"sessions on {card_gb} GB" for card_gb in CARDS_GB]
    rows = []
    for precision in PRECISIONS:
        plan = memory_plan(precision)
        sizes = [_gib(plan.shared_bytes), _gib(plan.session_bytes)]
        rows.append([precision, *sizes, *(plan.sessions(card_gb) for card_gb in CARDS_GB)])
    return _table(head, rows)


def _compute() -> str:
    head = ["card", "precision", "floor of a chunk, ms"]
    head += [f"at {efficiency:g}: ms, frames/s, sessions" for efficiency in EFFICIENCIES]
    rows = []
    for gpu in _GPUS:
        for precision in PRECISIONS:
            floor = chunk_floor_s(precision, gpu)
            cells = [
                f"{floor / each * 1e3:.0f}, {CHUNK_FRAMES * each / floor:.1f}, **{streams(floor, each)}**"
                for each in EFFICIENCIES
            ]
            rows.append([GPUS[gpu].name, precision, f"{floor * 1e3:.1f}", *cells])
    return _table(head, rows)


def _have() -> str:
    """What so many cards serve."""
    rows = []
    for cards, what in ((1, "one card"), (8, "one machine"), (16, "two machines"), (128, "16 machines")):
        cells: list[object] = []
        for precision in PRECISIONS:
            places = cards * computed(precision).streams
            cells.append(f"{places:,}, {offered_for(places):,.1f}, {offered_for(places, 0.1):,.1f}")
        jobs = cards * 3600 / computed("fp8").video_s(JOB_CHUNKS)
        rows.append([f"{cards} ({what})", *cells, f"{jobs:,.0f}", f"{cards * Prices().card_hour:,.2f}"])
    head = ["cards", *(f"{each}: places, viewers at 1 %, at 10 %" for each in PRECISIONS)]
    return _table([*head, "jobs an hour in fp8, alone", "$ an hour"], rows)


def _want() -> str:
    """What so many viewers want."""
    rows = []
    for viewers in (1, 10, 100, 1000, VIEWERS):
        purchase = Purchase(viewers, computed("fp8").streams)
        pooled, apart = purchase.pooled_cards, purchase.machines_apart
        price = Prices().card_hour
        rows.append(
            [
                f"{viewers:,}", f"{pooled:,}", f"{math.ceil(pooled / MACHINE_CARDS):,}",
                f"{pooled * price:,.2f}", f"{apart:,}", f"{apart * MACHINE_CARDS * price:,.2f}",
            ]
        )  # fmt: skip
    pool = ["in one pool: cards", "machines", "$ an hour"]
    return _table(["viewers", *pool, "machines apart", "$ an hour"], rows)


def _network() -> str:
    network = json.loads(record_path(1).read_text())["network"]
    kinds = (
        ("`tiny`, 64 x 64, measured", network["tiny"]["bits_a_second"]),
        ("the same enlarged to 832 x 480, measured", network["enlarged"]["bits_a_second"]),
        ("832 x 480 by Apple's table, cited", _CITED_BITS),
        ("832 x 480, **assumed** here", Load(1, 1, 1).bits_a_second),
    )
    rows = []
    for name, bits in kinds:
        load = Load(VIEWERS, VIEWERS, 1, bits_a_second=bits)
        traffic = f"{load.egress_gbit_s:.2f}", f"{load.egress_gb_hour / 1e3:.2f}"
        rows.append([name, f"{bits / 1e6:.3f}", *traffic])
    return _table(["video", "Mbit/s", "10,000 viewers, Gbit/s", "TB an hour"], rows)


def _storage() -> str:
    record = json.loads(record_path(1).read_text())
    load = Load(VIEWERS, VIEWERS, 1)
    byte_rate, snapshot = load.bits_a_second / 8, memory_plan("bf16").snapshot_bytes
    rows = [
        ["snapshot of `tiny`", "measured", f"{record['snapshot_bytes'] / 2**20:.2f} MiB"],
        ["snapshot of wan-1.3b at 832 x 480", "computed", f"{_gib(snapshot)} GiB"],
        ["recording, an hour of one session", "assumed rate", f"{byte_rate * 3600 / 1e9:.3f} GB"],
        ["recordings of 10,000 sessions, kept 24 h", "assumed rate", f"{load.recorded_gb(24) / 1e3:.0f} TB"],
        [
            "recording of one session that fills half of the default `--disk-gb`", "assumed rate",
            f"{ServeOptions().disk_gb * 2**30 / 2 / byte_rate / 3600:.1f} h",
        ],
        [
            "`--host-memory-gb` of a card that keeps points of two sessions by itself", "computed",
            f"{points_bytes(memory_plan('fp8').session_bytes, 2) / 2**30:.1f} GiB",
        ],
        ["video of a job of 81 frames", "assumed rate", f"{byte_rate * 81 / FPS / 1e6:.2f} MB"],
    ]  # fmt: skip
    return _table(["what", "", "size"], rows)


def _cost() -> str:
    prices, places = Prices(), computed("fp8").streams
    loads = (
        ("one viewer, one session", Load(1, 1, places)),
        ("100, a session each", Load(100, 100, places)),
        ("10,000, a session each", Load(VIEWERS, VIEWERS, places)),
        ("10,000, one stream through HLS", Load(1, VIEWERS, places)),
        ("10,000, 100 streams through HLS", Load(100, VIEWERS, places)),
    )
    rows = []
    for name, load in loads:
        cost = load.cost_hour(prices, recorded_hours=24)
        total = sum(cost.values())
        money = [f"{cost[each]:,.2f}" for each in ("cards", "egress", "storage")]
        rows.append([name, f"{load.cards:,}", *money, f"{total:,.2f}", f"{total / load.viewers:.3f}"])
    head = ["viewers", "cards", "cards, $", "egress, $", "storage, $", "an hour, $", "a viewer, $"]
    return _table(head, rows)


def _tiny(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        cells = [_milliseconds(row, name) for name in ("p50", "p95")]
        ratio = row["predicted"]["p95"] / row["measured"]["p95"]
        rows.append([row["threads"], row["sessions"], _MEASURED[row["what"]], *cells, f"{ratio:.2f}"])
    head = [
        "threads",
        "sessions",
        "ms of",
        "p50: predicted / measured",
        "p95: predicted / measured",
        "ratio of p95",
    ]
    return _table(head, rows) + "".join(_circumstances(threads) for threads in (1, 2))


def _circumstances(threads: int) -> str:
    record = json.loads(record_path(threads).read_text())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"\nMeasured {record['date']}, {record['machine']}, {versions}: `{record['command']}`\n"


def _milliseconds(row: dict[str, Any], name: str) -> str:
    return " / ".join(f"{row[side][name] * 1e3:.0f}" for side in ("predicted", "measured"))


def _card(record: dict[str, Any]) -> str:
    counts = sorted({row["sessions"] for row in record["rows"]})
    rows = []
    for precision in PRECISIONS:
        found = {row["sessions"]: row for row in record["rows"] if row["precision"] == precision}
        rows.append([precision, *(_stalls(found.get(count)) for count in counts)])
    return _table(["precision", "1 session", *(f"{count} sessions" for count in counts[1:])], rows)


def _stalls(row: dict[str, Any] | None) -> str:
    return "no memory" if row is None else f"{row['stall_s_an_hour'] / 60:.1f}"


def _admission(record: dict[str, Any]) -> str:
    rows = [
        [
            row["admits_by"], row["offered"], _percent(row["refused_share"]), _percent(row["gave_up_share"]),
            _mean(row["start_s"]["p50"]), _mean(row["start_s"]["p95"]), _percent(row["stalled_share"]),
            _mean(row["stall_s_an_hour"], 1 / 60), _percent(row["utilisation"]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    viewers = ["viewers offered", "refused once, %", "gave up, %", "start, s: p50", "p95"]
    head = ["admits by", *viewers, "stalled, %", "minutes of stalls an hour", "engine busy, %"]
    return _table(head, rows)


def _day(record: dict[str, Any]) -> str:
    rows = [
        [
            "the server's own" if row["spare"] is None else f"{row['spare']} spare places",
            _percent(row["refused_share"]), _percent(row["gave_up_share"]), _mean(row["start_s"]["p95"]),
            _percent(row["drained_share"]), _mean(row["card_hours"], digits=0),
            _mean(row["viewers_a_card"], digits=2), _mean(row["jobs"]["wait_s"]["p95"]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    viewers = ["refused once, %", "gave up, %", "start, s: p95", "session ended by draining, %"]
    return _table(["rule", *viewers, "card hours", "viewers a card", "jobs wait, s: p95"], rows)


def _loss(record: dict[str, Any], large: dict[str, Any]) -> str:
    groups = [(row, row["runs"]) for row in record["rows"]] + [(row, [row]) for row in large["rows"]]
    rows = []
    for row, runs in groups:
        struck = [run["loss"] for run in runs if run["loss"]]
        unserved = sum(each["all_served_s"] is None for each in struck)
        all_served = [each["all_served_s"] for each in struck if each["all_served_s"] is not None]
        jobs = [run["jobs"] for run in runs]
        rows.append(
            [
                f"{row['cards']:,}", row["together"], f"{row['offered']:,}", len(runs),
                sum(each["sessions"] for each in struck), sum(each["gave_up"] for each in struck),
                _seconds(percentiles(all_served), ("p50", "p99")), unserved,
                sum(each["requeued"] for each in jobs),
                sum(each["sent"] - each["made"] - each["left"] for each in jobs),
            ]
        )  # fmt: skip
    viewers = ["sessions lost", "of them gave up", "until all are served again, s: median, most"]
    jobs_head = ["runs in which some never were", "jobs made again", "jobs lost"]
    return _table(["cards", "lost at once", "viewers", "runs", *viewers, *jobs_head], rows)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _mean(found: Mapping[str, float | None], scale: float = 1.0, digits: int = 1) -> str:
    """A mean of runs and half the width of its confidence interval."""
    if found["mean"] is None:
        return ""
    half = "" if found["half"] is None else f" ± {found['half'] * scale:.{digits}f}"
    return f"{found['mean'] * scale:.{digits}f}{half}"


def _percent(found: Mapping[str, float | None]) -> str:
    return _mean(found, 100.0)


def _seconds(found: Mapping[str, float | None], names: Sequence[str]) -> str:
    values = [found[name] for name in names]
    return "" if None in values else ", ".join(f"{value:.1f}" for value in values)
