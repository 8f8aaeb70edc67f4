"""LoraModel: which layers get low-rank adapters, and what can be done with them model-wide."""

from __future__ import annotations

import functools
import importlib
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from ... import import_utils
from ...reexports import elsewhere
from ...rollback import undo_on_error
from ...utils.aux_wrappers import ModulesToSaveWrapper
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.matching import get_pattern_key
from ...utils.model_prep import get_quantization_config
from ...utils.quantization_utils import get_quantization_kwargs
from ..tuner_layer import move_parts
from ..tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    any_weight,
    find_parameter_name_by_module,
    get_device_map,
    replicate_layers,
)
from .batch_hooks import per_call_arguments
from .combine import COMBINATION_TYPES, Combination, write_factors
from .config import LoraConfig
from .core import LoraLayer
from .parallel import annotate_base_layer, shard_adapter
from .parameter import ParamWrapper

# module here, dispatcher, check whether its library is installed (None: the dispatcher finds out); first match wins
_DISPATCHERS: tuple[tuple[str, str, str | None], ...] = (
    ("bnb", "dispatch_bnb_8bit", "is_bnb_available"),
    ("bnb", "dispatch_bnb_4bit", "is_bnb_4bit_available"),
    ("eetq", "dispatch_eetq", None),
    ("aqlm", "dispatch_aqlm", None),
    ("awq", "dispatch_awq", None),
    ("gptq", "dispatch_gptq", None),
    ("hqq", "dispatch_hqq", None),
    ("inc", "dispatch_inc", None),
    ("torchao", "dispatch_torchao", None),
    ("tp_layer", "dispatch_megatron", None),
    ("te", "dispatch_transformer_engine", None),
    ("layer", "dispatch_default", None),
)

# `init_lora_weights` that take something out of the base weight, in lower case
_MUTATING_INITS = ("pissa", "corda", "olora", "lora_ga")


@functools.cache
def _dispatcher_homes() -> tuple[tuple[ModuleType, str], ...]:
    return tuple(
        (importlib.import_module(f".{module}", __package__), name)
        for module, name, available in _DISPATCHERS
        if available is None or getattr(import_utils, available)()
    )


def _dispatchers() -> Iterator[Callable[..., nn.Module | None]]:
    """The dispatchers of this moment: other packages assign their own ones, here or in the modules they come from."""
    here = globals()
    return (here.get(name) or getattr(module, name) for module, name in _dispatcher_homes())


