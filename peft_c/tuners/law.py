"""Merging adapters into base weights and taking them out again, once for every layer type and tuner.

A layer declares, `merge` and `unmerge` act:

- `_merge_targets()` -> {label: BaseView}: the weights that merging may change ("weight", "bias", ...)
- `_merge_changes(adapter)` -> {label: what the adapter does to that weight, in one of the forms of `changes`}; raises
  what PEFT raises when this adapter cannot be merged
- `_merge_adapters()` -> the adapter names this layer has parameters for
- `lora_variant[adapter]`, where there is one: it merges and unmerges by itself (merge_safe, merge_unsafe, unmerge)

Low-rank changes of all adapters go through the weight in one pass of the C kernels, in place, accumulated in fp32
(fp64 for fp64) and rounded once. Where C may not act (other devices, tensor subclasses, 8-bit weights) the same is
done with torch operations.

Undo is exact: beside a snapshot of what was added, a merge records the few weights that subtraction would not restore
(see `undo`).
The weight gets its old bits back whatever happened to the adapter meanwhile, and after deepcopy or pickling too. A
merged weight that was itself written, cast or moved since is restored by subtraction, with a warning.
`exact_unmerge(False)` or PEFT_C_EXACT=0 leaves the records out. Either all adapters are merged or nothing has changed.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import torch

from .. import _C
from ..rollback import undivided
from ..utils.warning import PeftWarning
from .base_view import BaseView, held
from .changes import Change, Elements, LowRank, Replace, Times
from .merging import check_adapters_to_merge
from .offloaded import onload_layer
from .tuner_layer import tensors_of
from .undo import Difference, Merge, Places, Product, Saved, is_sharded, meta_of, records, wider_sum, write

SMALL = 1 << 12  # elements; copying them takes less than asking whose memory they are in
LARGE = 1 << 16  # elements; a full delta with more is not kept for undoing, a copy of the old weight is


def _without_grad(function: Callable) -> Callable:
    """torch.no_grad() as a decorator, without the objects it makes at each call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(enabled)

    return call


class exact_unmerge:
    """Whether merges record what unmerging needs to restore every bit: a switch, or a context if used with `with`."""

    enabled: bool = os.environ.get("PEFT_C_EXACT", "1") != "0"

    def __init__(self, enabled: bool) -> None:
        self._before = exact_unmerge.enabled
        exact_unmerge.enabled = bool(enabled)

    def __enter__(self) -> exact_unmerge:
        return self

    def __exit__(self, *_: Any) -> None:
        exact_unmerge.enabled = self._before


# ---------------------------------------------------------------------------------------------------- one weight


def _delta(view: BaseView, change: Any, shape: torch.Size) -> torch.Tensor:
    if isinstance(change, LowRank):
        return view.restore(change.delta(), shape)
    return change


def _are_low_rank(changes: Iterable[Any]) -> bool:
    for change in changes:  # a generator for `all` costs more than all the rest
        if not isinstance(change, LowRank):
            return False
    return True


def _kernel_operands(view: BaseView, tensor: torch.Tensor, changes: list[Any]) -> tuple | None:
    """Matrix and operands as `_C.merge_add` takes them; None where the weight or the changes have no such form."""
    try:
        if _are_low_rank(changes):
            return view.matrix(tensor), changes
        return (view.matrix(tensor), view.matrix(changes[0])) if len(changes) == 1 else None
    except RuntimeError:  # strides that no matrix has
        return None


def _add(view: BaseView, weight: torch.Tensor, changes: list[Any], check: bool, record: bool) -> tuple[bool, Any]:
    """weight += the changes. (True, record or None), or (False, None) with `check` if a result is not finite."""
    tensor = weight.data
    operands = _kernel_operands(view, tensor, changes)
    done = None if operands is None else _C.merge_add(*operands, check, record, weight)
    if done is not None:
        return done
    deltas = [_delta(view, change, tensor.shape) for change in changes]
    new = tensor
    for delta in deltas:
        new = wider_sum(new, delta, 1)
    if check and not torch.isfinite(new).all():
        return False, None
    if record and is_sharded(tensor):
        return True, Difference.exchange(weight, tensor, new, False, False)
    undo = None
    if record:
        back = new
        for delta in reversed(deltas):
            back = wider_sum(back, delta, -1)
        undo = Difference.between(tensor, new, back)
    write(weight, tensor, new)
    return True, undo


