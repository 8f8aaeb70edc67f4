"""What programs see beside a layer's numbers: dtypes under autocast, reprs of configs, warnings, helpers. All is as
with the installed peft."""

import contextlib
import copy
import dataclasses
import importlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import peft_c
from peft_c.tuners.resets import RESETS
from tests.rooms.cases import (
    METHODS,
    NO_MERGE,
    PAIRS,
    call,
    config_of,
    disturb,
    kinds_of,
    layers,
    make,
    network,
    same,
    start,
    weights,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", METHODS)
def test_the_repr_of_configs(method):
    ours, theirs = (repr(config_of(method, package=package)) for package in (peft_c, peft))
    assert ours == theirs


# those of PEFT's for caches are not needed
@pytest.mark.parametrize("method", sorted({*METHODS} - {"deft"}))
def test_the_order_of_a_layers_modules(method):
    ours, theirs = (layers(start(method, kinds_of(method)[0], package))[0] for package in (peft_c, peft))
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


def test_the_modules_of_shadow():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = []
    for package in (peft_c, peft):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
        model = package.get_peft_model(
            base.double(), package.ShadowConfig(r=2, auxiliary_loss_weight=0.0, task_type="CAUSAL_LM")
        )
        ids = torch.tensor([[1, 2, 3]])
        assert model(input_ids=ids, labels=ids).loss.dtype is torch.float32
        with pytest.raises(NotImplementedError):
            model.unmerge_adapter()
        found.append([(name, type(module).__name__) for name, module in model.named_modules()])
        found.append([layer.module_type for layer in model.get_layer_status()])
    assert found[:2] == found[2:]


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_what_a_layer_is_an_instance_of(method, kind):
    found = [layers(start(method, kind, package))[0] for package in (peft_c, peft)]
    ours, theirs = ({c for c in type(layer).__mro__ if c.__module__.startswith("torch.")} for layer in found)
    assert ours == theirs


# PEFT's DEFT shows its cache
@pytest.mark.parametrize("method", sorted({*METHODS} - {"deft"}))
def test_the_repr_of_layers(method):
    ours, theirs = (repr(start(method, kinds_of(method)[0], package)) for package in (peft_c, peft))
    assert ours == theirs


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_buffers(method, kind):
    models = [start(method, kind, package) for package in (peft_c, peft)]
    ours, theirs = ([(name, b.shape, b.dtype) for name, b in model.named_buffers()] for model in models)
    assert ours == [buffer for buffer in theirs if "boft_P" not in buffer[0]]


@pytest.mark.parametrize(("method", "option"), [("boft", "boft_dropout"), ("oft", "module_dropout")])
def test_the_modules_of_block_dropout(method, option):
    found = []
    for package in (peft_c, peft):
        layer = layers(start(method, package=package, **{option: 0.5}))[0].train()
        dropout = getattr(layer, f"{method}_dropout")["default"]
        shape = (2, 6, 4, 4) if method == "boft" else (6, 4, 4)
        torch.manual_seed(3)
        found.append(
            (type(dropout).__name__, dropout.p, dropout(torch.ones(shape)), dropout.eval()(torch.ones(shape)))
        )
        with pytest.raises(ValueError, match="should be the same"):
            dropout.train()(torch.ones(*shape[:-1], 3))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2:], found[1][2:], strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", ["active", "disabled", "merged", "none"])
def test_the_dtype_of_a_layers_output_under_autocast(method, state):
    if state == "merged" and method in NO_MERGE:
        return
    found, kind = [], kinds_of(method)[0]
    for package in (peft_c, peft):
        model = start(method, kind, package)
        layer = layers(model)[0]
        layer.register_forward_hook(lambda layer, args, output: found.append(output.dtype))
        if state == "merged":
            model.merge_adapter()
        elif state == "none":
            layer._active_adapter = []
        disabled = model.disable_adapter() if state == "disabled" else contextlib.nullcontext()
        with torch.no_grad(), disabled, torch.autocast("cpu", torch.bfloat16):
            call(model, method, network(kind)[1])
    assert found[0] is found[1]


def test_the_status_of_a_saved_module_without_parameters():
    found = []
    for package in (peft_c, peft):
        config = package.LoraConfig(target_modules=["0"], modules_to_save=["1"])
        model = package.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), config)
        found.append([dataclasses.asdict(each) for each in (model.get_model_status(), *model.get_layer_status())])
    assert found[0] == found[1]
    assert found[0][2]["devices"] == {"default": []}


