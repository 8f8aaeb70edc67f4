"""EVA (https://arxiv.org/abs/2410.07170): start A along the principal directions of each layer's inputs, and give more
rank to the layers whose inputs they explain better."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import copy, deepcopy
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_c.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft_c.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft_c.utils.incremental_pca import IncrementalPCA
from peft_c.utils.other import _get_submodules, get_pattern_key

from ._targets import linear_types
from .attention import MultiheadAttention
from .config import LoraConfig
from .conv import _ConvNd
from .core import LoraLayer
from .layer import Embedding

UNSUPPORTED_LORA_MODULES = (Embedding, MultiheadAttention, _ConvNd)

_RHO_LIMIT = 1000  # above it `rho` is cut to what the largest side of any weight allows


def _first_tensor(layer_input: Any, layer_name: str) -> torch.Tensor:
    """The tensor a layer was called with: what a hook gets, or its first item."""
    if isinstance(layer_input, (tuple, list)):
        return layer_input[0]
    if isinstance(layer_input, torch.Tensor):
        return layer_input
    raise TypeError(
        f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, please "
        "provide a custom prepare_layer_inputs_fn"
    )


class _Hook:
    """A forward hook that sees the inputs of layer `name` as a matrix, from all ranks if asked to.

    `prepare_layer_inputs_fn(layer_input, model_input, layer_name)` makes the matrix; by default all dimensions but the
    last are flattened.
    """

    def __init__(
        self, name: str, prepare_layer_inputs_fn: Callable | None = None, gather_distributed_inputs: bool = True
    ) -> None:
        self.name = name
        self.gather_distributed_inputs = gather_distributed_inputs
        self._prepare_layer_inputs_fn = prepare_layer_inputs_fn or self._prepare_layer_inputs_fn_default
        self.model_input: Any = None

    @staticmethod
    def _prepare_layer_inputs_fn_default(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
        x = _first_tensor(layer_input, layer_name)
        return x.reshape(-1, x.size(-1)) if x.ndim > 2 else x

    @torch.no_grad()
    def prepare_layer_inputs(self, layer_input: Any) -> torch.Tensor:
        return self._prepare_layer_inputs_fn(layer_input, self.model_input, self.name)

    def gather_layer_inputs(self, layer_input: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, which may have different numbers of them."""
        if not (self.gather_distributed_inputs and dist.is_available() and dist.is_initialized()):
            return layer_input
        world = dist.get_world_size()
        sizes = torch.empty(world, dtype=torch.long, device=layer_input.device)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(layer_input)], device=layer_input.device))
        padded = layer_input.new_zeros((int(sizes.max()), *layer_input.shape[1:]))
        padded[: len(layer_input)] = layer_input
        gathered = [torch.zeros_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes.tolist(), strict=True)])