def _subtract(view: BaseView, weight: torch.Tensor, saved: Saved) -> str | None:
    """Undo `saved` on the weight. None when its old bits are back (or were never to be), else what happened to it."""
    tensor, undo = weight.data, saved.undo
    fits = saved.meta == meta_of(tensor)
    if not isinstance(undo, Difference):
        operands = _kernel_operands(view, tensor, saved.changes)
        same = None if operands is None else _C.merge_subtract(*operands, undo if fits else None, weight)
        if same is not None:
            return None if undo is None else "was cast or reshaped" if not fits else None if same else "was written to"
    undone = tensor
    for change in reversed(saved.changes):
        undone = wider_sum(undone, _delta(view, change, tensor.shape), -1)
    reason = None
    if isinstance(undo, Difference):
        reason = undo.mismatch(tensor, fits)
        undone = undone if reason else undo.restore(tensor, undone)
    elif undo is not None:
        reason = "was moved"
    write(weight, tensor, undone)
    return reason


# ----------------------------------------------------------------------------------------------------- one layer


def describe(layer: Any) -> str:
    """ "lora.Linear", for messages."""
    module = type(layer).__module__
    method = module.partition(".tuners.")[2].partition(".")[0] or module.rpartition(".")[2]
    return f"{method}.{type(layer).__name__}"


def nan_error(names: Iterable[str], what: str = "weights") -> ValueError:
    return ValueError(
        f"NaNs detected in the merged {what}. The adapter {', '.join(names)} seems to be broken; nothing was merged."
    )


def is_finite(tensor: torch.Tensor) -> bool:
    known = _C.finite(tensor)
    return bool(torch.isfinite(tensor).all()) if known is None else known


def _finite(changes: Iterable[Change]) -> bool:
    return all(is_finite(tensor) for change in changes if isinstance(change, LowRank) for tensor in change[:2])


