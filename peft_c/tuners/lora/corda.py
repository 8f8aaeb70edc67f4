"""CorDA's preprocessing (https://arxiv.org/abs/2406.05223): decompose weights along the covariance of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peft_c.utils.other import get_pattern_key

from ._targets import conv1d_types, first_device, load_cache, save_cache, targeted_linears
from .config import LoraConfig


@dataclass
class CordaEigens:
    """What a layer of `r` components keeps: S_WC (r,), U_WC (out, r) and V_WC (in, r), the last one times the inverse
    covariance, so that `U_WC * S_WC @ V_WC^T` is the chosen part of the weight."""

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


_PARTS = ("S_WC", "U_WC", "V_WC")


def target_modules(model: nn.Module, config: LoraConfig) -> Iterable[tuple[str, nn.Module]]:
    """Name and module of each layer CorDA works on."""
    return targeted_linears(model, config)


def get_model_device(model: nn.Module) -> str:
    """The type of the device that the first parameter is on."""
    return first_device(model).type


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Give every target layer the `eigens` that `init_lora_weights="corda"` starts from.

    A covariance matrix (in, in) per layer is held for a while: about twice the model for half-precision weights, see
    `CordaConfig.use_float16_for_covariance`.

    Args:
        model: The model that will be adapted.
        lora_config: With `corda_config` set; its files are read if they exist and written otherwise.
        run_model: Runs the model on sample data; not needed if one of the files exists. About
            `in_features / tokens * 128` samples keep the covariance well conditioned.
        hooked_model: The model that `run_model` runs, if it is another one.

    Raises:
        ValueError: without `run_model` or method where they are needed, and for inputs that are not finite.
    """
    options = lora_config.corda_config
    cache = load_cache(options.cache_file, model)
    if cache is not None:
        for name, module in target_modules(model, lora_config):
            module.eigens = CordaEigens(*(cache[f"{name}.eigens.{part}"] for part in _PARTS))
        return

    if options.corda_method not in ("ipm", "kpm"):
        raise ValueError(
            f"Invalid corda_method found: {options.corda_method}, it should be 'ipm' or 'kpm' when there is no cache."
        )
    for name, module in target_modules(model, lora_config):
        module.corda_method = options.corda_method
        pattern = get_pattern_key(lora_config.rank_pattern.keys(), name)
        module.rank = lora_config.rank_pattern.get(pattern, lora_config.r)
    calib_cov_distribution(model, lora_config, run_model, hooked_model, options.covariance_file)
    collect_eigens(model, lora_config, options.verbose)
    crop_corda_eigens(model, lora_config)

    if options.prune_temporary_fields:
        for _, module in target_modules(model, lora_config):
            for attribute in ("sample_count", "covariance_matrix", "corda_method", "rank"):
                vars(module).pop(attribute, None)
    save_cache(
        options.cache_file,
        {
            f"{name}.eigens.{part}": getattr(module.eigens, part)
            for name, module in target_modules(model, lora_config)
            for part in _PARTS
        },
    )


@torch.no_grad()
def calib_cov_distribution(
    model: nn.Module,
    config: LoraConfig,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
    covariance_file: str | None,
) -> None:
    """Set `covariance_matrix`, the mean over calls of X^T X, on every target layer: from the file or by running."""
    saved = load_cache(covariance_file, model)
    if saved is not None:
        for name, module in target_modules(model, config):
            module.covariance_matrix = saved[name]
        return
    if run_model is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
    keep_dtype = config.corda_config.use_float16_for_covariance

    def hook(module: nn.Module, args: tuple, output: object) -> None:
        x = args[0].detach().flatten(0, -2)
        x = x if keep_dtype else x.float()
        x = x / torch.max(x).abs()
        if not torch.isfinite(x).all():
            raise ValueError("Invalid value found in input, please check your input data.")
        covariance = x.t() @ x
        if not torch.isfinite(covariance).all():
            raise ValueError("Invalid value found in covariance: the inputs overflow in the type they are summed in.")
        module.sample_count += 1
        module.covariance_matrix = module.covariance_matrix + covariance

    hooked_model = model if hooked_model is None else hooked_model
    hooked_model.eval()
    hooked = dict(target_modules(hooked_model, config))
    handles = []
    try:
        for module in hooked.values():
            module.sample_count = 0
            module.covariance_matrix = 0
            handles.append(module.register_forward_hook(hook))
        run_model()
    finally:
        for handle in handles:
            handle.remove()

    targets = dict(target_modules(model, config))
    for name, module in targets.items():
        source = hooked.get(name, module)
        module.sample_count = source.sample_count
        module.covariance_matrix = source.covariance_matrix / source.sample_count
    save_cache(covariance_file, {name: module.covariance_matrix for name, module in targets.items()})


@torch.no_grad()
def collect_eigens(model: nn.Module, config: LoraConfig, verbose: bool) -> None:
    """Set the full `eigens` of every target layer."""
    layers = list(target_modules(model, config))
    if verbose:
        from tqdm import tqdm

        layers = tqdm(layers, desc="Collecting eigens")
    for _, module in layers:
        module.eigens = collect_eigens_for_layer(module, config)


@torch.no_grad()
def collect_eigens_for_layer(linear: nn.Module, config: LoraConfig) -> CordaEigens:
    """SVD of `weight @ covariance`, the covariance damped until its inverse is good; U and V on the CPU."""
    if not hasattr(linear, "covariance_matrix"):
        raise ValueError("Covariance matrix not found in linear module, please call `preprocess_corda` instead.")
    weight = _matrix(linear).float()
    covariance = linear.covariance_matrix.float()
    eye = torch.eye(len(covariance), device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + torch.diag(torch.ones(len(eye)).to(eye) * covariance.diag().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return CordaEigens(S_WC=S, U_WC=U.cpu(), V_WC=(Vh @ inverse).T.cpu())


def _matrix(linear: nn.Module) -> torch.Tensor:
    """The weight as (out, in)."""
    return linear.weight.data.T if isinstance(linear, conv1d_types()) else linear.weight.data


@torch.no_grad()
def crop_corda_eigens(model: nn.Module, config: LoraConfig) -> None:
    """Keep the first (ipm) or last (kpm) `rank` components, as copies, so that saving them does not save the rest.

    ValueError if a layer has fewer."""
    for name, module in target_modules(model, config):
        r, eigens = module.rank, module.eigens
        if r > len(eigens.S_WC):
            raise ValueError(f"rank mismatch: layer {name} has {len(eigens.S_WC)} components, fewer than r={r}.")
        part = slice(0, r) if module.corda_method == "ipm" else slice(-r, None)
        device = get_model_device(model)
        eigens.S_WC = eigens.S_WC[part].clone()
        eigens.U_WC = eigens.U_WC[:, part].clone().to(device)
        eigens.V_WC = eigens.V_WC[:, part].clone().to(device)
