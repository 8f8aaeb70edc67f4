"""Per-call arguments for LoRA layers (`adapter_names`, `alora_offsets`), handed to them by hooks for one forward.

The hooks live as long as the `with` block, however it ends, and act in the thread that opened it: calls in several
threads at the same time each have their own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

from torch import nn

from ... import _C
from ...import_utils import loaded
from ...utils.aux_wrappers import AuxiliaryTrainingWrapper
from ..tuner_layer import BaseTunerLayer
from .core import LoraLayer

# where a layer with gradient checkpointing keeps the handles that live until its backward is done
_HANDLES = "_peft_gradient_checkpointing_forward_hooks"


def _add_kwargs(module: nn.Module, args: tuple, kwargs: dict, **extra: Any) -> tuple[tuple, dict]:
    """Pre-forward hook that adds (or replaces) keyword arguments."""
    return args, {**kwargs, **extra}


# under PEFT's names, for programs that hand them to layers themselves
_adapter_names_pre_forward_hook = _alora_offsets_pre_forward_hook = _add_kwargs


def _add_kwargs_in(
    thread: int, extra: dict[str, Any], module: nn.Module, args: tuple, kwargs: dict | None = None
) -> tuple[tuple, dict] | None:
    """The same for calls in one thread. Others may call it without `kwargs`, while the hook comes or goes."""
    return (args, {**kwargs, **extra}) if get_ident() == thread else None


def _get_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model; None for others, which may return themselves as encoder."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


def _check_adapter_names(adapter_names: Any, layers: list[nn.Module], training: bool) -> None:
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    # a single layer need not have every adapter, but some layer must, or it is a mistyped name
    unknown = set(adapter_names) - {"__base__"}
    for layer in layers:
        if not unknown:
            break
        if isinstance(layer, BaseTunerLayer):
            for each in (*layer.adapter_layer_names, *layer.other_param_names):
                if hasattr(container := getattr(layer, each), "keys"):
                    unknown.difference_update(container.keys())
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")


@contextmanager
def per_call_arguments(
    tuner: nn.Module, *, adapter_names: list[str] | None, alora_offsets: list[int] | None, num_beams: Any
) -> Iterator[None]:
    """Within the context every layer (and auxiliary wrapper) of `tuner` gets the arguments given.

    Args:
        tuner: The `LoraModel`, or that of another method whose layers take `adapter_names`.
        adapter_names: The adapter of each sample, "__base__" for none. With beam search (`num_beams` > 1) each name
            counts for that many rows, except in the encoder of an encoder-decoder model.
        alora_offsets: For activated LoRA: from which token on, counted from the end, each sample is adapted.
        num_beams: As passed to `generate`, else None.

    Raises:
        ValueError: in training mode with `adapter_names`, for unknown names, for aLoRA with beam search.
        TypeError: if `adapter_names` is no list.
    """
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    kinds = (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper)
    layers = _C.find(tuner, kinds)[0]
    if adapter_names is not None:
        _check_adapter_names(adapter_names, layers, tuner.training)
    if alora_offsets is not None and beams > 1:
        raise ValueError("Beam search not yet supported for aLoRA.")

    with ExitStack() as hooks:

        def give(module: nn.Module, **extra: Any) -> None:
            handle = module.register_forward_pre_hook(partial(_add_kwargs_in, get_ident(), extra), with_kwargs=True)
            hooks.callback(handle.remove)

        if alora_offsets is not None:
            for layer in layers:
                if isinstance(layer, LoraLayer):
                    give(layer, alora_offsets=alora_offsets)
            hooks.push(_recompute_with(tuner, alora_offsets))
        if adapter_names is not None:
            names = [name for name in adapter_names for _ in range(beams)]
            for layer in layers:
                give(layer, adapter_names=names)
            encoder = _get_encoder(tuner.model) if beams > 1 else None
            for layer in encoder.modules() if encoder is not None else ():
                if isinstance(layer, kinds):
                    give(layer, adapter_names=list(adapter_names))  # runs last, so it wins
        yield


def _recompute_with(tuner: nn.Module, alora_offsets: list[int]) -> Callable[..., None]:
    """Let layers with gradient checkpointing have the offsets too when backward runs their forward a second time.

    By then the hooks of the first forward are gone, so each such layer keeps hooks of its own until its backward is
    done. Applying the offsets twice does no harm. Returns an exit callback that removes them if the forward fails.
    """
    cls = loaded("transformers.modeling_layers", "GradientCheckpointingLayer")
    layers = [m for m in tuner.modules() if cls and isinstance(m, cls) and m.gradient_checkpointing]
    if any(getattr(layer, _HANDLES, None) for layer in layers):
        raise ValueError(
            "Multiple invocations of PEFT forward hooks before .backward() with enabled gradient "
            "checkpointing. Disable gradient checkpointing or only call forward once per backward."
        )

    def before_forward(layer: nn.Module, args: tuple) -> None:
        hook = partial(_add_kwargs, alora_offsets=alora_offsets)
        getattr(layer, _HANDLES).extend(
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in layer.modules()
            if isinstance(module, LoraLayer)
        )

    def remove_hooks(layer: nn.Module, *_: Any) -> None:
        handles = getattr(layer, _HANDLES)
        while handles:
            handles.pop().remove()

    for layer in layers:
        handles = [
            layer.register_forward_pre_hook(before_forward),
            layer.register_full_backward_hook(remove_hooks),
        ]
        setattr(layer, _HANDLES, handles)

    def on_exit(exc_type: type | None, *_: Any) -> None:
        if exc_type is not None:
            for layer in layers:
                remove_hooks(layer)

    return on_exit
