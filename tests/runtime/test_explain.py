"""explain: per layer the path and the reason, as text and as a table."""

import torch
from torch import nn
from toy_layer import make

import peft_c
from peft_c.fast import explain, fast_paths
from peft_c.tuners import undo

PATHS = ["C", "merged", "composed"]


def model():
    layers = nn.Sequential(make(24, 40), make(40, 24), make(24, 24, dropout=0.1), nn.Linear(24, 2))
    layers[1].merged_adapters = ["default"]
    layers[2].lora_variant["default"] = object()
    return layers


def test_lines():
    lines = explain(model())
    assert [line.path for line in lines] == PATHS
    assert [line.name for line in lines] == ["0", "1", "2"]
    assert "variant" in lines[2].reason and lines[0].adapters == ("default",)
    assert lines.counts() == {"C": 1, "merged": 1, "composed": 1}


def test_printing():
    lines = explain(model())
    text = str(lines)
    assert text == repr(lines) and "3 tuner layers: 1 C, 1 merged, 1 composed" in text
    columns = [line.index(f" {path} ") for line, path in zip(text.splitlines()[1:4], PATHS, strict=True)]
    assert len(set(columns)) == 1
    page = lines._repr_html_()
    assert page.count("<tr>") == 4 and "&lt;" not in page.replace("&lt;lambda&gt;", "")
    assert str(explain(nn.Linear(2, 2))) == "no tuner layer found"


def test_switch_and_input_are_seen():
    layer = make()
    with fast_paths(False):
        assert explain(layer)[0].path == "composed" and "switched off" in explain(layer)[0].reason
    assert explain(layer)[0].name == ""
    assert "unsupported dtype" in explain(layer, torch.zeros(2, 24, dtype=torch.long))[0].reason
    layer.lora_A["default"].to("meta")
    assert "meta device" in explain(layer)[0].reason


def test_what_unmerging_needs_is_shown():
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(300, 200)), peft_c.LoraConfig(r=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    before = dict(layer.__dict__)
    assert "unmerge" not in str(explain(model)) and layer.__dict__ == before
    model.merge_adapter()
    held = undo.record_bytes(layer)
    assert f"{held / 2**10:.1f} KiB are held to unmerge" in explain(model)[0].reason
    model.unmerge_adapter()
    assert "unmerge" not in str(explain(model))


def test_kept_weights_are_shown():
    base = nn.Sequential(nn.Linear(600, 600))
    model = peft_c.get_peft_model(base, peft_c.FourierFTConfig(target_modules=["0"], n_frequency=10)).eval()
    with torch.no_grad():
        model(torch.zeros(600, 600)), model(torch.zeros(600, 600))
    assert "1.4 MiB of adapted weights are kept" in explain(model)[0].reason
