"""The update of one model by its optimizers, and the moving average of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rfengine.training.config import AdamConfig
from rfengine.training.parallel import Ranks, full_tensors

Figures = dict[str, float]


class Learner:
    """One model and its optimizers: accumulates the passes of a step, then updates the weights once.

    first: an optimizer of some of the parameters, whose rates follow the curve of `config` from their own
    peaks; AdamW takes the others that are trained. updates: planned in all. accumulation: passes of an
    update, which the ranks share.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: AdamConfig,
        updates: int,
        accumulation: int,
        ranks: Ranks,
        first: torch.optim.Optimizer | None = None,
    ) -> None:
        self.name, self.model, self.config, self.ranks = name, model, config, ranks
        self.updates, self.passes = updates, ranks.passes(accumulation)
        taken = {id(value) for group in first.param_groups for value in group["params"]} if first else set()
        others = [value for value in model.parameters() if value.requires_grad and id(value) not in taken]
        adam = torch.optim.AdamW(
            others, lr=config.rate, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps
        )
        self.optimizers = (adam,) if first is None else (first, adam)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def learn(self, update: int, loss_of: Callable[[int], tuple[Tensor, Figures]]) -> Figures:
        """Accumulate `loss_of(pass)` over this rank's passes, average over the ranks, clip, step once.

        loss_of also returns what to log of its pass. Returns the means over all passes, loss and gradient
        norm among them. Raises RuntimeError when either is not finite, before anything is changed.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        figures = {f"{self.name}_loss": 0.0}
        for index in self.passes:
            loss, watched = loss_of(index)
            (loss / len(self.passes)).backward()
            for name, value in [(f"{self.name}_loss", float(loss.detach())), *watched.items()]:
                figures[name] = figures.get(name, 0.0) + value / len(self.passes)
        parameters = [value for value in self.model.parameters() if value.grad is not None]
        self.ranks.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        norm = float(full_tensors({"norm": norm})["norm"])
        figures = {name: self.ranks.mean(value) for name, value in figures.items()}
        total = figures[f"{self.name}_loss"]
        if not torch.isfinite(torch.tensor((total, norm))).all():
            raise RuntimeError(
                f"the {self.name}'s loss is {total} and its gradient's norm {norm} in its update {update}; "
                "resume from the last checkpoint with a lower rate"
            )
        self._step(self.config.share_at(update, self.updates))
        return figures | {f"{self.name}_gradient_norm": norm}

    def _step(self, share: float) -> None:
        """Update the weights at this share of the peak rates."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.step()


class WeightAverage:
    """Exponential moving average of a module's parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Blend the parameters in; early on the average follows faster, so that it forgets the start."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        values = module.state_dict()
        torch._foreach_lerp_(
            list(self.values.values()), [values[name].detach() for name in self.values], weight
        )

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Take the parameters as they are, before averaging begins."""
        for name, value in module.state_dict().items():
            self.values[name].copy_(value)
