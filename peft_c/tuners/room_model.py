"""What injects the rooms of one method into a model (see `room`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, ClassVar

import torch
from torch import nn

from ..utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from .products import CONVOLUTIONS
from .room_layer import Room
from .room_options import pattern_value
from .tuner_layer import BaseTunerLayer, is_transformers_conv1d
from .tuners_utils import BaseTuner

State = dict[str, torch.Tensor]
QUANTISED = {"linear": nn.Linear, "embedding": nn.Embedding, "conv2d": nn.Conv2d}  # a backend's layer type -> class


def backend_of(base: nn.Module, **known: Any) -> QuantizationBackend | None:
    """How to get at the weight of a quantised base layer, of which its model may know more; None for others."""
    if type(base).__module__.startswith("torch.nn.") and type(getattr(base, "weight", None)) is nn.Parameter:
        return None
    return resolve_quantization_backend(base, **known)


class RoomModel(BaseTuner):
    """Injects the rooms of one method.

    `rooms`: base layer class, or "Conv1D" for transformers' -> Room, the first that fits.
    `unsupported`: what is raised for any other target; None: it is left as it is.
    """

    rooms: ClassVar[dict[type | str, type[Room]]]
    unsupported: ClassVar[type[Exception] | None] = TypeError
    title: ClassVar[str] = ""  # the method's name in messages
    corrects_config: ClassVar[bool] = True  # whether files say, too, that `fan_in_fan_out` was wrong
    by_pattern: ClassVar[dict[str, str]] = {}  # option that depends on a target's name -> the one that says how
    equal: ClassVar[dict[str, str]] = {}  # option that all adapters have to agree in -> what is said if they do not
    unequal: ClassVar[type[Exception]] = ValueError  # what is raised then

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name, message in self.equal.items():
            values = {getattr(known, name) for known in self.peft_config.values()}
            if len(values) > 1:
                message = message.format(title=self.title)
                raise self.unequal(f"{message}, but got multiple different values: {sorted(values)}")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Context of one forward (or generate) call with an adapter for each sample, `adapter_names`."""
        if kwargs.get("adapter_names") is None:
            return nullcontext()
        from .lora.batch_hooks import per_call_arguments

        beams = kwargs.get("num_beams")
        return per_call_arguments(self, adapter_names=kwargs["adapter_names"], alora_offsets=None, num_beams=beams)

    def settings(self, config: Any, key: str, base: nn.Module) -> dict[str, Any]:
        """What `Room.create` is given for the target called `key` beside the config: `by_pattern`."""
        known, values = type(config).__dataclass_fields__, {}
        for name, pattern in self.by_pattern.items():
            after_dot = known[pattern].metadata.get("after_dot", False)
            values[name] = pattern_value(getattr(config, pattern), key, getattr(config, name), after_dot)
        return values

    def settings_of(self, name: str, config: Any, key: str, base: nn.Module) -> dict[str, Any]:
        """`settings`, for methods in which they depend on the adapter's name."""
        return self.settings(config, key, base)

    def finish(self, name: str) -> None:
        """Called when all layers of the adapter `name` have been created."""

    @classmethod
    def saving(cls, model: nn.Module, config: Any, name: str, state: State, own: State) -> State:
        """What files have of an adapter: usually `own`, the layers' entries of the model's state dict."""
        return own

    @classmethod
    def loading(cls, model: nn.Module, config: Any, name: str, saved: State) -> State:
        """What is loaded: usually `saved`, the entries of a file, in which those of layers have the model's keys."""
        return saved

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State, unwanted_adapter_names: list[str]
    ) -> State:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return cls.saving(model, config, adapter_name, state_dict, own)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State
    ) -> State:
        saved = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return cls.loading(model, config, adapter_name, saved)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter to the model, see `BaseTuner.inject_adapter`."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.finish(adapter_name)

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if self.unsupported is None and self.room_for(base) is None:
            return
        settings = self.settings_of(adapter_name, config, current_key, base)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name=adapter_name, config=config, **settings)
            return
        layer = self._create_new_module(
            config, adapter_name, target, **settings, **get_quantization_kwargs(self.model)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def room_for(self, base: nn.Module) -> type[Room] | None:
        """The room for a base layer, None if the method has none."""
        return self._room_for(base, backend_of(base, **get_quantization_kwargs(self.model)))

    @classmethod
    def _room_for(cls, base: nn.Module, backend: QuantizationBackend | None) -> type[Room] | None:
        for kind, room in cls.rooms.items():
            if is_transformers_conv1d(base) if kind == "Conv1D" else isinstance(base, kind):
                return room
        return None if backend is None else cls.rooms.get(QUANTISED[backend.layer_type])

    @classmethod
    def _create_new_module(
        cls,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        get_apply_tensor_subclass: Callable | None = None,
        **settings: Any,
    ) -> Room:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = backend_of(base, get_apply_tensor_subclass=get_apply_tensor_subclass)
        room = cls._room_for(base, backend)
        if room is None:
            known = ", ".join(
                f"`{'transformers.pytorch_utils.Conv1D' if kind == 'Conv1D' else f'torch.nn.{kind.__name__}'}`"
                for kind in cls.rooms
            )
            raise cls.unsupported(
                f"Target module {target} is not supported. "
                f"Currently, only the following modules are supported: {known}."
            )
        has_choice = hasattr(config, "fan_in_fan_out") and not isinstance(base, (*CONVOLUTIONS, nn.Embedding))
        if has_choice and bool(config.fan_in_fan_out) != is_transformers_conv1d(base):
            warnings.warn(
                f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is "
                f"`{'torch.nn.Linear' if config.fan_in_fan_out else 'Conv1D'}`. "
                f"Setting fan_in_fan_out to {not config.fan_in_fan_out}."
            )
            config = config if cls.corrects_config else copy(config)
            config.fan_in_fan_out = not config.fan_in_fan_out
        return room(target, adapter_name=adapter_name, config=config, quantization_backend=backend, **settings)
