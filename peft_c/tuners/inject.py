"""Injecting an adapter into a model: plan its targets, create the layers, check, tidy up; all or nothing."""

from __future__ import annotations

import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import _C
from ..rollback import undo_on_error, where
from ..utils.constants import DUMMY_TARGET_MODULES, MIN_TARGET_MODULES_FOR_OPTIMIZATION
from ..utils.error import NoMatchingPeftModuleError
from ..utils.integrations import init_empty_weights
from ..utils.matching import _get_submodules
from ..utils.other import set_additional_trainable_modules
from ..utils.peft_types import PeftType
from .offloaded import onload_base
from .targets import (
    _ExcludedModule,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    _Names,
    check_names,
    check_target_module_exists,
    compile_target_matcher,
    outer_modules,
)
from .tuner_layer import BaseTunerLayer

if TYPE_CHECKING:
    from .tuners_utils import BaseTuner


@dataclass
class _Plan:
    """What an adapter targets, found before anything is changed."""

    modules: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # targets that get their weights from the layers in `modules`
    excluded: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    by_config: list[str] = field(default_factory=list)  # with a state_dict: what the config alone would target
    parameters: list[str] = field(default_factory=list)


class Injection:
    """One `inject_adapter` call: the steps in the order in which they run, with what they share."""

    def __init__(
        self,
        tuner: BaseTuner,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.tuner = tuner
        self.model = model
        # interned, as in C, so that switching finds it by identity
        self.adapter_name = sys.intern(adapter_name) if type(adapter_name) is str else adapter_name
        self.state_dict = state_dict
        self.config = tuner.peft_config[adapter_name]
        self.context = init_empty_weights if low_cpu_mem_usage else nullcontext

    def run(self) -> None:
        """Does it. If a step fails, the model, the tuner's lists and the config are what they were."""
        tuner, config = self.tuner, self.config
        saved_config = dict(vars(config))
        self.existing = _Existing(self.model, self.adapter_name, tuner.active_adapters)
        try:
            with undo_on_error(self.model):
                self.prepare()
                plan = self.plan()
                self.create(plan)
                self.check(plan)
                self.tidy_up()
        except BaseException:
            self.existing.restore()
            vars(config).clear()
            vars(config).update(saved_config)
            raise
        for known, new in (
            (tuner.targeted_module_names, plan.modules),
            (tuner.targeted_parameter_names, plan.parameters),
        ):
            _extend_unique(known, new)

    # --- prepare ---

    def prepare(self) -> None:
        """Lets the tuner check and complete the config, and change the model before layers are replaced."""
        tuner, model = self.tuner, self.model
        check_names("target_modules", getattr(self.config, "target_modules", None))
        check_names("exclude_modules", getattr(self.config, "exclude_modules", None) or None)
        if hasattr(getattr(model, "config", None), "model_type"):
            from .. import import_utils

            if import_utils.is_transformers_ge_v5:
                from ..utils import transformers_weight_conversion as conversion

                conversion.convert_peft_config_for_transformers(
                    self.config, model=model, conversions=conversion.get_model_conversion_mapping(model)
                )
        tuner._check_new_adapter_config(self.config)
        tuner._check_tied_modules(model, self.config)
        self.config = tuner._prepare_adapter_config(self.config, tuner.get_model_config(model))
        tuner._prepare_model(self.config, model)
        if getattr(self.config, "target_parameters", None) and self.state_dict:
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This "
                "is not supported: with `target_parameters`, inject the adapter without the state_dict."
            )

    # --- plan ---

    @property
    def is_dummy(self) -> bool:
        """Whether the adapter is meant to target nothing."""
        return getattr(self.config, "target_modules", None) == DUMMY_TARGET_MODULES

    def plan(self) -> _Plan:
        """Matches the names of all modules that are not part of an adapter."""
        plan = _Plan()
        names = [] if self.is_dummy else [name for name, _ in outer_modules(self.model)]
        self.config = _maybe_include_all_linear_layers(self.config, self.model)
        self.condense_targets(names)
        names = [name for name in names if name]
        if self.state_dict is None:
            self.plan_by_config(plan, names)
        else:
            self.plan_by_state_dict(plan, names)
        for name in plan.modules + plan.tied:
            self.check_compatible(name)
        return plan

    def condense_targets(self, names: list[str]) -> None:
        """Shortens a long list of target names. IA3 is left alone: its feedforward_modules must stay a subset."""
        targets = self.config.target_modules
        if (
            not isinstance(targets, (list, set))
            or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION
            or self.config.peft_type == PeftType.IA3
        ):
            return
        covered = _Names(targets).covers
        short = _find_minimal_target_modules(targets, [name for name in names if not covered(name)])
        if len(short) < len(targets):
            self.config.target_modules = short

    def matcher(self):
        """The function of a name that says whether the config targets it, by the tuner's own rule if it has one."""
        from . import tuners_utils

        rule = self.tuner._check_target_module_exists
        if rule in (tuners_utils.TARGET_RULE, check_target_module_exists):
            if tuners_utils.check_target_module_exists is check_target_module_exists:  # no other package replaced it
                return compile_target_matcher(self.config)
        return lambda name: rule(self.config, name)

    def plan_by_config(self, plan: _Plan, names: list[str]) -> None:
        match = self.matcher()
        for name in names:
            result = match(name)
            if self.tuner._check_tied_module_exists(self.config, name):
                plan.tied.append(name)
            elif isinstance(result, _ExcludedModule):
                plan.excluded.append(name)
            else:
                (plan.modules if result else plan.unmatched).append(name)

    def plan_by_state_dict(self, plan: _Plan, names: list[str]) -> None:
        """Targets the modules that a checkpoint has weights for, and notes what the config says about them."""
        from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        marker = "." + PEFT_TYPE_TO_PREFIX_MAPPING[self.config.peft_type]
        wanted = {key.rsplit(marker, 1)[0].removeprefix("_orig_mod.") for key in self.state_dict}
        match = self.matcher()
        for name in names:
            name = name.removeprefix("_orig_mod.")  # of a compiled model
            if name not in wanted:
                plan.unmatched.append(name)
            elif self.tuner._check_tied_module_exists(self.config, name):
                plan.tied.append(name)
                continue
            else:
                plan.modules.append(name)
            if match(name):
                plan.by_config.append(name)

    def check_compatible(self, name: str) -> None:
        self.tuner._check_target_module_compatiblity(self.config, self.model, name.rpartition(".")[2])

    # --- create ---

    def create(self, plan: _Plan) -> None:
        """Creates the adapter's layers: modules in the model's order, then parameters, then tied modules."""
        for name in plan.modules:
            self.create_one(name, name)
        if getattr(self.config, "target_parameters", None):
            plan.parameters = self.tuner._inject_parameters(
                peft_config=self.config,
                model=self.model,
                adapter_name=self.adapter_name,
                low_cpu_mem_usage=self.context is init_empty_weights,
            )
        for name in plan.tied:
            self.create_one(name, name)
        plan.modules = plan.modules + plan.tied

    def create_one(self, name: str, key: str, target: nn.Module | None = None, **kwargs: Any) -> None:
        """Calls the tuner's `_create_and_replace` for the module `name`, or for `target` in its place."""
        parent, found, target_name = _get_submodules(self.model, name)
        with where(f"adapter {self.adapter_name!r}, layer {key!r}"), onload_base(found), self.context():
            self.tuner._create_and_replace(
                self.config,
                self.adapter_name,
                found if target is None else target,
                target_name,
                parent,
                current_key=key,
                **kwargs,
            )

    def create_for_parameters(self) -> list[str]:
        """Creates layers for the nn.Parameters that `target_parameters` names; returns the names that were found."""
        targets = sorted(set(self.config.target_parameters))  # the order decides how wrappers nest
        covered = _Names(targets).covers
        found: list[str] = []
        for name, module in outer_modules(self.model, into_base_layers=True):
            if hasattr(module, "parametrizations"):
                # the parameter's own name now lies below `parametrizations`: only the whole name identifies it
                keys = [key for key in targets if key.rpartition(".")[0] == name]
                keys = [key for key in keys if getattr(module, key.rpartition(".")[2], None) is not None]
            else:
                plain_name = name.replace(".base_layer", "")
                keys = [f"{plain_name}.{p}" for p, _ in module.named_parameters(recurse=False)]
                keys = [key for key in keys if covered(key)]
            for key in keys:
                self.create_for_parameter(name, key)
                found.append(key)
        return found

    def create_for_parameter(self, name: str, key: str) -> None:
        parameter_name = key.rpartition(".")[2]
        if not name:
            raise ValueError(
                "Targeting an nn.Parameter on the top-level module is not supported (parameter "
                f"'{parameter_name}'): the module that holds it would have to wrap itself."
            )
        outermost_name = name.replace(".base_layer", "")
        outermost = self.model.get_submodule(outermost_name)
        if isinstance(outermost, BaseTunerLayer) and type(outermost).__name__ != "ParamWrapper":
            raise ValueError(
                f"Trying to wrap an `nn.Parameter` of layer '{outermost_name}' of type {type(outermost).__name__}, "
                "which is not a valid target. Make sure that this layer is not also targeted with `target_modules`. "
                "For some models, PEFT will do this automatically, try setting `target_modules=[]` to prevent it."
            )
        # a further adapter goes into the wrapper that an earlier one made for this parameter
        wrapper = outermost
        while isinstance(wrapper, BaseTunerLayer) and getattr(wrapper, "parameter_name", None) != parameter_name:
            wrapper = wrapper.base_layer
        self.check_compatible(name)
        self.create_one(
            name, key, target=wrapper if isinstance(wrapper, BaseTunerLayer) else None, parameter_name=parameter_name
        )

    # --- check ---

    def check(self, plan: _Plan) -> None:
        """Raises if nothing was targeted; warns about parts of the config that had no effect."""
        config = self.config
        if self.state_dict is not None:
            self.compare_with_config(plan)
        if not (plan.modules or plan.parameters or self.is_dummy):
            raise NoMatchingPeftModuleError(self.explain_nothing_targeted(plan))
        if getattr(config, "exclude_modules", None) and not plan.excluded:
            warnings.warn(
                f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
                "Please check that exclude_modules was set correctly."
            )
        elif not self.is_dummy:
            target_parameters = getattr(config, "target_parameters", None)
            if config.target_modules and not plan.modules:
                warnings.warn(
                    f"target_modules={config.target_modules} were set but no module was matched.", RuntimeWarning
                )
            elif target_parameters and not plan.parameters:
                warnings.warn(
                    f"target_parameters={target_parameters} were set but no parameter was matched.", RuntimeWarning
                )
        for option in ("rank_pattern", "alpha_pattern"):
            self.check_patterns(option, plan.modules)

    def compare_with_config(self, plan: _Plan) -> None:
        by_config, by_state_dict = set(plan.by_config), set(plan.modules)
        if by_config == by_state_dict:
            return
        parts = [
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent."
        ]
        if extra := sorted(by_config - by_state_dict):
            parts.append(f"The PEFT config contained these additional target modules: {extra}.")
        if extra := sorted(by_state_dict - by_config):
            parts.append(f"The state_dict contained these additional target modules: {extra}.")
        warnings.warn(" ".join(parts) + " ", RuntimeWarning)

    def explain_nothing_targeted(self, plan: _Plan) -> str:
        config = self.config
        if plan.excluded and not plan.unmatched:
            return (
                "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` "
                "and `modules_to_save` configuration."
            )
        if not plan.excluded and plan.unmatched:
            if not config.target_modules:
                return (
                    "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
                    "these arguments."
                )
            message = (
                f"Target modules {config.target_modules} not found in the base model. "
                "Please check the target modules and try again."
            )
        else:
            message = (
                "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
                "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration."
                " You may also have only targeted modules that are marked to be saved (`modules_to_save`)."
            )
        if getattr(config, "layers_to_transform", None) is not None:
            message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
        if getattr(config, "layers_pattern", None) is not None:
            message += f" You also specified 'layers_pattern': {config.layers_pattern}."
        return message

    def check_patterns(self, option: str, names: list[str]) -> None:
        """Warns about the keys of rank_pattern or alpha_pattern that fit no targeted module."""
        unused = []
        for pattern in getattr(self.config, option, None) or ():
            expression = re.compile(rf"(.*\.)?({pattern})$")
            if not any(expression.match(name) for name in names):
                unused.append(pattern)
        if unused:
            warnings.warn(
                f"The following {option} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
            )

    # --- tidy up ---

    def tidy_up(self) -> None:
        """Activates what was active, freezes the base model, adds fully trained modules, and leaves the trainability
        of everything that was there before a further adapter as it was."""
        tuner = self.tuner
        tuner.set_adapter(tuner.active_adapters, inference_mode=self.config.inference_mode)
        tuner._mark_only_adapters_as_trainable(self.model)
        set_additional_trainable_modules(
            model=self.model,
            peft_config=self.config,
            model_config=type(tuner).get_model_config(tuner),
            adapter_name=self.adapter_name,
            activate_adapter=self.adapter_name in tuner.active_adapters,
        )
        if self.existing.has_adapters:
            self.existing.restore()


