import math

import pytest
import torch

from rfengine.accuracy import beyond_reference_error, psnr_db, relative_error


def test_psnr_is_that_of_pixels_from_minus_one_to_one():
    exact = torch.zeros(1, 3, 2, 4, 4)
    assert psnr_db(exact, exact) == math.inf
    assert psnr_db(exact + 0.02, exact) == pytest.approx(40)
    assert psnr_db(exact + 5, exact + 3) == math.inf  # clamped


def test_relative_error_is_the_norm_of_the_difference_over_that_of_the_recording():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    with pytest.raises(ValueError, match="recorded"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_an_implementation_may_be_twice_as_far_from_float64_as_the_reference():
    exact = torch.ones(4, dtype=torch.float64)
    reference = torch.full((4,), 1.01)
    assert beyond_reference_error(torch.full((4,), 1.0199), reference, exact) == ""
    problem = beyond_reference_error(torch.full((4,), 1.03), reference, exact)
    assert problem == "3.00e-02 from float64, the limit is 2.00e-02"
    assert beyond_reference_error(torch.ones(4) + 2.0**-28, torch.ones(4), exact) == ""
    assert "nan from float64" in beyond_reference_error(torch.full((4,), math.nan), reference, exact)
    assert beyond_reference_error(torch.ones(3), reference, exact) == "(3,), not (4,)"
