"""Small models, one per kind of layer that LoRA adapts, with an input: shared by the layer and the merge tests."""

import copy
import warnings

import pytest
import torch
from torch import nn


class One(nn.Module):
    """A model of the one layer that is adapted, called `layer`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        out = self.layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class Attention(One):
    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """A stack of expert matrices, (e, out, in), or (e, in, out) with `is_transposed`."""

    def __init__(self, experts, n, k, is_transposed):
        super().__init__()
        shape = (experts, k, n) if is_transposed else (experts, n, k)
        self.weight = nn.Parameter(torch.randn(shape))
        self.other = nn.Parameter(torch.randn(3))
        self.is_transposed = is_transposed

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.einsum("bk,ekn->ebn", x, weight)


class ScaledEmbedding(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

    layer = Conv1D(12, 10)
    nn.init.normal_(layer.bias)
    return One(layer)


def ids(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) % 17


# name: (model, input, options of LoraConfig)
MODULE = {"target_modules": ["layer"]}
PARAMETER = {"target_modules": [], "target_parameters": ["layer.weight"]}
CASES = {
    "linear": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(4, 10), MODULE),
    "linear_3d": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(2, 3, 10), MODULE),
    "linear_no_bias": (lambda: One(nn.Linear(10, 12, bias=False)), lambda: torch.randn(4, 10), MODULE),
    "linear_lora_bias": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(4, 10), MODULE | {"lora_bias": True}),
    "linear_rslora": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(4, 10), MODULE | {"use_rslora": True}),
    "linear_dora": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(4, 10), MODULE | {"use_dora": True}),
    "conv1d_transformers": (conv1d, lambda: torch.randn(4, 10), MODULE | {"fan_in_fan_out": True}),
    "embedding": (lambda: One(nn.Embedding(17, 8)), lambda: ids(4, 5), MODULE),
    "embedding_padding": (lambda: One(nn.Embedding(17, 8, padding_idx=3)), lambda: ids(4, 5), MODULE),
    "embedding_scaled": (lambda: One(ScaledEmbedding(17, 8)), lambda: ids(4, 5), MODULE),
    "embedding_dora": (lambda: One(nn.Embedding(17, 8)), lambda: ids(4, 5), MODULE | {"use_dora": True}),
    "conv1d": (lambda: One(nn.Conv1d(6, 8, 3, padding=1)), lambda: torch.randn(4, 6, 9), MODULE),
    "conv1d_kernel1": (lambda: One(nn.Conv1d(6, 8, 1)), lambda: torch.randn(4, 6, 9), MODULE),
    "conv2d": (lambda: One(nn.Conv2d(6, 8, 3, stride=2)), lambda: torch.randn(4, 6, 9, 7), MODULE),
    "conv2d_kernel1": (lambda: One(nn.Conv2d(6, 8, 1)), lambda: torch.randn(4, 6, 5, 5), MODULE),
    "conv2d_oblong": (lambda: One(nn.Conv2d(6, 8, (3, 1))), lambda: torch.randn(4, 6, 5, 5), MODULE),
    "conv2d_lora_bias": (
        lambda: One(nn.Conv2d(6, 8, 3)),
        lambda: torch.randn(4, 6, 5, 5),
        MODULE | {"lora_bias": True},
    ),
    "conv2d_dora": (lambda: One(nn.Conv2d(6, 8, 3)), lambda: torch.randn(4, 6, 5, 5), MODULE | {"use_dora": True}),
    "conv3d": (lambda: One(nn.Conv3d(4, 6, 3)), lambda: torch.randn(2, 4, 5, 5, 5), MODULE),
    "mha": (lambda: Attention(nn.MultiheadAttention(8, 2)), lambda: torch.randn(5, 4, 8), MODULE),
    "mha_batch_first": (
        lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
        lambda: torch.randn(4, 5, 8),
        MODULE,
    ),
    "parameter_2d": (lambda: One(nn.Linear(10, 12)), lambda: torch.randn(4, 10), PARAMETER),
    "parameter_experts": (lambda: One(Experts(3, 12, 10, False)), lambda: torch.randn(4, 10), PARAMETER),
    "parameter_experts_transposed": (lambda: One(Experts(3, 12, 10, True)), lambda: torch.randn(4, 10), PARAMETER),
}
# cases that PEFT itself cannot do, or does wrong
OWN = {
    "conv3d_kernel1": (lambda: One(nn.Conv3d(4, 6, 1)), lambda: torch.randn(2, 4, 5, 5, 5), MODULE),
    "conv2d_dilated": (lambda: One(nn.Conv2d(6, 8, 3, dilation=2)), lambda: torch.randn(4, 6, 9, 9), MODULE),
    "conv2d_reflect": (
        lambda: One(nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")),
        lambda: torch.randn(4, 6, 9, 9),
        MODULE,
    ),
    "parameter_one_expert": (lambda: One(Experts(1, 12, 10, True)), lambda: torch.randn(4, 10), PARAMETER),
}
GROUPED = {
    "conv1d_groups": (lambda: One(nn.Conv1d(6, 8, 3, groups=2)), lambda: torch.randn(4, 6, 9), MODULE),
    "conv2d_groups": (lambda: One(nn.Conv2d(6, 8, 3, groups=2)), lambda: torch.randn(4, 6, 9, 9), MODULE),
}


def build(package, case, seed=0, r=4, adapters=("default",), init=False, dtype=None, **options):
    """(PEFT model, input) of a case, made with `package` (peft or peft_c) in a known random state."""
    make_model, make_input, config = case
    torch.manual_seed(seed)
    model = make_model()
    x = make_input()
    if dtype is not None:
        model = model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, name in enumerate(adapters):
            arguments = config | {"r": r + i * GROUP_STEP, "lora_alpha": 6, "init_lora_weights": init} | options
            lora_config = package.LoraConfig(**copy.deepcopy(arguments))
            if i == 0:
                model = package.get_peft_model(model, lora_config, adapter_name=name)
            else:
                model.add_adapter(name, lora_config)
    return model.eval(), x


GROUP_STEP = 2


def layer_of(model):
    return model.base_model.model.layer


def base_weights(layer):
    """The base weights that a merge may change, by name: live tensors."""
    base = layer.get_base_layer()
    if isinstance(base, nn.MultiheadAttention):
        out = base.out_proj.get_base_layer() if hasattr(base.out_proj, "get_base_layer") else base.out_proj
        return {"in_proj_weight": base.in_proj_weight, "out_proj": out.weight, "out_bias": out.bias}
    return {name: getattr(base, name) for name in ("weight", "bias") if getattr(base, name, None) is not None}
