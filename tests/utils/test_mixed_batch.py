"""Mixed batches: what is passed to one forward call is gone after it, however it ends."""

import pytest
import torch

from .pairs import network, pair, with_adapters

IDS = torch.arange(18).reshape(3, 6) % 19
CONFIGS = ({"r": 3, "target_modules": ["embed", "lin"]}, {"r": 2, "target_modules": ["lin", "head"]})


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_each_sample_gets_its_adapter():
    import peft_c

    model = with_adapters(peft_c, *CONFIGS)
    mixed = model(IDS, adapter_names=["a1", "__base__", "a0"])
    for row, name in enumerate(["a1", None, "a0"]):
        if name is None:
            with model.disable_adapter():
                expected = model(IDS[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected)
    assert hooks(model) == 0


def test_same_as_peft():
    pytest.importorskip("peft")
    names = ["a1", "__base__", "a0"]
    theirs, ours = (with_adapters(p, *CONFIGS)(IDS, adapter_names=names) for p in pair(""))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["a0", "a1"], ValueError, "Length of `adapter_names`"),
        (["a0", "a1", "nope"], ValueError, "non-existing adapter.*nope"),
        ("a0", TypeError, "expected a list of str"),
    ],
)
def test_errors_leave_nothing_behind(names, error, message):
    import peft_c

    model = with_adapters(peft_c, *CONFIGS)
    expected = model(IDS)
    with pytest.raises(error, match=message):
        model(IDS, adapter_names=names)
    assert hooks(model) == 0
    assert torch.equal(model(IDS), expected)


def test_an_exception_in_the_middle_leaves_nothing_behind():
    import peft_c

    model = with_adapters(peft_c, *CONFIGS)
    expected = model(IDS)
    handle = model.base_model.model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS, adapter_names=["a0", "a1", "__base__"])
    handle.remove()
    assert hooks(model) == 0
    assert torch.equal(model(IDS), expected)


def test_not_in_training_mode():
    import peft_c

    model = with_adapters(peft_c, *CONFIGS).train()
    with pytest.raises(ValueError, match="training mode"):
        model(IDS, adapter_names=["a0", "a1", "a0"])
    assert hooks(model) == 0


def test_beams_repeat_the_names():
    import peft_c
    from peft_c.tuners.lora.batch_hooks import per_call_arguments

    model = with_adapters(peft_c, *CONFIGS)
    seen = []
    with per_call_arguments(model.base_model, adapter_names=["a0", "a1", "__base__"], alora_offsets=None, num_beams=2):
        model.base_model.model.lin.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["adapter_names"]), with_kwargs=True
        )
        model(IDS.repeat_interleave(2, 0))
    assert seen == [["a0", "a0", "a1", "a1", "__base__", "__base__"]]


def test_a_network_without_an_encoder_has_none():
    from peft_c.tuners.lora.batch_hooks import _get_encoder

    model = network()
    assert _get_encoder(model) is None
    model.get_encoder = lambda: model
    assert _get_encoder(model) is None
    model.get_encoder = lambda: model.lin
    assert _get_encoder(model) is model.lin
