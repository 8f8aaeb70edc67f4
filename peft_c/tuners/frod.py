"""FRoD: a sparse rotation in a joint decomposition of weights is trained (https://doi.org/10.1609/aaai.v40i31.39813)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .room import RoomConfig, State, linear, multiply, option, product, register, shared, weight_view
from .shared_room import SeededModel, SharedRoom, check_projections, wide


@dataclass
class FrodConfig(RoomConfig):
    """Options of FRoD."""

    target_modules: list[str] | str | None = shared("target_modules")
    projection_prng_key: int = shared("projection_prng_key")
    save_projection: bool = shared("save_projection")
    frod_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    sparse_rate: float = option(0.01, "Part of the entries off the diagonal that are trained, from 0 to 1.")
    regularization_alpha: float = option(1e-3, "Keeps the joint decomposition stable if weights are alike.")
    progressbar: bool = option(True, "Whether to show a progress bar of the decompositions.")
    runtime_offload_base_weight: bool = option(
        False, "Whether base weights stay on the CPU while the adapter is used, which does not need them."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")


def _move_weight(base: nn.Module, to: torch.device | tuple) -> None:
    """Move an offloaded weight; as a forward pre-hook, to where the input is."""
    device = to if isinstance(to, torch.device) else to[0].device
    if not base.weight.is_meta and base.weight.device != device:
        base.weight.data = base.weight.data.to(device)


class Linear(SharedRoom, nn.Linear):
    """U (S + diag(l)) V^T in place of W = U diag(l) V^T: V (in, in) is shared by the layers of a category, U (out, in)
    has normalised columns; l (in,) and the values of the sparse S (in, in), at shared places, are trained."""

    adapter_layer_names = ("frod_lambda_l", "frod_lambda_s_values")
    other_param_names = (
        "r", "frod_V", "frod_U", "frod_s_indices", "frod_s_size", "frod_dropout", "runtime_offload_base_weight"
    )  # fmt: skip
    containers = {**dict.fromkeys(adapter_layer_names, nn.ParameterDict), "frod_U": BufferDict}
    own, dropout = "frod_lambda_l", "frod_dropout"
    converts_to_lora = False

    def share(self, containers: dict[str, nn.Module]) -> None:
        self.__dict__.update(containers)  # not as submodules: they are in the state dict once

    def create(self, name: str, config: FrodConfig, shared: dict[str, nn.Module]) -> None:
        self.share(shared)
        base = self.get_base_layer()
        if config.runtime_offload_base_weight and not self.runtime_offload_base_weight:
            base.register_forward_pre_hook(_move_weight)
        self.r[name], self.runtime_offload_base_weight[name] = self.out_features, config.runtime_offload_base_weight
        self.add_dropout(name, config.frod_dropout)
        weight = weight_view(base).matrix(base.weight.detach())
        U, scales = self._calculate_frod_u_and_lambda(self.frod_V[name].to(weight.dtype), weight)
        scales, values = scales.to(weight), weight.new_zeros(self.frod_s_indices[name].shape[1])
        if not config.init_weights:
            nn.init.normal_(values, std=0.1)
            scales = scales + torch.randn_like(scales) * 0.1
        self.frod_lambda_l[name], self.frod_lambda_s_values[name] = nn.Parameter(scales), nn.Parameter(values)
        self.frod_U[name] = U.to(weight.dtype)

    @staticmethod
    def _calculate_frod_u_and_lambda(V: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U and l with U diag(l) V^T = W."""
        V, W = V.detach().double().cpu(), W.detach().double().cpu()
        try:
            product = torch.linalg.solve(V, W.T).T
        except RuntimeError:
            product = W @ torch.linalg.pinv(V, rtol=1e-6).T
        scales = product.norm(dim=0)
        U = torch.where(scales > 1e-12, product / scales, 0.0)
        return U.float(), scales.float()

    def parts(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """U, V, S (sparse; its places differ) and l with the device and dtype of `like`."""
        dense = (self.frod_U, self.frod_V, self.frod_lambda_s_values, self.frod_lambda_l)
        U, V, values, scales = (container[name].to(like.device, like.dtype) for container in dense)
        S = torch.sparse_coo_tensor(self.frod_s_indices[name].to(like.device), values, self.frod_s_size[name].tolist())
        return U, V, S.coalesce() if S.requires_grad else S, scales

    def delta(self, name: str) -> torch.Tensor:
        weight = self.bare_weight()
        U, V, S, scales = self.parts(name, weight)
        V = wide(V.T.contiguous())
        inner = torch.addcmul(torch.sparse.mm(S.to(V.dtype), V), V, scales.to(V.dtype).unsqueeze(1))
        return multiply(partial(torch.addmm, beta=-1), weight, U, inner.to(U.dtype))

    @staticmethod
    def _sparse_activation_mm(z: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """z (n, in) times S^T; for few rows by a dense matrix. Half precision has no sparse product."""
        if torch.compiler.is_exporting() or len(z) <= 64:
            places, values = S._indices(), S._values()
            dense = S.to_dense() if S.is_coalesced() else values.new_zeros(S.shape).index_put_(tuple(places), values)
            return linear(z, dense)
        dtype = torch.promote_types(z.dtype, torch.float32)
        return torch.sparse.mm(S.to(dtype), z.T.to(dtype).contiguous()).T.to(z.dtype)

    def output(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The adapted output, with this bias."""
        U, V, S, scales = self.parts(name, x)
        z = product(x, V)
        rotated = self._sparse_activation_mm(z.reshape(-1, z.shape[-1]), S).view_as(z)
        return linear(torch.addcmul(rotated, z, scales), U, bias)

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.output(name, x) - linear(x, weight_view(self.get_base_layer()).matrix().to(x.dtype))

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, drop = self.get_base_layer(), self.frod_dropout[names[0]]
        if len(names) == 1 and (isinstance(drop, nn.Identity) or not drop.training):  # the base weight is not needed
            if self.runtime_offload_base_weight[names[0]]:
                _move_weight(base, torch.device("cpu"))
            return self.output(names[0], drop(x), self._cast_input_dtype(base.bias, x.dtype))
        return super().adapt(names, x, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As for other methods; where the base weight is offloaded, to the device of other adapters."""
        if device is None and self.get_base_layer().weight.device.type == "cpu":
            own = [scales.device for scales in self.frod_lambda_l.values() if not scales.is_meta]
            device = next((device for device in own if device.type != "cpu"), None)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)


FrodLayer = Linear


def _category(key: str) -> str:
    """What a module is in its layer: layers.0.attn.q_proj -> attn_q_proj. Modules of a category share V."""
    *parents, name = key.split(".")
    if not parents or parents[-1].isdigit():
        return name
    category = f"{parents[-1]}_{name}"
    return "attention_output" if category == "output_dense" and parents[-2:-1] == ["attention"] else category


def _layer_index(key: str, fallback: int) -> int:
    """The number of the layer that a module is in."""
    parts = key.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in after + parts if part.isdigit()), fallback)