def _values_of(change: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A full delta as it is now: a copy if it is a parameter's own memory, which training would change."""
    delta = change()
    return delta.detach().clone() if delta.is_leaf or delta._base is not None else delta.detach()


def _check_weight(view: BaseView, layer: Any) -> None:
    """ValueError if there is no weight that a merge could change."""
    if "parametrizations" in view.owner._modules and view.name in view.owner.parametrizations:
        raise ValueError(
            f"Cannot merge into '{view.name}' of {type(view.owner).__name__} ({describe(layer)}): it is parametrized. "
            "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if view.tensor.is_meta:
        raise ValueError(
            f"Cannot merge into '{view.name}' of {type(view.owner).__name__} ({describe(layer)}): it is on the meta "
            "device and has no values. Load the weights first."
        )


def _is_meta(layer: Any, name: str) -> bool:
    entries = [getattr(layer, container) for container in layer.adapter_layer_names]
    return any(tensor.is_meta for entry in entries if name in entry for tensor in tensors_of(entry[name]))


def _with_values(function: Callable) -> Callable:
    """Say so where a function of a layer fails because an adapter is on the meta device."""

    @functools.wraps(function)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(layer, *args, **kwargs)
        except RuntimeError as error:
            empty = [name for name in layer._merge_adapters() if _is_meta(layer, name)]
            if not empty:
                raise
            raise ValueError(
                f"Cannot merge into {describe(layer)}: the adapter {', '.join(empty)} is on the meta device and has "
                "no values. Load its weights first."
            ) from error

    return call


@_with_values
@_without_grad
def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge the adapters (default: the active ones) into the base weights of `layer`.

    With `safe_merge`, ValueError if a merged weight is not finite. Whatever is raised, nothing has changed.
    """
    resume(layer)
    known, plans = layer._merge_adapters(), {}
    for name in check_adapters_to_merge(layer, adapter_names):
        if name in known and name not in plans:
            plans[name] = layer._merge_changes(name)
    if not plans:
        return
    targets = layer._merge_targets()
    for plan in plans.values():
        for label in plan:
            _check_weight(targets[label], layer)
    if safe_merge:
        broken = [name for name in plans if not _finite(plans[name].values())]
        if broken:
            raise nan_error(broken)
    with transaction(layer) as way_back:
        for step in _steps(layer, plans):
            _merge_step(layer, step, targets, plans, safe_merge)
            way_back.now.append(step)
            layer.merged_adapters.extend(step.adapters)
            way_back.let_through()
    if not exact_unmerge.enabled:
        _drop_records(layer, plans, len(way_back.steps))


def _steps(layer: Any, plans: dict) -> list[Merge]:
    """The adapters in order, as many as can be in each pass over the weights."""
    variants, steps = layer.__dict__.get("lora_variant", ()), []
    for name, plan in plans.items():
        alone = name in variants or _replacement(plan) is not None
        if alone or not steps or steps[-1].alone:
            steps.append(Merge([name], [], alone))
        else:
            steps[-1].adapters.append(name)
    return steps


def _replacement(plan: dict[str, Change]) -> Replace | None:
    for change in plan.values():
        if isinstance(change, Replace):
            return change
    return None


def _drop_records(layer: Any, plans: dict, start: int) -> None:
    """Keep only the records that unmerging cannot do without."""
    for step in records(layer)[start:]:
        for saved in step.saved:
            if not isinstance(plans[step.adapters[0]].get(saved.label), Replace):
                saved.undo = None


class transaction(undivided):
    """A block that brings the layer's merging back to where it was if it raises: records, adapters, weights. Ctrl-C
    comes only where `let_through` is called, or after it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.now = records(layer)
        self.names, self.steps = list(layer.merged_adapters), list(self.now)
        self.suspended = layer.__dict__.get("_merge_suspended", False)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is not None:
                self.go_back()
        finally:
            undivided.__exit__(self)

    @_without_grad
    def go_back(self) -> None:
        """Take the steps back that were made since, and make those again that were taken back: the same bits."""
        layer, now = self.layer, self.now
        same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(now, self.steps, strict=False)))
        if [*now, *layer.merged_adapters] != [*self.steps, *self.names]:
            targets = layer._merge_targets()
            while len(now) > same:
                _undo(layer, now.pop(), targets)
            recorded = {name for step in self.steps for name in step.adapters}.union(layer.merged_adapters)
            for name in self.names:
                if name not in recorded and not self.suspended:
                    _redo(layer, _unrecorded(layer, name), targets)
            for step in self.steps[same:]:
                _redo(layer, step, targets)
            now[:] = self.steps
        layer.merged_adapters[:] = self.names
        layer._merge_suspended = self.suspended


def _merge_step(layer: Any, step: Merge, targets: dict, plans: dict, safe_merge: bool) -> None:
    merge_in = _merge_group if not step.alone else _merge_variant if _variant(layer, step) else _merge_replacement
    try:
        merge_in(layer, step, targets, plans, safe_merge)
    except BaseException:
        _undo(layer, step, targets)
        raise


def _variant(layer: Any, step: Merge) -> Any:
    return layer.__dict__.get("lora_variant", {}).get(step.adapters[0])


def _merge_group(layer: Any, step: Merge, targets: dict, plans: dict, safe_merge: bool) -> None:
    """Add the changes of adapters, each weight in one pass."""
    for label, view in targets.items():
        changes = [plans[name][label] for name in step.adapters if label in plans[name]]
        if changes:
            saved = _merge_one(layer, label, view, changes, safe_merge)
            if saved is None:
                raise nan_error(step.adapters)
            step.saved.append(saved)


