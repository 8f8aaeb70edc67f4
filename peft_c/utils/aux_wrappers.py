"""Wrappers that train parts of a model beside an adapter: whole modules, or single rows of an embedding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import nn

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_MIXED_BATCH_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _set_layer_requires_grad(layer: nn.Module | torch.Tensor, requires_grad: bool) -> None:
    """Set `requires_grad` on a tensor or on all parameters of a module.

    Non-leaf tensors, which FSDP may put in a parameter's place, have no such flag and are left alone.
    """
    for tensor in (layer,) if isinstance(layer, torch.Tensor) else layer.parameters():
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)


class AuxiliaryTrainingWrapper(nn.Module):
    """Base of the wrappers: bookkeeping of adapter names, choice of the module that runs, attribute delegation.

    A subclass says what an adapter is: `init_modules`, `update`, the `_forward_wrapped*` family, `set_adapter`,
    `_remove_adapter`, `_get_available_adapters`, and how it is saved (`adapter_state_dict*`).

    Args:
        module_to_save: The module to wrap, kept as `original_module`.
        adapter_name: The first adapter.
        **kwargs: Passed on to `init_modules` and `update`.

    Raises:
        TypeError: if the module is a container without a forward or is itself a tuner layer.
    """

    # attributes (dotted names allowed) that map adapter names to trainable weights
    adapter_layer_names: tuple[str, ...] = ()
    # attributes that map adapter names to anything else
    other_param_names: tuple[str, ...] = ()
    # a wrapper itself is never merged
    merged_adapters: list[str] = []

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any):
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.check_module()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    # what subclasses define

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create the submodules, before the first `update`."""
        raise NotImplementedError

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have weights here."""
        raise NotImplementedError

    def _remove_adapter(self, adapter_name: str) -> None:
        """Drop the adapter's weights."""
        raise NotImplementedError

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward with the active adapter."""
        raise NotImplementedError

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The forward of those samples of a mixed batch that go to `active_adapter`."""
        raise NotImplementedError

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of the base model."""
        raise NotImplementedError

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The adapter's entries of this module's `state_dict` under the names they have in a checkpoint."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """From each name in a checkpoint to the name in this module's state dict; the keys are what gets loaded."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that replaces this wrapper in an unloaded model, with the adapter merged into it if asked."""
        raise NotImplementedError

    def _error_message_name(self) -> str:
        """What the user wrote to get this wrapper, for error messages."""
        return "training wrapper"

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        """Whether an active adapter serves the attribute `name`; `modules` is this module's `_modules`."""
        return False

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        """The attribute `name` as the active adapter serves it."""
        return None

    # what they share

    def check_module(self) -> None:
        """Raise TypeError if the wrapped module cannot be called or is a tuner layer already."""
        from ..tuners.tuners_utils import BaseTunerLayer

        if isinstance(self.original_module, (*_CONTAINERS, BaseTunerLayer)):
            cls = type(self.original_module)
            raise TypeError(f"{self._error_message_name()} cannot be applied to modules of type {cls}")

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off (change it with `enable_adapters`)."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """Active adapter as it was set (change it with `set_adapter`)."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Active adapter as a list, empty if there is none."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # while nn.Module.__init__ has not run there is nobody to ask
            modules = self.__dict__.get("_modules")
            if modules is None:
                raise
        if self.disable_adapters or not self.active_adapters:
            return getattr(self.original_module, name)
        if self._hasattr_wrapped(name, modules):
            return self._getattr_wrapped(name, modules)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter; the keyword arguments are those of the constructor."""
        self._adapters.add(adapter_name)

    def _create_new_hook(self, old_hook: Any) -> Any:
        """A new accelerate hook of the same class with the same settings, without the old one's state."""
        import accelerate.hooks

        hook_cls = getattr(accelerate.hooks, type(old_hook).__name__)
        settings = inspect.signature(hook_cls.__init__).parameters
        return hook_cls(**{key: value for key, value in vars(old_hook).items() if key in settings})

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """ValueError if `adapter_names` does not name one adapter per sample of the first argument."""
        names = kwargs.get("adapter_names")
        if names is not None and args and len(args[0]) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(args[0])} respectively."
            )

    def _mixed_batch_forward(
        self, input: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Each sample (row of `input`) with its own adapter, "__base__" being the original module."""
        if not isinstance(self.original_module, _MIXED_BATCH_MODULES):
            names = ", ".join(cls.__name__ for cls in _MIXED_BATCH_MODULES)
            raise TypeError(f"Mixed batching is only supported for the following modules: {names}.")

        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name, []).append(row)
        outputs = []
        for name, rows in rows_of.items():
            if name == "__base__":
                outputs.append(self.original_module(input[rows], *args, **kwargs))
            else:
                outputs.append(self._forward_wrapped_mixed_batch(input[rows], name, *args, **kwargs))
        # the outputs lie grouped by adapter: row i of the input is in place `order.argsort()[i]`
        order = torch.tensor([row for rows in rows_of.values() for row in rows])
        return torch.cat(outputs)[order.argsort()]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of the active adapter, of the base, or, with `adapter_names`, of each sample's adapter."""
        self._check_forward_args(*args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters or not self._adapters.issuperset(self.active_adapters):
            return self._forward_wrapped_passthrough(*args, **kwargs)
        if adapter_names is None:
            return self._forward_wrapped(*args, **kwargs)
        return self._mixed_batch_forward(*args, adapter_names=adapter_names, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off."""
        self._disable_adapters = not enabled

    def _check_at_most_one(self, adapter_names: Sequence[str]) -> None:
        if len(adapter_names) > 1:
            raise ValueError(
                f"Attempted to set multiple ({list(adapter_names)}) adapters at once for "
                f"{self._error_message_name()}, which can have one active adapter."
            )

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of the adapters about to become active this wrapper has: the name, or None.

        A string is returned as it is. ValueError for an empty list and if the wrapper has more than one of them.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        available = self._get_available_adapters()
        here = [name for name in adapter_name if name in available]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the adapter(s) active; gradients are the business of subclasses. ValueError for unknown names."""
        if isinstance(adapter_names, str):
            self._active_adapter = adapter_names
            return
        for name in adapter_names:
            if name not in self._adapters:
                raise ValueError(f"Adapter {name} not found in {self._adapters}")
        self._active_adapter = list(adapter_names)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete the adapter if it is here and make the new active one active, if that is here too.

        The caller chooses `new_active_adapters`, at most one name, so that all layers agree; ValueError for more.
        """
        if adapter_name not in self._adapters:
            return
        new_active = list(new_active_adapters or ())
        self._check_at_most_one(new_active)
        self._adapters.remove(adapter_name)
        self._remove_adapter(adapter_name)
        new_active = [name for name in new_active if name in self._adapters]
        if new_active != self.active_adapters:
            self.set_adapter(new_active[0] if new_active else [])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the weights of the adapter(s) be trained or not; names that are not here are ignored."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for attribute in self.adapter_layer_names:
            for name, layer in attrgetter(attribute)(self).items():
                if name in names:
                    _set_layer_requires_grad(layer, requires_grad)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Trains a full copy of a module per adapter (`modules_to_save` of a config); the original is frozen.

    With `tied_module`, the copy is a bias-free linear layer that shares that module's weight.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    # names of the parameters that `enable_adapters(False)` has frozen
    _paused: Sequence[str] = ()

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None):
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict({})

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def _remove_adapter(self, adapter_name: str) -> None:
        del self.modules_to_save[adapter_name]
        self._paused = [name for name in self._paused if name.partition(".")[0] != adapter_name]

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_adapters
        return (self.modules_to_save[active[0]] if active else self.original_module)(*args, **kwargs)

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self.modules_to_save[active_adapter](x, *args, **kwargs)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.original_module(*args, **kwargs)

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return "modules_to_save" in modules and self.active_adapters[0] in modules["modules_to_save"]

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        return getattr(modules["modules_to_save"][self.active_adapters[0]], name)

    def _whole_parameters(self) -> Any:
        """A context in which the original's parameters have data even if DeepSpeed ZeRO-3 has sharded them away."""
        parameters = list(self.original_module.parameters())
        if any(param.numel() == 0 and hasattr(param, "ds_numel") for param in parameters):
            import deepspeed

            return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
        return nullcontext()

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        super().update(adapter_name)
        if adapter_name not in self.modules_to_save:
            with self._whole_parameters():
                if tied_module is None:
                    copied = copy.deepcopy(self.original_module)
                else:
                    out_features, in_features = tied_module.weight.shape
                    copied = nn.Linear(in_features, out_features, bias=False)
                    copied.weight = tied_module.weight
            self.modules_to_save[adapter_name] = copied

        module = self.modules_to_save[adapter_name]
        if hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module, remove_hook_from_module

            hook = self._create_new_hook(module._hf_hook)
            remove_hook_from_module(module)
            add_hook_to_module(module, hook)

        self.original_module.requires_grad_(False)
        if adapter_name == self.active_adapter:
            _set_layer_requires_grad(module, True)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off, and with them the gradients.

        What was frozen before it was switched off is so afterwards. Switching on what is not off makes the active
        adapter trainable.
        """
        was_disabled = self.disable_adapters
        super().enable_adapters(enabled)
        if not enabled:
            if not was_disabled:
                self._paused = [name for name, param in self.modules_to_save.named_parameters() if param.requires_grad]
            _set_layer_requires_grad(self.modules_to_save, False)
            return
        for adapter_name in self.active_adapters:
            module = self.modules_to_save[adapter_name]
            if not was_disabled:
                _set_layer_requires_grad(module, True)
                continue
            for name, param in module.named_parameters():
                if f"{adapter_name}.{name}" in self._paused:
                    _set_layer_requires_grad(param, True)
        self._paused = ()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or with an empty list none, active and, unless `inference_mode`, trainable.

        The adapter that was active is frozen. ValueError for more than one name and for unknown ones.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_at_most_one(names)
        for name in names:
            if name not in self._adapters:
                raise ValueError(f"Adapter {name} not found in {self._adapters}")

        for name in self.active_adapters:
            if name in self.modules_to_save:
                _set_layer_requires_grad(self.modules_to_save[name], False)
        for name in names:
            _set_layer_requires_grad(self.modules_to_save[name], not inference_mode)
        self._active_adapter = names[0] if names else []
        self._paused = ()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._adapters:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: state_dict[full] for key, full in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if not self.active_adapters:
            return self.original_module
        module = self.modules_to_save[self.active_adapters[0]]
        if hasattr(module, "base_layer"):
            # the copy has been given an adapter of its own
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.get_base_layer()
        return module


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Trains chosen rows of an embedding beside another adapter (`trainable_token_indices` of a config).

    Args:
        module_to_save: The embedding, or a linear layer whose weight is tied to one.
        adapter_name: The first adapter.
        token_indices: The rows.
        tied_adapter: The `TrainableTokensLayer` of the embedding to which the module is tied, whose rows are used.
    """

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: nn.Module | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)

    @property
    def original_module(self) -> nn.Module:
        """The wrapped module: the token adapter's base layer, so that it has one name in the state dict."""
        modules = self._modules
        return modules["token_adapter"].base_layer if "token_adapter" in modules else modules["original_module"]

    def init_modules(self, adapter_name: str, token_indices: list[int], tied_adapter: nn.Module | None) -> None:
        from ..tuners.trainable_tokens import TrainableTokensLayer

        module, self._modules["original_module"] = self._modules["original_module"], None  # shown in repr, as in PEFT
        self.token_adapter = TrainableTokensLayer(module, adapter_name, tied_adapter=tied_adapter)

    def _error_message_name(self) -> str:
        return "trainable_token_indices"

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.trainable_tokens_delta)

    def _remove_adapter(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return "token_adapter" in modules

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        adapter = modules["token_adapter"]
        if name == "weight":
            return adapter.get_merged_weights(adapter.active_adapters)
        return getattr(adapter.base_layer, name)

    def _forward_wrapped(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.token_adapter(x, *args, **kwargs)

    def _forward_wrapped_mixed_batch(
        self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return self.token_adapter.forward_adapters(x, [active_adapter])

    # the token adapter is told about disabling and about no active adapter as well, so it knows when to pass through
    _forward_wrapped_passthrough = _forward_wrapped

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        if adapter_name not in self._adapters:
            self.token_adapter.update_layer(adapter_name, **kwargs)
        super().update(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        # a tied layer has no rows of its own
        if self.token_adapter.tied_adapter or adapter_name not in self._adapters:
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: state_dict[full] for key, full in self.adapter_state_dict_load_map(adapter_name).items()}

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the adapter(s) active here and in the token adapter; trainable unless `inference_mode`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.token_adapter.set_adapter(adapter_names, inference_mode=inference_mode)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.get_base_layer()


# the public path, which error messages and pickles name
for _cls in (AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper):
    _cls.__module__ = f"{__package__}.other"


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make the adapter active in every wrapper of the model that has it, and none in the others."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = module.check_set_adapter(adapter_name)
            module.set_adapter(name if name in module._adapters else [], inference_mode=inference_mode)
