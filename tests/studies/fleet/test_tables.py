"""docs/scaling.md holds what the study's records and the code say."""

from __future__ import annotations

import re
import statistics
from dataclasses import fields

import pytest

from rfengine.cli.serve import ServeOptions
from rfengine.serving.admission import _RETRY_S
from rfengine.serving.options import ServiceOptions
from rfengine.serving.realtime.endpoint import RealtimeLimits
from rfengine.serving.replicas.plan import ReplicaPlan
from rfengine.serving.server import ServerOptions
from studies.fleet.capacity import PRECISIONS, Load, Prices, memory_plan, streams
from studies.fleet.measure import RESULTS
from studies.fleet.purchase import Purchase, places_for, refused_share
from studies.fleet.run import DOCUMENT, read_records
from studies.fleet.scenarios import PRECISION, SCENARIOS
from studies.fleet.service_times import chunk_floor_s, computed
from studies.fleet.tables import _mean, place, tables

PAGE = DOCUMENT.read_text(encoding="utf-8")


def test_every_table_of_the_document_is_what_the_study_makes() -> None:
    assert place(PAGE, tables(read_records(RESULTS))) == PAGE


def test_the_records_are_of_one_seed_and_of_every_scenario() -> None:
    records = read_records(RESULTS)
    assert {record["seed"] for record in records.values()} == {0}
    assert {name: record["scenario"] for name, record in records.items()} == {
        name: name for name in SCENARIOS
    }


def test_the_prose_has_the_figures_of_the_tables() -> None:
    flat, plan = re.sub(r"\s+", " ", PAGE), memory_plan(PRECISION)
    load = Load(10_000, 10_000, computed(PRECISION).streams)
    cost = load.cost_hour(Prices(), 24)
    assert Purchase(10_000, 2).pooled_cards < load.cards  # cautious
    assert Load(100, 100, 2).cards * 2 < places_for(100)  # refuses more
    assert f"take some {round(load.cards, -2):,} cards" in flat
    assert plan.sessions(80) == 7 and "an H100 holds seven sessions" in flat
    assert f"{load.egress_gbit_s:.0f} Gbit/s are a CDN's" in flat
    assert f"sends {16 * load.bits_a_second / 1e6:.0f} Mbit/s" in flat
    assert f"for 10,000 sessions takes {plan.snapshot_bytes * 10_000 / 1e12:.0f} TB" in flat
    assert f"takes about {plan.snapshot_bytes * 8 / 1e10:.0f} s over 10 Gbit/s" in flat
    assert f"Cards are {100 * cost['cards'] / sum(cost.values()):.0f} % of" in flat
    assert f"that of {load.cards / 10_000:.2f} cards" in flat


def test_published_rates_are_the_efficiencies_that_the_prose_says() -> None:
    flat = re.sub(r"\s+", " ", PAGE)
    reached = [rate * chunk_floor_s("bf16", gpu) / 12 for rate, gpu in ((15.0, "h200"), (23.1, "h100"))]
    assert [f"{each:.2f}" for each in reached] == ["0.23", "0.37"] and "of 0.23 to 0.37 in bf16" in flat
    assert {streams(chunk_floor_s(each, "h100"), 0.3) for each in PRECISIONS} == {1}


def test_the_prose_has_what_was_simulated() -> None:
    flat, records = re.sub(r"\s+", " ", PAGE), read_records(RESULTS)
    refused = next(row["refused_share"] for row in records["admission"]["rows"] if row["offered"] == 12)
    assert f"refuses {100 * refused_share(16, 12.0):.0f} %, and here {100 * refused['mean']:.0f} %" in flat
    days = {row["spare"]: row for row in records["day"]["rows"]}
    more = days[None]["card_hours"]["mean"] / days[4]["card_hours"]["mean"] - 1
    assert round(days[None]["viewers_a_card"]["mean"], 1) == 1.2 and "four in ten are spare" in flat
    assert f"for {100 * more:.0f} % more card hours" in flat
    own, four = (days[each]["refused_share"] for each in (None, 4))
    assert abs(own["mean"] - four["mean"]) < own["half"] + four["half"]
    assert 0 < days[None]["drained_share"]["mean"] < 0.01
    waits = [
        statistics.median(run["loss"]["all_served_s"] for run in row["runs"])
        for row in records["loss"]["rows"][1:]
    ]
    assert [round(wait) for wait in waits] == [12, 2]
    assert (
        "in about twelve seconds, of which ten pass until it is known, and that of a process in two" in flat
    )
    assert all(run["jobs"]["failed"] == 0 for row in records["loss"]["rows"] for run in row["runs"])


def test_the_prose_has_the_servers_own_limits_and_delays() -> None:
    flat = re.sub(r"\s+", " ", PAGE)
    plan = {field.name: field.default for field in fields(ReplicaPlan)}
    server = {field.name: field.default for field in fields(ServerOptions)}
    assert f"a key has {RealtimeLimits().connections_per_key}** (without" in flat
    assert f"then {server['max_connections']} connections of all" in flat
    assert f"the default of {ServiceOptions().max_sessions} admitted" in flat
    assert f"keeps its place, for {ServiceOptions().idle_s:g} s at most" in flat
    assert f"has waited for {plan['more_after_s']:g} s, and one less" in flat
    assert f"were at work for {plan['fewer_after_s']:g} s" in flat
    assert f"after their lease of {plan['job_lease_s']:g} s" in flat
    assert f"given up {2 * plan['lease_s']:g} s later" in flat
    assert f"tries again every {_RETRY_S} s for two minutes" in flat
    assert f"`--disk-gb`, {ServeOptions().disk_gb:g} by default" in flat


def test_a_spread_that_is_unknown_is_not_shown_as_none() -> None:
    assert _mean({"mean": 2.0, "half": 0.25}, 10.0) == "20.0 ± 2.5"
    assert _mean({"mean": 2.0, "half": None}) == "2.0" and _mean({"mean": None, "half": None}) == ""


def test_a_document_with_another_set_of_places_is_refused() -> None:
    with pytest.raises(ValueError, match="places for the tables one and the study makes two"):
        place("<!-- table: one -->\n<!-- end -->\n", {"two": ""})


def test_the_plot_is_there_and_of_modest_size() -> None:
    assert 10_000 < (RESULTS / "fleet.png").stat().st_size < 200_000
