"""Models that accelerate keeps on the CPU or on disk give what they give in memory, whatever is called on them."""

import pytest
import torch
from torch import nn

import peft_c as peft

accelerate = pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


X = torch.arange(12.0).reshape(2, 6) / 12
CONFIGS = {
    "lora": dict(r=2, init_lora_weights=False, modules_to_save=["head"]),
    "oft": dict(r=0, oft_block_size=2, init_weights=False),
}


def adapted(method):
    torch.manual_seed(0)
    cls = peft.LoraConfig if method == "lora" else peft.OFTConfig
    model = peft.get_peft_model(Net(), cls(target_modules=["up", "down"], **CONFIGS[method])).eval()
    model.add_adapter("b", cls(target_modules=["up"], **CONFIGS[method]))
    return model


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def dispatched(model, folder):
    device_map = {"base_model.model.up": "cpu", "base_model.model.down": "disk", "base_model.model.head": "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.fixture(params=[on_cpu, on_disk, dispatched])
def offload(request, tmp_path):
    def act(model):
        model = request.param(model, tmp_path / "weights") or model
        assert any(p.is_meta for p in model.parameters())
        return model

    return act


def merge(model):
    model.merge_adapter()
    yield model(X)
    with model.disable_adapter():
        yield model(X)
    yield model(X)
    model.unmerge_adapter()
    yield model(X)
    model.set_adapter("b")
    model.merge_adapter(safe_merge=True)
    yield model(X)


def unload(model):
    model.merge_adapter()
    yield model.merge_and_unload()(X)


def extend(model):
    torch.manual_seed(1)
    model.add_adapter("c", model.peft_config["b"])
    yield model(X)
    model.set_adapter("c")
    yield model(X)
    model.merge_adapter()
    yield model(X)
    model.delete_adapter("default")
    yield model(X)


def state(model):
    state = peft.get_peft_model_state_dict(model)
    yield from [value.clone() for value in state.values()]
    peft.set_peft_model_state_dict(model, {key: value * 2 for key, value in state.items()})
    yield from peft.get_peft_model_state_dict(model).values()
    yield model(X)


@pytest.mark.parametrize(
    ("method", "program"),
    [("lora", merge), ("lora", unload), ("lora", extend), ("lora", state), ("oft", merge), ("oft", unload)],
)
def test_offloaded_equals_in_memory(method, program, offload):
    with torch.no_grad():
        torch.testing.assert_close(list(program(offload(adapted(method)))), list(program(adapted(method))))


def test_saving(offload, tmp_path):
    model = adapted("lora")
    expected = peft.get_peft_model_state_dict(model)
    offload(model).save_pretrained(tmp_path / "adapter")
    saved = peft.load_peft_weights(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close({key: saved[key] for key in expected}, expected)


def test_an_initialisation_that_changes_the_base_weight(offload):
    torch.manual_seed(0)
    plain = Net().eval()
    expected = plain(X)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["up"]))
    model = offload(model)
    model.add_adapter("pissa", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"))
    model.set_adapter("pissa")
    torch.testing.assert_close(model(X), expected)
