"""add_weighted_adapter: every combination type gives PEFT's adapter, and errors leave nothing behind."""

import pytest
import torch

from .pairs import assert_same_state, network, pair, with_adapters

pytest.importorskip("peft")
TARGETS = {"target_modules": ["embed", "lin", "conv", "pointwise", "head"]}
PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
TYPES = ["linear", "cat", "svd", *PRUNING, *(f"{name}_svd" for name in PRUNING)]


def combined(peft, *configs, weights, **options):
    model = with_adapters(peft, *configs)
    torch.manual_seed(2)
    names = [f"a{i}" for i in range(len(configs))]
    model.add_weighted_adapter(names, weights, "new", **options)
    model.set_adapter("new")
    return model


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.6]])
@pytest.mark.parametrize("kind", TYPES)
def test_same_adapter(kind, weights):
    config = {"r": 3, "lora_alpha": 5, **TARGETS}
    options = {"combination_type": kind, "density": 0.6}
    theirs, ours = (combined(p, config, config, weights=weights, **options) for p in pair(""))
    ids = torch.randint(0, 19, (2, 6))
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-4, atol=1e-5)
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    assert ours.peft_config["new"].target_modules == theirs.peft_config["new"].target_modules
    if not kind.endswith("svd"):
        assert_same_state(theirs, ours)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_other_ranks_targets_and_options(kind):
    configs = [
        {"r": 2, "lora_alpha": 4, "target_modules": ["lin", "conv"]},
        {"r": 4, "lora_alpha": 4, "target_modules": ["lin", "head"], "use_rslora": True, "alpha_pattern": {"head": 9}},
    ]
    options = {"combination_type": kind, "density": 0.5, "majority_sign_method": "frequency"}
    if kind != "cat":
        options |= {"svd_rank": 3, "svd_clamp": 0.9, "svd_full_matrices": False}
    theirs, ours = (combined(p, *configs, weights=[0.5, 2.0], **options) for p in pair(""))
    ids = torch.randint(0, 19, (2, 6))
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-4, atol=1e-5)


def test_cat_is_the_weighted_sum():
    import peft_c

    config = {"r": 3, "lora_alpha": 6, "target_modules": ["lin"]}
    model = combined(peft_c, config, config, weights=[0.7, -0.4], combination_type="cat")
    layer = model.base_model.model.lin
    expected = 0.7 * layer.get_delta_weight("a0") - 0.4 * layer.get_delta_weight("a1")
    torch.testing.assert_close(layer.get_delta_weight("new"), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".a0." in n)


def test_rank_above_what_a_layer_has_is_filled_with_zeros():
    import peft_c

    config = {"r": 4, "target_modules": ["lin"]}
    model = combined(peft_c, config, config, weights=[1.0, 1.0], combination_type="svd", svd_rank=14)
    layer = model.base_model.model.lin
    expected = layer.get_delta_weight("a0") + layer.get_delta_weight("a1")
    assert layer.lora_A["new"].weight.shape == (14, 12)
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"adapters": ["a0", "nope"]}, "does not exist"),
        ({"adapters": []}, "Found no adapter"),
        ({"combination_type": "blend"}, "Invalid combination_type: blend"),
        ({"combination_type": "ties"}, "density"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "loud"}, "majority_sign_method"),
        ({"weights": [1.0]}, "one weight"),
        ({"adapters": ["a0", "a2"]}, "same r value"),
        ({"adapters": ["a0", "a3"]}, "target modules type"),
    ],
)
def test_bad_arguments_change_nothing(changes, message):
    import peft_c

    config = {"r": 3, "target_modules": ["lin"]}
    model = with_adapters(
        peft_c, config, config, {"r": 2, "target_modules": ["lin"]}, {"r": 3, "target_modules": ".*lin"}
    )
    before = list(model.state_dict())
    arguments = {"adapters": ["a0", "a1"], "weights": [1.0, 1.0], "combination_type": "linear"}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapter_name="new", **{**arguments, **changes})
    assert list(model.state_dict()) == before and "new" not in model.peft_config


def test_a_failure_on_the_way_is_taken_back(monkeypatch):
    import peft_c

    config = {"r": 3, "target_modules": ["lin", "head"]}
    model = with_adapters(peft_c, config, config)
    before, output = list(model.state_dict()), model(torch.arange(6)[None])
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no convergence")))
    with pytest.raises(RuntimeError, match="no convergence"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "new", combination_type="svd")
    assert list(model.state_dict()) == before and "new" not in model.peft_config
    assert torch.equal(model(torch.arange(6)[None]), output)


def test_an_existing_name_is_left_alone():
    import peft_c

    model = with_adapters(peft_c, {"r": 3, "target_modules": ["lin"]}, model=network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_weighted_adapter(["a0"], [3.0], "a0")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_linear_svd"])
def test_same_dtype_over_a_half_precision_base(kind):
    config = {"r": 3, **TARGETS}
    dtypes = []
    for peft in pair(""):
        model = with_adapters(peft, config, config, model=network().bfloat16())
        model.add_weighted_adapter(["a0", "a1"], [0.7, 0.4], "new", combination_type=kind, density=0.6)
        dtypes.append({name: p.dtype for name, p in model.named_parameters()})
    assert dtypes[0] == dtypes[1]
