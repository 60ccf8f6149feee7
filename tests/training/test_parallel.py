import pytest
import torch

from rfengine.training.parallel import average_over_workers, run_workers


def write_average(rank: int, directory) -> None:
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])]
    average_over_workers(tensors)
    torch.save(tensors, directory / f"{rank}.pt")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_ends_with_the_mean(tmp_path, workers: int):
    run_workers(write_average, workers, tmp_path)
    mean = (workers - 1) / 2
    for rank in range(workers):
        matrix, scalar = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(matrix, torch.full((2, 3), mean)) and float(scalar) == 10 * mean


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        run_workers(write_average, 0)
