"""Ops: the rows of table.py as methods, each of which checks shapes and calls the backend chosen at start."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rfengine.config import Backend
from rfengine.ops.backends import SIXTEEN_BITS, backend_reasons, family, is_hopper
from rfengine.ops.table import OPS, has_backend, implementation, op_of, shape_key

logger = logging.getLogger(__name__)


class Ops:
    """The ops of one model, each bound once to its shape check and the backend that runs it. Models hold one
    of these and never call a kernel. Every op of the table is a method, which a subclass may override; its
    arguments, given by position, and its meaning are those of the function in reference.py.

    choice: backend by op; a key of shape_key is the backend of one op for one shape. folds_gate: whether
    a block adds its branch to the residual stream in the product before (gated_linear) rather than in the
    norm after it.
    """

    def __init__(self, choice: Mapping[str, str], folds_gate: bool = False) -> None:
        self.choice = dict(choice)
        self.folds_gate = folds_gate
        self._run = {name: self._bound(name) for name in dict.fromkeys(map(op_of, self.choice))}

    def _bound(self, name: str) -> Callable[..., Any]:
        op, run = OPS[name], implementation(name, self.choice[name])
        by_shape = {
            key: implementation(name, backend)
            for key, backend in self.choice.items()
            if key != name and op_of(key) == name
        }

        def by_sizes(*arguments: Any) -> Any:
            return by_shape.get(shape_key(name, *op.by_shape(*arguments)), run)(*arguments)

        chosen = by_sizes if by_shape else run

        def checked(*arguments: Any) -> Any:
            op.check(*arguments)
            return chosen(*arguments)

        return chosen if op.check is None else checked

    def backend_of(self, name: str, *arguments: Any) -> str:
        """The backend that runs an op with a choice by shape for these arguments; the first ones suffice."""
        return self.choice.get(shape_key(name, *OPS[name].by_shape(*arguments)), self.choice[name])

    def __deepcopy__(self, memo: dict) -> Ops:
        return self

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def _method(name: str) -> Callable[..., Any]:
    def run(self: Ops, *arguments: Any) -> Any:
        return self._run[name](*arguments)

    return functools.update_wrapper(run, OPS[name].reference)


for _name in OPS:
    setattr(Ops, _name, _method(_name))

REFERENCE_OPS = Ops(dict.fromkeys(OPS, "reference"))


def choose_ops(
    requested: Backend,
    device: torch.device | str,
    overrides: Mapping[str, str] | None = None,
    folds_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Ops:
    """The ops for `device`: on the requested backend, or on the best there is for "auto" in `dtype`.

    An op that the backend has no form for runs on the reference. overrides: backend by op, or by shape_key
    for one shape of a product or a convolution; tuning/autotune.py measures them, and folds_gate (see Ops).
    Raises RuntimeError when a requested backend cannot run here, with the reason, and ValueError for an op
    that is not there or that an override has no form for.
    """
    overrides = dict(overrides or {})
    reasons = backend_reasons(device)
    for key, backend in overrides.items():
        op = op_of(key)
        if op not in OPS or (key != op and OPS[op].by_shape is None):
            raise ValueError(f"there is no op {key!r}; there are {', '.join(OPS)}")
        if family(backend) in reasons and not has_backend(op, backend):
            raise ValueError(f"{op} has no form for backend {backend!r}; leave it to 'reference'")
    for backend in {requested, *overrides.values()} - {"auto"}:
        reason = reasons.get(family(backend), "it is not built into this version")
        if reason:
            known = ", ".join(("auto", *(name for name, absence in reasons.items() if not absence)))
            raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}; use one of {known}")
    if requested == "auto":
        choice = default_choice(device, dtype)
    else:
        choice = {op: requested if has_backend(op, requested) else "reference" for op in OPS}
    choice |= overrides
    logger.info("ops on %s: %s", device, choice)
    return Ops(choice, folds_gate)


def default_choice(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Backend by op that "auto" stands for on `device` in `dtype`, before anything is measured.

    On Hopper in 16 bits cuDNN attends over the window, which by estimate is a fifth faster than Triton's own
    form (docs/kernels.md); without a dtype nobody knows whether cuDNN serves it.
    """
    reasons = backend_reasons(device)
    choice = dict.fromkeys(OPS, "reference")
    if not reasons["cpu"]:  # and never Triton there: its interpreter is for tests
        choice |= _where_unasked("cpu")
    if torch.device(device).type == "cuda" and not reasons["triton"]:
        choice |= _where_unasked("triton")
    if not reasons["cublaslt"]:  # before Triton's, which nobody has timed
        choice |= _where_unasked("cublaslt")
    if dtype in SIXTEEN_BITS and not reasons["cudnn"] and is_hopper(device):
        choice["sink_window_attention"] = "cudnn"
    return choice


def _where_unasked(backend: str) -> dict[str, str]:
    """`backend` for the ops that may take it without a request."""
    return {
        name: backend for name, op in OPS.items() if backend in op.backends and backend not in op.by_request
    }
