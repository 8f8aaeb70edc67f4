"""Every method that learns a prompt, on every kind of model it is for, against the installed peft: the same names,
values, losses, gradients, generated tokens and files."""

import copy

import pytest
import torch

import peft_c

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 3
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0}
BERT = {**SIZES, "intermediate_size": 32, "num_labels": 3}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
MODELS = {
    "CAUSAL_LM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "SEQ_CLS": ("BertForSequenceClassification", "BertConfig", BERT),
    "TOKEN_CLS": ("BertForTokenClassification", "BertConfig", BERT),
    "QUESTION_ANS": ("BertForQuestionAnswering", "BertConfig", {**BERT, "num_labels": 2}),
    "FEATURE_EXTRACTION": ("BertModel", "BertConfig", BERT),
}
CONFIGS = {
    "prompt": ("PromptTuningConfig", {}),
    "sampled prompt": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "lstm p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected prefix": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 1}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 2, "num_ranks": 2}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]}),
    "decaying cpt": (
        "CPTConfig",
        {
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_tokens_type_mask": [2, 4, 6, 8],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.5,
        },
    ),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
}
FOR_ALL = ("prompt", "sampled prompt", "p-tuning", "lstm p-tuning", "prefix", "projected prefix", "cartridge")
# PEFT passes no tasks on for the models that are not here.
BY_TASK = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
PAIRS = [(method, task) for method in FOR_ALL for task in MODELS]
PAIRS += [("multitask", task) for task in BY_TASK]
PAIRS += [(method, "CAUSAL_LM") for method in ("cpt", "decaying cpt", "adaption")]
each = pytest.mark.parametrize(("method", "task"), PAIRS)


def base(task):
    torch.manual_seed(0)
    model_cls, config_cls, options = MODELS[task]
    return getattr(transformers, model_cls)(getattr(transformers, config_cls)(**options)).eval()


def config(package, method, task):
    name, options = CONFIGS[method]
    if method != "adaption" and "cpt" not in method:
        options = {**options, "num_virtual_tokens": TOKENS}
    return getattr(package, name)(task_type=task, **copy.deepcopy(options))


def make(package, method, task, **kwargs):
    model = base(task)
    torch.manual_seed(1)
    model = package.get_peft_model(model, config(package, method, task), **kwargs)
    with torch.no_grad():  # gates and differences are zero at first
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name or "delta_embedding" in name:
                parameter.fill_(0.3)
    return model


def inputs(method, task):
    torch.manual_seed(2)
    ids = torch.randint(1, 40, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    result = {"input_ids": ids, "attention_mask": mask}
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        result["labels"] = ids.clone()
    elif task == "SEQ_CLS":
        result["labels"] = torch.tensor([0, 2])
    elif task == "TOKEN_CLS":
        result["labels"] = torch.randint(0, 3, (2, 5 + (TOKENS if method not in PREFIXES else 0)))
    elif task == "QUESTION_ANS":
        result.update(start_positions=torch.tensor([0, 1]), end_positions=torch.tensor([2, 2]))
    if method == "multitask":
        result["task_ids"] = torch.tensor([1, 0])
    return result


PREFIXES = ("prefix", "projected prefix", "cartridge")


def both(method, task, **kwargs):
    return make(peft_c, method, task, **kwargs), make(peft, method, task, **kwargs)


def same(left, right):
    torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


@each
def test_a_new_prompt_has_the_same_values_names_and_flags(method, task):
    ours, theirs = both(method, task)
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name, value in right.items():
        assert torch.equal(left[name], value), name
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert flags[0] == flags[1]
    options = [model.peft_config["default"].to_dict() for model in (ours, theirs)]
    for values in options:  # PEFT names the head's modules twice
        values["modules_to_save"] = sorted(set(values.get("modules_to_save") or ()))
    assert options[0] == options[1]


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtypes_of_what_a_forward_returns(method, task, dtype):
    found = []
    for model in both(method, task):
        output = model.to(dtype)(**inputs(method, task))
        found.append({name: value.dtype for name, value in output.items() if isinstance(value, torch.Tensor)})
    assert found[0] == found[1]


@each
def test_loss_output_and_gradients(method, task):
    results = []
    for model in both(method, task):
        output = model(**inputs(method, task))
        value = output.loss if "loss" in output and output.loss is not None else output[0].square().mean()
        value.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output[0], output[1], value, grads))
    (*ours, our_grads), (*theirs, their_grads) = results
    for left, right in zip(ours, theirs, strict=True):
        if torch.is_tensor(right):
            same(left, right)
    assert our_grads.keys() == their_grads.keys() and our_grads
    for name, grad in their_grads.items():
        same(our_grads[name], grad)


@each
def test_embeddings_and_position_ids_as_input(method, task):
    results = []
    for model in both(method, task):
        given = inputs(method, task)
        ids = given.pop("input_ids")
        given["inputs_embeds"] = model.get_input_embeddings()(ids)
        if task == "CAUSAL_LM":
            given["position_ids"] = torch.arange(5).expand(2, -1)
        results.append(model(**given)[0])
    same(*results)


@pytest.mark.parametrize(("method", "task"), [pair for pair in PAIRS if pair[1] in ("CAUSAL_LM", "SEQ_2_SEQ_LM")])
def test_generated_tokens(method, task):
    given = {key: value for key, value in inputs(method, task).items() if key != "labels"}
    results = [
        model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False) for model in both(method, task)
    ]
    assert torch.equal(*results)


