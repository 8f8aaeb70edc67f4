"""GLoRA: weight and bias are scaled and shifted by supports of various forms (https://arxiv.org/abs/2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, kaiming, linear, option, product, register, shared


@dataclass
class GloraConfig(RoomConfig):
    """Options of GLoRA. ValueError: an unknown form in `config_A_B`, `config_C` or `config_D_E`."""

    r: int = option(8, "Rank of the supports of form 'lora'.")
    target_modules: list[str] | str | None = shared("target_modules")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    config_A_B: Literal["lora", "vector", "constant", "none"] = option(
        "lora",
        "Form of A and B, which scale and shift the weight: low-rank, one number an output, one number, none.",
        choices=("constant", "lora", "none", "vector"),
    )
    config_C: Literal["lora", "vector", "none"] = option(
        "lora", "Form of C: W C is added to the bias.", choices=("lora", "none", "vector")
    )
    config_D_E: Literal["vector", "constant", "none"] = option(
        "constant", "Form of D and E, which scale and shift the bias.", choices=("constant", "none", "vector")
    )
    init_weights: bool = shared("init_weights")


class GloraPath(nn.Module):
    """A support of the given shape: low-rank Xd Xu, a column X, one number X, or a buffer of zeros."""

    form: ClassVar[str]

    def __init__(self, shape: tuple[int, ...], r: int, init_weights: bool) -> None:
        super().__init__()
        form = self.form
        if form == "none":
            self.register_buffer("zeros", torch.zeros(shape))
        elif form == "lora":
            self.Xd, self.Xu = nn.Parameter(torch.zeros(shape[0], r)), nn.Parameter(torch.zeros(r, shape[1]))
            for factor in (self.Xu,) if init_weights else (self.Xu, self.Xd):
                kaiming(factor)
        else:
            column = (shape[0], *(1 for _ in shape[1:]))
            self.X = nn.Parameter(torch.zeros(1 if form == "constant" else column))
            if not init_weights and form == "constant":
                nn.init.normal_(self.X, mean=0.0, std=0.02)
            elif not init_weights:
                kaiming(self.X if self.X.ndim > 1 else self.X.unsqueeze(0))

    def forward(self) -> torch.Tensor:
        """The support, as a tensor that broadcasts to its shape."""
        if self.form == "lora":
            return product(self.Xd, self.Xu)
        return self.zeros if self.form == "none" else self.X


_PATHS = {
    form: type(f"Glora{name}Path", (GloraPath,), {"__module__": __name__, "form": form})
    for form, name in (("lora", "Lora"), ("vector", "Vector"), ("constant", "Scalar"), ("none", "Empty"))
}
GloraLoraPath, GloraVectorPath, GloraScalarPath, GloraEmptyPath = _PATHS.values()


class GloraLinear(AddRoom):
    """W + W * A + B and b + b * D + E + W C for nn.Linear, with A and B (out, in), C (in, 1), D and E (out,)."""

    converts_to_lora = False
    returns_input_dtype = False
    adapter_layer_names = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
    other_param_names = ("r",)
    containers = dict.fromkeys(adapter_layer_names, nn.ModuleDict)
    adds = ("weight", "bias")

    def create(self, name: str, config: GloraConfig) -> None:
        self.r[name] = config.r
        out, biased = self.out_features, self.get_base_layer().bias is not None
        forms = (config.config_A_B, config.config_C if biased else "none", config.config_D_E if biased else "none")
        shapes = ((out, self.in_features), (self.in_features, 1), (out,))
        for letter, kind in zip("ABCDE", (0, 0, 1, 2, 2), strict=True):
            path = _PATHS[forms[kind]](shapes[kind], config.r, config.init_weights)
            getattr(self, f"glora_{letter}")[name] = path

    def support(self, letter: str, name: str) -> torch.Tensor:
        """A, B, C, D or E in the weight's dtype."""
        return getattr(self, f"glora_{letter}")[name]().to(self.get_base_layer().weight.dtype)

    def adapter_dtype(self, name: str) -> torch.dtype:
        return self.get_base_layer().weight.dtype

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return self.glora_A[name].form == "lora"

    def delta(self, name: str) -> torch.Tensor:
        return torch.addcmul(self.support("B", name), self.bare_weight(), self.support("A", name))

    def bias_delta(self, name: str) -> torch.Tensor:
        bias, C, D, E = self.bare_bias(), *(self.support(letter, name) for letter in "CDE")
        return bias * D + E + product(self.bare_weight(), C).squeeze(-1)

    def term_beside(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        form, bias = self.glora_A[name].form, self.get_base_layer().bias
        term = output.new_zeros(()) if bias is None else self.bias_delta(name)
        if form == "lora":
            return term + linear(x, self.delta(name))
        if form != "none":
            A, B = (self.support(letter, name).flatten() for letter in "AB")
            term = term + (output if bias is None else output - bias) * A + x.sum(-1, keepdim=True) * B
        return term


GloraLayer = GloraLinear


class GloraModel(RoomModel):
    """Injects GLoRA."""

    rooms = {nn.Linear: GloraLinear}
    unsupported = ValueError


register("glora", GloraConfig, GloraModel)
