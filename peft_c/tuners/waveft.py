"""WaveFT: the delta is the inverse wavelet transform of a few trained coefficients (https://arxiv.org/abs/2505.12532)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import wavelet_filters, wavelets
from .fourierft import random_places
from .room import AddRoom, RoomConfig, RoomModel, option, register, rows_of, shared
from .targets import check_target_module_exists
from .tuner_layer import BaseTunerLayer, _get_in_out_features


@dataclass
class WaveFTConfig(RoomConfig):
    """Options of WaveFT. ValueError: an unknown `wavelet_family`."""

    n_frequency: int = option(2592, "Number of trained coefficients of each layer, from 1 to in * out.")
    scaling: float = option(25.0, "Factor of the delta.")
    wavelet_family: str = option("db1", "Wavelet: db1 (Haar) to db10, sym2 to sym10, coif1 to coif4.")
    use_idwt: bool = option(True, "False: the coefficients are entries of the delta themselves, without a transform.")
    random_loc_seed: int = option(777, "Seed of the choice of coefficients.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    n_frequency_pattern: dict | None = option({}, "Module name or pattern -> n_frequency, where it differs.")
    proportional_parameters: bool = option(False, "Whether larger layers get more of all the coefficients.")
    init_weights: bool = shared("init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in wavelets.LENGTHS:
            raise ValueError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: "
                f"{list(wavelets.LENGTHS)}"
            )


class WaveFTLinear(AddRoom):
    """WaveFT for nn.Linear and Conv1D: spectrum (n_frequency,) at random places of (out, in).

    With the transform the places are those of a matrix padded to P x Q on all sides, S; the delta is
    scaling * L S' R^T, where L (out, P), R (in, Q) synthesise rows and columns, and S' is S with the blocks off the
    diagonal exchanged: the horizontal details, top right, are high frequencies along the rows' index.
    """

    adapter_layer_names = ("waveft_spectrum",)
    other_param_names = (
        "waveft_n_frequency",
        "waveft_scaling",
        "waveft_random_loc_seed",
        "waveft_wavelet_family",
        "waveft_indices",
        "waveft_use_idwt",
    )

    def create(self, name: str, config: WaveFTConfig, n_frequency: int) -> None:
        self.waveft_n_frequency[name], self.waveft_scaling[name] = n_frequency, config.scaling
        self.waveft_random_loc_seed[name] = config.random_loc_seed
        self.waveft_wavelet_family[name], self.waveft_use_idwt[name] = config.wavelet_family, config.use_idwt
        places = random_places(n_frequency, self.in_features, self.out_features, config.random_loc_seed)
        self.waveft_indices[name] = places
        wavelets.filters(config.wavelet_family)  # made before torch.compile sees it
        spectrum = torch.zeros(n_frequency) if config.init_weights else torch.randn(n_frequency) * 0.01
        self.waveft_spectrum[name] = nn.Parameter(spectrum)

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Row and column of each coefficient in S' (or in the delta), and that matrix's shape."""
        rows, columns = self.waveft_indices[name].to(self.waveft_spectrum[name].device)
        shape = (self.out_features, self.in_features)
        if not self.waveft_use_idwt[name]:
            return rows, columns, shape
        p, q = (wavelets.padded(size, self.waveft_wavelet_family[name]) for size in shape)
        rows, columns = rows + (p - shape[0]) // 2, columns + (q - shape[1]) // 2
        low, left = rows >= p // 2, columns < q // 2
        exchanged = low == left
        rows = torch.where(exchanged, (rows + p // 2) % p, rows)
        columns = torch.where(exchanged, (columns + q // 2) % q, columns)
        return rows, columns, (p, q)

    def delta(self, name: str) -> torch.Tensor:
        spectrum, (rows, columns, shape) = self.waveft_spectrum[name], self.entries(name)
        scaled, family = spectrum * self.waveft_scaling[name], self.waveft_wavelet_family[name]
        size = (self.out_features, self.in_features)
        if self.waveft_use_idwt[name] and len(spectrum) * wavelets.LENGTHS[family] ** 2 < size[0] * size[1]:
            (i, left), (j, right) = (
                wavelets.support(places, length, family, spectrum)
                for places, length in zip((rows, columns), size, strict=True)
            )
            patches = left.unsqueeze(2) * right.unsqueeze(1) * scaled.view(-1, 1, 1)
            places = i.unsqueeze(2) * size[1] + j.unsqueeze(1)
            flat = spectrum.new_zeros(size[0] * size[1]).index_add(0, places.flatten(), patches.flatten())
            return flat.view(size)
        delta = spectrum.new_zeros(shape).index_put((rows, columns), scaled)
        if self.waveft_use_idwt[name]:
            delta = wavelets.synthesise(
                wavelets.synthesise(delta, self.in_features, family).T, self.out_features, family
            ).T
        return delta

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return rows_of(x) > 128 and not torch.is_grad_enabled()

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        spectrum, flat = self.waveft_spectrum[name], x.reshape(-1, x.shape[-1])
        if not rows_of(x) or 16 * len(spectrum) > self.in_features * self.out_features:  # then the matrix is less work
            return super().term(name, x)
        rows, columns, shape = self.entries(name)
        family, transform = self.waveft_wavelet_family[name], self.waveft_use_idwt[name]
        flat = wavelets.analyse(flat, family) if transform else flat
        parts = flat.T[columns] * (spectrum * self.waveft_scaling[name]).unsqueeze(1)
        result = parts.new_zeros(shape[0], flat.shape[0]).index_add(0, rows, parts).T
        result = wavelets.synthesise(result, self.out_features, family) if transform else result
        return result.reshape(*x.shape[:-1], -1)


WaveFTLayer = WaveFTLinear


class WaveFTModel(RoomModel):
    """Injects WaveFT."""

    rooms = {nn.Linear: WaveFTLinear, "Conv1D": WaveFTLinear}
    by_pattern = {"n_frequency": "n_frequency_pattern"}

    def settings(self, config: WaveFTConfig, key: str, base: nn.Module) -> dict[str, Any]:
        if config.proportional_parameters:
            return {"n_frequency": self.proportional(config, base)}
        return super().settings(config, key, base)

    def proportional(self, config: WaveFTConfig, base: nn.Module) -> int:
        """The layer's share, at least 1, of n_frequency coefficients for each of the targets."""
        targets = (module for name, module in self.model.named_modules() if check_target_module_exists(config, name))
        targets = [target.get_base_layer() if isinstance(target, BaseTunerLayer) else target for target in targets]
        sizes = [target.weight.numel() for target in targets if self.room_for(target) is not None]
        if not sizes:
            raise ValueError("No target modules found for proportional parameter allocation.")
        inputs, outputs = _get_in_out_features(base)
        return max(1, round(inputs * outputs / sum(sizes) * (config.n_frequency * len(sizes))))


register("waveft", WaveFTConfig, WaveFTModel)
for part, home in {"constants": wavelets, "waverec2d": wavelets, "wavelet": wavelet_filters}.items():
    sys.modules[f"{__name__}.{part}"] = globals()[part] = home