@each
def test_without_the_prompt_it_is_the_base_model(method, task):
    given = inputs("prefix", task)
    model, plain = make(peft_c, method, task), base(task)
    with torch.no_grad(), model.disable_adapter():
        with model.disable_adapter():
            same(model(**given)[0], plain(**given)[0])
        same(model(**given)[0], plain(**given)[0])
        if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            ids = {"input_ids": given["input_ids"], "max_new_tokens": 4, "do_sample": False}
            tasks = {key: value for key, value in inputs(method, task).items() if key == "task_ids"}
            assert torch.equal(model.generate(**ids, **tasks), plain.generate(**ids))
    with_prompt = model(**inputs(method, task))[0]
    assert with_prompt.shape != plain(**given)[0].shape or not torch.allclose(with_prompt, plain(**given)[0])


@each
def test_files_are_read_by_either(method, task, tmp_path):
    ours, theirs = both(method, task)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "delta" not in name:
                parameter.data.add_(0.1)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    given = inputs(method, task)
    results = []
    for package, folder in ((peft_c, "theirs"), (peft, "ours"), (peft_c, "ours"), (peft, "theirs")):
        model = package.PeftModel.from_pretrained(base(task), tmp_path / folder)
        results.append(model(**given)[0])
    for result in results[1:]:
        same(result, results[0])


@each
def test_a_second_adapter_is_added_used_and_deleted(method, task):
    given = inputs(method, task)
    results = []
    for package in (peft_c, peft):
        model = make(package, method, task)
        torch.manual_seed(3)
        model.add_adapter("other", config(package, method, task))
        first = model(**given)[0]
        model.set_adapter("other")
        outputs = [first, model(**given)[0]]
        model.delete_adapter("other")
        assert list(model.peft_config) == ["default"]
        if method != "adaption":  # PeftModel's own note of the active adapter is not updated there in PEFT
            assert model.active_adapter == "default"
            outputs.append(model(**given)[0])
            same(outputs[2], first)
        results.append(outputs)
    for left, right in zip(*results, strict=True):
        same(left, right)


def test_text_as_start_repeats_its_tokens(monkeypatch):
    class Tokenizer:
        @classmethod
        def from_pretrained(cls, name, **kwargs):
            assert name == "somewhere" and "trust_remote_code" not in kwargs
            return lambda text: {"input_ids": [7, 8]}

    monkeypatch.setattr(transformers, "AutoTokenizer", Tokenizer)
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a b",
        "tokenizer_name_or_path": "somewhere",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    model = base("CAUSAL_LM")
    words = model.get_input_embeddings().weight.detach().clone()
    model = peft_c.get_peft_model(
        model, peft_c.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **options)
    )
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, words[[7, 8, 7]])


@pytest.mark.parametrize("package", [peft_c, peft])
def test_a_prefix_starts_as_the_cache_of_a_text(package, tmp_path):
    model = make(package, "cartridge", "CAUSAL_LM")
    ids = torch.randint(1, 40, (1, 6))
    cache = base("CAUSAL_LM")(ids[:, :TOKENS], use_cache=True).past_key_values
    package.tuners.cartridge.utils.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    rest = model(input_ids=ids[:, TOKENS:]).logits
    same(rest, base("CAUSAL_LM")(ids).logits[:, TOKENS:])
    with pytest.raises(ValueError, match="Need at least 9 cached tokens, got 3"):
        package.tuners.cartridge.utils.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=9)
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    package.tuners.cartridge.utils.compose_cartridge_adapters(
        [tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both"
    )
    both = package.PeftModel.from_pretrained(base("CAUSAL_LM"), tmp_path / "both")
    whole, half = both.prompt_encoder["default"].weight, model.prompt_encoder["default"].weight
    assert torch.equal(whole, torch.cat([half, half]))


def test_a_failing_adapter_leaves_no_trace():
    model = make(peft_c, "prefix", "CAUSAL_LM")
    before = model.state_dict()
    model.get_base_model().model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        model.add_adapter("other", config(peft_c, "prefix", "CAUSAL_LM"))
    assert list(model.peft_config) == ["default"] == list(model.prompt_encoder) == list(model.prompt_tokens)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("package", [peft_c, peft])
def test_a_subclass_makes_prompts_of_its_own(package):
    class Model(package.PeftModelForCausalLM):
        def _setup_prompt_encoder(self, adapter_name):
            super()._setup_prompt_encoder(adapter_name)
            self.prompt_encoder[adapter_name].requires_grad_(adapter_name == "default")

    model = Model(base("CAUSAL_LM"), config(package, "prompt", "CAUSAL_LM"))
    model.add_adapter("other", config(package, "prompt", "CAUSAL_LM"))
    trained = {name: encoder.embedding.weight.requires_grad for name, encoder in model.prompt_encoder.items()}
    assert trained == {"default": True, "other": False}


def test_a_prompt_whose_modules_cannot_be_saved_leaves_no_trace(monkeypatch):
    model = make(peft_c, "prompt", "CAUSAL_LM")
    before = model.state_dict()

    def fail(**kwargs):
        raise RuntimeError("no more modules")

    monkeypatch.setattr(peft_c.prompt_learning, "set_additional_trainable_modules", fail)
    with pytest.raises(RuntimeError, match="no more modules"):
        model.add_adapter("other", config(peft_c, "prompt", "CAUSAL_LM"))
    assert list(model.peft_config) == ["default"] == list(model.prompt_encoder) == list(model.prompt_tokens)
    assert list(model.state_dict()) == list(before)