def _joint_basis(weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """V (in, in) of a hierarchical joint decomposition of weights (out, in)."""
    stacked = torch.cat(weights)
    if len(stacked) < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T
    Q, R = torch.linalg.qr(stacked)
    ridge = alpha * torch.eye(len(R), dtype=R.dtype)
    inverses = [torch.linalg.inv(q.T @ q + ridge) for q in Q.split([len(weight) for weight in weights])]
    return R.T @ torch.linalg.eigh(sum(inverses) / len(inverses)).eigenvectors


def _places(size: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Random places off the diagonal of (size, size), as (2, number)."""
    available = size * (size - 1)
    count = min(int(size * size * rate), available)
    count = max(1, count) if rate > 0 and available else count
    chosen = torch.randperm(available, generator=generator)[:count]
    rows, columns = chosen // max(1, size - 1), chosen % max(1, size - 1)
    return torch.stack([rows, columns + (columns >= rows)])


class FrodModel(SeededModel):
    """Injects FRoD."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear}
    title, key = "FRoD", "FRoD projection initialization key"
    equal = SeededModel.equal | {
        "runtime_offload_base_weight": "FRoD runtime base-weight offloading must be enabled for all adapters or none"
    }
    projections = ("frod_V", "frod_s_indices", "frod_s_size")

    def _pre_injection_hook(self, model: nn.Module, config: FrodConfig, adapter_name: str) -> None:
        for name in self.projections:
            setattr(self, name, nn.ModuleDict())
        self.decompose(config, adapter_name)

    def decompose(self, config: FrodConfig, adapter_name: str) -> None:
        """Make the adapter's V and places of S, for those categories of its targets where it has none."""
        layers: dict[str, dict[int, nn.Module]] = {}
        for i, (key, base) in enumerate(self.targets(config)):
            layers.setdefault(_category(key), {})[_layer_index(key, i)] = base
        if not layers:
            raise ValueError("No layer types compatible with FRoD were found. Please check `target_modules`.")
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        categories = sorted(layers)
        if config.progressbar:
            from tqdm import tqdm

            categories = tqdm(categories, desc="FRoD hierarchical joint decomposition", unit="category")
        for category in categories:
            matrices = [weight_view(base).matrix(base.weight.detach()) for _, base in sorted(layers[category].items())]
            places = _places(matrices[0].shape[1], config.sparse_rate, generator)
            if category in self.frod_V and adapter_name in self.frod_V[category]:
                continue
            V = _joint_basis([weight.float().cpu() for weight in matrices], config.regularization_alpha)
            made = (V.to(matrices[0].dtype), places, torch.tensor(V.shape))
            for homes, tensor in zip((getattr(self, name) for name in self.projections), made, strict=True):
                if category not in homes:
                    homes[category] = BufferDict({}, config.save_projection)
                homes[category][adapter_name] = tensor

    def settings_of(self, name: str, config: FrodConfig, key: str, base: nn.Module) -> dict[str, Any]:
        category = _category(key)
        if category not in self.frod_V or not len(self.frod_V[category]):
            self.decompose(config, name)
        containers = {part: getattr(self, part)[category] for part in self.projections}
        for container in containers.values():
            if name not in container:
                container[name] = next(iter(container.values()))
        return {"shared": containers}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As for other methods, but for U, which keeps the dtype of the base weight."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, Linear) and adapter_name in layer.frod_U:
                layer.frod_U[adapter_name] = layer.frod_U[adapter_name].to(layer.get_base_layer().weight.dtype)

    @classmethod
    def loading(cls, model: nn.Module, config: FrodConfig, name: str, saved: State) -> State:
        prefixes = tuple(f"base_model.{part}." for part in cls.projections)
        found = {key for key in saved if key.startswith(prefixes)}
        if found or config.save_projection:
            check_projections("FRoD projection tensors", config.save_projection, bool(found))
        return {f"{key}.{name}" if key in found else key: tensor for key, tensor in saved.items()}


register("frod", FrodConfig, FrodModel)