def _merge_one(layer: Any, label: str, view: BaseView, changes: list[Change], check: bool) -> Saved | None:
    """Add the changes of one weight; what undoes it, or None if `check` found a result that is not finite."""
    weight = view.tensor
    tensor = weight.data
    record, full = exact_unmerge.enabled or check, not _are_low_rank(changes)
    large = full and tensor.numel() > LARGE
    few = len(changes) == 1 and isinstance(changes[0], Elements) and tensor.is_contiguous()
    if record and (few or large or (full and tensor.ndim == 1)):
        undo = Places.of(weight, tensor, changes[0], check) if few else _add_full(view, weight, changes, check, layer)
        return None if undo is None else Saved(label, [], undo, meta_of(tensor))
    kept = [change.snapshot() if isinstance(change, LowRank) else _values_of(change) for change in changes]
    finite, undo = _add(view, weight, kept, check, record)
    return Saved(label, [] if large else kept, undo, meta_of(tensor)) if finite else None


def _add_full(
    view: BaseView, weight: torch.Tensor, changes: list[Change], check: bool, layer: Any
) -> Difference | None:
    """weight += the changes; the record is a copy of the old values. None as in `Difference.exchange`."""
    tensor = weight.data
    deltas = [_delta(view, change if isinstance(change, LowRank) else change(), tensor.shape) for change in changes]
    if len(deltas) == 1 and tensor.ndim > 1 and deltas[0].dtype == tensor.dtype:
        return Difference.exchange(weight, tensor, _own(deltas[0], tensor, layer), True, check)
    if len(deltas) == 1:
        return Difference.adding(weight, tensor, deltas[0], check)
    new = tensor
    for delta in deltas:
        new = wider_sum(new, delta, 1)
    return Difference.exchange(weight, tensor, new, False, check)


def _own(value: torch.Tensor, tensor: torch.Tensor, layer: Any) -> torch.Tensor:
    """`value` with the dtype and layout of `tensor`, in memory that is no parameter's or buffer's of the layer."""
    if value.dtype != tensor.dtype or value.device != tensor.device or value.stride() != tensor.stride():
        return torch.empty_like(tensor).copy_(value)
    if value.numel() <= SMALL:
        return value.clone()
    value = value.detach()
    memory, modules = value.untyped_storage().data_ptr(), [layer]
    for module in modules:  # less than parameters() and buffers() cost
        for own in (*module._parameters.values(), *module._buffers.values()):
            if own is not None and own.untyped_storage().data_ptr() == memory:
                return value.clone()
        modules.extend(child for child in module._modules.values() if child is not None)
    return value


