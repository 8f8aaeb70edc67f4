"""FourierFT: the delta is the inverse Fourier transform of a few trained frequencies (https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, option, positive, register, rows_of, shared


@dataclass
class FourierFTConfig(RoomConfig):
    """Options of FourierFT."""

    n_frequency: int = option(1000, "Number of trained frequencies of each layer, from 1 to in * out.")
    scaling: float = option(150.0, "Factor of the delta; the paper uses 100 to 300.")
    random_loc_seed: int | None = option(777, "Seed of the choice of frequencies.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    n_frequency_pattern: dict | None = option({}, "Name or pattern -> n_frequency, where it differs.", after_dot=True)
    init_weights: bool = option(False, "True: start with a spectrum of zeros (no change); False: standard normal.")


def random_places(n_frequency: int, in_features: int, out_features: int, seed: int) -> torch.Tensor:
    """Rows and columns (2, n_frequency) of different elements of a matrix (out, in)."""
    size = in_features * out_features
    if positive("n_frequency", n_frequency) > size:
        raise ValueError(
            "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
            f"value passed is {n_frequency} and the product is {size}"
        )
    places = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n_frequency]
    return torch.stack([places // in_features, places % in_features])


class FourierFTLinear(AddRoom):
    """FourierFT for nn.Linear and Conv1D: spectrum (n_frequency,) at random places of (out, in)."""

    adapter_layer_names = ("fourierft_spectrum",)
    other_param_names = ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")

    def create(self, name: str, config: FourierFTConfig, n_frequency: int) -> None:
        self.indices[name] = random_places(n_frequency, self.in_features, self.out_features, config.random_loc_seed)
        self.fourierft_n_frequency[name] = n_frequency
        self.fourierft_scaling[name] = config.scaling
        self.fourierft_random_loc_seed[name] = config.random_loc_seed
        spectrum = torch.randn(n_frequency)
        self.fourierft_spectrum[name] = nn.Parameter(torch.zeros_like(spectrum) if config.init_weights else spectrum)

    def half_spectrum(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the places, those beyond the middle column seen from the other end: there the spectrum
        of a real matrix has the conjugate values."""
        rows, columns = self.indices[name].to(self.fourierft_spectrum[name].device)
        beyond = columns > self.in_features // 2
        return (
            torch.where(beyond, -rows % self.out_features, rows),
            torch.where(beyond, self.in_features - columns, columns),
        )

    def delta(self, name: str) -> torch.Tensor:
        """The real part of the inverse transform: that of the spectrum's symmetric part, of which half is enough."""
        spectrum, (rows, columns) = self.fourierft_spectrum[name], self.half_spectrum(name)
        size, width = (self.out_features, self.in_features), self.in_features // 2 + 1
        values = spectrum.float() * (self.fourierft_scaling[name] / 2)
        alone = (columns == 0) | (2 * columns == self.in_features)  # columns that have their conjugates in themselves
        flat = values.new_zeros(size[0] * width).index_add(0, rows * width + columns, values)
        flat = flat.index_add(0, -rows % size[0] * width + columns, values * alone)
        columns = torch.fft.ifft(flat.view(size[0], width), dim=0)  # faster than irfft2
        return torch.fft.irfft(columns, n=size[1], dim=1).to(spectrum.dtype)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return not 0 < rows_of(x) <= 128  # nothing has no transform

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The delta's product in three steps: transform x, multiply by the sparse spectrum, transform back."""
        spectrum, (rows, columns) = self.fourierft_spectrum[name], self.half_spectrum(name)
        flat = torch.fft.rfft(x.reshape(-1, x.shape[-1]).float()).T
        scale = self.fourierft_scaling[name] / (self.in_features * self.out_features)
        parts = flat[columns] * (spectrum.float() * scale).unsqueeze(1)
        sums = parts.new_zeros(self.out_features, parts.shape[1]).index_add(0, rows, parts)
        return torch.fft.fft(sums, dim=0).real.T.reshape(*x.shape[:-1], -1).to(x.dtype)


FourierFTLayer = FourierFTLinear


class FourierFTModel(RoomModel):
    """Injects FourierFT."""

    rooms = {nn.Linear: FourierFTLinear, "Conv1D": FourierFTLinear}
    by_pattern = {"n_frequency": "n_frequency_pattern"}


register("fourierft", FourierFTConfig, FourierFTModel)
