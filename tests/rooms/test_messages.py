"""What layers are called in messages."""

from torch import nn

from peft_c import HRAConfig, LoraConfig, get_peft_model
from peft_c.tuners import law


def test_layers_are_called_by_their_method():
    for config, name in ((HRAConfig(target_modules=["0"]), "hra.HRALinear"), (LoraConfig(), "lora.Linear")):
        config.target_modules = ["0"]
        layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0]
        assert law.describe(layer) == name


def test_layers_of_other_packages_are_called_by_their_module():
    layer = type("Layer", (), {"__module__": "other.svf"})()
    assert law.describe(layer) == "svf.Layer"