def _merge_variant(layer: Any, step: Merge, targets: dict, plans: dict, safe_merge: bool) -> None:
    """Let a variant merge its adapter; the record is a copy of the weight, whose storage is kept."""
    (name,) = step.adapters
    weight, variant = targets["weight"].tensor, layer.lora_variant[name]
    home, before = weight.data, weight.data.clone()
    saved = Saved("weight", [], Difference(None, None, before), meta_of(home))
    try:
        if safe_merge:
            merged = variant.merge_safe(layer, name, before.clone())
            if not torch.isfinite(merged).all():
                raise nan_error(step.adapters)
        else:
            variant.merge_unsafe(layer, name, weight)
            merged = weight.data
        if merged.data_ptr() != home.data_ptr():
            home.copy_(merged)
        saved.undo.digest = Difference.digest_of(home)
    except BaseException:
        home.copy_(before)
        raise
    finally:
        weight.data = home
    step.saved.append(saved)
    rest = {label: change for label, change in plans[name].items() if label != "weight"}
    _merge_group(layer, step, {label: targets[label] for label in rest}, {name: rest}, safe_merge)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same memory, seen in the same way. That of a DTensor is not known."""
    return not is_sharded(one) and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _merge_replacement(layer: Any, step: Merge, targets: dict, plans: dict, safe_merge: bool) -> None:
    """Give weights the values an adapter computes from the present ones; the record is a copy of these."""
    (name,) = step.adapters
    for label, merged in _replacement(plans[name]).merged(targets).items():
        weight = targets[label].tensor
        tensor = weight.data
        if isinstance(merged, Times):
            undo = Product.of(weight, tensor, merged, safe_merge)
        elif _is_same(merged, tensor):  # it does not change
            continue
        else:
            undo = Difference.exchange(weight, tensor, _own(merged, tensor, layer), False, safe_merge)
        if undo is None:
            raise nan_error(step.adapters, "bias" if label == "bias" else "weights")
        step.saved.append(Saved(label, [], undo, meta_of(tensor)))


def _undo(layer: Any, step: Merge, targets: dict) -> list[str]:
    """Take one step back, or, after an error, nothing of it. The reasons, if any, why bits may differ."""
    reasons, undone = [], []
    try:
        for saved in reversed(step.saved):
            view = targets[saved.label]
            back = _subtract(view, view.tensor, saved) if saved.changes else _restore(layer, step, view, saved)
            reasons.append(back)
            undone.append(saved)
    except BaseException:
        _redo(layer, Merge(step.adapters, undone[::-1], step.alone), targets)
        raise
    for name in step.adapters:
        if name in layer.merged_adapters:
            layer.merged_adapters.remove(name)
    return [reason for reason in reasons if reason]


def _redo(layer: Any, step: Merge, targets: dict) -> None:
    """Make a step again that `_undo` took back, of its own snapshots, so that the weights get the same bits again."""
    for saved in step.saved:
        view = targets[saved.label]
        weight = view.tensor
        variant = _variant(layer, step) if saved.label == "weight" else None
        if saved.changes:
            saved.undo = _add(view, weight, saved.changes, False, saved.undo is not None)[1]
        elif variant is not None:  # makes, too, what it keeps until it is unmerged
            before = weight.data.clone()
            variant.merge_unsafe(layer, step.adapters[0], weight)
            if saved.undo is not None:
                write(weight, weight.data, before)
        if saved.undo is not None and not saved.changes:
            saved.undo.swap(weight, weight.data)
        elif not saved.changes and variant is None:
            changes = [change for change in _changes_now(layer, step, saved.label) if not isinstance(change, Replace)]
            _add(view, weight, changes, False, False)


def _changes_now(layer: Any, step: Merge, label: str) -> list[Any]:
    """What merging the step's adapters would do to a weight as they are now."""
    plans = [layer._merge_changes(name) for name in step.adapters if name in layer._merge_adapters()]
    changes = [plan[label] for plan in plans]
    return [change if isinstance(change, (LowRank, Replace)) else change() for change in changes]


def _restore(layer: Any, step: Merge, view: BaseView, saved: Saved) -> str | None:
    """Undo a merge of which no change was kept: from the copy, or, where that does not fit any more, by asking the
    variant or the adapters as they are now."""
    weight, undo, undone = view.tensor, saved.undo, None
    tensor = weight.data
    variant = _variant(layer, step) if saved.label == "weight" else None
    if variant is not None and step.adapters[0] in layer.merged_adapters:  # drops what the variant keeps, too
        kept = dict(layer._caches)
        try:
            undone = variant.unmerge(layer, step.adapters[0], weight)
        except BaseException:
            layer._caches.update(kept)
            raise
    reason = "" if undo is None else undo.put_back(weight, tensor, saved.meta == meta_of(tensor))
    if reason is None:
        return None
    if undo is not None:
        saved.undo = Difference(None, None, tensor.clone())
    if undone is not None:
        write(weight, tensor, undone)
        return reason
    for change in reversed(_changes_now(layer, step, saved.label)):
        if isinstance(change, Replace):  # nothing to subtract: what was written since is lost
            write(weight, tensor, undo.old.view(saved.meta[0]).view(saved.meta[1]))
        else:
            _subtract(view, weight, Saved(saved.label, [change]))
    return reason


