"""docs/scaling.md holds what the study's records and the code say."""

from __future__ import annotations

import re

import pytest

from studies.fleet.capacity import Load, Prices, memory_plan
from studies.fleet.measure import RESULTS
from studies.fleet.run import DOCUMENT, read_records
from studies.fleet.scenarios import PRECISION, SCENARIOS
from studies.fleet.service_times import computed
from studies.fleet.tables import place, tables

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
    assert f"take some {round(load.cards, -2):,} cards" in flat
    assert plan.sessions(80) == 7 and "an H100 holds seven sessions" in flat
    assert f"{load.egress_gbit_s:.0f} Gbit/s are a CDN's" in flat
    assert f"sends {16 * load.bits_a_second / 1e6:.0f} Mbit/s" in flat
    assert f"for 10,000 sessions takes {plan.snapshot_bytes * 10_000 / 1e12:.0f} TB" in flat
    assert f"takes about {plan.snapshot_bytes * 8 / 1e10:.0f} s over 10 Gbit/s" in flat
    assert f"Cards are {100 * cost['cards'] / sum(cost.values()):.0f} % of" in flat
    assert f"that of {load.cards / 10_000:.2f} cards" in flat


def test_a_document_with_another_set_of_places_is_refused() -> None:
    with pytest.raises(ValueError, match="places for the tables one and the study makes two"):
        place("<!-- table: one -->\n<!-- end -->\n", {"two": ""})


def test_the_plot_is_there_and_of_modest_size() -> None:
    assert 10_000 < (RESULTS / "fleet.png").stat().st_size < 200_000
