"""One update of a model: rates, passes, and two optimizers that share its parameters."""

import pytest
import torch
from torch import Tensor, nn

from rfengine.training.checkpoints import TrainingCheckpoints, TrainState
from rfengine.training.config import AdamConfig
from rfengine.training.learner import Learner, WeightAverage
from rfengine.training.parallel import Ranks
from rfengine.training.stages import TrainingStage

ADAM = AdamConfig(1e-2, betas=(0.9, 0.98), warm_up=2)


def test_learning_rate_warms_up_holds_and_falls():
    config = AdamConfig(1.0, warm_up=100, fall=0.5)
    assert config.share_at(0, 1000) == pytest.approx(0.01)
    assert config.share_at(100, 1000) == 1.0
    assert config.share_at(750, 1000) == pytest.approx(0.5)
    assert config.share_at(1000, 1000) == pytest.approx(0.02)


def two_optimizers() -> Learner:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return Learner(
        "small", model, ADAM, 10, 2, Ranks(), torch.optim.SGD([model.weight], lr=0.5, momentum=0.9)
    )


def learn(learner: Learner, update: int) -> dict[str, float]:
    def loss_of(index: int) -> tuple[Tensor, dict[str, float]]:
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(2 * update + index))
        return learner.model(inputs).square().mean(), {"pass": float(index)}

    return learner.learn(update, loss_of)


def test_an_update_uses_each_optimizer_at_its_share_of_its_own_peak():
    learner = two_optimizers()
    figures = learn(learner, 0)
    assert figures.keys() == {"small_loss", "small_gradient_norm", "pass"}
    assert figures["pass"] == 0.5  # the mean over both passes
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in learner.optimizers]
    assert rates == [[0.25], [0.005]]
    counts = [sum(map(len, (group["params"] for group in o.param_groups))) for o in learner.optimizers]
    assert counts == [1, 1]


def test_a_checkpoint_of_two_optimizers_resumes_bit_by_bit(tmp_path):
    whole = two_optimizers()
    state = TrainState(TrainingStage((whole,), {}))
    for update in range(4):
        learn(whole, update)
        if update == 1:
            TrainingCheckpoints(tmp_path, {}, 1).save(state, wait=True)
    resumed = two_optimizers()
    state = TrainState(TrainingStage((resumed,), {}))
    assert TrainingCheckpoints(tmp_path, {}, 1).restore(state)
    for update in (2, 3):
        learn(resumed, update)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def constant(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_average_follows_fast_at_first_and_slowly_later():
    average, layer = WeightAverage(constant(0.0), decay=0.99), constant(1.0)
    average.update(layer, step=0)
    assert float(average.values["weight"]) == pytest.approx(0.9)
    average.values["weight"].zero_()
    average.update(layer, step=10_000)
    assert float(average.values["weight"]) == pytest.approx(0.01)


def test_average_without_decay_is_the_weights():
    average, layer = WeightAverage(constant(0.0), decay=0.0), constant(0.1)
    average.update(layer, step=0)
    assert torch.equal(average.values["weight"], layer.weight)
