"""OFT, orthogonal fine-tuning: blocks of the inputs are rotated (https://arxiv.org/abs/2306.07280, 2506.19847)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .block_dropout import MultiplicativeDropoutLayer
from .room import MapRoom, RoomConfig, RoomModel, State, Unscaled, multipliable, option, positive, register, shared


@dataclass
class OFTConfig(RoomConfig):
    """Options of OFT. ValueError unless exactly one of `r` and `oft_block_size` is given."""

    r: int = option(0, "Number of blocks in a layer, in place of their size.")
    oft_block_size: int = option(32, "Size of the blocks; a size that does not divide a layer's inputs is adjusted.")
    module_dropout: float = option(0.0, "Probability of leaving a block unrotated; has no effect, as in PEFT.")
    target_modules: list[str] | str | None = shared("target_modules")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: Literal["none", "all", "oft_only"] = shared("bias")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    modules_to_save: list[str] | None = shared("modules_to_save")
    coft: bool = option(False, "Whether to keep the rotations near the identity (constrained OFT).")
    eps: float = option(6e-5, "How near, with `coft`: the greatest norm of all blocks' generators.")
    block_share: bool = option(False, "Whether all blocks of a layer share one rotation.")
    use_cayley_neumann: bool = option(True, "Whether the Cayley transform's inverse is a truncated series.")
    num_cayley_neumann_terms: int = option(5, "Number of terms of this series; more are nearer to a rotation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            either = "`r` or `oft_block_size`"
            how = f"You can only specify either {either}" if self.r != 0 else f"Either {either} must be non-zero"
            raise ValueError(
                f"{how}, but not both: r x oft_block_size is the input size. Currently, r = {self.r} and "
                f"oft_block_size = {self.oft_block_size}."
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse the files of PEFT before 0.14 (ValueError); warn about another series in those before 0.18."""
        if "oft_block_size" not in kwargs:
            raise ValueError(
                "OFT has been updated since PEFT 0.14.0: adapter weights of older versions do not fit the present "
                "ones. Train the adapter again, or use PEFT 0.13.0."
            )
        if kwargs.get("use_cayley_neumann", False):
            version = kwargs.get("peft_version", "0.0.0").partition("@")[0]
            if tuple(int(part) for part in version.split(".")[:2]) < (0, 18):
                warnings.warn(
                    "The cayley-neumann parameterization has been slightly changed to be more numerically stable in "
                    "PEFT 0.18.0. Train the adapter again, or use PEFT 0.17.0 with this file."
                )
        return super().check_kwargs(**kwargs)