def test_merging_layer_norms_again_warns_once_a_layer():
    found = []
    for package in (peft_c, peft):
        model = make("ln_tuning", "LayerNorm", package)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (model.unmerge_adapter, model.merge_adapter, model.merge_adapter, model.unmerge_adapter):
                step()
        found.append([str(warning.message) for warning in caught])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", sorted(NO_MERGE))
def test_what_cannot_be_merged_refuses_an_empty_list_too(method):
    for package in (peft_c, peft):
        with pytest.raises(NotImplementedError):
            make(method, package=package).merge_adapter(adapter_names=[])


def test_lycoris_configs():
    for package in ("peft", "peft_c"):
        base = importlib.import_module(f"{package}.tuners.lycoris_utils").LycorisConfig
        for name in ("loha", "lokr"):
            module = importlib.import_module(f"{package}.tuners.{name}.config")
            assert module.LycorisConfig is base
            assert issubclass(getattr(module, f"Lo{name[2:].title()}Config"), base)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("vera.model", "_get_in_out_features"),
        ("ia3.model", "_get_submodules"),
        ("lora.model", "_freeze_adapter"),
        ("tuners_utils", "_set_adapter"),
    ],
)
def test_helpers_that_modules_pass_on(path, name):
    for package in ("peft", "peft_c"):
        assert callable(getattr(importlib.import_module(f"{package}.tuners.{path}"), name))


# what PEFT's take beside the name
RESET_ARGUMENTS = {"boft": (False,), "c3a": (False,), "delora": (True, 3.0), "hira": (True,), "oft": (False,)}
RESET_ARGUMENTS |= {"poly": (True,), "pvera": (0.3,), "road": (False,), "vblora": (0.1,), "vera": (0.3,)}
RESET_ARGUMENTS |= {"reset_miss_parameters": (4,), "reset_bat_parameters": (4,), "reset_mini_parameters": (4, 2)}
# the form of adapter that some are for
RESET_FORMS = {"reset_bat_parameters": {"init_weights": "bat"}}
RESET_FORMS["reset_mini_parameters"] = {"init_weights": "mini", "mini_r": 2}
# PEFT draws in another order than where it makes an adapter, or less
DRAWN_OTHERWISE = {"adalora", "delora", "hira", "lily", "peanut"}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in RESETS for name in RESETS[method]])
def test_resetting_an_adapter(method, name):
    found, kind = [], kinds_of(method)[0]
    arguments = RESET_ARGUMENTS.get(name, RESET_ARGUMENTS.get(method, ()))
    for package in (peft_c, peft):
        model = make(method, kind, package, **RESET_FORMS.get(name, {}))
        layer = layers(model)[0]
        addresses = {key: p.data_ptr() for key, p in layer.named_parameters()}
        flags = {key: p.requires_grad for key, p in layer.named_parameters()}
        torch.manual_seed(3)
        getattr(layer, name)("default", *arguments)
        getattr(layer, name)("default", *arguments)
        found.append([p.detach() for _, p in sorted(layer.named_parameters())])
        if package is peft_c:
            assert {key: p.data_ptr() for key, p in layer.named_parameters()} == addresses
            assert {key: p.requires_grad for key, p in layer.named_parameters()} == flags
            getattr(layer, name)("nope", *arguments)
    for ours, theirs in zip(*found, strict=True):
        if method in DRAWN_OTHERWISE and ours.unique().numel() > 1:
            assert 0.7 < ours.std() / theirs.std() < 1.4
        else:
            torch.testing.assert_close(ours, theirs)


def test_a_reset_that_fails_changes_nothing():
    layer = layers(make("boft"))[0]
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match="Unknown initialization"):
        layer.reset_boft_parameters("default", "nope")
    assert same(before, list(layer.parameters()))


def test_a_reset_keeps_the_scale():
    layer = layers(make("loha"))[0]
    layer.set_scale("default", 3.0)
    scaling = layer.scaling["default"]
    layer.reset_adapter_parameters("default")
    assert layer.scaling["default"] == scaling


def test_unmerging_one_of_two_adapters():
    found = []
    for package in (peft_c, peft):
        model = start("glora", package=package, adapters=("default", "more"))
        disturb(model, "default")
        disturb(model, "more")
        layer = layers(model)[0]
        before = weights(model)
        layer.merge(adapter_names=["default", "more"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.unmerge(["nope"])
            layer.unmerge(adapter_names=["default"])
        found.append((list(layer.merged_adapters), *weights(model)))
        layer.unmerge(["more"])
        assert layer.merged_adapters == []
        assert package is peft or same(weights(model), before)
    assert found[0][0] == found[1][0] == ["more"]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["lora", "vector", "constant", "none"])
def test_the_paths_of_glora(form):
    found = []
    for package in (peft_c, peft):
        kinds = importlib.import_module(f"{package.__name__}.tuners.glora.layer")
        config = package.GloraConfig(target_modules=["0"], config_A_B=form)
        path = package.get_peft_model(network("Linear")[0], config).base_model.model[0].glora_A["default"]
        assert isinstance(path, kinds.GloraPath) and type(path) is getattr(kinds, type(path).__name__)
        found.append((repr(path), repr(copy.deepcopy(path)), type(pickle.loads(pickle.dumps(path))).__name__))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["boft", "deft", "hra", "miss", "oft"])
def test_scaling_warns_for_adapters_that_act(method):
    found = []
    for package in (peft_c, peft):
        model = start(method, package=package)
        model.add_adapter("other", config_of(method, package=package))
        counts = []
        for names in (["default", "other"], ["default"], []):
            for layer in layers(model):
                layer.set_adapter(names)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    layer.scale_layer(1)
                    layer.scale_layer(2)
                    layer.unscale_layer()
                counts.append(len(caught))
        found.append(counts)
    assert found[0] == found[1]


# PEFT leaves TinyLoRA's memory as it is
@pytest.mark.parametrize("value", [None, 0, "nope"])
@pytest.mark.parametrize("method", sorted({*METHODS} - {"tinylora"}))
def test_unusual_values_of_init_weights(method, value):
    found, fields = [], {field.name for field in dataclasses.fields(config_of(method))}
    name = next((n for n in ("init_weights", "init_lora_weights", "init_ia3_weights") if n in fields), None)
    for package in (peft_c, peft) if name else ():
        try:
            found.append(dict(start(method, kinds_of(method)[0], package, **{name: value}).named_parameters()))
        except Exception as error:
            found.append(type(error))
    if not found or isinstance(found[1], type):
        assert not found or found[0] is found[1]
        return
    for key, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][key])


@pytest.mark.parametrize("package", [peft_c, peft])
def test_a_dispatcher_assigned_to_the_model_module_makes_the_layers(package, monkeypatch):
    from_name = f"{package.__name__}.tuners.lora"
    model_module, layer_module = (importlib.import_module(f"{from_name}.{name}") for name in ("model", "layer"))
    config = package.LoraConfig(r=2, target_modules=["0"])
    package.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)  # its dispatchers are known by now

    class Own(layer_module.Linear):
        pass

    def dispatch(target, adapter_name, config, **kwargs):
        return Own(target, adapter_name, config=config, **kwargs)

    monkeypatch.setattr(model_module, "dispatch_megatron", dispatch)
    model = package.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    assert type(model.base_model.model[0]) is Own


def test_a_dispatcher_assigned_to_its_own_module_makes_the_layers(monkeypatch):
    # Those of bitsandbytes are imported by PEFT when they are needed.
    from peft_c import import_utils
    from peft_c.tuners.lora import bnb, layer, model

    class Own(layer.Linear):
        pass

    monkeypatch.setattr(import_utils, "is_bnb_available", lambda: True)
    monkeypatch.setattr(import_utils, "is_bnb_4bit_available", lambda: False)
    model._dispatcher_homes.cache_clear()
    monkeypatch.setattr(bnb, "dispatch_bnb_8bit", lambda target, name, config, **kwargs: None)
    config = peft_c.LoraConfig(r=2, target_modules=["0"])
    peft_c.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    own = lambda target, name, config, **kwargs: Own(target, name, config=config, **kwargs)  # noqa: E731
    monkeypatch.setattr(bnb, "dispatch_bnb_8bit", own)
    try:
        made = peft_c.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    finally:
        model._dispatcher_homes.cache_clear()
    assert type(made.base_model.model[0]) is Own


@pytest.mark.parametrize("package", [peft_c, peft])
def test_a_loading_function_assigned_to_the_model_module_loads(package, monkeypatch, tmp_path):
    config = package.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    package.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    names = []

    def load(model, state_dict, **kwargs):
        names.append(kwargs["adapter_name"])
        doubled = {key: 2 * value for key, value in state_dict.items()}
        return package.set_peft_model_state_dict(model, doubled, **kwargs)

    monkeypatch.setattr(package.peft_model, "set_peft_model_state_dict", load)
    model = package.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path)
    for key, value in package.load_peft_weights(tmp_path).items():
        assert torch.equal(package.get_peft_model_state_dict(model)[key], 2 * value)
    assert names == ["default"]
