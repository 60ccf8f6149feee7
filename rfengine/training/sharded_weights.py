"""The weights of a sharded model, of which each rank reads or draws its own rows and holds no others.

The model is built without values, on the meta device, adapted and sharded; then it gets memory for its
shares, and tensor after tensor is put there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.loader import chosen_names
from rfengine.checkpoint.tensor_file import StoredTensor
from rfengine.config import WanConfig
from rfengine.models.dit import WanDiT
from rfengine.models.linear import Scale
from rfengine.training.lora import first_adapters, plain_name
from rfengine.training.parallel import Ranks
from rfengine.training.shares import put

Weights = Iterable[tuple[str, StoredTensor]]  # by the names in a checkpoint


def unread_weights(source: str, model: WanDiT, seed: int) -> Weights:
    """The weights of `model`, which is on the meta device and as its constructor made it: those of a
    checkpoint directory, of which no tensor is read yet, or where `source` is "" those that fresh_model
    draws. Raises ValueError as Checkpoint.load does, for values alone not yet."""
    if not source:
        return ((name, StoredTensor.of(value)) for name, value in _drawn(model.config, seed))
    stored, label = Checkpoint.open(source).stored("transformer")
    chosen_names(model, stored, label)
    return stored.items()


def fill_shares(
    model: WanDiT, weights: Weights, device: torch.device, ranks: Ranks, adapter_seed: int
) -> None:
    """Give a sharded model on the meta device its shares on `device`, and adapters their first values; in
    place. Every rank has to call it.

    One tensor is in memory beside the shares, and of a file this rank's rows alone. Raises ValueError for
    values that are not finite in the model's dtype and RuntimeError for a file that cannot be read; the
    other ranks raise RuntimeError then.
    """
    model.to_empty(device=device)
    state, failure = model.state_dict(), None
    places = {plain_name(name): value for name, value in state.items()}
    try:
        for name, stored in weights:
            _put_finite(name, places[name], stored)
    except (ValueError, RuntimeError) as error:
        failure = error
    reason = ranks.agreed("" if failure is None else f"rank {ranks.rank}: {failure}", patient=True)
    if failure is not None:
        raise failure
    if reason:
        raise RuntimeError(f"another rank could not load its share of the weights ({reason})")
    for name, value in first_adapters(state, adapter_seed):
        put(state[name], StoredTensor.of(value))


def fresh_model(model: WanDiT, device: torch.device, seed: int) -> WanDiT:
    """`model`, which is on the meta device, on `device` with the first values of its layers, drawn on the
    CPU: the same on every rank and as the constructor draws them after manual_seed(seed)."""
    model.to_empty(device=device)
    state = model.state_dict()
    for name, value in _drawn(model.config, seed):
        state[name].copy_(value)
    return model


def _put_finite(name: str, value: Tensor, stored: StoredTensor) -> None:
    if not torch.isfinite(put(value, stored)).all():
        raise ValueError(
            f"{name} has values that are not finite in {value.dtype}; use a wider dtype or another file"
        )


@torch.no_grad()
def _drawn(config: WanConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a new WanDiT by name, in float32 on the CPU: layer after layer in the order in which
    its constructor draws them, so that no more than one layer is in memory."""
    with torch.device("meta"):
        model = WanDiT(config)
    generator_state = torch.Generator().manual_seed(seed).get_state()
    for name, module in _children_first("", model):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator_state)
            values = _first_values(module)
            generator_state = torch.get_rng_state()
        yield from ((f"{name}{key}", value) for key, value in values.items())


def _children_first(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below and including this one, with the start of the names of its own parameters."""
    for name, child in module.named_children():
        yield from _children_first(f"{prefix}{name}.", child)
    yield prefix, module


def _first_values(module: nn.Module) -> dict[str, Tensor]:
    """The own parameters of a module on the meta device, which it leaves there, as they are at first."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return {}
    if isinstance(module, Scale):
        return {name: torch.ones(value.shape, device="cpu") for name, value in own.items()}
    if own.keys() == {"modulation"}:  # of a block and of the head, whose layers have their own
        shape = own["modulation"].shape
        return {"modulation": torch.randn(shape, device="cpu").div_(shape[-1] ** 0.5)}
    module.to_empty(device="cpu").reset_parameters()
    values = {name: value.detach() for name, value in module.named_parameters()}
    module.to("meta")
    return values