class _Existing:
    """Which parameters require grad before an injection, but for those of the adapter to come.

    Adapters that are frozen for certain are left out, so that the cost does not depend on their number.
    """

    def __init__(self, model: nn.Module, adapter_name: str, active: list[str]) -> None:
        layers, modules = _C.find(model, BaseTunerLayer, nn.Module)
        self.has_adapters = bool(layers)
        self.flags: list[tuple[torch.Tensor, bool]] = [
            (parameter, parameter.requires_grad)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and name != adapter_name
        ]
        self.layers = []
        for layer in layers:
            self.flags += _C.flags(layer, active, [adapter_name])
            state = layer.__dict__
            self.layers.append((layer, state.get("_adapter_ledger"), state.get("_disabled_trainable")))

    def restore(self) -> None:
        for parameter, flag in self.flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad = flag
        for layer, ledger, memory in self.layers:
            state = layer.__dict__
            if ledger is None:
                state.pop("_adapter_ledger", None)
            for name in ledger[0] if ledger else ():
                layer._may_be_trainable(name)
            if memory is None:
                state.pop("_disabled_trainable", None)
            else:
                state["_disabled_trainable"] = memory


def _extend_unique(existing: list[str], new_names: list[str]) -> None:
    """Appends the names that are missing, in order."""
    seen = set(existing)
    existing += [name for name in dict.fromkeys(new_names) if name not in seen]