class SVDHook(_Hook):
    """Updates an incremental SVD with every batch; `converged[i]` tells whether direction i has settled, that is, its
    cosine similarity to the previous step is at least `sim_thresh` (a number, or a tensor of 1 or n_components)."""

    def __init__(self, n_components: int, sim_thresh: float | torch.Tensor, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        if isinstance(sim_thresh, torch.Tensor) and sim_thresh.ndim > 0:
            if sim_thresh.shape not in ((n_components,), (1,)):
                raise ValueError(
                    "if sim_thresh is a tensor with more than 0 dimensions it must have shape "
                    f"(n_components,) or (1,), got {tuple(sim_thresh.shape)}"
                )
        self.n_components = n_components
        self.sim_thresh = sim_thresh
        self.svd = IncrementalPCA(n_components=n_components, copy=True, lowrank=True, lowrank_seed=42)
        self.converged = torch.zeros((n_components,), dtype=torch.bool)

    @property
    def has_components(self) -> bool:
        return hasattr(self.svd, "components_")

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        previous = self.svd.components_.clone() if self.has_components else None
        states = self.gather_layer_inputs(self.prepare_layer_inputs(input))
        if states.size(0) < self.n_components:
            print(f"skipping SVD for {self.name} because there are less than {self.n_components} examples")
            return
        self.svd.partial_fit(states.to(torch.float32))
        if previous is not None:
            width = self.svd.components_.shape[-1]
            similarity = torch.nn.functional.cosine_similarity(
                self.svd.components_.reshape(-1, width), previous.reshape(-1, width)
            )
            self.converged = similarity >= self.sim_thresh


class HashHook(_Hook):
    """Collects hashes of the inputs, to find layers that get the same ones and can share an SVD."""

    def __init__(self, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.hashed_inputs: list[int] = []

    @staticmethod
    def hash_fn(tensor: torch.Tensor) -> int:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        self.hashed_inputs.append(self.hash_fn(self.gather_layer_inputs(self.prepare_layer_inputs(input))))


def find_equal_values(dictionary: dict) -> dict:
    """From value to the list of keys that have it, for values with more than one key."""
    keys = defaultdict(list)
    for key, value in dictionary.items():
        keys[value].append(key)
    return {value: same for value, same in keys.items() if len(same) > 1}


def get_device_with_meta_params(model: nn.Module) -> torch.device | None:
    """The device of the parameters that are not on meta; None, with a warning, if there are several."""
    devices = list({p.device for p in model.parameters() if p.device.type != "meta"})
    if len(devices) > 1:
        warnings.warn(f"Could not determine device, model has multiple devices: {devices}")
        return None
    return devices[0]


def move_inputs_to_device(inputs: Any, device: str | torch.device) -> Any:
    """The same nest of mappings, lists and tuples with everything that has a `.to` moved."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: move_inputs_to_device(value, device) for key, value in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(move_inputs_to_device(value, device) for value in inputs)
    warnings.warn(f"input of type {type(inputs)} could not be moved to the correct device")
    return inputs


def prepare_model_inputs_fn_language_modeling(model_input: dict, peft_config: LoraConfig) -> torch.Tensor:
    """The indices (n, 2) of the tokens to use: attended to and, with `use_label_mask`, labelled."""
    if not isinstance(model_input, dict):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """The rows of a layer's input (batch, tokens, features) at the indices that the function above returned."""
    return _first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def forward_fn_dict(model: nn.Module, inputs: dict) -> Any:
    return model(**inputs)


def _rank_distribution(
    hooks: dict[str, SVDHook], source: dict[str, str], budget: int, max_components: dict[str, int]
) -> dict[str, int]:
    """Spend `budget` ranks on the directions with the largest explained variance ratios over all layers.

    `source` maps each layer to the one whose hook it shares; that one never gets less than those it serves.
    """
    ratios = {name: hook.svd.explained_variance_ratio_[: max_components[name]] for name, hook in hooks.items()}
    owners = [name for name, hooked in source.items() for _ in ratios[hooked]]
    order = torch.stack([ratio for hooked in source.values() for ratio in ratios[hooked]]).argsort(descending=True)
    counted = Counter(owners[i] for i in order[:budget].tolist())
    ranks = {name: counted.get(name, 0) for name in source}
    for name, hooked in source.items():
        if ranks[hooked] < ranks[name]:
            ranks[hooked], ranks[name] = ranks[name], ranks[hooked]
    return ranks


class _EvaRun:
    """One computation of the EVA state dict: `batches` feeds the model, `watch` hooks layers."""

    def __init__(self, model, dataloader, peft_config, forward_fn, prepare_model_inputs_fn) -> None:
        self.model = model
        self.dataloader = dataloader
        self.peft_config = peft_config
        self.forward_fn = forward_fn
        self.prepare = prepare_model_inputs_fn
        self.device = get_device_with_meta_params(model)
        self.handles: dict[str, Any] = {}

    def load(self, inputs: Any, hooks: Iterable[_Hook]) -> Any:
        """Put a batch on the device and tell the hooks about it."""
        if self.device is not None:
            inputs = move_inputs_to_device(inputs, self.device)
        seen = deepcopy(inputs) if self.prepare is None else self.prepare(inputs, self.peft_config)
        for hook in hooks:
            hook.model_input = seen
        return inputs

    def watch(self, hook: _Hook, on: bool = True) -> None:
        if on and hook.name not in self.handles:
            self.handles[hook.name] = self.model.get_submodule(hook.name).register_forward_hook(hook)
        elif not on and hook.name in self.handles:
            self.handles.pop(hook.name).remove()

    def close(self) -> None:
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()

    def equal_inputs(self, hooks: dict[str, HashHook]) -> list[list[str]]:
        """Groups of layers that get the same input, found with one batch."""
        inputs = self.load(next(iter(self.dataloader)), hooks.values())
        for hook in hooks.values():
            self.watch(hook)
        self.forward_fn(self.model, inputs)
        self.close()
        return list(find_equal_values({name: hook.hashed_inputs[0] for name, hook in hooks.items()}).values())

    def fit(self, hooks: dict[str, SVDHook], source: dict[str, str], budget: int, max_components, show_progress_bar):
        """Feed batches until all directions that matter for the rank distribution have settled; returns the ranks."""
        ranks = dict(max_components)
        batches = cycle(self.dataloader)
        if show_progress_bar and (not dist.is_initialized() or dist.get_rank() == 0):
            from tqdm import tqdm

            batches = tqdm(batches, position=0, leave=False)
        for step, batch in enumerate(batches):
            done = {name: bool(hook.converged[: ranks[name]].all()) for name, hook in hooks.items()}
            for name, hook in hooks.items():
                self.watch(hook, on=not done[name])
            if hasattr(batches, "set_description"):
                settled = sum(done[hooked] for hooked in source.values())
                batches.set_description(f"{settled}/{len(source)} layers have converged")
            if all(done.values()):
                break
            if step == len(self.dataloader):
                self.check_progress(hooks)
            self.forward_fn(self.model, self.load(batch, hooks.values()))
            if all(hook.has_components for hook in hooks.values()):
                ranks = _rank_distribution(hooks, source, budget, max_components)
        return ranks

    @staticmethod
    def check_progress(hooks: dict[str, SVDHook]) -> None:
        """After one pass over the data every layer must have had one batch with enough rows."""
        short = {name: hook.n_components for name, hook in hooks.items() if not hook.has_components}
        if short:
            raise ValueError(
                "No batch of the dataloader has enough rows for the SVD of these layers; use larger batches, a "
                f"smaller rank or a smaller `rho`. Layer -> rows needed: {short}"
            )


def _get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig,
    target_module_check_fn: Callable,
    forward_fn: Callable,
    prepare_model_inputs_fn: Callable | None,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None,
    gather_distributed_inputs: bool,
    show_progress_bar: bool,
) -> dict[str, torch.Tensor]:
    """`get_eva_state_dict` for the layers that `target_module_check_fn(name, module)` accepts."""
    if len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    if dist.is_initialized() and gather_distributed_inputs:
        warnings.warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA initialization "
            "will gather tensors from all ranks. Ensure the model does not receive the same inputs on different ranks."
        )
    options = peft_config.eva_config
    rho = options.rho
    if rho > _RHO_LIMIT:
        rho = min(rho, max(max(p.shape) for p in model.parameters()) // peft_config.r)

    names = [name for name, module in model.named_modules() if target_module_check_fn(name, module)]
    per_layer = isinstance(prepare_layer_inputs_fn, Mapping)
    unknown = set(prepare_layer_inputs_fn) - set(names) if per_layer else ()
    if unknown:
        raise ValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{sorted(unknown)}"
        )
    common = {
        name: {
            "name": name,
            "prepare_layer_inputs_fn": prepare_layer_inputs_fn.get(name) if per_layer else prepare_layer_inputs_fn,
            "gather_distributed_inputs": gather_distributed_inputs,
        }
        for name in names
    }
    layer_rank = {name: _from_pattern(peft_config.rank_pattern, name, peft_config.r) for name in names}
    max_components = {name: round(rank * rho) for name, rank in layer_rank.items()}

    training = model.training
    model.eval()
    run = _EvaRun(model, dataloader, peft_config, forward_fn, prepare_model_inputs_fn)
    try:
        groups = run.equal_inputs({name: HashHook(**common[name]) for name in names})
        shared = {name: group[0] for group in groups for name in group[1:]}
        for group in groups:
            largest = max(max_components[name] for name in group)
            max_components.update(dict.fromkeys(group, largest))
        hooks = {
            name: SVDHook(n_components=max_components[name], sim_thresh=options.tau, **common[name])
            for name in names
            if name not in shared
        }
        source = {**{name: name for name in hooks}, **shared}
        budget = sum(layer_rank.values())
        ranks = run.fit(hooks, source, budget, max_components, show_progress_bar)
    finally:
        run.close()
        model.train(training)

    state_dict = {}
    for name, rank in ranks.items():
        svd = hooks[source[name]].svd
        directions = svd.components_[:rank]
        if options.whiten:
            directions = directions / svd.singular_values_[:rank].sqrt().reshape(-1, 1)
        state_dict[name] = directions if run.device is None else directions.to(run.device)
    return state_dict


