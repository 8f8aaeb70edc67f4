"""A low-rank layer with nothing around it, to test gate and forward without the tuners."""

import torch
from torch import nn

from peft_c import _C


class ToyLayer(nn.Module):
    """What a tuner's layer shows to C, with the composed forward as the specification."""

    _lowrank_names = ("lora_A", "lora_B", "scaling", "lora_dropout", "lora_variant")

    def __init__(self, base_layer, adapters=("default",), r=4, dropout=0.0, dtype=None, k=None, n=None):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.lora_variant = {}, {}
        self.merged_adapters, self._disable_adapters, self._active_adapter = [], False, list(adapters)
        k = k or base_layer.in_features
        n = n or base_layer.out_features
        for i, name in enumerate(adapters):
            self.lora_A[name] = nn.Linear(k, r + i, bias=False, dtype=dtype)
            self.lora_B[name] = nn.Linear(r + i, n, bias=False, dtype=dtype)
            self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
            self.scaling[name] = 0.5 + i

    def forward(self, x, *args, **kwargs):
        if not torch.compiler.is_compiling():
            result = _C.lowrank_forward(self, x, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.composed(x, *args, **kwargs)

    def composed(self, x, *args, **kwargs):
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            return result
        dtype = result.dtype
        for name in self._active_adapter:
            if name in self.lora_A:
                x = x.to(self.lora_A[name].weight.dtype)
                term = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                result = result + term * self.scaling[name]
        return result.to(dtype)


def make(k=24, n=40, dtype=torch.float32, adapter_dtype=None, seed=0, bias=True, **kwargs):
    """A layer with a frozen base, on fixed random weights."""
    torch.manual_seed(seed)
    base = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    return ToyLayer(base, dtype=adapter_dtype or dtype, **kwargs)


TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def close(actual, expected, scale=1.0):
    tolerance = {key: value * scale for key, value in TOLERANCE[expected.dtype].items()}
    torch.testing.assert_close(actual, expected, **tolerance)
