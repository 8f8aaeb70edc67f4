"""Which modules of a model an adapter targets: walking the model, matching names, condensing lists of names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from ..utils.peft_types import TaskType
from .tuner_layer import BaseTunerLayer, is_transformers_conv1d

if TYPE_CHECKING:
    from ..config import PeftConfig


class _ExcludedModule:
    """A match result: the module would be a target but is excluded. It is false."""

    def __bool__(self) -> bool:
        return False


def outer_modules(model: nn.Module, into_base_layers: bool = False) -> list[tuple[str, nn.Module]]:
    """(name, module) like `model.named_modules()`, without anything that lies inside a tuner layer; with
    `into_base_layers`, the base layers of tuner layers and what lies in them are included.

    The cost does not depend on the number of adapters. Modules whose class has its own idea of its submodules are
    asked for them.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, listed: bool = True) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))  # of unlisted modules, too: a base layer may have a second name elsewhere
        if listed:
            found.append((name, module))
        if isinstance(module, BaseTunerLayer):
            base_layer = module._modules.get("base_layer")
            if base_layer is not None:
                visit(f"{name}.base_layer" if name else "base_layer", base_layer, listed and into_base_layers)
            return
        if type(module).named_modules is nn.Module.named_modules:
            children = list(module._modules.items())
        else:
            children = [(key, child) for key, child in module.named_modules() if key]
        for key, child in children:
            if child is not None:
                visit(f"{name}.{key}" if name else key, child, listed)

    visit("", model)
    return found


# --- matching one name ---


def _ends(key: str) -> Iterator[str]:
    """The parts of a dotted name after each of its dots: "a.b.c" gives "b.c", "c"."""
    at = key.find(".")
    while at >= 0:
        yield key[at + 1 :]
        at = key.find(".", at + 1)


class _Names:
    """A collection of module names; a name is in it, or ends (at a dot) with one that is."""

    def __init__(self, names: Collection) -> None:
        self.exact = frozenset(names)
        self.suffixes = {f"{name}" for name in self.exact}

    def has_end_of(self, key: str) -> bool:
        return any(end in self.suffixes for end in _ends(key))

    def covers(self, key: str) -> bool:
        return key in self.exact or self.has_end_of(key)


def _layer_filter(config: Any) -> Callable[[str], bool] | None:
    """Tells whether a name lies in a layer that `layers_to_transform` lists; None if there is no such restriction."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or (isinstance(wanted, list) and not wanted):
        return None
    patterns = getattr(config, "layers_pattern", None)
    if not patterns:
        # the first number in the name is the layer's index; later ones count experts and the like
        expressions = [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in patterns]

    def in_wanted_layer(key: str) -> bool:
        match = next(filter(None, (expression.match(key) for expression in expressions)), None)
        index = match and match.groupdict().get("idx")
        if not index:
            return False
        return int(index) == wanted if isinstance(wanted, int) else int(index) in wanted

    return in_wanted_layer


def check_names(option: str, value: Any) -> None:
    """`re.error` or TypeError unless the option's value is a regular expression, a list or set of names, or None."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise re.error(f"{option}={value!r} is no regular expression: {error.msg}", value, error.pos) from None
    elif value is not None and not (isinstance(value, Collection) and all(isinstance(name, str) for name in value)):
        raise TypeError(f"{option} must be a list of names or a regular expression, got {value!r}.")


def compile_target_matcher(config: Any) -> Callable[[str], Any]:
    """The function of a module name that `check_target_module_exists(config, name)` is, built once for many names."""
    rejected: list[Callable[[str], Any]] = []
    excluded = getattr(config, "exclude_modules", None)
    if excluded:
        rejected.append(re.compile(excluded).fullmatch if isinstance(excluded, str) else _Names(excluded).covers)
    # modules that are trained as a whole, and what is in them
    for name in getattr(config, "modules_to_save", None) or ():
        rejected.append(re.compile(rf"(^|.*\.){name}($|\..*)").match)

    targets = config.target_modules
    if targets is None:
        if getattr(config, "target_parameters", None) is None:
            raise ValueError("Please specify `target_modules` in the config: neither it nor target_parameters is set.")
        accepted: Callable[[str], Any] = lambda key: False  # noqa: E731
    elif isinstance(targets, str):
        accepted = re.compile(targets).fullmatch
    else:
        names, in_layer = _Names(targets), _layer_filter(config)

        def accepted(key: str) -> bool:
            return key in names.exact or (names.has_end_of(key) and (in_layer is None or in_layer(key)))

    def match(key: str) -> Any:
        if any(reject(key) for reject in rejected):
            return _ExcludedModule()
        return accepted(key)

    return match


def check_target_module_exists(config: PeftConfig, key: str) -> bool | re.Match[str] | None:
    """Whether the module named `key` is a target of the config: a true value (True or a match), or a false one.

    `target_modules` is a regular expression for the whole name, or a collection of names; a name also stands for
    those that end with it at a dot, there restricted to the layers in `layers_to_transform`. Modules that
    `exclude_modules` or `modules_to_save` name give an `_ExcludedModule`, which is false.
    """
    return compile_target_matcher(config)(key)


# --- rewriting target_modules ---


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):  # a linear layer that has an adapter already; every method has its class
        return "Linear" in type(module).__name__
    return isinstance(module, nn.Linear) or is_transformers_conv1d(module)


def _output_head(model: nn.Module, config: PeftConfig) -> nn.Module | None:
    """The output layer of a transformers model, which "all-linear" leaves out."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        head = next((module for module in heads if module is not None), None)
    return head


def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Replaces `target_modules="all-linear"` by the set of the names of all linear layers (nn.Linear, transformers'
    Conv1D, and those that have adapters already), without the output head of a transformers model."""
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = _output_head(model, peft_config)
        peft_config.target_modules = {
            name for name, module in outer_modules(model) if _is_linear(module) and module is not head
        }
    return peft_config


def _find_minimal_target_modules(
    target_modules: list[str] | set[str], other_module_names: list[str] | set[str]
) -> set[str]:
    """A small set of name endings that covers all of `target_modules` and none of `other_module_names`.

    Long lists, such as those made from the keys of a checkpoint, match faster when "q_proj" stands for hundreds of
    names. Raises ValueError if `target_modules` is empty, a string or contains "", or if the two overlap.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets = set(target_modules)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if not targets.isdisjoint(other_module_names):
        both = sorted(targets.intersection(other_module_names))
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue "
            f"(in both: {both})"
        )

    def endings(name: str) -> list[str]:
        """From the last part to the whole name."""
        return [*_ends("." + name)][::-1]

    taken = {ending for name in set(other_module_names) for ending in endings(name)}
    chosen: set[str] = set()
    for candidates in sorted(map(endings, targets)):
        *proper, _ = candidates
        if chosen.isdisjoint(proper):
            new = next((ending for ending in candidates if ending not in taken and ending not in chosen), None)
            if new is not None:
                chosen.add(new)
    return chosen or targets