class OFTRotationModule(nn.Module):
    """Rotations of `r` blocks of size b, by the Cayley transform of skew-symmetric matrices Q: (I - Q)(I + Q)^-1.

    `weight` (r, b (b - 1) / 2) are the elements of Q above its diagonal; r is 1 for shared blocks.
    """

    def __init__(self, blocks: int, block_size: int, config: OFTConfig) -> None:
        super().__init__()
        self.r, self.block_size, self.block_share = blocks, block_size, config.block_share
        self.coft, self.eps = config.coft, config.eps
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.weight = nn.Parameter(torch.zeros(blocks, block_size * (block_size - 1) // 2))
        rows, cols = torch.triu_indices(block_size, block_size, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cols", cols, persistent=False)

    @torch.no_grad()
    def project(self) -> None:
        """Shrink the generators whose norm is above eps / sqrt(r)."""
        bound = self.eps / self.r**0.5
        norms = self.weight.norm(dim=1, keepdim=True) * 2**0.5  # Q has every element twice
        self.weight.copy_(torch.where(norms <= bound, self.weight, self.weight * (bound / norms)))

    def skew(self) -> torch.Tensor:
        """Q (r, b, b), in a dtype that is multiplied fast."""
        if self.coft:
            self.project()
        weight = multipliable(self.weight)
        upper = weight.new_zeros(self.r, self.block_size, self.block_size)
        upper[:, self.rows, self.cols] = weight
        return upper - upper.transpose(-1, -2)

    def series(self, skew: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """1 + 2 Q + 2 Q^2 + ... + Q^n, or `blocks` (r, rows, b) times that."""
        last = max(self.terms, 4) - 1 if self.terms > 2 else self.terms - 1
        result = power = torch.eye(self.block_size, device=skew.device, dtype=skew.dtype) if blocks is None else blocks
        for degree in range(1, last + 1):
            power = skew if blocks is None and degree == 1 else torch.bmm(power, skew)
            result = torch.add(result, power, alpha=1 if degree == last > 1 else 2)
        return result.expand(self.r, -1, -1)

    def rotations(self, skew: torch.Tensor) -> torch.Tensor:
        """The blocks (r, b, b), in the dtype of Q."""
        if self.terms is not None:
            return self.series(skew)
        eye = torch.eye(self.block_size, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew, left=False).to(skew.dtype)

    def forward(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """x (..., r b), each block multiplied by its rotation from the right."""
        skew = self.skew()
        blocks = x.to(skew.dtype).reshape(-1, x.shape[-1] // self.block_size, self.block_size)
        blocks = blocks.flatten(0, 1).unsqueeze(0) if self.block_share else blocks.transpose(0, 1)
        if self.terms is not None and blocks.shape[1] <= self.block_size:  # then the rotations are more work
            result = self.series(-skew if transposed else skew, blocks)
        else:
            rotations = self.rotations(skew)
            result = torch.bmm(blocks, rotations.transpose(-1, -2) if transposed else rotations)
        result = result if self.block_share else result.transpose(0, 1)
        return result.reshape(x.shape).to(self.weight.dtype)


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller one of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


class OFTLayer(Unscaled, MapRoom):
    """W R^T with a block diagonal rotation R (in, in); for convolutions `in` counts the kernel's elements, too."""

    title = "OFT"
    adapter_layer_names = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size", "oft_dropout")
    containers = dict.fromkeys(("oft_R", "oft_embedding_R", "oft_dropout"), nn.ModuleDict)
    home = "oft_R"

    def create(self, name: str, config: OFTConfig) -> None:
        base = self.get_base_layer()
        if getattr(base, "dilation", (1,))[0] > 1:
            raise ValueError(f"{type(base).__name__} with dilation > 1 is not supported by OFT.")
        size = self.rotated_size()
        given = "r" if config.r != 0 else "oft_block_size"
        value = nearest_divisor(size, positive(given, getattr(config, given)))
        if value != getattr(config, given):
            warnings.warn(f"Invalid `{given}` ({getattr(config, given)})! Adjusted `{given}` to ({value}).")
        blocks, block_size = (value, size // value) if given == "r" else (size // value, value)
        rotation = OFTRotationModule(1 if config.block_share else blocks, block_size, config)
        if config.init_weights is False:
            nn.init.normal_(rotation.weight, mean=0.0, std=0.1)
        elif config.init_weights is not True:
            raise ValueError(f"Unknown initialization init_weights={config.init_weights!r}: give True or False.")
        getattr(self, self.home)[name] = rotation
        self.r[name], self.oft_block_size[name] = blocks, block_size
        if self.home == "oft_R":
            p = config.module_dropout
            self.oft_dropout[name] = MultiplicativeDropoutLayer(p) if p > 0 else nn.Identity()

    def rotated_size(self) -> int:
        """Length of the vectors that are rotated."""
        base = self.get_base_layer()
        return base.weight[0].numel() if isinstance(base, nn.Conv2d) else self.in_features

    def rotate(self, name: str, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        rotation = getattr(self, self.home)[name]
        return rotation(self._cast_input_dtype(x, rotation.weight.dtype), transposed)

    def transform(self, name: str, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, Any]:
        return self.rotate(name, weight, transposed=True), bias

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """R, a matrix (in, in)."""
        rotation = getattr(self, self.home)[adapter]
        repeats = self.r[adapter] if rotation.block_share else 1
        blocks = rotation.rotations(rotation.skew()).to(rotation.weight.dtype)
        return torch.block_diag(*blocks.repeat(repeats, 1, 1))


class Linear(OFTLayer):
    """OFT for nn.Linear: x R goes into the base layer."""

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.rotate(name, x)


class Conv2d(OFTLayer):
    """OFT for nn.Conv2d: the kernel is rotated, which is to rotate the patches that it sees."""


class Embedding(OFTLayer):
    """OFT for nn.Embedding: W R, the embedded vectors are rotated."""

    home = "oft_embedding_R"

    def prepare(self, base: nn.Module, config: OFTConfig) -> None:
        self.out_features, self.in_features = base.num_embeddings, base.embedding_dim

    def transform(self, name: str, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, Any]:
        return self.rotate(name, weight), bias

    def after(self, name: str, y: torch.Tensor) -> torch.Tensor:
        return self.rotate(name, y)


class OFTModel(RoomModel):
    """Injects OFT."""

    rooms = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.Embedding: Embedding}

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge OFT layers when the model is gptq quantized")

    @classmethod
    def loading(cls, model: nn.Module, config: OFTConfig, name: str, saved: State) -> State:
        if any(".oft_r." in key for key in saved):
            raise ValueError("This is an OFT adapter of PEFT <= 0.15.2, which does not fit; train a new one.")
        return saved


register("oft", OFTConfig, OFTModel)
