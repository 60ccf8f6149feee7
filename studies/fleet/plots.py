"""The plot of the study: one card, admission, a day, and the loss of a machine, as one PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfengine.evaluation.plots import new_figure
from rfengine.files import replaced
from studies.fleet.service_times import EFFICIENCY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito
_BLACK, _ORANGE, _GREEN, _BLUE, _RED = "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00"
_COLOURS = (_BLUE, _ORANGE, _GREEN)
_MARKERS = "osD"
_DPI, _COLOUR_COUNT = 100, 64
_SHOWN_SPARE = "4"  # places, of the day that is drawn


def draw(records: Mapping[str, dict[str, Any]], path: Path) -> Path:
    """Draw the records into a PNG. Raises RuntimeError when matplotlib is missing."""
    figure, (card, admission, day, loss) = new_figure(12, 9, 2, 2)
    _card(card, records["card"])
    _admission(admission, records["admission"])
    _day(day, records["day"])
    _loss(loss, records["loss"])
    _save(figure, path)
    return path


def _save(figure: Figure, path: Path) -> None:
    """A PNG of a palette, which is about a third of the size of one in full colour."""
    from PIL import Image  # which matplotlib brings

    figure.set_dpi(_DPI)
    figure.canvas.draw()
    size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba()
    image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        image.quantize(_COLOUR_COUNT, dither=Image.Dither.NONE).save(partial, format="PNG", optimize=True)


def _card(axes: Axes, record: dict[str, Any]) -> None:
    precisions = list(dict.fromkeys(row["precision"] for row in record["rows"]))
    for precision, colour, marker in zip(precisions, _COLOURS, _MARKERS, strict=True):
        rows = [row for row in record["rows"] if row["precision"] == precision]
        minutes = [row["stall_s_an_hour"] / 60 for row in rows]
        axes.plot([row["sessions"] for row in rows], minutes, color=colour, marker=marker, label=precision)
    axes.set(
        title=f"One H100 at efficiency {EFFICIENCY:g} (assumed): sessions and stalls",
        xlabel="sessions on the card", ylabel="stalls, minutes in an hour",
    )  # fmt: skip
    axes.legend(title="precision", loc="upper left")


def _admission(axes: Axes, record: dict[str, Any]) -> None:
    for policy, colour in (("compute", _BLUE), ("memory", _RED)):
        rows = [row for row in record["rows"] if row["admits_by"] == policy]
        loads = [row["offered"] for row in rows]
        for name, style, what in (("gave_up_share", "-o", "gave up"), ("stalled_share", "--s", "stalled")):
            shares, halves = ([100 * row[name][part] for row in rows] for part in ("mean", "half"))
            label = f"{what}, admitted by {policy}"
            axes.errorbar(loads, shares, halves, fmt=style, color=colour, capsize=3, label=label)
    axes.set(
        title=f"{record['cards']} cards: who gives up, and who stalls (mean of {record['runs']} runs, 95 %)",
        xlabel="viewers offered, mean number at once", ylabel="share of viewers, %",
    )  # fmt: skip
    axes.legend(loc="upper left")


def _day(axes: Axes, record: dict[str, Any]) -> None:
    curves = record["curves"][_SHOWN_SPARE]
    hours = [second / 3600 for second in curves["at_s"]]
    minutes = (hours[1] - hours[0]) * 60
    places = [cards * record["places_a_card"] for cards in curves["cards"]]
    axes.step(hours, places, where="post", color=_ORANGE, label="places on cards that are up")
    axes.plot(hours, curves["watching"], color=_BLUE, label="viewers who watch")
    axes.plot(hours, curves["waiting"], color=_RED, label="viewers who wait")
    axes.set(
        title=f"A day with autoscaling, {_SHOWN_SPARE} spare places (one run)",
        xlabel=f"time of day, hours (every {minutes:.0f} minutes)", ylabel="viewers, places",
        xlim=(0, 24), xticks=range(0, 25, 4),
    )  # fmt: skip
    axes.legend(loc="upper left")


def _loss(axes: Axes, record: dict[str, Any]) -> None:
    for (cards, curves), colour in zip(record["curves"].items(), (_RED, _BLUE), strict=True):
        seconds = curves["at_s"]
        axes.step(seconds, curves["watching"], where="post", color=colour, label=f"{cards} cards: watch")
        waits = f"{cards} cards: wait for a place"
        axes.step(seconds, curves["waiting"], "--", where="post", color=colour, label=waits)
    axes.axvline(0, ymax=0.83, color=_BLACK, linewidth=0.8)
    axes.axvline(record["start_s"], ymax=0.83, color=_BLACK, linewidth=0.8, linestyle=":")
    axes.set(
        title="The loss of a machine of 8 cards at 0 s (one run each)",
        xlabel="time after the loss, s (dotted: the first new card may be up)", ylabel="viewers",
    )  # fmt: skip
    axes.set_ylim(bottom=-1, top=1.45 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=2)