def _from_pattern(pattern: dict, name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def _load_eva_state_dict(model: nn.Module, eva_state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Give every LoRA layer the rank and the A that EVA found, and write them into the adapter's config.

    A layer of rank 0 loses its adapter altogether; a layer that is not in the state dict is initialised as usual.
    """
    config = copy(model.peft_config[adapter_name])
    kept, missing, others = [], [], []
    rank_pattern, alpha_pattern = {}, {}
    for name, module in list(model.named_modules()):
        base_name = name.replace("base_model.model.", "")
        if not isinstance(module, LoraLayer):
            others.append(base_name)
            continue
        rank = _from_pattern(config.rank_pattern, name, config.r)
        alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
        directions = eva_state_dict.get(name)
        if directions is None:
            config.init_lora_weights = True
            module.update_layer(adapter_name=adapter_name, r=rank, lora_alpha=alpha, config=config)
            missing.append(base_name)
        elif directions.size(0) == 0:
            parent, _, child = _get_submodules(model, name)
            setattr(parent, child, module.get_base_layer())
            continue
        else:
            old_rank, rank = rank, directions.size(0)
            if rank != old_rank and config.eva_config.adjust_scaling_factors:
                alpha *= rank / old_rank
            if rank != old_rank or module.lora_A[adapter_name].weight.is_meta:
                config.init_lora_weights = "eva"
                module.update_layer(adapter_name=adapter_name, r=rank, lora_alpha=alpha, config=config)
            module.lora_A[adapter_name].weight.copy_(directions)
            kept.append(base_name)
        if rank != config.r:
            rank_pattern[base_name] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[base_name] = alpha

    targets = kept + missing
    if len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        targets = _find_minimal_target_modules(targets, others)
    final = model.peft_config[adapter_name]
    final.target_modules, final.rank_pattern, final.alpha_pattern = targets, rank_pattern, alpha_pattern
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}\ncurrently the following lora modules are not supported by EVA: "
            f"{UNSUPPORTED_LORA_MODULES}"
        )


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """The principal input directions of each target layer: name -> (rank, in_features).

    Args:
        model: Any model; a `PeftModel` is run with its adapters disabled.
        dataloader: Batches; gone through repeatedly until the directions have settled.
        peft_config: Needed unless `model` is a `PeftModel`, whose config of `adapter_name` is used.
        forward_fn: Called as `forward_fn(model, batch)`.
        prepare_model_inputs_fn: Called as `(batch, peft_config)`; its result is `model_input` below. By default the
            indices of the tokens to use. None: the batch itself.
        prepare_layer_inputs_fn: Called as `(layer_input, model_input, layer_name)`, returns the matrix (rows,
            in_features) to decompose; a dict gives one function per layer name. None: all rows.
        adapter_name: See `peft_config`.
        gather_distributed_inputs: Use the inputs of all ranks when torch.distributed is initialised.
        show_progress_bar: Show one (on rank 0).

    Raises:
        ValueError: without a config, for an empty dataloader, for unknown layer names in `prepare_layer_inputs_fn`,
            and if no batch has as many rows as a layer needs components.
    """
    is_peft_model = hasattr(model, "peft_config")
    if peft_config is None and not is_peft_model:
        raise ValueError("peft_config is required if model is not a PeftModel")
    config = peft_config if peft_config is not None else model.peft_config[adapter_name]

    def is_target(name: str, module: nn.Module) -> bool:
        if is_peft_model:
            return hasattr(module, "base_layer") and not isinstance(module, UNSUPPORTED_LORA_MODULES)
        targeted = config.target_modules is None or check_target_module_exists(config, name)
        return isinstance(module, linear_types()) and bool(targeted)

    with model.disable_adapter() if is_peft_model else nullcontext():
        return _get_eva_state_dict(
            model=model,
            dataloader=dataloader,
            peft_config=config,
            target_module_check_fn=is_target,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise a LoRA adapter made with `init_lora_weights="eva"`, redistributing ranks as its `eva_config` says.

    Give either an `eva_state_dict` or the arguments of `get_eva_state_dict` to compute it with. ValueError if the
    model is no `PeftModel`, has several active adapters, or the adapter's config asks for another scheme.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model=model,
            dataloader=dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    _load_eva_state_dict(model, eva_state_dict, adapter_name)
