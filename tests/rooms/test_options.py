"""The options of single methods against PEFT: same start, forward, gradients and merged output."""

import math
import warnings

import pytest
import torch
from torch import nn

import peft_c
from peft_c.tuners import wavelets

FORMS = ("lora", "vector", "constant", "none")
CASES = [
    *(("waveft", "mlp", {"n_frequency": 12, "wavelet_family": family}) for family in ("db2", "sym4", "sym7", "coif4")),
    *(("waveft", "mlp", {"n_frequency": 300, "wavelet_family": family}) for family in ("db1", "db7", "coif3")),
    ("waveft", "mlp", {"n_frequency": 40, "use_idwt": False}),
    ("waveft", "mlp", {"n_frequency": 20, "proportional_parameters": True}),
    *(("road", "mlp", {"group_size": 4, "variant": variant}) for variant in ("road_1", "road_2", "road_4")),
    *(("glora", "mlp", {"r": 4, "config_A_B": form}) for form in FORMS),
    *(("glora", "mlp", {"r": 4, "config_C": form, "config_D_E": "vector"}) for form in ("vector", "none")),
    ("miss", "mlp", {"r": 5}),
    ("miss", "even", {"r": 8, "init_weights": "bat"}),
    ("miss", "even", {"r": 8, "init_weights": "mini", "mini_r": 4}),
    ("gralora", "even", {"r": 8, "hybrid_r": 2, "gralora_k": 4}),
    ("gralora", "even", {"r": 8, "hybrid_r": 2, "gralora_dropout": 0.4}),
    ("delora", "mlp", {"r": 4, "module_dropout": 0.4, "lambda_pattern": {"0": 3}}),
    ("hira", "mlp", {"r": 4, "hira_dropout": 0.4, "init_weights": "gaussian"}),
    ("hira", "conv", {"r": 4}),
    ("hira", "embedding", {"r": 4}),
    ("deft", "mlp", {"r": 4, "alpha": 3, "decomposition_method": "qr", "deft_dropout": 0.4}),
    ("deft", "mlp", {"r": 4, "para": True}),
    ("peanut", "mlp", {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5}),
    ("psoft", "mlp", {"r": 4, "psoft_svd": "lowrank", "ab_svd_init": "pissa_init", "psoft_orth": False}),
    *(
        (
            "psoft",
            "mlp",
            {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": n, "cayley_neumann_eps": 0.3},
        )
        for n in (1, 2, 3, 5)
    ),
]


def build(kind):
    torch.manual_seed(0)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 5, 5)
    if kind == "embedding":
        return nn.Sequential(nn.Embedding(20, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randint(0, 20, (2, 6))
    sizes = (32, 64, 16) if kind == "even" else (18, 36, 20)
    layers = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]))
    return layers, torch.randn(2, 3, sizes[0])


def run(package, method, kind, options):
    config = package.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
    base, x = build(kind)
    options = {"init_weights": False, **options}
    model = package.get_peft_model(base, config(target_modules=["0", "2"], **options))
    torch.manual_seed(1)
    y = model(x)
    (y.square().sum() if y.requires_grad else y.sum().requires_grad_()).backward()
    state = package.get_peft_model_state_dict(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        unmerged = model(x)
        before = [p.clone() for name, p in model.named_parameters() if "base_layer" in name]
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
        after = [p for name, p in model.named_parameters() if "base_layer" in name]
    exact = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return state, (y, unmerged, merged, dict(sorted(grads.items()))), exact


@pytest.mark.parametrize("method, kind, options", CASES, ids=lambda value: str(value).replace(" ", ""))
def test_option_agrees_with_peft(method, kind, options):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, wanted, _ = run(peft, method, kind, options)
        state, results, exact = run(peft_c, method, kind, options)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert results[3].keys() == wanted[3].keys()
    for result, value in zip((*results[:3], *results[3].values()), (*wanted[:3], *wanted[3].values()), strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=1e-5 * max(1.0, value.abs().max().item()))
    assert exact


@pytest.mark.parametrize("family", [name for name in wavelets.LENGTHS if name != "coif4"])
def test_filters_are_orthonormal(family):
    low, high = (torch.tensor(taps, dtype=torch.float64) for taps in wavelets.filters(family))
    for shift in range(0, len(low), 2):
        expected = 1.0 if shift == 0 else 0.0
        for taps in (low, high):
            assert math.isclose((taps[: len(taps) - shift] @ taps[shift:]).item(), expected, abs_tol=1e-7)
        assert abs((low[: len(low) - shift] @ high[shift:]).item()) < 1e-7
    assert math.isclose(low.sum().item(), math.sqrt(2), abs_tol=1e-9)


@pytest.mark.parametrize("family", ["db1", "db3", "sym8", "coif2"])
@pytest.mark.parametrize("size", [16, 17])
def test_analysis_is_the_transpose_of_synthesis(family, size):
    n = wavelets.padded(size, family)
    synthesis = wavelets.synthesise(torch.eye(n, dtype=torch.float64), size, family)
    torch.testing.assert_close(wavelets.analyse(torch.eye(size, dtype=torch.float64), family), synthesis.T)
    places, values = wavelets.support(torch.arange(n), size, family, synthesis)
    torch.testing.assert_close(torch.zeros_like(synthesis).scatter_add(1, places, values), synthesis)


def test_lily_layers_share_factors():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    config = peft_c.LilyConfig(r=4, stride_A=2, num_B=3, target_modules=r"\d")
    layers = list(peft_c.get_peft_model(model, config).base_model.model)
    assert len({id(layer.lily_B["default"]) for layer in layers}) == 1
    assert [layer.lily_A["default"] is layers[0].lily_A["default"] for layer in layers] == [True, True, False, False]


def test_adapters_that_depend_on_the_weight_merge_in_any_grouping():
    for method, options in (("hira", {"r": 4}), ("deft", {"r": 4}), ("glora", {"r": 4}), ("peanut", {"r": 4})):
        base, x = build("mlp")
        config = peft_c.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
        model = peft_c.get_peft_model(base, config(target_modules=["0", "2"], init_weights=False, **options)).eval()
        model.add_adapter("other", config(target_modules=["0", "2"], init_weights=False, **options))
        model.base_model.set_adapter(["default", "other"])
        with torch.no_grad():
            expected = model(x)
            model.merge_adapter(["default"])
            with pytest.warns(UserWarning, match="additionally merging"):
                model.merge_adapter(["other"])
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["bat", "mini", False])
def test_every_form_of_miss_converts_to_lora(form):
    base, x = build("even")
    options = {"r": 8, "init_weights": form, "mini_r": 4}
    model = peft_c.get_peft_model(base, peft_c.MissConfig(target_modules=["0", "2"], **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    expected = model(x)
    config, state = peft_c.convert_to_lora(model, rank=16)
    converted = peft_c.get_peft_model(model.unload(), config).eval()
    peft_c.set_peft_model_state_dict(converted, state)
    if form == "bat":  # a fit, not an identity
        assert (converted(x) - expected).square().mean() < (converted.unload()(x) - expected).square().mean()
    else:
        torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [4, 5, 8])
def test_more_orthogonalised_reflections_than_inputs_reflect_everything(r):
    torch.manual_seed(0)
    config = peft_c.HRAConfig(r=r, apply_GS=True, init_weights=False, target_modules=["0"])
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(4, 3, bias=False)), config).eval()
    x = torch.randn(2, 4)
    with model.disable_adapter():
        expected = -model(x)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
