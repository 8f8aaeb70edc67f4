"""What state the adapter layers of a model are in: per layer, and for the model as a whole."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .tuners.tuners_utils import BaseTuner, BaseTunerLayer
from .utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper


@dataclass
class TunerLayerStatus:
    """One adapter layer; see `get_layer_status`."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model with adapters; see `get_model_status`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Literal["irregular"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. Partitioned and 4-bit quantised parameters count with their real size."""
    trainable = total = 0
    for param in model.parameters():
        count = param.numel() or getattr(param, "ds_numel", 0)  # DeepSpeed ZeRO-3 leaves an empty tensor
        if type(param).__name__ == "Params4bit":  # two values in each byte of the storage
            if hasattr(param, "element_size"):
                width = param.element_size()
            else:
                width = param.quant_storage.itemsize if hasattr(param, "quant_storage") else 1
            count *= 2 * width
        total += count
        trainable += count * param.requires_grad
    return trainable, total


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the adapter layers and of the modules that are trained in full beside them."""
    for name, module in model.named_modules():
        # A TrainableTokensWrapper holds the layer that counts.
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
            module, TrainableTokensWrapper
        ):
            yield name, module


def adapter_parameters(layer: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(adapter, tensor) of everything that the dict-like attributes `names` of an adapter layer hold."""
    for name in names:
        holder = getattr(layer, name)
        if isinstance(holder, nn.ModuleDict):
            for adapter, module in holder.items():
                yield from ((adapter, param) for param in module.parameters())
        elif isinstance(holder, nn.ParameterDict) or type(holder).__name__ == "BufferDict":
            yield from holder.items()


def _common(values: Iterable[Any]) -> Any:
    """The value when all are equal, else "irregular"."""
    first, *others = values
    return first if all(value == first for value in others) else "irregular"


def _grouped(pairs: Iterable[tuple[str, Any]]) -> dict[str, list]:
    groups = collections.defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _base_of(model: nn.Module, caller: str) -> nn.Module:
    from .peft_model import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if not isinstance(model.base_model, BaseTuner):
        raise TypeError(
            f"{caller}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        )
    return model.base_model


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer of `model`: a PeftModel, or any module with injected adapters.

    Each entry has the `name` of the layer, its `module_type` (such as "lora.Linear"), whether it is `enabled`, the
    `active_adapters`, `merged_adapters` and `available_adapters`, per adapter whether its parameters `requires_grad`
    ("irregular" when some do) and on which types of `devices` they are, and the `quantization_backend` or None.

    Raises `ValueError` when there is no adapter layer and `TypeError` for prompt learning.
    """
    statuses = []
    for name, layer in adapter_layers(_base_of(model, "get_layer_status")):
        trained = layer.adapter_layer_names
        grads = _grouped(
            (adapter, param.requires_grad)
            for adapter, param in adapter_parameters(layer, trained)
            if isinstance(param, nn.Parameter)
        )
        names = (*trained, *layer.other_param_names)
        modules = (getattr(layer, name) for name in names)
        devices = {adapter: set() for held in modules if isinstance(held, nn.ModuleDict) for adapter in held}
        for adapter, param in adapter_parameters(layer, names):
            devices.setdefault(adapter, set()).add(param.device.type)
        backend = getattr(layer, "quantization_backend", None)
        statuses.append(
            TunerLayerStatus(
                name=name,
                module_type=repr(layer).partition("(")[0],
                enabled=not layer.disable_adapters,
                active_adapters=layer.active_adapters,
                merged_adapters=layer.merged_adapters,
                requires_grad={adapter: _common(values) for adapter, values in grads.items()},
                available_adapters=sorted(layer._get_available_adapters()),
                devices={adapter: sorted(types) for adapter, types in devices.items()},
                quantization_backend=None if backend is None else backend.backend_name,
            )
        )
    if not statuses:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT "
            "adapters injected in the model."
        )
    return statuses


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of `model` as a whole: that of its layers where they agree, "irregular" where they do not.

    Beside the fields of `get_layer_status` it has `base_model_type`, `adapter_model_type`, `peft_types` (type of each
    adapter), `trainable_params`, `total_params` and `num_adapter_layers`. An adapter counts as merged only when it is
    merged in every layer that has it. Raises as `get_layer_status` does.
    """
    from .import_utils import loaded

    base_model = _base_of(model, "get_model_status")
    if base_model is not model:
        base_type = type(model.get_base_model()).__name__
        tuner_type = type(base_model).__name__
        peft_types = {name: str(cfg.peft_type).partition(".")[-1] for name, cfg in base_model.peft_config.items()}
    else:
        pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
        base_type = type(model).__name__ if pretrained and isinstance(model, pretrained) else "other"
        tuner_type, peft_types = "None", {}

    layers = get_layer_status(model)
    available = set().union(*(layer.available_adapters for layer in layers))
    merged = set().union(*(layer.merged_adapters for layer in layers))
    half_merged = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    grads = _grouped(pair for layer in layers for pair in layer.requires_grad.items())
    devices = _grouped(pair for layer in layers for pair in layer.devices.items())
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=tuner_type,
        peft_types=peft_types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(list(layer.active_adapters) for layer in layers),
        merged_adapters="irregular" if half_merged else sorted(merged),
        requires_grad={adapter: _common(values) for adapter, values in grads.items()},
        available_adapters=sorted(available),
        devices={adapter: sorted(set().union(*types)) for adapter, types in devices.items()},
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )
