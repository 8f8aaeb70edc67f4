"""PeftModel's switches: disable, delete, several adapters, heads that are trained in full, notebooks."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

import peft_c
from peft_c import LoraConfig, PeftModel, get_peft_model

from . import tiny

X = torch.linspace(-1, 1, 30).view(3, 10)
IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model():
    model = get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["lin1"]))
    return tiny.randomize(model).eval()


def test_disable_adapter_nests_and_restores(model):
    base, adapted = tiny.mlp()(X), model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
        assert not model.has_active_enabled_adapter
    assert torch.equal(model(X), adapted)
    with pytest.raises(ZeroDivisionError):
        with model.disable_adapter():
            raise ZeroDivisionError
    assert torch.equal(model(X), adapted)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(X), base)


def test_disable_adapter_visits_no_module_in_python(model, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("walked in Python")

    monkeypatch.setattr(torch.nn.Module, "modules", refuse)
    monkeypatch.setattr(torch.nn.Module, "named_modules", refuse)
    with model.disable_adapter():
        pass


def test_delete(model):
    two = model.set_adapter("two") or model(X)
    model.delete_adapter("one")
    assert model.active_adapter == "two" and torch.equal(model(X), two)
    model.delete_adapter("two")
    assert model.active_adapters == [] and not model.peft_config
    assert torch.equal(model(X), tiny.mlp()(X))
    with pytest.raises(ValueError, match="No adapter is active"):
        _ = model.active_peft_config
    model.add_adapter("three", LoraConfig(r=2, target_modules=["lin0"]))
    model.set_adapter("three")
    assert model.active_peft_config.r == 2


def test_delete_one_of_several_active(model):
    model.base_model.set_adapter(["one", "two"])
    model.delete_adapter("one")
    assert model.active_adapter == "two" and model.active_adapters == ["two"]
    model(X)


def test_task_model_runs_without_any_adapter():
    pytest.importorskip("transformers")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    model.delete_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, tiny.llama()(input_ids=IDS).logits)


def test_heads_are_added_once(tmp_path):
    pytest.importorskip("transformers")
    names = ["pooler"]
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=names)
    model = get_peft_model(tiny.bert(), config)
    model.add_adapter("other", copy.deepcopy(config))
    assert names == ["pooler"]
    assert all(cfg.modules_to_save == ["pooler", "classifier", "score"] for cfg in model.peft_config.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert again.peft_config["default"].modules_to_save == ["pooler", "classifier", "score"]
    assert again.modules_to_save == {"pooler", "classifier", "score"}


def test_question_answering_passes_token_types():
    pytest.importorskip("transformers")
    config = LoraConfig(r=2, target_modules=["query"], task_type="QUESTION_ANS")
    base = tiny.bert("QuestionAnswering")
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    expected = base(input_ids=IDS, token_type_ids=types).start_logits
    model = get_peft_model(base, config)
    assert torch.equal(model(input_ids=IDS, token_type_ids=types).start_logits, expected)


def test_only_one_adapter_with_trainable_tokens(tmp_path):
    config = LoraConfig(r=2, target_modules=["lin0"])
    model = get_peft_model(tiny.token_mlp(), config, adapter_name="plain")
    model.add_adapter("tokens", LoraConfig(r=2, target_modules=["lin0"], trainable_token_indices={"emb": [1, 2]}))
    tiny.randomize(model).save_pretrained(tmp_path)
    keys = {name: set(peft_c.load_peft_weights(tmp_path / name)) for name in ("plain", "tokens")}
    assert keys["tokens"] - keys["plain"] == {"base_model.model.emb.token_adapter.trainable_tokens_delta"}
    again = PeftModel.from_pretrained(tiny.token_mlp(), tmp_path / "plain", adapter_name="plain")
    again.load_adapter(tmp_path / "tokens", "tokens")
    for name in keys:
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(model.eval()(IDS), again(IDS))


def test_copies_and_pickles(model):
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        assert other.active_adapter == "one" and list(other.peft_config) == ["one", "two"]


def test_attributes_are_those_of_the_base_model(model):
    assert model.lin0 is model.base_model.model.lin0
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    assert isinstance(model.get_base_model(), tiny.MLP)


def test_html_shows_the_state(model):
    html = model._repr_html_()
    assert html.count("<tr>") == 3 and "MLP" in html and "LORA" in html
    assert "lora.Linear" in html and repr(model).startswith("PeftModel(\n")
    model.peft_config["<b>"] = model.peft_config.pop("two")
    assert "&lt;b&gt;" in model._repr_html_()
    model.merge_adapter(["one"])
    with model.disable_adapter():
        pass
    from peft_c.notebook import describe

    facts = describe(model)
    assert facts["adapters"]["one"]["merged"] is True and facts["adapters"]["one"]["active"]
    assert facts["adapters"]["one"]["parameters"] == sum(
        param.numel() for name, param in model.named_parameters() if ".one." in name
    )


def test_signature_helpers_leave_the_class_alone():
    pytest.importorskip("transformers")
    from peft_c.helpers import update_signature

    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = inspect.signature(PeftModel.forward)
    update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "input_ids" in str(inspect.signature(model.forward))
    assert inspect.signature(PeftModel.forward) == before
    assert model(input_ids=IDS).logits.shape == (2, 6, 64)
    with pytest.raises(ValueError, match="not supported"):
        update_signature(model, method="backward")


def test_input_dtype_casting_can_be_disabled_for_every_layer():
    from peft_c.helpers import disable_input_dtype_casting

    config = LoraConfig(r=2, target_modules=["lin0"], trainable_token_indices={"emb": [1]})
    model = get_peft_model(tiny.token_mlp(), config)
    layer = model.base_model.model.mlp.lin0
    with disable_input_dtype_casting(model):
        assert layer.cast_input_dtype_enabled is False
    assert layer.cast_input_dtype_enabled is True


def test_scaling_is_restored_after_an_error(model):
    from peft_c.helpers import rescale_adapter_scale

    before = dict(model.lin0.scaling)
    with pytest.raises(ZeroDivisionError):
        with rescale_adapter_scale(model, 0.5):
            assert model.lin0.scaling["one"] == before["one"] / 2
            raise ZeroDivisionError
    assert model.lin0.scaling == before


def test_mixed_model_loads_and_switches(tmp_path):
    config = LoraConfig(r=2, target_modules=["lin0"])
    tiny.randomize(get_peft_model(tiny.mlp(), config)).save_pretrained(tmp_path)
    mixed = peft_c.PeftMixedModel.from_pretrained(tiny.mlp(), tmp_path, adapter_name="one").eval()
    one = mixed(X)
    mixed.load_adapter(tmp_path, "two")
    mixed.set_adapter(["one", "two"])
    base = tiny.mlp()
    with torch.no_grad():
        delta = one - base(X)
    assert delta.abs().max() > 0
    with mixed.disable_adapter():
        assert torch.equal(mixed(X), base(X))
    with pytest.raises(ValueError, match="'nope'.*not found"):
        mixed.set_adapter("nope")
    with pytest.raises(NotImplementedError):
        mixed.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        mixed.load_adapter(tmp_path, "three")
    assert list(mixed.peft_config) == ["one", "two"]


def test_no_warning_in_ordinary_use(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["lin0"], lora_bias=True))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(tiny.mlp(), tmp_path)
