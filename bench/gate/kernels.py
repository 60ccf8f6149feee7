"""Part kernels: every kernel checked, then timed beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch
from gate.part import Item, Setting
from gate.record import Result

from bench.kernel_cases import CASES, CASES_BY_NAME, KernelCase
from bench.kernels import Ceilings, fault_of, measure_case, seeded_draw
from rfengine.config import PRESETS
from rfengine.costs.shapes import Shapes

SMALL_CASE = "rms_norm"


def items(setting: Setting) -> list[Item]:
    if setting.small:
        return [Item(SMALL_CASE, _checked)]
    major, minor = torch.cuda.get_device_capability()
    cases = [case for case in CASES if case.is_forward and case.minimum_capability <= 10 * major + minor]
    found = [result["ceilings"] for result in setting.results("device") if "ceilings" in result]
    ceilings = Ceilings(**found[0]) if found else Ceilings.measured(Shapes())
    return [Item(case.name, partial(_rows, case, ceilings), least_s=8) for case in cases]


def _rows(case: KernelCase, ceilings: Ceilings) -> Iterator[Result]:
    fault = fault_of(case, Shapes(), seeded_draw(1))
    assert not fault, fault
    yield from map(asdict, measure_case(case, Shapes(), ceilings))


def _checked() -> Iterator[Result]:
    """A kernel by Triton's interpreter; nothing is timed."""
    draw = seeded_draw(1, "cpu", torch.float32)
    fault = fault_of(CASES_BY_NAME[SMALL_CASE], Shapes(PRESETS["tiny"]), draw)
    assert not fault, fault
    yield {"checked": SMALL_CASE}
