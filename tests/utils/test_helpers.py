"""Constants, registry, matching, PCA and the small helpers against PEFT's."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from .pairs import network, pair

pytest.importorskip("peft")


def test_constants_are_equal():
    theirs, ours = pair("utils.constants")
    names = [name for name in vars(theirs) if name.isupper()]
    assert len(names) > 40
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("module", ["utils", "utils.other", "utils.constants"])
def test_public_names_are_there(module):
    theirs, ours = pair(module)
    own = [n for n, v in vars(theirs).items() if getattr(v, "__module__", "") == theirs.__name__ or n.isupper()]
    assert not [name for name in {*own, *getattr(theirs, "__all__", ())} if not hasattr(ours, name)]


def test_tables_of_two_methods_are_two_dicts():
    from peft_c.utils import constants

    assert (
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        is not constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
    )


def test_utils_do_not_import_optional_libraries():
    code = """
import sys
import peft_c.utils.other, peft_c.utils.hotswap, peft_c.optimizers, peft_c.tuners.lora.model
import peft_c.tuners.trainable_tokens, peft_c.utils.loftq_utils, peft_c.utils.quantization_utils
print([m for m in ("transformers", "accelerate", "safetensors", "huggingface_hub") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompt_cache_postprocessing():
    theirs, ours = pair("utils.constants")
    cache = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(4))
    for a, b in zip(
        theirs.bloom_model_postprocess_past_key_value(cache),
        ours.bloom_model_postprocess_past_key_value(cache),
        strict=True,
    ):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for a, b in zip(
        theirs.starcoder_model_postprocess_past_key_value(cache),
        ours.starcoder_model_postprocess_past_key_value(cache),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_enums_are_equal():
    theirs, ours = pair("utils.peft_types")
    for name in ("PeftType", "TaskType"):
        assert [m.value for m in getattr(ours, name)] == [m.value for m in getattr(theirs, name)]


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"name": "lora_"}, ValueError, "without '_' suffix"),
        ({"name": "Lora"}, ValueError, "lower case"),
        ({"name": "nosuchmethod"}, ValueError, "Unknown PEFT type"),
        ({"name": "lora"}, KeyError, "already PEFT method"),
    ],
)
def test_registration_is_checked(kwargs, error, message):
    from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft_c.utils import register_peft_method

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    with pytest.raises(error, match=message):
        register_peft_method(config_cls=object, model_cls=None, **kwargs)
    assert dict(PEFT_TYPE_TO_CONFIG_MAPPING) == before


words = st.sampled_from(["q", "v", "q_proj", "v_proj", "layers", "0", "1", "12", "attn", "mlp", "lm_head"])
keys = st.lists(words, min_size=1, max_size=5).map(".".join)
patterns = st.one_of(keys, st.sampled_from([r".*\.q_proj", r"layers\.\d+", "(q|v)", r"^layers\.0.*", "q.*", r"1\..*"]))


@settings(max_examples=300, deadline=None)
@given(key=keys, target=keys, options=st.lists(patterns, max_size=4))
def test_matching(key, target, options):
    theirs, ours = pair("utils.other")
    assert ours._is_valid_match(key, target) == theirs._is_valid_match(key, target)
    assert ours.get_pattern_key(options, key) == theirs.get_pattern_key(options, key)
    for option in options:
        found = ours.match_target_against_key(option, key), theirs.match_target_against_key(option, key)
        assert bool(found[0]) == bool(found[1])
        assert found[0] is None or isinstance(found[0], re.Match)


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.sampled_from(["transformer", "h", "3", "0", "7", "lm_head"]), max_size=4).map(".".join))
def test_layer_device_map(names):
    theirs, ours = pair("utils.integrations")

    class Model:
        hf_device_map = {names: 1, **{f"model.layers.{i}": i % 2 for i in range(4)}, "norm": "cpu"}

        class config:
            num_hidden_layers = 4

    assert ours.get_layer_device_map(Model) == theirs.get_layer_device_map(Model)


def test_submodules():
    from peft_c.utils import _get_submodules

    model = network()
    assert _get_submodules(model, "lin") == (model, model.lin, "lin")
    with pytest.raises(AttributeError):
        _get_submodules(model, "nowhere.lin")


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": 3},
        {"n_components": 3, "batch_size": 7},
        {"batch_size": 9},
        {"n_components": 3, "lowrank": True, "lowrank_seed": 1, "batch_size": 8},
    ],
)
def test_incremental_pca(options):
    theirs, ours = pair("utils.incremental_pca")
    data = torch.randn(40, 6)
    left, right = (module.IncrementalPCA(**options).fit(data) for module in (theirs, ours))
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert torch.equal(left.transform(data), right.transform(data))


@given(n=st.integers(1, 40), size=st.integers(1, 12), least=st.integers(0, 6))
def test_batches_of_pca(n, size, least):
    theirs, ours = pair("utils.incremental_pca")
    expected = list(theirs.IncrementalPCA.gen_batches(n, size, least))
    assert list(ours.IncrementalPCA.gen_batches(n, size, least)) == expected


def test_low_rank_decomposition():
    theirs, ours = pair("utils.loftq_utils")
    matrix = torch.randn(10, 7)
    left, right = (module._low_rank_decomposition(matrix, 4) for module in (theirs, ours))
    assert left.keys() == right.keys()
    for name in ("L", "R", "U", "S", "Vh"):
        torch.testing.assert_close(right[name], left[name])


def test_init_empty_weights_and_its_exemption():
    from peft_c.utils.integrations import init_empty_weights, skip_init_on_device

    class Own(nn.Module):
        @skip_init_on_device
        def add(self):
            self.real = nn.Parameter(torch.ones(2))

    register = nn.Module.register_parameter
    with init_empty_weights():
        own = Own()
        own.add()
        own.lin = nn.Linear(2, 2)
    assert own.lin.weight.is_meta and not own.real.is_meta
    with pytest.raises(RuntimeError, match="stop"), init_empty_weights(include_buffers=True):
        assert torch.zeros(2).is_meta
        raise RuntimeError("stop")
    assert nn.Module.register_parameter is register and not torch.zeros(2).is_meta


def test_shift_tokens_right():
    theirs, ours = pair("utils.other")
    labels = torch.tensor([[4, 5, -100], [-100, 6, 7]])
    assert torch.equal(ours.shift_tokens_right(labels, 0, 1), theirs.shift_tokens_right(labels, 0, 1))
    with pytest.raises(ValueError, match="pad_token_id"):
        ours.shift_tokens_right(labels, None, 1)


def test_kbit_preparation():
    theirs, ours = pair("utils.other")
    for module in (theirs, ours):
        model = network().half()
        assert module.prepare_model_for_kbit_training(model) is model
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())


def test_tied_names_of_a_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    theirs, ours = pair("utils.other")
    for tied in (True, False):
        config.tie_word_embeddings = tied
        model = transformers.LlamaForCausalLM(config)
        expected = theirs._get_module_names_tied_with_embedding(model)
        assert ours._get_module_names_tied_with_embedding(model) == expected
        assert bool(expected) == tied


def test_str_to_bool():
    from peft_c.utils.other import str_to_bool

    assert [str_to_bool(word) for word in ("Yes", "1", "off", "F")] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="maybe"):
        str_to_bool("maybe")
