import pytest
import torch
from torch import nn

from recipes.tiny.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(2, 24, 48), (1, 24, 72), (3, 72, 24)])
def test_singular_values_are_brought_near_one(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert float(values.min()) > 0.3 and float(values.max()) < 1.4


def test_a_linear_map_is_learned():
    torch.manual_seed(0)
    wanted, inputs = torch.randn(12, 8), torch.randn(256, 8)
    layer = nn.Linear(8, 12, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        loss = (layer(inputs) - inputs @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-2


def test_a_parameter_without_gradient_stays():
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(4, 4))
