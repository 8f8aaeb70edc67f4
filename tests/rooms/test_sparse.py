"""Rooms that add to some elements: merging touches and keeps no others."""

import pytest
import torch
from torch import nn

from peft_c import ShiraConfig, SupertuningConfig, get_peft_model
from peft_c.tuners import law, undo

CONFIGS = {
    "shira": ShiraConfig(target_modules=["0"], r=2, init_weights=False, random_seed=1),
    "supertuning": SupertuningConfig(target_modules=["0"], sparsity=0.97, init_weights=False),
}


@pytest.fixture(params=CONFIGS)
def layer(request):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(320, 256)), CONFIGS[request.param])
    return model.base_model.model[0]


def test_the_record_has_changed_elements_only_and_restores_them(layer):
    before = layer.weight.clone()
    expected = before + layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.weight, expected)
    changed = (layer.weight != before).sum().item()
    assert 0 < undo.record_bytes(layer) <= 12 * layer.elements("default")[0].numel() < 0.2 * layer.weight.nbytes
    assert changed <= layer.elements("default")[0].numel()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_what_others_write_elsewhere_stays(layer, recwarn):
    before = layer.weight.clone()
    layer.merge()
    places = layer.elements("default")[0]
    other = next(i for i in range(layer.weight.numel()) if i not in set(places.tolist()))
    with torch.no_grad():
        layer.weight.view(-1)[other] = 7.0
    layer.unmerge()
    assert not recwarn.list
    before.view(-1)[other] = 7.0
    assert torch.equal(layer.weight, before)


def test_a_changed_element_is_noticed(layer):
    before = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.weight.view(-1)[layer.elements("default")[0][0]] += 1.0
    with pytest.warns(match="was written to"):
        layer.unmerge()
    before.view(-1)[layer.elements("default")[0][0]] += 1.0
    torch.testing.assert_close(layer.weight, before)


def test_a_bare_weight_while_merged(layer):
    before = layer.weight.clone()
    layer.merge()
    assert torch.equal(law.bare_weight(layer), before)


def test_nan_changes_nothing(layer):
    before = layer.weight.clone()
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged
