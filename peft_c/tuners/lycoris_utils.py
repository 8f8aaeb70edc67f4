"""What LoHa and LoKr share: rank and alpha by module, scales, rank and module dropout (LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..reexports import elsewhere
from .room import AddRoom, RoomConfig, RoomModel, apply_weight, kaiming, option, positive, shared


@dataclass
class LycorisConfig(RoomConfig):
    """The options that LoHa and LoKr share."""

    rank_pattern: dict | None = shared("rank_pattern")
    alpha_pattern: dict | None = shared("alpha_pattern")
    r: int = option(8, "Rank of the factors. A LoHa delta has up to r * r; LoKr factors where that saves anything.")
    alpha: int = option(8, "The delta is scaled by alpha / r.")
    rank_dropout: float = option(0.0, "Probability of dropping a row of the delta in training.")
    module_dropout: float = option(0.0, "Probability of leaving out the adapter of a layer in training.")
    use_effective_conv2d: bool = option(False, "Whether kernels larger than 1 get a factor of their own.")


class LycorisLayer(AddRoom):
    """A delta of `scaling = alpha / r` times factors; `factors(name)` gives them where the delta has low rank."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def create(self, name: str, config: Any, r: int, alpha: float) -> None:
        positive("r", r)
        self.r[name], self.alpha[name], self.scaling[name] = r, alpha, alpha / r
        self.rank_dropout[name], self.module_dropout[name] = config.rank_dropout, config.module_dropout
        self.rank_dropout_scale[name] = getattr(config, "rank_dropout_scale", True)
        self.create_factors(name, config, r)

    def create_factors(self, name: str, config: Any, r: int) -> None:
        """Make and initialise the adapter's parameters."""
        raise NotImplementedError

    def kernel(self, config: Any) -> tuple[tuple[int, ...], bool]:
        """The kernel's size, () for linear layers, and whether it gets a factor of its own (tensor decomposition)."""
        size = tuple(getattr(self.get_base_layer(), "kernel_size", ()))
        return size, config.use_effective_conv2d and any(k != 1 for k in size)

    def new_factor(self, container: str, name: str, *shape: int, zero: bool = False) -> None:
        """Create one factor: kaiming uniform as for a linear layer, or zeros."""
        factor = torch.zeros(shape)
        if not zero:
            kaiming(factor)
        getattr(self, container)[name] = nn.Parameter(factor)

    def whole_delta(self, name: str) -> torch.Tensor:
        return super().whole_delta(name).reshape(self.get_base_layer().weight.shape)

    # --- dropout ---

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """What merging adds to the weight, with its shape; in training optionally with rows dropped at random."""
        delta = super().get_delta_weight(adapter_name)
        if not apply_rank_dropout:
            return delta
        keep = (torch.rand(len(delta)) > self.rank_dropout[adapter_name]).to(delta)
        if self.rank_dropout_scale[adapter_name]:
            keep = keep / keep.mean()
        return delta * keep.view(-1, *(1,) * (delta.ndim - 1))

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        # In training a number is drawn even where nothing can be dropped, as in PEFT, so that whatever draws after it
        # gets the same numbers; rooms therefore leave `dense` to eval mode.
        if self.training and torch.rand(1) <= self.module_dropout[name]:
            return x.new_zeros(())
        if self.training and self.rank_dropout[name]:
            return apply_weight(self.get_base_layer(), x, self.get_delta_weight(name, apply_rank_dropout=True), None)
        return self.activations(name, x)

    def activations(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`term` without dropout."""
        return super().term(name, x)

    # --- scales ---

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scale to `scale` times alpha / r; unknown names are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; None: back to alpha / r."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.alpha[name] / self.r[name] if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return isinstance(self.get_base_layer(), nn.Linear)


class LycorisTuner(RoomModel):
    """Injects a LyCORIS method, with rank and alpha by module."""

    by_pattern = {"r": "rank_pattern", "alpha": "alpha_pattern"}


__getattr__ = elsewhere(__name__)