def _dispatch_custom(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """Layers that the user has registered for base layer types in `config._custom_modules`."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for base_cls, custom_cls in (config._custom_modules or {}).items():
        if isinstance(base, base_cls):
            return custom_cls(target, adapter_name, config=config, **kwargs)
    return None


def _takes_adapter(target: nn.Module, adapter_name: str) -> bool:
    """Whether `target` is a LoRA layer to which the adapter can be added, rather than something to be wrapped.

    A `ParamWrapper` that has the adapter is wrapped again, for another parameter of the same module; so is an
    AdaLoRA layer, which is a LoRA layer only by inheritance.
    """
    adalora_layer = import_utils.loaded(f"{__package__.rpartition('.')[0]}.adalora.layer", "AdaLoraLayer")
    if adalora_layer is not None and isinstance(target, adalora_layer):
        return False
    if isinstance(target, ParamWrapper) and adapter_name in target.lora_A:
        return False
    return isinstance(target, LoraLayer)


def _tied_factors(
    model: nn.Module, config: LoraConfig, adapter_name: str, target_name: str
) -> dict[str, torch.Tensor]:
    """For a layer that is tied to the input embedding: that embedding's factors, transposed for this layer."""
    if target_name not in (getattr(config, "target_modules_to_tie", None) or ()):
        return {}
    embedding = model.get_input_embeddings()
    return {
        "lora_A": embedding.lora_embedding_B[adapter_name].t(),
        "lora_B": embedding.lora_embedding_A[adapter_name].t(),
    }


def _model_kwargs(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """What dispatchers need to know about the model: placement and quantisation."""
    kwargs = {
        "loaded_in_8bit": getattr(model, "is_loaded_in_8bit", False),
        "loaded_in_4bit": getattr(model, "is_loaded_in_4bit", False),
        "ephemeral_gpu_offload": config.runtime_config.ephemeral_gpu_offload,
        "device_map": get_device_map(model),
        **get_quantization_kwargs(model),
    }
    method = getattr(model, "quantization_method", None)
    if method in ("gptq", "aqlm", "awq"):
        quantization_config = get_quantization_config(model, method=method)
        if quantization_config is not None:
            kwargs[f"{method}_quantization_config"] = quantization_config
    return kwargs


def _without_first_matches(names: Iterable[str], keys: Iterable[str]) -> list[str]:
    """`names` (ends or parts of module names, at dots) less the first one that matches, for each of `keys`."""
    remaining = list(names)
    for key in keys:
        match = next((name for name in remaining if re.match(rf"(^|.*\.){name}($|\..*)", key)), None)
        if match is not None:
            remaining.remove(match)
    return remaining


class LoraModel(BaseTuner):
    """A model with low-rank adapters (LoRA, https://huggingface.co/papers/2106.09685) injected into it, in place.

    Args:
        model: The model to adapt; any `torch.nn.Module`.
        config: The `LoraConfig`, or a dict from adapter names to configs.
        adapter_name: Name of the first adapter.
        low_cpu_mem_usage: Whether to create the adapter's weights on the meta device, to be loaded later.

    Attributes:
        model: The adapted model.
        peft_config: Config of each adapter by name.

    Example:
        >>> config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        >>> lora_model = LoraModel(model, config, "default")
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # injection

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: dict) -> LoraConfig:
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(model_config["model_type"])
            if targets is not None:
                peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
            elif not peft_config.target_parameters:
                raise ValueError("Please specify `target_modules` or `target_parameters`in `peft_config`")
        return peft_config

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        uses_kasa = getattr(config, "kasa_config", None) is not None
        targets = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            if other is config:
                continue
            # KaSA truncates the base weight at initialisation, under every adapter that is there
            if uses_kasa != (getattr(other, "kasa_config", None) is not None):
                raise ValueError(
                    "KaSA cannot be combined with adapters that don't use KaSA, since KaSA modifies the base "
                    f"weights: the new adapter {'uses' if uses_kasa else 'does not use'} KaSA but adapter "
                    f"'{name}' {'does not' if uses_kasa else 'does'}."
                )
            # which parameter a factor belongs to is told by the nesting of the wrappers, which all adapters share
            other_targets = set(getattr(other, "target_parameters", None) or ())
            if targets and other_targets and targets != other_targets:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(targets)} for the new adapter and {sorted(other_targets)} for "
                    f"adapter '{name}'."
                )

    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        rank_key = get_pattern_key(lora_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(lora_config.alpha_pattern.keys(), current_key)
        r = lora_config.rank_pattern.get(rank_key, lora_config.r)
        lora_alpha = lora_config.alpha_pattern.get(alpha_key, lora_config.lora_alpha)

        model = self.model
        if _takes_adapter(target, adapter_name):
            lora_module, base_layer = target, target.get_base_layer()
            annotate_base_layer(model, base_layer, current_key)
            target.update_layer(adapter_name, r, lora_alpha=lora_alpha, target_name=current_key, config=lora_config)
        else:
            if isinstance(target, ParamWrapper) and parameter_name == target.parameter_name:
                raise ValueError(
                    "Trying to target the same nn.Parameter twice, this should not happen: "
                    f"parameter {parameter_name} of {current_key}."
                )
            base_layer = target
            annotate_base_layer(model, base_layer, current_key)
            lora_module = self._create_new_module(
                lora_config,
                adapter_name,
                target,
                r=r,
                lora_alpha=lora_alpha,
                target_name=current_key,
                parameter_name=parameter_name,
                tied_adapter=_tied_factors(model, lora_config, adapter_name, target_name),
                **_model_kwargs(model, lora_config),
            )
            if adapter_name not in self.active_adapters:
                lora_module.requires_grad_(False)
            self._replace_module(parent, target_name, lora_module, target)
        shard_adapter(model, lora_module, base_layer, adapter_name, current_key)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """The LoRA layer around `target` from the first dispatcher that knows its type, ValueError if none does."""
        for dispatch in (_dispatch_custom, *_dispatchers()):
            new_module = dispatch(target, adapter_name, config=lora_config, **kwargs)
            if new_module is not None:
                return new_module
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`, "
            "`transformers.pytorch_utils.Conv1D`, `torch.nn.MultiheadAttention.`."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the LoRA layer in the child's place and its own parameters on the child's device."""
        setattr(parent, child_name, new_module)
        child = getattr(child, "base_layer", child)
        move_parts(new_module, (self.prefix, "ranknum"), lambda: any_weight(child))

    # forward and merging

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Context of one forward (or generate) call with the arguments of a mixed batch, see `per_call_arguments`."""
        adapter_names, alora_offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if adapter_names is None and alora_offsets is None:
            return nullcontext()
        return per_call_arguments(
            self, adapter_names=adapter_names, alora_offsets=alora_offsets, num_beams=kwargs.get("num_beams")
        )

    def _check_merge_allowed(self) -> None:
        """ValueError for GPTQ models and replicated layers: their weights cannot be written, or belong to several."""
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError("Cannot merge LORA layers when base model layers are replicated")

    # combining adapters

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, set[str] | str]:
        """(combination type, rank and target modules of the new adapter); ValueError if the adapters do not fit."""
        if not adapters:
            raise ValueError(f"Found no adapter matching the names in {adapters}")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist. The adapters are {list(self.peft_config)}.")
        configs = [self.peft_config[name] for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.target_parameters:
                raise ValueError(
                    f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
                )
        clashes = sum(
            isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in adapters) > 1
            for module in self.modules()
        )
        if clashes:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{clashes} such instance(s)."
            )

        # one adapter is only ever scaled
        kind = "linear" if len(adapters) == 1 else combination_type
        if kind not in COMBINATION_TYPES:
            raise ValueError(f"Invalid combination_type: {kind}, expected one of {', '.join(COMBINATION_TYPES)}.")
        ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
        if kind == "cat":
            rank = sum(ranks)
        elif kind.endswith("svd"):
            rank = svd_rank or max(ranks)
        elif len(set(ranks)) == 1:
            rank = ranks[0]
        else:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                f"dare_linear, got {dict(zip(adapters, ranks, strict=True))}."
            )

        targets = [config.target_modules for config in configs]
        types = {type(target) for target in targets}
        if len(types) > 1:
            raise ValueError(
                "all adapter configs should follow the same target modules type. "
                "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
            )
        if types == {str}:
            return kind, rank, "|".join(f"({target})" for target in targets)
        if types == {set}:
            return kind, rank, functools.reduce(operator.or_, targets)
        raise TypeError(f"Invalid type {types.pop()} found in target_modules")

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal[
            "svd",
            "linear",
            "cat",
            "ties",
            "ties_svd",
            "dare_ties",
            "dare_linear",
            "dare_ties_svd",
            "dare_linear_svd",
            "magnitude_prune",
            "magnitude_prune_svd",
        ] = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others; nothing happens if `adapter_name` exists.

        If anything is wrong with the arguments or goes wrong on the way, the model is as it was before.

        Args:
            adapters: Names of the adapters to combine.
            weights: A factor for each; negative ones subtract.
            adapter_name: Name of the new adapter, which is frozen and not active.
            combination_type: "cat" is exact, its rank is the sum of the ranks. "svd" decomposes the sum of the deltas,
                exact up to its rank. "linear" combines A and B each for itself, a rough approximation for equal ranks.
                "ties", "dare_ties", "dare_linear" and "magnitude_prune" prune first (see `utils.merge_utils`), with
                "_svd" in the deltas, else in A and B. A single adapter is always combined by "linear".
            svd_rank: Rank for "svd" types; by default the largest of the ranks.
            svd_clamp: Quantile (0 to 1) at which the factors of an SVD are clamped; None for no clamping.
            svd_full_matrices: As in `torch.linalg.svd`; False is faster.
            svd_driver: As in `torch.linalg.svd`, for CUDA.
            density: Fraction of values (0 to 1) that pruning keeps; required by the types that prune.
            majority_sign_method: How TIES elects signs, "total" or "frequency".

        Raises:
            ValueError: for unknown adapters, adapters that do not fit together and incomplete arguments.
        """
        if adapter_name in self.peft_config:
            return
        kind, rank, target_modules = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        combine = Combination(
            kind, adapters, weights, rank, density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver
        )
        with undo_on_error(self):
            self.peft_config[adapter_name] = replace(
                self.peft_config[adapters[0]],
                r=rank,
                lora_alpha=rank,
                target_modules=target_modules,
                alpha_pattern={},
                rank_pattern={},
            )
            self.inject_adapter(self.model, adapter_name)
            self.set_requires_grad(adapter_name, False)
            for layer in self._lora_layers():
                if adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A:
                    write_factors(layer, adapter_name, combine(layer), keep_dtype=kind == "cat")

    # what PEFT calls for each layer, and programs that combine adapters themselves
    def _generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        target: LoraLayer,
        density: float | None,
        majority_sign_method: str,
    ) -> list[torch.Tensor]:
        """A and B of a combination on one layer, each combined for itself."""
        return list(Combination(combination_type, adapters, weights, 0, density, majority_sign_method)(target))

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: LoraLayer,
        target_lora_A: torch.Tensor,
        target_lora_B: torch.Tensor,
        density: float | None,
        majority_sign_method: str,
        clamp: float | None = None,
        full_matrices: bool = True,
        driver: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of rank `new_rank` for the combined delta of one layer, in the shape of these two but for it."""
        A, B = Combination(
            combination_type,
            adapters,
            weights,
            new_rank,
            density,
            majority_sign_method,
            clamp,
            full_matrices,
            driver,
        )(target)
        return A.reshape(-1, *target_lora_A.shape[1:]), B.reshape(len(B), -1, *target_lora_B.shape[2:])

    def _lora_layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    # checkpoints

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """A plain LoRA state dict of twice the rank from one that was trained on a base weight changed at its start.

        PiSSA, CorDA, OLoRA and LoRA-GA take B0 A0 out of the base weight W. On the original W the trained adapter is
        B A - B0 A0 = [B, -B0] [A; A0].

        Args:
            output_state_dict: The trained adapter (A, B), with its names as in a checkpoint.
            adapter_name: The adapter of this model that holds the initial values (A0, B0).
            kwargs: `state_dict`, the model's state dict to read the initial values from.
        """
        from ...utils.save_and_load import get_peft_model_state_dict

        floats = (torch.float32, torch.float16, torch.bfloat16)
        if adapter_name.startswith("pissa") and any(p.dtype not in floats for p in self.model.parameters()):
            warnings.warn(
                "The base model is quantized: Quant(W_res) + AB differs from Quant(W) + delta(AB), so the converted "
                "LoRA may show a gap to the fine-tuned model. Consider to use Quant(W_res) with the PiSSA adapter."
            )
        initial = get_peft_model_state_dict(
            self, state_dict=(kwargs or {}).get("state_dict"), adapter_name=adapter_name
        )
        converted = {}
        for name, trained in output_state_dict.items():
            # names of the PeftModel have one part more in front than those of this model
            if "lora_A" in name:
                converted[name] = torch.cat([trained, initial[name.partition(".")[2]]], dim=0)
            elif "lora_B" in name:
                converted[name] = torch.cat([trained, -initial[name.partition(".")[2]]], dim=1)
        return converted

    # DoRA's magnitude is the `weight` of a module but has no such ending in a checkpoint

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not config.use_dora:
            return selected
        magnitude = f"lora_magnitude_vector.{adapter_name}"
        return {k.removesuffix(".weight") if k.endswith(f"{magnitude}.weight") else k: v for k, v in selected.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: v for k, v in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and not import_utils.is_transformers_dtensor_tp:
            from ...utils.save_and_load import _maybe_shard_state_dict_for_tp

            _maybe_shard_state_dict_for_tp(model, remapped, adapter_name)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: nn.Module,
        peft_config: LoraConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict,
    ) -> dict[str, torch.Tensor]:
        if peft_config.use_rslora and (peft_config.rank_pattern or peft_config.alpha_pattern):
            raise ValueError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when "
                "using `rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
            )
        if not str(peft_config.init_lora_weights).lower().startswith((*_MUTATING_INITS, "true")):
            warnings.warn(
                "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA "
                "adapter to a LoRA adapter"
            )
        folder, name = os.path.split(path_initial_model_for_weight_conversion)
        try:
            peft_model.load_adapter(folder, subfolder=name, adapter_name=name)
            init = str(peft_model.peft_config[name].init_lora_weights).lower()
            if init.startswith("pissa") or init in _MUTATING_INITS:
                raise ValueError(
                    "The `init_lora_weights` parameter of the initial adapter should be set to `True`. "
                    "Otherwise, `self.load_adapter` will subtract the decomposed values again based on the "
                    "residual model."
                )
            return peft_model.base_model.subtract_mutated_init(output_state_dict, name, kwargs)
        finally:
            if name in peft_model.peft_config:
                peft_model.delete_adapter(name)

    # auxiliary losses of variants

    def _layers_with(self, attribute: str, adapter_names: str | list[str] | None) -> Iterator[tuple[LoraLayer, str]]:
        """(layer, adapter) for each entry of a per-adapter dict that some layers have; None means active adapters."""
        if adapter_names is None:
            adapter_names = self.active_adapters
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for layer in self._lora_layers():
            entries = getattr(layer, attribute, None)
            for name in names if entries is not None else ():
                if name in entries:
                    yield layer, name

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """MonteCLoRA's regulariser to add to the task loss: KL divergence and entropy, averaged over the samplers.

        For the active adapters unless `adapter_names` says otherwise; 0.0 if none of them uses MonteCLoRA.
        """
        losses = [
            sum(layer.lora_monteclora_sampler[name].get_variational_loss())
            for layer, name in self._layers_with("lora_monteclora_sampler", adapter_names)
        ]
        return sum(losses) / len(losses) if losses else 0.0

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """KaSA's regularisers to add to the task loss (https://huggingface.co/papers/2412.06071, eq. 9-12).

        The sum over the layers of beta times the squared singular values and gamma times the distance of A and B from
        orthogonality, with beta and gamma of each adapter's `KasaConfig`. For the active adapters unless
        `adapter_names` says otherwise; 0.0 if none of them uses KaSA.
        """
        from .variants import _kasa_layer_regularization_loss

        total: torch.Tensor | float = 0.0
        for layer, name in self._layers_with("lora_diag", adapter_names):
            kasa = self.peft_config[name].kasa_config
            total = total + _kasa_layer_regularization_loss(layer, adapter_name=name, beta=kasa.beta, gamma=kasa.gamma)
        return total

    # tied weights: the input embedding gets the adapter (or the trained copy), the layers tied to it use that

    def _add_modules_to_save_to_tie(self, peft_config: LoraConfig, tied_weight_keys: list[str]) -> None:
        """Move the tied layers from `modules_to_save` to `modules_to_tie`, and the embedding into the former."""
        peft_config.modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        names = list(getattr(peft_config, "modules_to_save", None) or ())
        if embedding not in names:
            names.append(embedding)
        peft_config.modules_to_save = _without_first_matches(names, peft_config.modules_to_tie)

    def _add_targets_to_tie(self, peft_config: LoraConfig, tied_weight_keys: list[str]) -> None:
        """Move the tied layers from `target_modules` to `target_modules_to_tie`, and the embedding into the former."""
        peft_config.target_modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        targets = getattr(peft_config, "target_modules", None)
        if isinstance(targets, str):
            peft_config.target_modules = rf"(?:{targets}|^{re.escape(embedding)}$)"
        else:
            names = {embedding, *(targets or ())}
            peft_config.target_modules = set(_without_first_matches(names, peft_config.target_modules_to_tie))


__getattr__ = elsewhere(
    __name__,
    "utils.merge_utils",
    "tuners.lora.layer",
    "tuners.lora.batch_hooks",
    *(f"tuners.lora.{module}" for module, *_ in _DISPATCHERS),
)