@_without_grad
def unmerge(layer: Any) -> None:
    """Take all merged adapters out of the base weights of `layer`, in the reverse order of merging."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.")
        return
    steps = records(layer)
    if layer.__dict__.pop("_merge_suspended", None):
        steps.clear()
        layer.merged_adapters.clear()
        return
    targets = layer._merge_targets()
    reasons = []
    with transaction(layer) as way_back:
        while steps:
            step = steps[-1]
            if not set(step.adapters).isdisjoint(layer.merged_adapters):
                reasons += _undo(layer, step, targets)
            steps.pop()
            way_back.let_through()
        while layer.merged_adapters:  # merged by others, without a record
            _undo(layer, _unrecorded(layer, layer.merged_adapters[-1]), targets)
    _warn_about(layer, reasons)


def _warn_about(layer: Any, reasons: list[str]) -> None:
    if reasons:
        warnings.warn(
            f"The merged weight of {describe(layer)} {reasons[0]} after merging. The adapter was subtracted from it; "
            "the weights may differ from the original ones by rounding.",
            PeftWarning,
        )


def _unrecorded(layer: Any, name: str) -> Merge:
    """A step for an adapter that somebody else has merged, without a record."""
    plan = layer._merge_changes(name) if name in layer._merge_adapters() else {}
    return Merge([name], [Saved(label, []) for label, change in plan.items() if not isinstance(change, Replace)])


# -------------------------------------------------------------------------------------------------------- switching


@_with_values
@_without_grad
def switch(layer: Any, adapter_names: list[str], safe_merge: bool = False) -> None:
    """Merge `adapter_names` in place of all that are merged: the bits and records that unmerging and merging give, in
    one pass over each weight where one merge of plain adapters follows another.

    With `safe_merge`, ValueError if a merged weight is not finite. Whatever is raised, nothing has changed.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    resume(layer)
    known = layer._merge_adapters()
    names = [name for name in dict.fromkeys(adapter_names) if name in known]
    plans = {name: layer._merge_changes(name) for name in names}
    with transaction(layer) as way_back:
        if names and _is_one_pass(layer, plans):
            reasons = _switch_in_one(layer, names, plans, safe_merge)
        else:
            reasons = []
            if layer.merged:
                layer.unmerge()
            if names:
                layer.merge(safe_merge=safe_merge, adapter_names=names)
        way_back.let_through()
    _warn_about(layer, [reason for reason in reasons if reason])


def _switch_in_one(layer: Any, names: list[str], plans: dict, safe_merge: bool) -> list[str | None]:
    targets = layer._merge_targets()
    (old,) = records(layer)
    new = Merge(names)
    reasons = []
    try:
        for label, view in targets.items():
            changes = [plans[name][label] for name in names if label in plans[name]]
            changes = [change.snapshot() if isinstance(change, LowRank) else _values_of(change) for change in changes]
            before = next((saved for saved in old.saved if saved.label == label), Saved(label, []))
            after, reason = _switch_one(view, view.tensor, before, changes, safe_merge)
            if after is None:
                raise nan_error(names)
            new.saved.append(after)
            reasons.append(reason)
    except BaseException:
        for after in reversed(new.saved):
            before = next((saved for saved in old.saved if saved.label == after.label), Saved(after.label, []))
            view = targets[after.label]
            _switch_one(view, view.tensor, after, before.changes, False)
        raise
    new.saved = [saved for saved in new.saved if saved.changes]
    records(layer)[:] = [new]
    layer.merged_adapters[:] = names
    if not exact_unmerge.enabled:
        _drop_records(layer, plans, 0)
    return reasons


def _is_one_pass(layer: Any, plans: dict) -> bool:
    steps = records(layer)
    changes = [change for plan in plans.values() for change in plan.values()]
    return (
        len(steps) == 1
        and not steps[0].alone
        and steps[0].adapters == layer.merged_adapters
        and all(saved.changes for saved in steps[0].saved)
        and not any(name in layer.__dict__.get("lora_variant", ()) for name in plans)
        and not any(isinstance(change, Replace) for change in changes)
        and all(isinstance(plan["weight"], LowRank) for plan in plans.values() if "weight" in plan)
    )


