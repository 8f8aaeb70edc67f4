"""What the contract and golden tests run on: every registered method with every base layer that it adapts.

A new room is among them by being registered. It gets a small rank and a start that changes the output; a row in
OPTIONS says what else its config needs for layers as small as these.
"""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import peft_c
from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

SMALL = {"r": 4, "init_weights": False, "init_lora_weights": False, "init_ia3_weights": False, "progressbar": False}
OPTIONS = {
    "adalora": {"r": 8, "init_r": 4, "target_r": 2, "total_step": 10},
    "adamss": {"num_subspaces": 2},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 40},
    "gralora": {"r": 8, "alpha": 8},
    "ia3": {"feedforward_modules": ["2"]},
    "lokr": {"r": 2},
    "oft": {"oft_block_size": 4, "r": 0},
    "psoft": {"psoft_alpha": 4},
    "randlora": {"randlora_alpha": 1},
    "road": {"group_size": 2},
    "shira": {"r": 2},
    "supertuning": {"r": 2, "sparsity": 0.9},
    "tinylora": {"r": 2, "u": 16, "init_weights": "uniform"},
    "trainable_tokens": {"token_indices": [1, 3]},
    "unilora": {"theta_d_length": 101},
    "vblora": {"vector_length": 4, "num_vectors": 10},
    "waveft": {"n_frequency": 16},
}
LORA_LAYERS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")
# methods that need a whole transformers model: PEFT's own tests run on them, see shared/conformance
WHOLE_MODELS = {"shadow", "xlora"}

NO_MERGE = {"lily", "poly"}  # what they add depends on the input
NO_UNMERGE = {"osf"}  # as in PEFT
ONE_ADAPTER = {"adalora"}  # one trainable adapter
ONE_ACTIVE = {"ln_tuning", "trainable_tokens"}  # two adapters exclude each other, or may not have the same tokens
NO_MIXED = {"poly", "trainable_tokens"}  # no `adapter_names` in the forward
RANDOM_START = {"unilora", "vblora"}  # have no start that changes nothing, as in PEFT
NEUTRAL = {"adamss": {"init_weights": "orthogonal"}}  # options of such a start, beside those that are usual


class Attention(nn.Module):
    """A MultiheadAttention with one input and one output."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"0": nn.MultiheadAttention(16, 2, batch_first=True)})

    def forward(self, x):
        return self.inner["0"](x, x, x)[0]


def network(kind):
    """A model whose layers "0" and "2" are of this kind, and inputs for it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    dims = int(kind[4]) if kind in ("Conv1d", "Conv2d", "Conv3d") else 0
    if kind == "MultiheadAttention":
        return Attention(), torch.randn(5, 3, 16, generator=generator)
    if kind == "Embedding":
        x = torch.randint(0, 16, (5, 3), generator=generator)
        return nn.Sequential(nn.Embedding(16, 32), nn.ReLU(), nn.Linear(32, 8)), x
    if dims:
        layer = getattr(nn, kind)
        x = torch.randn(5, 4, *[5] * dims, generator=generator)
        return nn.Sequential(layer(4, 8, 3, padding=1), nn.ReLU(), layer(8, 4, 2 if dims == 3 else 1)), x
    if kind == "LayerNorm":
        layers = nn.LayerNorm(16), nn.ReLU(), nn.LayerNorm(16)
    elif kind == "Conv1D":
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

        layers = Conv1D(32, 16), nn.ReLU(), Conv1D(8, 32)
        for layer in (layers[0], layers[2]):
            nn.init.normal_(layer.bias)
    else:
        layers = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)
    return nn.Sequential(*layers), torch.randn(5, 3, 16, generator=generator)


def kinds_of(method):
    """The names of the base layers that a method adapts."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[method.upper()]
    if method in ("lora", "trainable_tokens"):
        return LORA_LAYERS if method == "lora" else ("Embedding",)
    names = [kind if isinstance(kind, str) else kind.__name__ for kind in tuner.rooms]
    return ["LayerNorm" if name == "Module" else name for name in names]


TUNERS = {kind.value.lower(): tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
METHODS = sorted({"lora", "trainable_tokens"} | {name for name, tuner in TUNERS.items() if hasattr(tuner, "rooms")})
METHODS = [name for name in METHODS if name not in WHOLE_MODELS]
PAIRS = [(method, kind) for method in METHODS for kind in kinds_of(method)]
MERGEABLE = [(method, kind) for method, kind in PAIRS if method not in NO_MERGE | NO_UNMERGE]


def config_of(method, kind="Linear", package=peft_c, **options):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    options = {**SMALL, **OPTIONS.get(method, {}), **options}
    if method == "adamss":
        pytest.importorskip("sklearn")
    targets = ["0"] if kind in ("Embedding", "MultiheadAttention") else ["0", "2"]
    if method == "ia3" and "2" not in targets:
        options["feedforward_modules"] = []
    cls = cls if package is peft_c else getattr(package, cls.__name__)
    return cls(target_modules=targets, **{name: value for name, value in options.items() if name in known})


def start(method, kind="Linear", package=peft_c, adapters=("default",), dtype=torch.float32, **options):
    """A model with freshly drawn adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = network(kind)[0].to(dtype)
        torch.manual_seed(1)
        model = package.get_peft_model(base, config_of(method, kind, package, **options), adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config_of(method, kind, package, **options))
    return model.eval()


def make(method, kind="Linear", package=peft_c, **options):
    """A model with an adapter whose parameters have all been trained a little."""
    model = start(method, kind, package, **options)
    disturb(model)
    return model


def disturb(model, of=None):
    """Move all trainable parameters (or those of the adapter `of`), the same way in both packages."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad if of is None else f".{of}" in name and parameter.is_floating_point():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def layers(model):
    return [
        module for module in model.modules() if hasattr(module, "merged_adapters") and hasattr(module, "base_layer")
    ]


def weights(model):
    """Copies of all base weights under adapted layers."""
    found = (item for layer in layers(model) for item in layer.get_base_layer().named_parameters())
    return [tensor.detach().clone() for name, tensor in found if "lora_" not in name]  # attention has nested layers


def call(model, method, x):
    if method == "poly":
        return getattr(model, "base_model", model)(x, task_ids=torch.zeros(len(x), dtype=torch.long))
    return model(x)


def run(model, method="", kind="Linear", x=None):
    torch.manual_seed(7)
    with torch.no_grad():
        return call(model, method, network(kind)[1] if x is None else x)


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
