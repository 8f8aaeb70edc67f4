"""Small models for the tests of PeftModel, the same numbers each time."""

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, out=4):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, out)

    def forward(self, x):
        return self.lin1(self.relu(self.lin0(x)))


class TokenMLP(nn.Module):
    def __init__(self, out=4):
        super().__init__()
        self.emb = nn.Embedding(30, 10)
        self.mlp = MLP(out)

    def forward(self, ids):
        return self.mlp(self.emb(ids))


def mlp(out=4):
    torch.manual_seed(0)
    return MLP(out).eval()


def token_mlp(out=4):
    torch.manual_seed(0)
    return TokenMLP(out).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def bert(task="SequenceClassification"):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    return getattr(transformers, f"BertFor{task}")(config).eval()


def randomize(model, seed=1):
    """Gives every adapter parameter random values; the base model keeps its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model
