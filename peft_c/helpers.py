"""Small tools around models with adapters: signatures, scaling, dtype casting, DoRA caching, choice of targets."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import nn

from .config import PeftConfig
from .import_utils import loaded
from .peft_model import PeftModel
from .tuners.lora import dora
from .tuners.lora.layer import LoraLayer
from .tuners.lora.model import LoraModel
from .tuners.tuners_utils import BaseTunerLayer


def _show_as(model: PeftModel, name: str, signatures: tuple[set[str], ...]) -> None:
    """Gives the model its own copy of the method `name` that says of itself what the base model's says, when its
    parameters are no more than one of `signatures`."""
    method = getattr(model, name)
    if set(inspect.signature(method).parameters) not in signatures:
        return
    own = method.__func__
    copied = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    shown = getattr(type(model.get_base_model()), name)
    update_wrapper(copied, shown, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, types.MethodType(copied, model))


def update_forward_signature(model: PeftModel) -> None:
    """Makes `help(model.forward)` and `inspect.signature` show the base model's parameters, if PeftModel's own are
    only `*args, **kwargs`."""
    _show_as(model, "forward", ({"args", "kwargs"},))


def update_generate_signature(model: PeftModel) -> None:
    """As `update_forward_signature`, for `generate`; models without it are left alone."""
    if hasattr(model, "generate"):
        _show_as(model, "generate", ({"args", "kwargs"}, {"kwargs"}))


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Updates the signature of `forward`, `generate` or both (`"all"`). `ValueError` for other values of `method`."""
    updates = {"forward": (update_forward_signature,), "generate": (update_generate_signature,)}
    updates["all"] = updates["forward"] + updates["generate"]
    if method not in updates:
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for update in updates[method]:
        update(model)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether the folder or Hub repository holds an adapter with a configuration that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # any reason counts, those of future Hub clients too
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Inside of this context the scaling of every LoRA layer is multiplied by `multiplier`.

    With a value between 0 and 1 this interpolates between the base and the fine-tuned model as WiSE-FT does
    (https://huggingface.co/papers/2109.01903). Works on any module with LoRA layers in it.

    Raises `TypeError` when `multiplier` is no number and `ValueError` when there is no LoRA layer.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: scale * multiplier for name, scale in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside of this context adapter layers do not cast their inputs to the dtype of their weights.

    For models whose weights are cast by hooks, layer by layer, as diffusers does. With `active=False` nothing changes.
    Layers that never cast are left alone.
    """
    layers = [
        module
        for module in (model.modules() if active else ())
        if isinstance(module, BaseTunerLayer) and hasattr(module, "cast_input_dtype_enabled")
    ]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = value


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's variational loss to a trainer: `class MyTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The trainer's loss plus the variational loss, averaged over the LoRA tuners in `model`; with
        `return_outputs` a tuple of it and the outputs. Zero is added for LoRA without MonteCLoRA."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = result if return_outputs else (result, None)
        extra = [module._get_monteclora_loss() for module in model.modules() if isinstance(module, LoraModel)]
        if extra:
            loss = loss + sum(extra) / len(extra)
        return (loss, outputs) if return_outputs else loss


class DoraCaching:
    """Switches the caching of DoRA's weight and weight norm, which makes inference faster and needs more memory.

    As a context, `with DoraCaching(): ...`, or for good, `DoraCaching()(enabled=True)`. Modules in training mode do
    not cache, and forget what they had.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value = None

    def __enter__(self) -> None:
        self.prev_value = dora.ENABLE_DORA_CACHING
        dora.ENABLE_DORA_CACHING = self.enabled

    def __exit__(self, type, value, traceback) -> None:
        dora.ENABLE_DORA_CACHING = self.prev_value
        self.prev_value = None

    def __call__(self, enabled: bool = True) -> None:
        dora.ENABLE_DORA_CACHING = enabled


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """The weight in float32; bitsandbytes' quantised weights are dequantised."""
    functional = loaded("bitsandbytes", "functional")
    if functional is not None and hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if functional is not None and hasattr(getattr(weight, "state", None), "CB"):
        return functional.int8_vectorwise_dequant(weight.state.CB, weight.state.SCB).float()
    return weight.detach().float()


def _condition_number(matrix: torch.Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return (values[0] / (values[-1] + 1e-8)).item()


class KappaTuneSelector:
    """Finds LoRA targets by the condition number of their weights: the lower, the better suited (KappaTune).

    Args:
        model: the base model.
        max_dim_size_to_analyze: matrices with a larger dimension are left out.
        moe_param_suffixes: how the names of three-dimensional expert parameters end; the default covers
            `gate_up_proj`, `down_proj`, `gate_proj` and `up_proj`. Their number is the mean over the experts.
        show_progress: show a progress bar; singular values of large models take minutes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.show_progress = show_progress
        self.moe_param_suffixes = moe_param_suffixes or (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        self._condition_numbers: dict[str, float] | None = None
        self._parameter_condition_numbers: dict[str, float] | None = None

    def _measure(self, weights: list[tuple[str, torch.Tensor]], kind: str) -> dict[str, float]:
        """The mean condition number over each weight's matrices."""
        if self.show_progress:
            from tqdm.auto import tqdm

            weights = tqdm(weights, desc=f"Condition numbers ({kind})")
        numbers = {}
        for name, weight in weights:
            dense = _dense(weight)
            matrices = list(dense) if dense.dim() == 3 else [dense.view(dense.size(0), -1)]
            if max(matrices[0].shape) <= self.max_dim_size_to_analyze:
                numbers[name] = sum(map(_condition_number, matrices)) / len(matrices)
        return numbers

    def _compute_kappas(self) -> None:
        if self._condition_numbers is not None:
            return
        modules = [(name, m.weight) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        experts = [
            (name, param)
            for name, param in self.model.named_parameters()
            if param.dim() == 3 and name.endswith(tuple(self.moe_param_suffixes))
        ]
        self._parameter_condition_numbers = self._measure(experts, "experts")
        self._condition_numbers = self._measure(modules, "linear layers")

    @staticmethod
    def _best(
        numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
    ) -> list[str]:
        names = sorted(numbers, key=numbers.get)
        if num_modules is not None:
            return names[:num_modules]
        if top_p is not None:
            return names[: max(1, int(len(names) * top_p))]
        if threshold is not None:
            return [name for name in names if numbers[name] <= threshold]
        return names

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear modules, best first: `num_modules` of them, or the share `top_p`, or those with a number of
        at most `threshold`, or all."""
        self._compute_kappas()
        return self._best(self._condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of expert parameters, chosen as in `get_best_targets`."""
        self._compute_kappas()
        return self._best(self._parameter_condition_numbers, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The share `top_p` of modules and expert parameters with the lowest condition numbers.

    Returns {"target_modules": names, "target_parameters": names or None}, to be passed to LoraConfig; see
    `KappaTuneSelector` for the arguments.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
