"""Every method on bf16 layers against the same in fp64: as near to it as PEFT, within a rounding."""

import copy
import warnings

import pytest
import torch
from torch import nn

import peft_c
from tests.rooms.cases import NO_MERGE, PAIRS, config_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = [method for method, kind in PAIRS if kind == "Linear"]
ROUNDING = 2.0**-8
# no reference: PEFT computes in the dtype of the adapter only, or needs to be told the task
NO_REFERENCE = {"adamss", "poly"}


def layer(package, method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64)).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.get_peft_model(base, config_of(method, "Linear", package), autocast_adapter_dtype=False)
    return model.base_model.model[0].eval()


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(set(LINEAR) - NO_REFERENCE))
def test_errors_are_no_larger(method):
    ours, theirs = (layer(package, method) for package in (peft_c, peft))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(24, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    for rows in (x[:3], x):
        wanted = exact(rows.double())
        assert error(ours(rows), wanted) <= 2 * error(theirs(rows), wanted) + ROUNDING
    if method not in NO_MERGE:
        for merged in (ours, theirs, exact):
            merged.merge()
        mine, other = (error(merged.base_layer.weight, exact.base_layer.weight) for merged in (ours, theirs))
        assert mine <= 1.5 * other + 0.1 * ROUNDING
