"""Combining task tensors gives PEFT's numbers under PEFT's seed."""

import pytest
import torch

from .pairs import pair

pytest.importorskip("peft")
theirs, ours = pair("utils.merge_utils")
CASES = [
    ("task_arithmetic", {}),
    ("magnitude_prune", {"density": 0.7}),
    ("magnitude_prune", {"density": 0.0}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.5, "majority_sign_method": "frequency"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (3,), (2, 3, 2, 2)])
@pytest.mark.parametrize("name, options", CASES)
def test_same_numbers(name, options, shape, dtype):
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    tensors[1].flatten()[0] = 0.0
    weights = torch.tensor([0.3, -0.4, 2.0])
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(getattr(module, name)(tensors, weights, **options))
    assert results[0].dtype == results[1].dtype
    assert torch.equal(*results)


def test_density_out_of_range():
    tensor = torch.randn(4)
    with pytest.warns(UserWarning, match="no pruning"):
        assert ours.prune(tensor, 1.0, "magnitude") is tensor
    with pytest.raises(ValueError, match="should be >= 0"):
        ours.prune(tensor, -0.1, "magnitude")
    with pytest.raises(ValueError, match="Unknown method"):
        ours.prune(tensor, 0.5, "alphabetical")
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):
        ours.calculate_majority_sign_mask(tensor[None], "loudness")
