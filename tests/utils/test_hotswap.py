"""Hot-swapping: same outputs as PEFT and as a freshly loaded adapter; errors change nothing."""

import pytest
import torch

from .pairs import network, pair, with_adapters

pytest.importorskip("peft")
IDS = torch.arange(12).reshape(2, 6)
TARGETS = ["lin", "conv", "pointwise", "head"]


@pytest.fixture
def checkpoints(tmp_path):
    """Two saved adapters of other rank and alpha, with the outputs they give."""
    import peft_c

    saved = []
    for number, (r, alpha) in enumerate([(3, 5), (6, 2)]):
        torch.manual_seed(number)
        config = peft_c.LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False)
        model = peft_c.get_peft_model(network(), config).eval()
        model.save_pretrained(tmp_path / str(number))
        saved.append((tmp_path / str(number), model(IDS).detach()))
    return saved


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_like_a_fresh_load(checkpoints, first, prepare):
    import peft_c
    from peft_c.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    (path0, output0), (path1, output1) = checkpoints[first], checkpoints[1 - first]
    model = peft_c.PeftModel.from_pretrained(network(), path0)
    if prepare:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        shapes = {name: param.shape for name, param in model.named_parameters()}
    torch.testing.assert_close(model(IDS), output0)
    for path, output in ((path1, output1), (path0, output0)):
        hotswap_adapter(model, path, "default")
        torch.testing.assert_close(model(IDS), output)
    if prepare:
        assert {name: param.shape for name, param in model.named_parameters()} == shapes
        assert all(isinstance(s, torch.Tensor) for m in model.modules() for s in getattr(m, "scaling", {}).values())


def test_set_scale_after_a_swap_uses_the_new_alpha(checkpoints):
    import peft_c
    from peft_c.utils.hotswap import hotswap_adapter

    model = peft_c.PeftModel.from_pretrained(network(), checkpoints[0][0])
    hotswap_adapter(model, checkpoints[1][0], "default")
    layer = model.base_model.model.lin
    layer.set_scale("default", 3.0)
    assert layer.scaling["default"] == pytest.approx(3.0 * 2 / 6)


def test_rank_pattern_counts_for_the_scaling(tmp_path):
    import peft_c
    from peft_c.utils.hotswap import hotswap_adapter

    options = {"target_modules": ["lin", "head"], "lora_alpha": 8, "init_lora_weights": False}
    config = peft_c.LoraConfig(r=2, rank_pattern={"head": 4}, **options)
    model = peft_c.get_peft_model(network(), config).eval()
    model.save_pretrained(tmp_path)
    other = peft_c.get_peft_model(network(), peft_c.LoraConfig(r=2, **options)).eval()
    hotswap_adapter(other, tmp_path, "default")
    torch.testing.assert_close(other(IDS), model(IDS))


def test_other_adapters_stay(checkpoints):
    import peft_c
    from peft_c.utils.hotswap import hotswap_adapter

    # "default" is a part of the other name, and the other one has a layer more
    model = peft_c.PeftModel.from_pretrained(network(), checkpoints[0][0])
    config = peft_c.LoraConfig(r=2, target_modules=["lin", "embed"], init_lora_weights=False)
    model.add_adapter("default_2", config)
    before = {n: p.clone() for n, p in model.named_parameters() if "default_2" in n}
    hotswap_adapter(model, checkpoints[1][0], "default")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_missing_layers_become_zero_and_same_as_peft():
    outputs = []
    for peft in pair(""):
        model = with_adapters(peft, {"r": 3, "target_modules": ["lin", "head"]})
        hotswap = pair("utils.hotswap")[("peft", "peft_c").index(peft.__name__)]
        new = {n: p.detach() * 2 for n, p in model.state_dict().items() if "lora_" in n and "head" not in n}
        hotswap.hotswap_adapter_from_state_dict(model, new, "a0", model.peft_config["a0"])
        outputs.append(model(IDS))
        assert not model.base_model.model.head.lora_A["a0"].weight.any()
    torch.testing.assert_close(outputs[1], outputs[0])


def test_errors_change_nothing():
    import peft_c
    from peft_c.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

    model = with_adapters(peft_c, {"r": 3, "target_modules": ["lin", "head"]})
    config, before = model.peft_config["a0"], {n: p.clone() for n, p in model.state_dict().items()}
    weights = {n: p.detach() * 2 for n, p in before.items() if "lora_" in n}
    name = next(iter(weights))
    with pytest.raises(RuntimeError, match="unexpected keys found: elsewhere"):
        hotswap_adapter_from_state_dict(model, {**weights, "elsewhere": weights[name]}, "a0", config)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        hotswap_adapter_from_state_dict(model, {**weights, name: torch.zeros(3, 99)[:, :, None]}, "a0", config)
    with pytest.raises(ValueError, match=r"target rank 2, but the original rank is larger \(3\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter_from_state_dict(model, weights, "a0", config)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not isinstance(model.base_model.model.lin.scaling["a0"], torch.Tensor)


def test_padding_keeps_the_blocks_of_groups():
    from peft_c.utils.hotswap import _fill

    source = torch.arange(8.0).reshape(4, 2) + 1
    destination = torch.full((8, 2), 9.0)
    _fill(destination, source, groups=2)
    assert torch.equal(destination[:2], source[:2]) and torch.equal(destination[4:6], source[2:])
    assert not destination[2:4].any() and not destination[6:].any()
