"""How the LoRA factors of a layer start: one function per scheme, and the table that picks one.

Every function takes a LoRA layer, in PEFT's sense, whose adapter has its `r`, `scaling` and parameters already, and
writes the factors. Shapes below are those of the update `scaling * B @ A`: W (out, in), A (r, in), B (out, r); layers
that store their weight transposed are turned round on the way in and out. The numbers drawn from torch's generators
are those of PEFT 0.21.2, in the same order. All checks come before the first write.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_c.utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type
from peft_c.utils.other import transpose

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def initialize(layer: Any, adapter_name: str, config: Any) -> None:
    """Initialise `adapter_name` of `layer` as `config.init_lora_weights` says.

    Linear layers of all kinds know every scheme. Embeddings and convolutions know "loftq" (embeddings also
    "mica"); for "lora_ga" they take the default, and `reset_lora_parameters` decides about the rest. False keeps the
    parameters as they were constructed.
    """
    value = config.init_lora_weights
    scheme = _scheme_name(value)
    factors = layer.lora_A
    if adapter_name not in factors or isinstance(factors[adapter_name], nn.modules.conv._ConvNd):
        value = True if scheme == "lora_ga" else value
        scheme = scheme if scheme in ("loftq", "mica") else None
    if scheme == "eva":
        nn.init.zeros_(layer.lora_B[adapter_name].weight)  # A comes from `initialize_lora_eva_weights`
    elif scheme is not None:
        with gather_params_ctx(layer.get_base_layer().weight):
            SCHEMES[scheme](layer, adapter_name, config)
    elif value:
        layer.reset_lora_parameters(adapter_name, value)


# the layer's own methods are called, so that a subclass can override a scheme
SCHEMES = {
    "pissa": lambda layer, name, config: layer.pissa_init(name, config.init_lora_weights),
    "corda": lambda layer, name, config: layer.corda_init(name, config.init_lora_weights),
    "olora": lambda layer, name, config: layer.olora_init(name),
    "mica": lambda layer, name, config: layer.mica_init(name),
    "loftq": lambda layer, name, config: layer.loftq_init(name, config),
    "orthogonal": lambda layer, name, config: layer.orthogonal_init(name),
    "lora_ga": lambda layer, name, config: layer.lora_ga_init(name, config.lora_ga_config),
}


def _scheme_name(value: bool | str) -> str | None:
    """The key of SCHEMES (or "eva") that `init_lora_weights=value` asks for; None for the plain schemes."""
    if not isinstance(value, str):
        return None
    for prefix in ("pissa", "corda"):
        if value.startswith(prefix):
            return prefix
    name = value.lower() if value.lower() in ("olora", "mica") else value
    return name if name in SCHEMES or name == "eva" else None


# ---------------------------------------------------------------- shared steps


def _base_matrix(layer: Any, scheme: str, transposed: bool | None = None) -> torch.Tensor:
    """The base weight as a detached fp32 (out, in) matrix; TypeError unless it is stored in a float type."""
    weight = layer.get_base_layer().weight
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"Please initialize {scheme} under float32, float16, or bfloat16, the weight of the base layer "
            f"({type(layer.get_base_layer()).__name__}) is {weight.dtype}. Quantize the model after initialization."
        )
    return transpose(weight.detach().to(torch.float32), _transposed(layer) if transposed is None else transposed)


def _transposed(layer: Any) -> bool:
    return getattr(layer, "fan_in_fan_out", False)


def _put(module: nn.Module, weight: torch.Tensor) -> None:
    """Give `module` the weight; a placeholder on the meta device is replaced, since its data cannot be set."""
    if module.weight.is_meta:
        module.weight = nn.Parameter(weight)
    else:
        module.weight.data = weight


def _set_factors(layer: Any, adapter_name: str, A: torch.Tensor, B: torch.Tensor) -> None:
    _put(layer.lora_A[adapter_name], A.contiguous())
    _put(layer.lora_B[adapter_name], B.contiguous())


def _set_factors_keep_output(layer: Any, adapter_name: str, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """Install A and B and leave `W - scaling * B @ A` in the base layer, so that the layer computes what it did.

    W is the base weight as an fp32 (out, in) matrix. It is stored in the base weight's type and orientation, or
    quantised again when the base layer is a bitsandbytes one.
    """
    base = layer.get_base_layer()
    old = base.weight
    residual = W - (layer.scaling[adapter_name] * B.float()) @ A.float()
    residual = transpose(residual, _transposed(layer))
    _set_factors(layer, adapter_name, A, B)
    quantized = get_bnb_param_type(old)
    if not quantized:
        old.data = residual.to(old.dtype).contiguous()
        return
    keep = {
        "4bit": ("quant_type", "quant_storage", "compress_statistics", "module"),
        "8bit": ("requires_grad", "has_fp16_weights"),
    }[quantized]
    base.weight = type(old)(residual, **{name: getattr(old, name) for name in keep}).to(old.device)


# ---------------------------------------------------------------- plain schemes


def reset_lora_parameters(layer: Any, adapter_name: str, init_lora_weights: bool | str) -> None:
    """The schemes that do not look at the base weight: True, "gaussian"; False draws nothing.

    Linear and convolution: A uniform as `nn.Linear` starts (True) or normal with deviation 1 / r ("gaussian"), B and
    its bias zero. Embedding: A zero, B standard normal. ValueError for any other string on a linear or convolution
    layer. Under tensor parallelism the unsharded factor is then made equal on all ranks.
    """
    if init_lora_weights is not False:
        factors, embedding_factors = layer.lora_A, layer.lora_embedding_A
        if adapter_name in factors:
            A, B = factors[adapter_name], layer.lora_B[adapter_name]
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
            elif init_lora_weights.lower() == "gaussian":
                nn.init.normal_(A.weight, std=1 / layer.r[adapter_name])
            else:
                raise ValueError(
                    f"Unknown initialization {init_lora_weights=} for adapter '{adapter_name}' on a "
                    f"base layer of type "
                    f"{type(layer.get_base_layer()).__name__}."
                )
            nn.init.zeros_(B.weight)
            if layer.lora_bias[adapter_name]:
                nn.init.zeros_(B.bias)
        if adapter_name in embedding_factors:
            nn.init.zeros_(embedding_factors[adapter_name])
            nn.init.normal_(layer.lora_embedding_B[adapter_name])
    if dist.is_available() and dist.is_initialized():
        _broadcast_unsharded_factor(layer, adapter_name)


def _broadcast_unsharded_factor(layer: Any, adapter_name: str) -> None:
    """Each tensor-parallel rank drew its own numbers; take rank 0's for the factor that is not split over ranks."""
    base = layer.get_base_layer()
    mesh = getattr(base, "_hf_device_mesh", None)
    if mesh is None:
        return
    plan = getattr(base, "_hf_tp_plan", None)
    shared = {
        "colwise": layer.lora_A,
        "rowwise": layer.lora_B,
        "embedding_rowwise": layer.lora_embedding_B,
    }
    if plan not in shared:
        warnings.warn(
            f'tp_plan "{plan}" found on the base layer is not supported for LoRA weight synchronization. Expected one '
            'of "colwise", "rowwise", "embedding_rowwise". LoRA weights may differ between ranks.'
        )
    elif adapter_name in shared[plan]:
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        factor = shared[plan][adapter_name]
        group = mesh.get_group()
        dist.broadcast(getattr(factor, "weight", factor).data, src=dist.get_global_rank(group, 0), group=group)


@torch.no_grad()
def orthogonal_init(layer: Any, adapter_name: str) -> None:
    """Row spaces of A^T and B from the odd and even rows of one random orthogonal matrix, so B @ A starts at zero.

    Source: https://datta0.github.io/posts/rethink-lora-init/. ValueError for an odd rank.
    """
    r = layer.r[adapter_name]
    if r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(layer.in_features, r // 2).mm(basis[0::2]).T / 10.0
    B = torch.randn(r // 2, layer.out_features).T.mm(basis[1::2]) / 10.0
    dtype = layer.get_base_layer().weight.dtype
    layer.lora_A[adapter_name].weight = nn.Parameter(A.contiguous().to(dtype))
    layer.lora_B[adapter_name].weight = nn.Parameter(B.contiguous().to(dtype))


# ---------------------------------------------------------------- factors of the base weight


@torch.no_grad()
def olora_init(layer: Any, adapter_name: str) -> None:
    """OLoRA (https://arxiv.org/abs/2406.01775): B and A are the first r columns and rows of W = QR."""
    base = layer.get_base_layer()
    if get_bnb_param_type(base.weight):
        W = transpose(dequantize_module_weight(base).detach().to(torch.float32), _transposed(layer))
    elif base.weight.dtype in _FLOATS:
        W = _base_matrix(layer, "OLoRA")
    else:
        raise TypeError(f"Unsupported data type for the base layer. Got {base.weight.dtype}.")
    r = layer.r[adapter_name]
    Q, R = torch.linalg.qr(W)
    _set_factors_keep_output(layer, adapter_name, W, R[:r], Q[:, :r])


@torch.no_grad()
def pissa_init(layer: Any, adapter_name: str, init_lora_weights: str) -> None:
    """PiSSA (https://arxiv.org/abs/2404.02948): A and B share the r leading singular components of W.

    "pissa" takes the exact SVD, "pissa_niter_N" a randomised one with N subspace iterations.
    """
    W = _base_matrix(layer, "PiSSA")
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    prefix, _, niter = init_lora_weights.partition("_niter_")
    if init_lora_weights == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    elif prefix == "pissa" and niter.isdecimal():
        U, S, V = torch.svd_lowrank(W, r, niter=int(niter))
        Vh = V.t()
    else:
        raise ValueError(
            f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got {init_lora_weights} instead."
        )
    root = (S / scaling).sqrt()
    _set_factors_keep_output(layer, adapter_name, W, root[:, None] * Vh, U * root)


@torch.no_grad()
def mica_init(layer: Any, adapter_name: str) -> None:
    """MiCA (https://arxiv.org/abs/2604.01694): B from the left singular vectors of W with the r smallest singular
    values, A zero, both in the base weight's type. The variant freezes B.

    For an embedding W is the transposed table (dim, num_embeddings). Factors on the meta device are left alone, a
    checkpoint will fill them. ValueError when r exceeds the smaller side of W.
    """
    embedding = adapter_name in layer.lora_embedding_B
    put_A, put_B = (
        (layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name])
        if embedding
        else (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
    )
    if put_B.is_meta:
        return
    weight = layer.get_base_layer().weight
    W = _base_matrix(layer, "MiCA", transposed=embedding or _transposed(layer))
    r = layer.r[adapter_name]
    if r > min(W.shape):
        sides = "num_embeddings, embedding_dim" if embedding else "in_features, out_features"
        raise ValueError(
            f"MiCA requires `r` <= min({sides}) but got r={r} for a base layer of type "
            f"{type(layer.get_base_layer()).__name__} with weight shape {tuple(weight.shape)} (max usable r is "
            f"{min(W.shape)})."
        )
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    put_B.data = U[:, -r:].contiguous().to(weight.dtype)
    put_A.data = torch.zeros(r, W.shape[1], device=W.device, dtype=weight.dtype)


@torch.no_grad()
def loftq_init(layer: Any, adapter_name: str, config: Any) -> None:
    """LoftQ (https://arxiv.org/abs/2310.08659): the base weight becomes its quantised value, B @ A fits the error."""
    from peft_c.utils.loftq_utils import loftq_init as quantize_and_fit

    weight = layer.get_base_layer().weight
    embedding = adapter_name in layer.lora_embedding_A
    turned = embedding or _transposed(layer)
    W, A, B = quantize_and_fit(
        weight.detach().T if turned else weight,
        num_bits=config.loftq_config["loftq_bits"],
        reduced_rank=layer.r[adapter_name],
        num_iter=config.loftq_config["loftq_iter"],
    )
    if embedding:
        layer.lora_embedding_A[adapter_name].data = A
        layer.lora_embedding_B[adapter_name].data = B
    else:
        _set_factors(layer, adapter_name, A, B)
    weight.data = W.T.contiguous() if turned else W


# ---------------------------------------------------------------- data-driven schemes


@torch.no_grad()
def corda_init(layer: Any, adapter_name: str, init_lora_weights: str | None = None) -> None:
    """CorDA (https://arxiv.org/abs/2406.05223): factors from the `eigens` that `preprocess_corda` left on the layer.

    ValueError when they are missing, not finite, or made for another rank or layer; they are removed once used.
    """
    base = layer.get_base_layer()
    W = _base_matrix(layer, "CorDA")
    eigens = getattr(base, "eigens", None)
    if eigens is None:
        raise ValueError("`eigens` attribute not found for layer, please run `preprocess_corda` first.")
    (out_dim, in_dim), r = W.shape, layer.r[adapter_name]
    parts = {
        "S": (eigens.S_WC, (r,)),
        "U": (eigens.U_WC, (out_dim, r)),
        "V": (eigens.V_WC, (in_dim, r)),
    }
    for name, (value, shape) in parts.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"Invalid value found in matrix {name} of the CorDA decomposition: it is not finite.")
        if value.shape != shape:
            raise ValueError(
                f"Matrix {name} size mismatch: {tuple(value.shape)} vs. {shape}. Please make sure that "
                "`preprocess_corda` got the same model and `lora_config` as `get_peft_model`, and that its cache, "
                "if any, was built with them."
            )
    root = (eigens.S_WC / layer.scaling[adapter_name]).sqrt()
    _set_factors_keep_output(layer, adapter_name, W, eigens.V_WC.t() * root[:, None], eigens.U_WC * root)
    del base.eigens


# which of the 2r leading components of the gradient A and B take
_LORA_GA_DIRECTIONS = {
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "random": lambda r: (torch.randperm(2 * r)[:r],) * 2,
}
_LORA_GA_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@torch.no_grad()
def lora_ga_init(layer: Any, adapter_name: str, lora_ga_config: Any) -> None:
    """LoRA-GA (https://arxiv.org/abs/2407.05000): A and B from the singular components of the gradient that
    `preprocess_loraga` left on the layer, in the base weight's type.

    Without a gradient, as when a saved adapter is loaded, the default scheme is used. ValueError for a missing or
    unknown option and for a layer with fewer than 2r singular components.
    """
    base = layer.get_base_layer()
    grad = getattr(base, "_peft_loraga_grad", None)
    if grad is None:
        layer.reset_lora_parameters(adapter_name, True)
        return
    if lora_ga_config is None:
        raise ValueError(
            "lora_ga_config must be provided when init_lora_weights='lora_ga', please pass "
            "lora_ga_config=LoraGAConfig(...) to LoraConfig."
        )
    direction, scale = lora_ga_config.direction, lora_ga_config.scale
    if direction not in _LORA_GA_DIRECTIONS or scale not in _LORA_GA_SCALES:
        raise ValueError(
            f"Unknown LoRA-GA direction {direction!r} or scale {scale!r}; directions are "
            f"{list(_LORA_GA_DIRECTIONS)}, scales {list(_LORA_GA_SCALES)}."
        )
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    grad = transpose(grad.to(torch.float32), _transposed(layer))
    if 2 * r > min(grad.shape):
        raise ValueError(
            f"LoRA-GA needs 2 * r <= min(in_features, out_features), got r={r} for a layer with shape "
            f"{tuple(grad.shape)}."
        )
    W = transpose(base.weight.detach().to(torch.float32), _transposed(layer))
    dtype = base.weight.dtype

    U, S, V = torch.svd_lowrank(grad, q=min(4 * r, *grad.shape), niter=4)
    for_A, for_B = _LORA_GA_DIRECTIONS[direction](r)
    A, B = V.t()[for_A], U[:, for_B] * S[for_B]
    if scale == "stable":
        # the first side of the weight as stored, which for Conv1D is its input: PEFT's starting point, kept
        B = B * (base.weight.shape[0] ** 0.25 / lora_ga_config.stable_gamma**0.5)
    elif scale == "weight_svd":
        largest = torch.svd_lowrank(W, q=r, niter=4)[1][0]
        B = B * (largest / S[for_B][0]) if S[for_B][0] > 0 else B
    elif scale == "gd_scale":
        A, B = A / scaling, B / scaling

    _set_factors_keep_output(layer, adapter_name, W, A.to(dtype), B.to(dtype))
    del base._peft_loraga_grad
