"""ShadowPEFT on a tiny model, against the installed peft."""

import pytest
import torch

import peft_c

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])
BLOCKS = {"first": ["layers.0"], "last": ["layers.1"], "both": ["layers.0", "layers.1"]}
PAIRS = [(one, other) for one in BLOCKS for other in BLOCKS if one != other]


def config(package, **options):
    return package.ShadowConfig(
        task_type="CAUSAL_LM", **{"r": 2, "init_weights": False, "shadow_alpha": 1.0, **options}
    )


def start(package, base, **options):
    torch.manual_seed(5)
    return package.get_peft_model(base, config(package, **options)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": BLOCKS["last"], "shadow_hidden_size": 16, "update_hidden_size": 4},
        {"share_embeddings": False, "shadow_num_hidden_layers": 2, "shadow_num_attention_heads": 2},
    ],
)
def test_outputs_losses_gradients_and_generated_tokens(llama, options):
    ours, theirs = (start(package, llama(), **options) for package in (peft_c, peft))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(model(input_ids=IDS).logits for model in (ours, theirs)), atol=1e-5, rtol=1e-5)
    tokens = [model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_adapters_of_different_blocks(llama, one, other):
    ours, theirs = (start(package, llama(), target_modules=BLOCKS[one]) for package in (peft_c, peft))
    first = theirs(input_ids=IDS).logits
    for model, package in ((ours, peft_c), (theirs, peft)):
        model.add_adapter("other", config(package, target_modules=BLOCKS[other]))
        model.eval()
        torch.testing.assert_close(model(input_ids=IDS).logits, first, atol=1e-5, rtol=1e-5)

    ours.set_adapter("other")
    second = ours(input_ids=IDS).logits
    alone = start(peft_c, llama(), target_modules=BLOCKS[other])
    weights = peft_c.get_peft_model_state_dict(ours, adapter_name="other")
    peft_c.set_peft_model_state_dict(alone, weights)
    assert torch.equal(alone(input_ids=IDS).logits, second)
    ours.delete_adapter("other")
    torch.testing.assert_close(ours(input_ids=IDS).logits, first, atol=1e-5, rtol=1e-5)
