"""Every method on one layer: merging and unmerging, the forward, and a training step.

The floor of the forward is the base layer's, of a training step the base layer's down to its input, of merging and
unmerging reading and writing the weight twice.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from models import DTYPES, PACKAGES, package
from timing import Case, Step, one
from torch import nn

R = {"r": 16}
LINEAR: dict[str, dict] = {
    "adalora": {"init_r": 16, "target_r": 8, "total_step": 10},
    "adamss": {},
    "beft": {},
    "boft": {},
    "c3a": {},
    "deft": R,
    "delora": R,
    "fourierft": {"n_frequency": 1000},
    "frod": {"progressbar": False},
    "glora": {},
    "gralora": R,
    "hira": R,
    "hra": R,
    "ia3": {"feedforward_modules": []},
    "lily": {**R, "stride_A": 1, "num_B": 2},
    "loha": R,
    "lokr": R,
    "lora": R,
    "miss": {},
    "oft": {},
    "osf": {},
    "peanut": R,
    "psoft": {**R, "psoft_alpha": 16},
    "pvera": {},
    "randlora": {},
    "road": {},
    "shira": R,
    "supertuning": {},
    "tinylora": {"r": 2, "u": 16},
    "unilora": {},
    "vblora": {},
    "vera": {},
    "waveft": {},
}
"""Methods that plug into nn.Linear, with the options in which the run differs from PEFT's defaults."""

# without OFT on nn.Conv2d, of which PEFT's forward fails for images narrower than the kernel
OTHERS: dict[str, dict[str, dict]] = {
    "conv2d": {"boft": {"boft_block_size": 4}, "hira": R, "hra": R, "ia3": {"feedforward_modules": []}, "loha": R}
    | {"lokr": R, "lora": R},
    "embedding": {"hira": R, "lora": R, "oft": {}, "tinylora": {"r": 2, "u": 16}}
    | {"trainable_tokens": {"token_indices": list(range(0, 800, 8))}},
    "norm": {"ln_tuning": {}},
}
QUICK = ("boft", "fourierft", "hra", "ia3", "loha", "lora", "oft", "vera")
NOT_MERGED = ("lily",)
NOT_UNMERGED = ("osf",)


def _base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "linear": lambda: nn.Linear(1024, 1024),
        "conv2d": lambda: nn.Conv2d(128, 128, 3, padding=1),
        "embedding": lambda: nn.Embedding(8192, 512),
        "norm": lambda: nn.LayerNorm(1024),
    }
    return layers[kind]().requires_grad_(False)


def _input(kind: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    if kind == "embedding":
        return torch.randint(0, 8192, (rows,))
    return torch.randn(*((1, 128, 4, rows // 4) if kind == "conv2d" else (rows, 1024)), dtype=dtype)


@functools.lru_cache(1)
def layers(kind: str, method: str, dtypes: str) -> dict[str, nn.Module]:
    """The same adapted layer of each package, with parameters that do something, and the base layer as the floor."""
    dtype, own = DTYPES[dtypes]
    base = nn.Sequential(_base(kind).to(dtype))
    options = (LINEAR if kind == "linear" else OTHERS[kind])[method]
    found = {}
    for name in PACKAGES:
        peft = package(name)
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
        known = inspect.signature(config).parameters
        config = config(target_modules=["0"], **{key: value for key, value in options.items() if key in known})
        torch.manual_seed(1)
        own_base = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # where a weight lies changes its speed
        model = peft.get_peft_model(own_base, config, autocast_adapter_dtype=own != dtype)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        found[name] = model.base_model.model[0]
    return found | {"floor": base[0]}


def _forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    layer.eval()

    def call():
        with torch.no_grad():
            layer(x)

    return call


def _training(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    inputs = x.detach().requires_grad_(x.is_floating_point())
    layer.train()

    def call():
        output = layer(inputs)
        if output.requires_grad:
            output.sum().backward()
        inputs.grad = None
        for parameter in parameters:
            parameter.grad = None

    return call


def _merging(layer: nn.Module) -> Callable[[], None]:
    weight = getattr(layer, "base_layer", layer).weight

    def touch():
        weight.mul_(1.0)
        weight.mul_(1.0)

    def call():
        layer.merge()
        layer.unmerge()

    return call if hasattr(layer, "merge") else touch


def _case(kind: str, method: str, dtypes: str, what: str) -> dict[str, list[Step]]:
    rows = int(what.rpartition("=")[2]) if "=" in what else 1
    x = _input(kind, rows, DTYPES[dtypes][0])
    cycles = {}
    for name, layer in layers(kind, method, dtypes).items():
        step = _merging(layer) if "merge" in what else (_training if "training" in what else _forward)(layer, x)
        cycles[name] = one(f"{method} {kind}, {what}, {dtypes}", step)
    return cycles


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    kinds = {"linear": LINEAR} if quick else {"linear": LINEAR, **OTHERS}
    steps = ("merge + unmerge", "forward M=8", "forward M=512", "training M=64")
    for kind, methods in kinds.items():
        for method in methods:
            if quick and method not in QUICK:
                continue
            for dtypes in ("fp32", "bf16") if quick else ("fp32", "bf16", "bf16+fp32"):
                for what in steps:
                    if "merge" in what and method in NOT_MERGED + NOT_UNMERGED:
                        continue
                    build = functools.partial(_case, kind, method, dtypes, what)
                    name = f"{method} {kind} {what} {dtypes}"
                    yield Case(name, build, unit="us", seconds=0.8 if "merge" in what else 0.5)
