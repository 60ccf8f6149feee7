"""What the results of gpu_gate.py come to: the goals, and a short table."""

from __future__ import annotations

from typing import Any

from kernel_cases import CASES
from measurement import OURS

Result = dict[str, Any]
Parts = dict[str, list[Result]]

ATTENTION_SHARE = 0.95  # of the faster of cuDNN and FlashAttention-3
ROW_SHARE = 0.85  # of the bandwidth of a large copy
CACHE_MS = 1.5  # for the sink and the rotation of all layers, once a chunk


def judge(parts: Parts) -> list[Result]:
    """Each goal with what was reached; None where it was not measured."""
    rows = _rows(parts)

    def median_ms(case: str, contender: str = OURS) -> float | None:
        row = rows.get(case, {}).get(contender)
        return row["timing"]["median_ms"] if row else None

    own = median_ms("sink_window_attention")
    rivals = (median_ms("sink_window_attention", name) for name in ("SDPA cuDNN", "FlashAttention-3"))
    best = min((ms for ms in rivals if ms is not None), default=None)
    share = best / own if own is not None and best is not None else None
    goals = [
        _at_least("attention, share of the better of cuDNN and FlashAttention-3", share, ATTENTION_SHARE)
    ]
    for case in CASES:
        if case.is_row:
            row = rows.get(case.name, {}).get(OURS)
            share = row["share_of_copy"] if row else None
            goals.append(_at_least(f"{case.name}, share of copy bandwidth", share, ROW_SHARE))
    evict, rephase = median_ms("ema_evict"), median_ms("rephase_keys")
    apart = None if evict is None or rephase is None else evict + rephase
    together = (ms for ms in (apart, median_ms("evict_and_rephase")) if ms is not None)
    goals.append(
        _at_most("ema_evict and rephase_keys, apart or in one, ms", min(together, default=None), CACHE_MS)
    )
    return goals


def _rows(parts: Parts) -> dict[str, dict[str, Result]]:
    """Rows with a time, by case and contender."""
    rows: dict[str, dict[str, Result]] = {}
    for row in parts.get("kernels", []):
        if row.get("timing"):
            rows.setdefault(row["case"], {})[row["contender"]] = row
    return rows


def _at_least(name: str, reached: float | None, goal: float) -> Result:
    return {"goal": name, "asked": goal, "reached": reached, "met": reached is not None and reached >= goal}


def _at_most(name: str, reached: float | None, goal: float) -> Result:
    return {"goal": name, "asked": goal, "reached": reached, "met": reached is not None and reached <= goal}


def summarise(results: Result) -> tuple[str, bool]:
    """A short table, and whether all went well: no failure, and every goal met."""
    parts: Parts = results["parts"]
    goals = judge(parts)
    failures = _failures(parts)
    tests = [result.get("outcome") for result in parts.get("tests", [])]
    parity = [result["ok"] for result in parts.get("parity", []) if "ok" in result]
    device = {name: value for result in parts.get("device", []) for name, value in result.items()}
    lines = [
        f"{device.get('gpu', 'no device')}, torch {results['torch']}, Triton {results['triton']}",
        f"tests: {tests.count('PASSED')} passed, {tests.count('FAILED') + tests.count('ERROR')} failed, "
        f"{tests.count('SKIPPED')} skipped; golden files: {sum(parity)} of {len(parity)} agree",
        *(f"{name}: {value:.2f}" for name, value in device.get("ceilings", {}).items()),
        *_kernel_lines(parts),
        *(_goal_line(goal) for goal in goals),
        *failures,
    ]
    passed = tests.count("PASSED") > 0 and bool(parity)
    return "\n".join(lines), passed and not failures and all(goal["met"] for goal in goals)


def _kernel_lines(parts: Parts) -> list[str]:
    """One line for each kernel: its share of the ceiling, and its time beside the others'."""
    lines = []
    for case, rows in _rows(parts).items():
        own = rows.get(OURS)
        share = (own["share_of_copy"] or own["share_of_product"]) if own else None
        times = ", ".join(f"{name} {row['timing']['median_ms']:.4f}" for name, row in rows.items())
        lines.append(f"{case}: {'' if share is None else f'{share:.0%} of the ceiling, '}ms: {times}")
    return lines


def _goal_line(goal: Result) -> str:
    reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.3f}"
    return f"{'met' if goal['met'] else 'NOT met'}: {goal['goal']} {reached}, asked {goal['asked']}"


def _failures(parts: Parts) -> list[str]:
    broken = (r["test"] for r in parts.get("tests", []) if r.get("outcome") in ("FAILED", "ERROR"))
    lines = [f"FAILED {test}" for test in broken]
    for result in parts.get("parity", []):
        if not result.get("ok", True):
            told = result.get("error", result.get("max_rel_err"))
            lines.append(f"APART {result['file']} {result['backend']} {result['dtype']}: {told}")
    lines += [f"WRONG {r['case']}: {r['wrong']}" for r in parts.get("kernels", []) if "wrong" in r]
    lines += [
        f"BROKE {part}: {r['failed'][-400:]}" for part, rs in parts.items() for r in rs if "failed" in r
    ]
    return lines