def _switch_one(
    view: BaseView, weight: torch.Tensor, old: Saved, changes: list[Any], check: bool
) -> tuple[Saved | None, str | None]:
    """Undo `old` on a weight and add `changes`. (None, None): not finite, nothing has changed; else what undoes the
    new changes, and the reason why the old bits were not there."""
    record = exact_unmerge.enabled or check
    tensor, label = weight.data, old.label
    meta = meta_of(tensor)
    if old.changes and changes and isinstance(old.undo, tuple) and old.meta == meta:
        before, after = (_kernel_operands(view, tensor, part) for part in (old.changes, changes))
        if before is not None and after is not None:
            done = _C.merge_switch(*before, old.undo, after[1], check, record, weight)
            if done is not None:
                finite, undo, same = done
                after = Saved(label, changes, undo, meta) if finite else None
                return after, None if same or not finite else "was written to"
    reason = _subtract(view, weight, old) if old.changes else None
    if not changes:
        return Saved(label, [], None, meta), reason
    finite, undo = _add(view, weight, changes, check, record)
    if finite:
        return Saved(label, changes, undo, meta), reason
    if old.changes:
        _add(view, weight, old.changes, False, False)
    return None, None


@_without_grad
def bare_weight(layer: Any, label: str = "weight") -> torch.Tensor | None:
    """A copy of the layer's weight (or of its target `label`) without its merged adapters; None if that cannot be told
    without unmerging."""
    steps = records(layer)
    merged = [name for step in steps for name in step.adapters]
    if merged != layer.merged_adapters or getattr(layer, "_merge_targets", None) is None:
        return None
    saved_steps = [saved for step in steps for saved in step.saved if saved.label == label]
    if any(not saved.changes and saved.undo is None for saved in saved_steps):
        return None
    view = layer._merge_targets()[label]
    weight = view.tensor.data.clone()
    if layer.__dict__.get("_merge_suspended"):
        return weight
    for saved in reversed(saved_steps):
        if saved.changes:
            _subtract(view, weight, saved)
        else:
            weight.copy_(saved.undo.restore(weight, None))
    return weight


# ------------------------------------------------------------------------ a merged layer with disabled adapters


def suspend(layer: Any) -> None:
    """Give the base weights their values without the merged adapters until `resume`; `merged_adapters` stays."""
    if layer.__dict__.get("_merge_suspended") or not layer.merged:
        return
    below = layer._modules["base_layer"]
    if hasattr(below, "merged_adapters"):  # of another model; it was merged later, into the same weight
        suspend(below)
    names = list(layer.merged_adapters)
    with onload_layer(layer):
        layer.unmerge()
    layer.merged_adapters[:] = names
    layer._merge_suspended = True


def resume(layer: Any) -> None:
    """Merge again what `suspend` took out."""
    if layer.__dict__.pop("_merge_suspended", None):
        names = list(layer.merged_adapters)
        layer.merged_adapters.clear()
        with onload_layer(layer):
            layer.merge(adapter_names=names)


# ----------------------------------------------------------------------------------------------- a layer's methods


class Merging:
    """The merging methods of a layer that declares `_base_view` (its weight as a matrix) and `_merge_changes`."""

    def _base_view(self) -> BaseView:
        """How the base weight reads as the matrix (out, in...) that adapters act on."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its base weight reads as a matrix")

    def _merge_targets(self) -> dict[str, BaseView]:
        weight = self._base_view()
        if held(weight.owner, "bias") is None:
            return {"weight": weight}
        return {"weight": weight, "bias": BaseView(weight.owner, "bias")}

    def _merging(self) -> transaction:
        """The way back to what is merged now; see `transaction`."""
        return transaction(self)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the base weights, in place, in one pass where that can be.

        safe_merge: ValueError if a merged weight is not finite. Nothing has changed when an error is raised.
        """
        merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weights, which get their old bits back."""
        unmerge(self)

    def switch(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Merge these adapters in place of the ones that are merged: `unmerge` and `merge` in one pass."""
        switch(self, adapter_names, safe_merge)
