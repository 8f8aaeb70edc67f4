"""CorDA, EVA and LoRA-GA against PEFT's: what they leave on a model, what the adapters start from, bad input."""

import copy
import importlib

import pytest
import torch
from variant_cases import assert_same_state, build

import peft_c


class Data(list):
    """Batches of token ids for a network that takes `input_ids`."""

    def __init__(self, batches=6, rows=4, tokens=9):
        generator = torch.Generator().manual_seed(0)
        # the same distribution in every batch, so that directions settle
        ids = torch.randint(0, 19, (rows, tokens), generator=generator)
        super().__init__({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for _ in range(batches))


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(19, 16)
        self.query = torch.nn.Linear(16, 16)
        self.key = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        return self.out(torch.tanh(self.query(h)) * self.key(h))


def reader():
    torch.manual_seed(4)
    return Reader()


def lora(package, name):
    return importlib.import_module(f"{package.__name__}.tuners.lora.{name}")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(peft, kind, method, tmp_path):
    models = []
    for package in (peft_c, peft):
        net, _, targets = build(kind)
        data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
        before = net(data)
        options = {"covariance_file": str(tmp_path / package.__name__ / "cov.pt"), "corda_method": method}
        options["cache_file"] = str(tmp_path / package.__name__ / "cache.pt")
        config = package.LoraConfig(
            target_modules=targets,
            r=4,
            init_lora_weights="corda",
            corda_config=lora(package, "config").CordaConfig(**options),
            fan_in_fan_out=kind == "conv1d",
        )
        lora(package, "corda").preprocess_corda(net, config, run_model=lambda n=net, d=data: n(d))
        again = copy.deepcopy(net)
        for module in again.modules():
            vars(module).pop("eigens", None)
        lora(package, "corda").preprocess_corda(again, config)  # from the cache
        model = package.get_peft_model(net, config)
        models += [model, package.get_peft_model(again, config)]
        torch.testing.assert_close(model(data), before, atol=1e-4, rtol=1e-4)
        assert not any(hasattr(m, a) for m in model.modules() for a in ("eigens", "sample_count", "corda_method"))
    assert_same_state(models[0], models[2], tolerance=1e-3)
    assert_same_state(models[0], models[1], tolerance=0)


@pytest.mark.parametrize(("data", "text"), [(None, "run_model"), (float("nan"), "Invalid value found in input")])
def test_corda_refusals(data, text):
    net, x, targets = build("linear")
    config = peft_c.LoraConfig(
        target_modules=targets, init_lora_weights="corda", corda_config=lora(peft_c, "config").CordaConfig()
    )
    with pytest.raises(ValueError, match=text):
        lora(peft_c, "corda").preprocess_corda(net, config, None if data is None else lambda: net(x * data))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"rho": 1.0, "whiten": True}, {"adjust_scaling_factors": False}])
def test_eva(peft, options):
    states, models = [], []
    # PEFT whitens twice where two layers share their inputs, as query and key do
    targets = ["query", "out"] if "whiten" in options else ["query", "key", "out"]
    for package in (peft_c, peft):
        config = package.LoraConfig(
            target_modules=targets,
            r=3,
            rank_pattern={"key": 4},
            init_lora_weights="eva",
            eva_config=package.EvaConfig(**options),
        )
        states.append(package.get_eva_state_dict(reader(), Data(), config, show_progress_bar=False))
        torch.manual_seed(1)
        model = package.get_peft_model(reader(), config)
        package.initialize_lora_eva_weights(model, Data(), show_progress_bar=False)
        models.append(model)
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, atol=1e-4, rtol=1e-4)
    assert_same_state(*models, tolerance=1e-4)
    mine, theirs = (model.peft_config["default"] for model in models)
    assert (mine.rank_pattern, mine.alpha_pattern) == (theirs.rank_pattern, theirs.alpha_pattern)
    assert set(mine.target_modules) == set(theirs.target_modules)


@pytest.mark.filterwarnings("ignore")
def test_eva_refusals():
    config = peft_c.LoraConfig(target_modules=["query"], r=3, init_lora_weights="eva", eva_config=peft_c.EvaConfig())
    with pytest.raises(ValueError, match="peft_config is required"):
        peft_c.get_eva_state_dict(reader(), Data())
    with pytest.raises(ValueError, match="dataloader is empty"):
        peft_c.get_eva_state_dict(reader(), [], config)
    with pytest.raises(ValueError, match="not found in the model.*nope"):
        peft_c.get_eva_state_dict(reader(), Data(), config, prepare_layer_inputs_fn={"nope": lambda *args: None})
    net = reader()
    with pytest.raises(ValueError, match="enough rows.*'query': 6"):  # forever, in PEFT
        peft_c.get_eva_state_dict(net, Data(rows=1, tokens=2), config, show_progress_bar=False)
    assert net.training and not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="must be a PeftModel"):
        peft_c.initialize_lora_eva_weights(net, Data())
    model = peft_c.get_peft_model(net, peft_c.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="only be used with `init_lora_weights='eva'`"):
        peft_c.initialize_lora_eva_weights(model, Data())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga(peft, kind, direction, scale):
    models = []
    for package in (peft_c, peft):
        net, x, targets = build(kind)
        expected = net(x)
        config = package.LoraConfig(
            target_modules=targets,
            r=4,
            lora_alpha=6,
            init_lora_weights="lora_ga",
            lora_ga_config=package.LoraGAConfig(direction=direction, scale=scale),
            fan_in_fan_out=kind == "conv1d",
        )

        def train_step(net=net, x=x):
            for part in x:
                net(part).square().sum().backward()

        torch.manual_seed(2)
        package.preprocess_loraga(net, config, train_step)
        model = package.get_peft_model(net, config)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        models.append(model)
    assert_same_state(*models, tolerance=1e-4)


def test_lora_ga_puts_everything_back():
    net, x, targets = build("linear")
    net.down.weight.requires_grad = False
    net.up.eval()
    net.up.weight.grad = torch.ones_like(net.up.weight)
    config = peft_c.LoraConfig(
        target_modules=targets, r=4, init_lora_weights="lora_ga", lora_ga_config=peft_c.LoraGAConfig()
    )

    def fail():
        net(x).sum().backward()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        peft_c.preprocess_loraga(net, config, fail)
    assert not net.down.weight.requires_grad and net.up.weight.requires_grad
    assert not net.up.training and net.down.training
    assert net.up.weight.grad.min() == 1 and not net.up._backward_hooks


@pytest.mark.parametrize(
    ("options", "r", "text"), [({"direction": "up"}, 2, "direction"), ({"scale": "?"}, 2, "scale"), ({}, 9, "2 \\* r")]
)
def test_lora_ga_refusals(options, r, text):
    net, x, targets = build("linear")
    config = peft_c.LoraConfig(
        target_modules=targets, r=r, init_lora_weights="lora_ga", lora_ga_config=peft_c.LoraGAConfig(**options)
    )
    peft_c.preprocess_loraga(net, config, lambda: net(x).sum().backward())
    with pytest.raises(ValueError, match=text):
        peft_c.get_peft_model(net, config)
