"""Part kernels: every kernel checked, then timed beside PyTorch; last, which takes longest, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gate.part import Item, Setting
from gate.record import Result
from kernel_cases import CASES, CASES_BY_NAME, KernelCase
from measurement import Ceilings, check, measure_case, measure_compiled, measured_ceilings, seeded_draw

from rfengine.config import PRESETS
from rfengine.costs.shapes import Shapes

SMALL_CASE = "rms_norm"


def items(setting: Setting) -> list[Item]:
    if setting.small:
        return [Item(SMALL_CASE, _checked)]
    major, minor = torch.cuda.get_device_capability()
    cases = [case for case in CASES if case.is_forward and case.minimum_capability <= 10 * major + minor]
    found = [result["ceilings"] for result in setting.results("device") if "ceilings" in result]
    ceilings = Ceilings(**found[0]) if found else measured_ceilings()
    return [
        *(Item(case.name, _rows(measure_case, case, ceilings), least_s=2) for case in cases),
        *(
            Item(f"{case.name}, compiled", _rows(measure_compiled, case, ceilings), least_s=8)
            for case in cases
        ),
    ]


def _rows(
    measure: Callable[..., Iterator[object]], case: KernelCase, ceilings: Ceilings
) -> Callable[[], Iterator[Result]]:
    return lambda: (row.to_dict() for row in measure(case, Shapes(), ceilings))


def _checked() -> Iterator[Result]:
    """A kernel by Triton's interpreter; nothing is timed."""
    check(CASES_BY_NAME[SMALL_CASE], Shapes(PRESETS["tiny"]), seeded_draw(1, "cpu", torch.float32))
    yield {"checked": SMALL_CASE}
