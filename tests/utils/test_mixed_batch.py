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


LAYERS = {
    "linear": (lambda: torch.nn.Linear(6, 5), lambda: torch.randn(6, 2, 6)),
    "embedding": (lambda: torch.nn.Embedding(9, 5), lambda: torch.randint(0, 9, (6, 4))),
    "conv": (lambda: torch.nn.Conv2d(3, 5, 3, padding=1), lambda: torch.randn(6, 3, 4, 4)),
}
ORDERS = (["a", "a", "b", "b", "b", "__base__"], ["b", "a", "__base__", "b", "a", "b"])


@pytest.mark.parametrize("order", ORDERS, ids=["runs", "mixed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_in_any_order_with_and_without_gradients(kind, order):
    """Each layer type against its own rows one by one, and the gradients of these."""
    import peft_c

    torch.manual_seed(0)
    base, batch = LAYERS[kind]
    model = peft_c.get_peft_model(
        torch.nn.Sequential(base()), peft_c.LoraConfig(r=2, target_modules=["0"]), adapter_name="a"
    )
    model.add_adapter("b", peft_c.LoraConfig(r=3, target_modules=["0"]))
    layer, x = model.eval().base_model.model[0], batch()
    factors = {key: p for key, p in layer.named_parameters() if "lora_" in key}
    for p in factors.values():
        torch.nn.init.normal_(p, std=0.3)
        p.requires_grad_()

    def one_by_one():
        for row, name in zip(x.split(1), order, strict=True):
            layer.set_adapter("a" if name == "__base__" else name)
            for p in factors.values():
                p.requires_grad_()
            yield layer.base_layer(row) if name == "__base__" else layer(row)

    expected, found = torch.cat(list(one_by_one())), layer(x, adapter_names=order)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, adapter_names=order), expected)
    for key in factors:
        want, got = (torch.autograd.grad(y.sin().sum(), factors[key], retain_graph=True)[0] for y in (expected, found))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", LAYERS)
def test_few_rows_for_each_adapter(kind, max_norm):
    """Adapters of one rank, whose rows are one product where nothing speaks against it."""
    import peft_c

    torch.manual_seed(0)
    base, batch = LAYERS[kind]
    module, x, names = base(), batch(), ["a", "b", "b", "a", "b", "a"]
    if kind == "embedding":
        module.max_norm = max_norm
    config = peft_c.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = peft_c.get_peft_model(torch.nn.Sequential(module), config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.eval().base_model.model[0]
    for key, p in layer.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.3)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            found, expected = layer(x, adapter_names=names), []
            for row, name in zip(x.split(1), names, strict=True):
                layer.set_adapter(name)
                expected.append(layer(row))
            torch.testing.assert_close(found, torch.cat(expected))


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


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_that_hooks_have_seen_are_not_written_to(kind, register, grad):
    import peft_c

    make, inputs = LAYERS[kind]
    config = peft_c.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft_c.get_peft_model(torch.nn.Sequential(make()), config, "a").eval()
    model.add_adapter("b", config)
    base, x, seen = model.base_model.model[0].base_layer, inputs(), []
    names = (None, ["a", "b", "a", "b", "a", "b"], ["a", "a", "b", "b", "b", "__base__"])
    expected = [model(x) if rows is None else model(x, adapter_names=rows) for rows in names]
    getattr(base, register)(lambda module, *args: seen.append(args[-1]) if "forward" in register else None)
    with torch.set_grad_enabled(grad):
        for rows, y in zip(names, expected, strict=True):
            torch.testing.assert_close(model(x) if rows is None else model(x, adapter_names=rows), y)
    plain = base.forward(x)
    assert all(torch.equal(output, plain) for output in seen)


def test_adapters_of_an_embedding_are_mapped_over():
    import peft_c

    config = peft_c.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft_c.get_peft_model(torch.nn.Sequential(torch.nn.Embedding(9, 5)), config).eval()
    model.add_adapter("other", config)
    x = torch.randint(0, 9, (4, 6))
    key = "base_model.model.0.lora_embedding_A.default"
    stacked = torch.randn(3, 2, 9)
    for rows in ({}, {"adapter_names": ["default", "other"] * 2}):
        call = lambda A, rows=rows: torch.func.functional_call(model, {key: A}, (x,), rows)  # noqa: E731
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(call)(stacked), torch.stack([call(A) for A in stacked]))


def test_layers_without_a_weight_are_not_asked_where_it_is():
    from peft_c.tuners.tuners_utils import any_weight, move_parts

    activation = torch.nn.ReLU()
    move_parts(torch.nn.Sequential(activation), ("lora_",), lambda: any_weight(activation))
