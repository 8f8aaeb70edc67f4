"""Several threads at once, and Ctrl-C: every call gets what it asked for."""

import signal
import sys
import threading

import pytest
import torch
from torch import nn

import peft_c as peft
from peft_c.tuners.lora import LoraLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TARGETS = ["emb", *(f"layers.{i}" for i in range(4))]
X = torch.arange(12).reshape(4, 3) % 10


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **options)
    )
    for r, name in enumerate(("one", "two"), start=1):
        config = peft.LoraConfig(r=r, target_modules=TARGETS, init_lora_weights=False, **options)
        model.add_adapter(name, config)
    return model.eval()


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run(*works):
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def asking(model, names, rounds=60):
    """A thread's work: forwards with its own adapter a row, or with the active one; each as if it were alone."""
    options = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        expected = model(X, **options)

    @torch.no_grad()
    def work():
        for _ in range(rounds):
            torch.testing.assert_close(model(X, **options), expected)

    return work


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}])
def test_each_thread_has_its_own_adapter_names(options, frequent_switches):
    model = make(**options)
    run(*(asking(model, names) for names in (["one"] * 4, ["two"] * 4, ["one", "__base__", "two", "default"], None)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_forwards_while_another_model_is_merged(frequent_switches):
    model, other = make(), make(1)
    before = [parameter.clone() for parameter in other.parameters()]

    def merge():
        for _ in range(20):
            other.merge_adapter()
            other.unmerge_adapter()

    run(merge, asking(model, ["two"] * 4), asking(model, None))
    assert all(torch.equal(left, right) for left, right in zip(before, other.parameters(), strict=True))


def test_saving_in_several_threads(tmp_path, frequent_switches):
    model = make()

    def save(name):
        for _ in range(3):
            model.save_pretrained(tmp_path / name, selected_adapters=[name])

    run(lambda: save("one"), lambda: save("two"), asking(model, ["one"] * 4))
    for name in ("one", "two"):
        saved = peft.load_peft_weights(tmp_path / name / name, device="cpu")
        torch.testing.assert_close(saved, dict(peft.get_peft_model_state_dict(model, adapter_name=name)))


def test_ctrl_c_while_deleting(monkeypatch):
    model, deleted = make(), []
    delete = LoraLayer.delete_adapter

    def interrupting(layer, name):
        delete(layer, name)
        deleted.append(layer)
        if len(deleted) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LoraLayer, "delete_adapter", interrupting)
    with pytest.raises(KeyboardInterrupt):
        model.delete_adapter("one")
    assert sorted(model.peft_config) == ["default", "two"]
    assert not any(".one." in name or name.endswith(".one") for name in model.state_dict())
