"""The packages and models that are measured."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# The package beside this folder is the one that is measured, here and in the processes started from here.
ROOT = str(Path(__file__).resolve().parent.parent)
if sys.path[0] != ROOT:
    sys.path.insert(0, ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

PACKAGES = [name for name in ("peft_c", "peft") if find_spec(name)]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
"""name: (dtype of the base model and activations, dtype of the adapters)"""


@functools.cache
def package(name: str):
    """The module peft_c or peft."""
    return importlib.import_module(name)


class Block(nn.Module):
    """The seven Linear layers of a decoder block, with norms and activations but no attention over positions."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.o_proj(torch.sigmoid(self.q_proj(h) * self.k_proj(h)) * self.v_proj(h))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Stack(nn.Module):
    """`blocks` such blocks: 7 x blocks target layers."""

    def __init__(self, blocks: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden, ffn) for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack(blocks: int, hidden: int, ffn: int, dtype=torch.float32) -> Stack:
    """A frozen stack, the same for every contender."""
    torch.manual_seed(0)
    return Stack(blocks, hidden, ffn).to(dtype).eval().requires_grad_(False)


def with_lora(name: str, base: nn.Module, dtypes: str = "fp32", r: int = 16, targets=TARGETS):
    """A PeftModel of package `name` over a copy of `base`, whose adapter does something (B is not zero)."""
    peft = package(name)
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets)
    torch.manual_seed(1)
    widen = DTYPES[dtypes][0] != DTYPES[dtypes][1]
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=widen)
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Give every lora_B the same small random values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(0.01 * torch.randn(p.shape, generator=generator))


class Composed(nn.Module):
    """What one would write by hand: F.linear and one addmm, no adapter system."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, r: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(r, base.in_features, dtype=dtype) / r)
        self.b = nn.Parameter(0.01 * torch.randn(base.out_features, r, dtype=dtype))
        self.scale = 1.0

    def forward(self, x):
        y = self.base(x)
        t = F.linear(x.to(self.a.dtype), self.a)
        if y.dtype == self.b.dtype and not torch.is_grad_enabled():
            y.view(-1, y.shape[-1]).addmm_(t.view(-1, t.shape[-1]), self.b.T, alpha=self.scale)
            return y
        return y + (F.linear(t, self.b) * self.scale).to(y.dtype)


def composed(base: nn.Module, dtypes: str, r: int = 16, targets=TARGETS) -> nn.Module:
    """A copy of `base` with every target replaced by a `Composed` layer."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    for _, parent in list(model.named_modules()):
        for key, child in list(parent.named_children()):
            if key in targets:
                setattr(parent, key, Composed(child, DTYPES[dtypes][1], r))
    return model
