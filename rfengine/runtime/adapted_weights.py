"""AdaptedWeights: the weights of a model with LoRAs merged into them, in place, and the way back.

A tensor W that LoRAs change is always computed anew from its original: W in float32 plus scale times change
of each LoRA, in float32 and in an order of the LoRAs' own (changes_by_tensor), rounded once to the model's
dtype. So what it holds depends on the set of LoRAs and scales alone, and without any it has its own bits
again. The originals of what is changed are kept in host memory: as many bytes as those tensors have in the
model. They are not pinned, since torch takes up to twice the bytes for pinned memory and does not give it
back. The parameters stay where they are in memory, packed or not, so recorded CUDA graphs read the new
values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rfengine.checkpoint.lora import (
    ChangesByTensor,
    LoadedLora,
    Lora,
    changes_by_tensor,
    load_loras,
    with_loras,
)
from rfengine.checkpoint.rank_weights import rank_values, whole_with
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.cuda_graph import launching_on
from rfengine.host_state import own_state
from rfengine.memory import require_memory
from rfengine.models.fp8_products import refresh
from rfengine.runtime.chunk_runner import ChunkRunner
from rfengine.runtime.ranks import on_all
from rfengine.runtime.turns import Turns

_Changes = tuple[tuple[str, float], ...]  # sha256 and scale of each LoRA in a tensor


class AdaptedWeights:
    """What the transformer's weights are made of. One for a model: two would each take the other's changes
    for originals.

    version: counts the changes; what was computed from the weights with another version is out of date.
    loras: those that are merged, in the order given.
    """

    def __init__(self, runner: ChunkRunner, turns: Turns, compute_stream: torch.cuda.Stream | None) -> None:
        self.version = 0
        self.loras: tuple[LoadedLora, ...] = ()
        self._runner, self._turns, self._compute_stream = runner, turns, compute_stream
        self._originals: dict[str, Tensor] = {}
        self._written: dict[str, _Changes | None] = {}  # what is in them; None while it is being written

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self._runner.model.named_parameters())

    def settings(self) -> list[str]:
        """The LoRAs that have an effect, for a snapshot: sha256, scale and name of each."""
        active = [each for each in self.loras if each.lora.scale != 0]
        return sorted(f"{each.sha256} {each.lora.scale!r} {each.lora.name}" for each in active)

    def load(self, sources: Iterable[Lora | str | Path]) -> tuple[LoadedLora, ...]:
        """The LoRAs with their values; files of those that are merged already are not read again."""
        shapes = expected_shapes(self._runner.model.config)
        with own_state():
            return load_loras(sources, shapes, loaded=self.loras)

    def apply(self, loras: Sequence[LoadedLora]) -> None:
        """Make the weights those of the model with `loras` instead of those before, in place, between two
        chunks, and recompute what the runner keeps of them.

        After an error the weights are what they were, on every rank. Raises ValueError for values that are
        not finite in the model's dtype, RuntimeError from inside a chunk and where host memory cannot hold
        the originals.
        """
        if self._turns.is_own:
            raise RuntimeError("a chunk is being made; set the LoRAs once its on_step has returned")
        model = self._runner.model
        with self._turns, own_state(), launching_on(self._compute_stream, model.device):
            wanted = changes_by_tensor(loras)
            try:
                with on_all(model.parallel):
                    self._require_room(wanted)
                    self._write(wanted)
                self.loras = tuple(loras)
            except BaseException:
                self._write(changes_by_tensor(self.loras))
                raise
            finally:
                self._drop_originals()

    def _require_room(self, wanted: ChangesByTensor) -> None:
        """For the originals of `wanted`, beside those that are kept until the change is done."""
        parameters = self._parameters
        needed = sum(parameters[name].nbytes for name in wanted.keys() - self._originals.keys())
        what = "keeping the original weights of what the LoRAs change"
        require_memory(needed, torch.device("cpu"), what, "merge them for good by `rfengine convert --lora`")

    def _write(self, wanted: ChangesByTensor) -> None:
        self.version += 1
        parameters = self._parameters
        for name in sorted(self._originals.keys() | wanted.keys()):
            loras = wanted.get(name, ())
            changes = tuple((each.sha256, each.lora.scale) for each in loras)
            if self._written.get(name, ()) != changes:
                self._write_tensor(name, parameters[name], loras)
                self._written[name] = changes
        refresh(self._runner.model)
        self._runner.refresh()

    def _drop_originals(self) -> None:
        """Those of tensors that hold no change."""
        for name in [name for name in self._originals if self._written.get(name, ()) == ()]:
            del self._originals[name]
            self._written.pop(name, None)

    def _write_tensor(self, name: str, parameter: Tensor, loras: Sequence[LoadedLora]) -> None:
        if name not in self._originals:
            original = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            self._originals[name] = original.copy_(parameter)
        value = self._originals[name].to(parameter.device)
        if loras:
            value = self._adapted(value, name, loras).to(parameter.dtype)
            if not torch.isfinite(value).all():
                given = ", ".join(f"{each.lora.path} at {each.lora.scale:g}" for each in loras)
                raise ValueError(
                    f"{name} has values that are not finite in {parameter.dtype} with {given}; lower them"
                )
        self._written[name] = None
        parameter.copy_(value)

    def _adapted(self, value: Tensor, name: str, loras: Sequence[LoadedLora]) -> Tensor:
        """with_loras, of the part of a tensor that this rank holds."""
        model = self._runner.model
        if not model.parallel.divides:
            return with_loras(value, name, loras)
        whole = whole_with(name, value, expected_shapes(model.config)[name], model.parallel)
        return rank_values(name, with_loras(whole, name, loras), model.parallel)
