"""BaseTunerLayer: what every layer that wraps a base layer and holds adapters has in common."""

from __future__ import annotations

import sys
import warnings
from abc import ABC
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks

from .. import _C
from ..utils.warning import PeftWarning
from ._buffer_dict import BufferDict
from .offloaded import execution_device

if TYPE_CHECKING:
    from ..utils.quantization_utils import QuantizationBackend

# what wraps no other module: asking these for a base layer would cost an exception
INNERMOST = frozenset((nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
# what holds one entry per adapter
ADAPTER_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)


def is_transformers_conv1d(module: Any) -> bool:
    """Whether `module` is transformers' Conv1D; transformers is not imported to find out."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def _linear_features(module: nn.Linear) -> tuple[int, int]:
    """Sizes that an nn.Linear computes with: the local shard's under tensor parallelism, else the full ones."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(module.weight, tensors.DTensor):
        # fully_shard has an unnamed mesh, or one dimension "fsdp": it gathers the weight before use
        if not set(module.weight.device_mesh.mesh_dim_names or ()) <= {"fsdp"}:
            out_features, in_features = module.weight.to_local().shape
            return in_features, out_features
    return module.in_features, module.out_features


# pairs of attributes that hold (in, out) sizes: GPTQ-like and Megatron layers
_SIZE_ATTRIBUTES = (("infeatures", "outfeatures"), ("input_size", "output_size"))
# classes with in_features and out_features that are known to work: TransformerEngine, INC
_KNOWN_CLASSES = {"Linear", "LayerNormLinear", "PatchedLinear"}
# the same, for classes whose name alone says too little: AQLM, HQQ, EETQ
_KNOWN_BY_ATTRIBUTE = {"QuantizedLinear": "codebooks", "HQQLinear": "W_q", "EetqLinear": "in_features"}


def _get_in_out_features(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """(in_features, out_features) of a base layer; (None, None) with a warning if they cannot be found.

    A result does not mean that a tuner supports the layer. nn.MultiheadAttention must have equal query, key and value
    sizes, else ValueError.
    """
    if isinstance(module, nn.Linear):
        return _linear_features(module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_transformers_conv1d(module):
        return tuple(getattr(module.weight, "ds_shape", module.weight.shape))
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise ValueError("Only same dim for query/key/value is supported as of now for MultiheadAttention.")
        return module.embed_dim, 3 * module.embed_dim
    for names in _SIZE_ATTRIBUTES:
        if all(hasattr(module, name) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])

    kind = type(module).__name__
    if kind == "LayerNormMLP":
        return (module.layer_norm_weight.shape[0],) * 2
    if kind == "EetqLinear" and not hasattr(module, "in_features"):
        return tuple(module.weight.shape)
    known = kind in _KNOWN_CLASSES or (kind in _KNOWN_BY_ATTRIBUTE and hasattr(module, _KNOWN_BY_ATTRIBUTE[kind]))
    if not known:
        from ..utils.other import is_gptqmodel_quant_linear

        known = is_gptqmodel_quant_linear(module)
    if not known:
        warnings.warn(f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.", UserWarning)
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return None, None
    return module.in_features, module.out_features


class BaseTunerLayer(_C.Layer, ABC):
    """Mixin for a module that wraps `base_layer` and adds the weights of any number of adapters to it.

    A subclass names the attributes that hold one entry per adapter and writes `merge`, `unmerge` and `forward`:
    `class Linear(nn.Module, MyLayer)` with `MyLayer(BaseTunerLayer)`.

    Attributes:
        adapter_layer_names: containers (ModuleDict, ParameterDict) whose entries may be trained.
        other_param_names: further per-adapter containers, such as dicts of scalars.
        shared_param_names: those of them that other layers have as well: deleting an adapter from one layer leaves
            their entries.
        frozen_peft_weight_names: adapter name -> containers whose entry stays frozen when the adapter is activated.
        merged_adapters: names of the adapters now merged into the base weight.

    `set_adapter(adapter_names, inference_mode=False)`, `enable_adapters(enabled)`,
    `set_requires_grad(adapter_names, requires_grad=True)` and `_freeze_non_trainable_peft_weights(adapter_names=None)`
    are written in C (`peft_c._C.Layer`); a subclass may override them and call super().
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    shared_param_names: tuple[str, ...] = ()
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str] = []
    quantization_backend: QuantizationBackend | None = None

    # --- the base layer ---

    def get_base_layer(self) -> nn.Module:
        """The wrapped module, below all tuner layers that may be nested in each other."""
        layer = self.__dict__.get("_modules", {}).get("base_layer", self)
        while type(layer) not in INNERMOST:
            inner = layer.__dict__.get("_modules", {}).get("base_layer")  # where getattr would look last
            if inner is None:
                if not hasattr(layer, "base_layer"):
                    break
                inner = layer.base_layer
            layer = inner
        return layer

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight as a plain tensor, dequantized if it is quantized."""
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        return self.get_base_layer().weight.detach()  # not .data, which torch.export does not follow

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Makes `weight_data` the base layer's weight, quantizing it if the weight is quantized."""
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
        else:
            self.get_base_layer().weight.data = weight_data

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight: models that read `layer.weight` keep working."""
        base_layer = self.get_base_layer()
        return base_layer.qweight if hasattr(base_layer, "qweight") else base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        """The base layer's bias."""
        return self.get_base_layer().bias

    def _get_embed_scale(self) -> torch.Tensor | None:
        """The factor that some embeddings (Gemma 3) apply to their output, as a tensor of one element, or None."""
        base_layer = self.get_base_layer()
        scale = getattr(base_layer, "embed_scale", None)
        if isinstance(scale, (int, float)):
            return torch.tensor(scale, device=base_layer.weight.device, dtype=base_layer.weight.dtype)
        if not isinstance(scale, torch.Tensor):
            return None
        if scale.numel() != 1:
            warnings.warn(
                f"Found embed_scale attribute with shape {scale.shape}, expected scalar. It will not be applied to "
                "the adapter's part of the embedding.",
                PeftWarning,
            )
            return None
        return scale

    # --- which adapters there are, which act ---

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are switched off; change it with `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter or adapters, as they were set; change it with `set_adapter`."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else active

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have trainable entries on this layer."""
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return {key for c in containers if isinstance(c, (nn.ModuleDict, nn.ParameterDict)) for key in c.keys()}

    def _all_available_adapter_names(self) -> list[str]:
        """Sorted names of the adapters that have any entry on this layer."""
        names = self.adapter_layer_names + self.other_param_names
        containers = (getattr(self, name) for name in names if name not in self.shared_param_names)
        return sorted({key for container in containers if hasattr(container, "keys") for key in container.keys()})

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes the entries of an adapter; nothing happens if there are none.

        If it was active, the other active adapters stay so; if there are none, the first of the remaining ones in
        alphabetical order becomes active, with a warning.
        """
        attributes = self.__dict__
        ledger, modules = attributes.get("_adapter_ledger"), attributes.get("_modules", {})
        sizes = array("i", ledger[1] if ledger else b"")
        for i, name in enumerate(self.adapter_layer_names + self.other_param_names):
            container = modules[name] if name in modules else getattr(self, name)
            if adapter_name in container and name not in self.shared_param_names:
                del container[adapter_name]
                if i < len(sizes):
                    sizes[i] -= 1
        if ledger and not self.shared_param_names:
            attributes["_adapter_ledger"] = (ledger[0] - {adapter_name}, sizes.tobytes())
        memory = attributes.get("_disabled_trainable")
        if memory:
            attributes["_disabled_trainable"] = tuple(pair for pair in memory if pair[1] != adapter_name)
        # an instance that has entries owns its dict, so that the class's default is not touched
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]

        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active:
            active = self._all_available_adapter_names()[:1]
            if active:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}."
                )
        self.set_adapter(active)

    # --- merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters (default: the active ones) to the base weight; with `safe_merge` only if all is finite."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Takes all merged adapters out of the base weight."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's effect is an added weight, so that a LoRA can approximate it."""
        return False

    # --- devices and dtypes ---

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype to give to new adapter weights; None for what cannot be determined."""
        weights = (getattr(base_layer, name, None) for name in ("weight", "qweight"))
        weight = next((w for w in weights if w is not None), None)
        device = None if weight is None else weight.device
        dtype = None if weight is None else weight.dtype
        return device, getattr(base_layer, "compute_dtype", dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves one adapter to the base layer's device (or to `device`) and to its dtype, if that is a floating one.

        Other adapters stay where they are, and so does everything that is on the meta device.
        """
        base_layer = self.get_base_layer()
        if isinstance(base_layer, nn.MultiheadAttention):
            base_layer = base_layer.out_proj
        base_device, dtype = self._get_base_layer_device_and_dtype(base_layer)
        if base_device is not None and base_device.type == "meta":
            base_device = execution_device(base_layer) or base_device
        device = base_device if device is None else device
        self._may_be_trainable(adapter_name)
        if device is None:
            return
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            dtype = None

        modules = self.__dict__.get("_modules", {})  # where getattr would look last
        for name in self.adapter_layer_names + self.other_param_names:
            container = modules[name] if name in modules else getattr(self, name, None)
            if type(container) is dict or not isinstance(container, ADAPTER_CONTAINERS):
                continue
            if adapter_name not in container:
                continue
            item = container[adapter_name]
            tensors = tensors_of(item)
            if _are_at(tensors, device, dtype) or any(t.device.type == "meta" for t in tensors):
                continue
            own = getattr(item, "dtype", None)  # a module has none and keeps its integer buffers by itself
            castable = dtype is not None and (own is None or own.is_floating_point or own.is_complex)
            moved = item.to(device, dtype=dtype) if castable else item.to(device)
            frozen = isinstance(item, nn.Parameter) and not item.requires_grad
            container[adapter_name] = nn.Parameter(moved, requires_grad=False) if frozen else moved

    def _may_be_trainable(self, adapter_name: str) -> None:
        """Notes that entries of this adapter were added or replaced and may be trainable now."""
        ledger = self.__dict__.get("_adapter_ledger")
        if ledger is not None and adapter_name not in ledger[0]:
            self.__dict__["_adapter_ledger"] = (ledger[0] | {adapter_name}, ledger[1])

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """x in the dtype of the adapter's weights, unless `cast_input_dtype_enabled` is False; None stays None."""
        if x is None or x.dtype == dtype or not getattr(self, "cast_input_dtype_enabled", True):
            return x
        return x.to(dtype=dtype)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is nothing but its operation: it has no hooks and no forward of its own."""
    everywhere = nn.modules.module
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    hooked = hooked or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def add_modules(owner: nn.Module, **modules: nn.Module) -> None:
    """`owner.name = module` for modules whose names nothing in `owner` has."""
    if not _global_module_registration_hooks:
        owner._modules.update(modules)
        return
    for name, module in modules.items():
        owner.register_module(name, module)


def move_parts(layer: nn.Module, marks: tuple[str, ...], weight: Callable[[], torch.Tensor]) -> None:
    """Moves the modules in a layer whose names contain one of `marks` to where `weight()` is, but for those that have
    a parameter on the meta device."""
    marked = any(mark in name for name in layer._modules for mark in marks)  # else there may be no weight to ask for
    if marked and _is_at(layer, weight().device):
        return
    parts = [module for name, module in layer.named_modules() if any(mark in name for mark in marks)]
    device = weight().device if parts else None
    for part in parts:
        if not any(parameter.is_meta for parameter in part.parameters()):
            part.to(device)


def _is_at(module: nn.Module, device: torch.device) -> bool:
    """Whether a module and all in it are on the device; innermost base layers are not asked."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.device != device:
                return False
    for name, child in module._modules.items():
        innermost = name == "base_layer" and type(child) in INNERMOST
        if child is not None and not innermost and not _is_at(child, device):
            return False
    return True


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def tensors_of(item: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return [item]
    modules = item.modules() if item._modules else (item,)
    return [tensor for module in modules for tensor in _own_tensors(module)]


def _are_at(tensors: list[torch.Tensor], device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether nothing would change by moving them to the device and those that are no integers to the dtype."""
    for t in tensors:
        if t.device != device or (dtype not in (None, t.dtype) and (t.is_floating_point() or t.is_complex())):
            return False
    return True
