"""Rooms whose layers share weights that live on the model, such as random projections that are drawn once.

The model keeps each of them in a container (a BufferDict, or a ParameterDict of trained weights) with one entry an
adapter; every layer has the same container as an attribute of the same name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .room import AddRoom, RoomConfig, RoomModel, State, positive
from .targets import _maybe_include_all_linear_layers, outer_modules
from .tuner_layer import BaseTunerLayer, _get_in_out_features


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 if it is a half-precision one on the CPU, else itself."""
    half = tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


class SharedRoom(AddRoom):
    """A layer that refers to what `SharedRoomModel.shared` gives.

    own: the container that has an entry for exactly the adapters of this layer.
    """

    own: ClassVar[str]

    def share(self, containers: dict[str, nn.Module]) -> None:
        """Refer to the containers of the model."""
        for name, container in containers.items():
            setattr(self, name, container)

    def _merge_adapters(self) -> list[str]:
        return list(getattr(self, self.own).keys())

    def has_adapter(self, name: str) -> bool:
        return name in getattr(self, self.own)


class SharedRoomModel(RoomModel):
    """Injects rooms that share weights."""

    uses_shared_state = True

    def shared(self, name: str, config: Any) -> dict[str, nn.Module]:
        """The containers that layers share, by attribute, with an entry for the adapter."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its layers share")

    def settings_of(self, name: str, config: Any, key: str, base: nn.Module) -> dict[str, Any]:
        positive("r", config.r)
        return {"shared": self.shared(name, config), **self.settings(config, key, base)}

    def targets(self, config: Any) -> Iterator[tuple[str, nn.Module]]:
        """(name, base layer) of everything that the config adapts, in the order of the model."""
        config = self._prepare_adapter_config(config, self.get_model_config(self.model))
        config = _maybe_include_all_linear_layers(config, self.model)
        for name, module in outer_modules(self.model):
            if name and self._check_target_module_exists(config, name):
                base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                if self.room_for(base) is not None:
                    yield name, base


# ------------------------------------------------------------------------------------------------ random projections


@dataclass
class ProjectionConfig(RoomConfig):
    """Base of the configs of methods with projections, called `random`, that are drawn from a `seed` and frozen."""

    random: ClassVar[str]
    seed: ClassVar[str] = "projection_prng_key"
    restored: ClassVar[str] = ", instead they will be restored using the PRNG key store in"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            warnings.warn(
                f"Specified to not save {self.random} within the state dictionary{self.restored} `config.{self.seed}`."
                " Consider setting `config.save_projection` to `True` to guarantee restoring the checkpoint correctly "
                "on all system configurations."
            )


def check_projections(names: str, saved: bool, present: bool, required: bool = True) -> None:
    """Compare what a config says about projections with what a checkpoint has: ValueError if they are `required` and
    missing, else a warning."""
    if saved and present:
        return
    if saved and required:
        raise ValueError(
            f"Specified to load {names} from state dictionary however they were not present! If the checkpoint was "
            "saved with `save_projection=False`, set `peft_config.save_projection` to `False`."
        )
    again = "they are made again from the config's seed, which may not be accurate on all system configurations."
    if present:
        again = (
            "they are present in state dictionary! Consider using them to ensure checkpoint loading is correct on all "
            "platforms using `peft_config.save_projection = True`"
        )
    warnings.warn(f"Specified to {'' if saved else 'not '}load {names} from state dictionary however {again}")


def drawn(seed: int, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Kaiming uniform tensors of these shapes, from a generator with that seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes)


class SeededModel(SharedRoomModel):
    """Has one seed, and one choice whether to save, for the projections of all adapters."""

    key: ClassVar[str]  # what messages call the seed
    equal = {"save_projection": "{title} projection weights must be saved for all adapters or none"}

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for known in self.peft_config.values():
            if known.projection_prng_key != config.projection_prng_key:
                raise ValueError(
                    f"{self.key} must be the same for all adapters. Got "
                    f"{config.projection_prng_key=} but previous config had {known.projection_prng_key}."
                )


class ProjectionModel(SeededModel):
    """Shares the projections `projections` (A and B), sized by the largest layer of the first adapter.

    Further adapters use those of the first one if they have its rank, and draw their own from the seed if they have a
    smaller one.
    """

    projections: ClassVar[tuple[str, str]]
    ranked: ClassVar[str] = ""  # which of them tells the rank in messages, if not the first

    def draw(self, config: Any, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B for layers of up to this size, from the config's seed."""
        raise NotImplementedError

    @staticmethod
    def sizes(A: torch.Tensor, B: torch.Tensor) -> tuple[int, int, int]:
        """(rank, largest out_features, largest in_features) that A and B serve."""
        return B.shape[-1], B.shape[0], A.shape[-1]

    @staticmethod
    def needed(out_features: int, in_features: int) -> tuple[int, int]:
        """What a layer of this size needs of the last two `sizes`."""
        return out_features, in_features

    def shapes(self, config: Any) -> list[tuple[int, int]]:
        """(out_features, in_features) of all targets."""
        shapes = [_get_in_out_features(base)[::-1] for _, base in self.targets(config)]
        if not shapes:
            raise ValueError(
                f"No layers types compatible with {self.title} were found. Please check `peft_config.target_modules`."
            )
        return shapes

    def largest(self, config: Any) -> tuple[int, int]:
        """The largest out_features and the largest in_features of all targets."""
        out_features, in_features = zip(*self.shapes(config), strict=True)
        return max(out_features), max(in_features)

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        drawn = self.draw(config, *self.largest(config))
        for container, tensor in zip(self.projections, drawn, strict=True):
            setattr(self, container, BufferDict({adapter_name: tensor}, persistent=config.save_projection))

    def shared(self, name: str, config: Any) -> dict[str, nn.Module]:
        containers = {container: getattr(self, container) for container in self.projections}
        if not all(name in container for container in containers.values()):
            for container, tensor in zip(containers.values(), self.further(config), strict=True):
                container[name] = tensor
        return containers

    def further(self, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The projections of an adapter that is not the first one; ValueError if it needs larger ones."""
        a, b = self.projections
        if not len(getattr(self, a)):
            return self.draw(config, *self.largest(config))
        A, B = (next(iter(getattr(self, container).values())) for container in (a, b))
        r, rows, columns = self.sizes(A, B)
        out, in_ = map(max, zip(*(self.needed(*shape) for shape in self.shapes(config)), strict=True))
        shape = f"an additional {self.title} adapter was added after the first one with incompatible shapes."
        rank = (
            f"an additional {self.title} adapter with a lower rank was added after the first one; loading the "
            "adapters in reverse order may solve this."
        )
        checks = ((a, columns, in_, shape), (b, rows, out, shape), (self.ranked or a, r, config.r, rank))
        for container, size, required, reason in checks:
            if size < required:
                raise ValueError(
                    f"{container} has a size of {size} but {required} or greater is required; this probably happened "
                    f"because {reason}"
                )
        if config.r < r:
            drawn = zip(self.draw(config, rows, columns), (A, B), strict=True)
            A, B = (new.to(first.device, first.dtype) for new, first in drawn)
        return A, B

    @classmethod
    def loading(cls, model: nn.Module, config: Any, name: str, saved: State) -> State:
        """Makes room for saved projections of another size if they serve all layers of the adapter: the first adapter
        may have been another one when they were saved."""
        tensors = [saved.get(f"base_model.{part}.{name}") for part in cls.projections]
        if any(tensor is None for tensor in tensors):
            return saved
        r, rows, columns = cls.sizes(*tensors)
        layers = (layer for layer in model.modules() if isinstance(layer, cls.tuner_layer_cls))
        needs = [cls.needed(x.out_features, x.in_features) for x in layers if name in x._merge_adapters()]
        if r == config.r and all(out <= rows and in_ <= columns for out, in_ in needs):
            for part, tensor in zip(cls.projections, tensors, strict=True):
                container = getattr(model, part)
                if container[name].shape != tensor.shape:
                    container[name] = torch.empty_like(tensor).to(container[name])
        return saved


class SavedProjectionModel(ProjectionModel):
    """Saves the projections once, under the model's name of them."""

    @classmethod
    def saving(cls, model: nn.Module, config: Any, name: str, state: State, own: State) -> State:
        parts = tuple(f".{part}." for part in cls.projections)
        own = {key: value for key, value in own.items() if not any(part in key for part in parts)}
        if config.save_projection:
            keys = [f"base_model.{part}.{name}" for part in cls.projections]
            if keys[0] not in state:
                raise ValueError(
                    f"Model was initialised to not save {' and '.join(cls.projections)} but config now specifies to "
                    "save projection! Set `config.save_projection` to `False`."
                )
            own.update({key: state[key] for key in keys})
        return own

    @classmethod
    def loading(cls, model: nn.Module, config: Any, name: str, saved: State) -> State:
        key = f"base_model.{cls.projections[0]}"
        key = f"{key}.{name}" if config.save_projection else key
        check_projections(" and ".join(cls.projections), config.save_projection, key in saved)
        return super().loading(model, config, name, saved)
