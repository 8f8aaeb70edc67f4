"""LoftQ: LoRA weights that make up for the error of quantising the base weight.

Source: https://huggingface.co/papers/2310.08659.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from ..import_utils import is_bnb_4bit_available, is_bnb_available, is_xpu_available


def _low_rank_decomposition(weight: torch.Tensor, reduced_rank: int = 32) -> dict[str, torch.Tensor | int]:
    """The best rank-r approximation L R of a matrix (H, W), the singular values split evenly between L and R.

    Also returned are the singular value decomposition itself and the rank.
    """
    if weight.dim() != 2:
        raise ValueError(f"Only support 2D matrix, but your input has {weight.dim()} dimensions.")
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    # at least as many columns as asked for if there are that many singular values
    root = S[:reduced_rank].sqrt()
    return {
        "L": U[:, :reduced_rank] * root,
        "R": root[:, None] * Vh[:reduced_rank],
        "U": U,
        "S": S,
        "Vh": Vh,
        "reduced_rank": reduced_rank,
    }


def _accelerator() -> str:
    """bitsandbytes quantises on an accelerator only."""
    return "xpu" if is_xpu_available() else "cuda"


def _free_unused_memory(device: str) -> None:
    backend = getattr(torch, device)
    if backend.is_available():
        backend.empty_cache()


def _quantize_and_back(weight: torch.Tensor, num_bits: int, device: str) -> torch.Tensor:
    """What is left of `weight` after nf4 (4 bits) or int8 quantisation, on the device given."""
    import bitsandbytes as bnb

    if num_bits == 4:
        param = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4")
        param = param.to(device)
        return bnb.functional.dequantize_4bit(param.data, param.quant_state)
    param = bnb.nn.Int8Params(weight.cpu(), requires_grad=False).to(device)
    return bnb.functional.int8_vectorwise_dequant(param.data, param.SCB)


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Alternate between quantising what the low-rank part leaves and decomposing what quantisation leaves.

    Args:
        weight: The base weight (out, in).
        num_bits: 4 (nf4) or 8 (int8); needs bitsandbytes and an accelerator.
        reduced_rank: Rank of the LoRA weights.
        num_iter: How often to alternate, at least once.

    Returns:
        The dequantised base weight (device and dtype of `weight`), lora_A (r, in) and lora_B (out, r).
    """
    if not is_bnb_available():
        raise ValueError("bitsandbytes is not available, please install it to use LoftQ.")
    if num_bits not in (4, 8):
        raise ValueError(f"Only nf4 and int8 quantization is supported, so `num_bits` is 4 or 8, got {num_bits}")
    if num_iter <= 0:
        raise ValueError(f"Number of iterations must be greater than 0, got {num_iter}")
    if num_bits == 4 and not is_bnb_4bit_available():
        raise RuntimeError("4bit LoftQ needs a bitsandbytes with nf4 support, please install a recent version.")

    device = _accelerator()
    target = weight.to(device=device, dtype=torch.float32)
    low_rank = torch.zeros_like(target)
    for _ in range(num_iter):
        _free_unused_memory(device)
        quantized = _quantize_and_back(target - low_rank, num_bits, device)
        parts = _low_rank_decomposition(target - quantized, reduced_rank=reduced_rank)
        low_rank = parts["L"] @ parts["R"]
    return quantized.to(device=weight.device, dtype=weight.dtype), parts["R"], parts["L"]


@torch.no_grad()
def _loftq_init_new(
    qweight: nn.Parameter, weight: torch.Tensor, num_bits: int, reduced_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B that approximate `weight` minus the already quantised 4-bit `qweight`."""
    import bitsandbytes as bnb

    if num_bits != 4:
        raise ValueError(f"Only 4 bit quantization supported at the moment, got {num_bits} bits.")
    if not is_bnb_4bit_available():
        raise ValueError("bitsandbytes 4bit quantization is not available.")
    device = _accelerator()
    quantized = bnb.functional.dequantize_4bit(qweight.data, qweight.quant_state)
    error = weight.to(device=device, dtype=torch.float32) - quantized
    _free_unused_memory(device)
    parts = _low_rank_decomposition(error, reduced_rank=reduced_rank)
    return parts["R"], parts["L"]


class _SafetensorLoader:
    """Reads single tensors of the base model from its safetensors file, whole or in shards.

    Args:
        peft_model: The PEFT model; without `model_path` its base model's name is looked up in the local hub cache.
        model_path: The file, or the directory that has `model.safetensors` or its index.
    """

    def __init__(self, peft_model: nn.Module, model_path: str | None):
        if model_path is None:
            model_path = self._find_in_cache(peft_model)
        file_name = "model.safetensors"
        if not model_path.endswith(file_name):
            model_path = os.path.join(model_path, file_name)
        self.model_path = model_path
        self.base_model_prefix = getattr(peft_model.get_base_model(), "base_model_prefix", None)
        self.prefix = "base_model.model."
        # file of each tensor, if there are shards
        self.weight_map: dict[str, str] | None = None
        if not os.path.exists(model_path):
            self.weight_map = self._read_index(model_path)
        self.is_sharded = self.weight_map is not None

    @staticmethod
    def _find_in_cache(peft_model: nn.Module) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return snapshot_download(peft_model.base_model.config._name_or_path, local_files_only=True)
        except (AttributeError, HFValidationError) as exc:
            raise ValueError(
                "The provided model does not appear to be a transformers model or is a local model. In this case, "
                "you must pass the model_path argument that points to the safetensors file."
            ) from exc
        except LocalEntryNotFoundError as exc:
            raise ValueError("The model.safetensors file must be present on disk, but it could not be found.") from exc

    @staticmethod
    def _read_index(model_path: str) -> dict[str, str]:
        import json

        folder = os.path.dirname(model_path)
        try:
            with open(f"{model_path}.index.json", encoding="utf-8") as file:
                weight_map = json.load(file)["weight_map"]
        except OSError as exc:
            raise FileNotFoundError(
                f"Could not find file for {model_path}, ensure that there is a safetensors file or an index of shards."
            ) from exc
        return {name: os.path.join(folder, shard) for name, shard in weight_map.items()}

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU; files of a bare base model have names without its `base_model_prefix`."""
        from safetensors import SafetensorError, safe_open

        path = self.model_path if self.weight_map is None else self.weight_map[name]
        with safe_open(path, framework="pt", device="cpu") as file:
            try:
                return file.get_tensor(name)
            except SafetensorError:
                if not self.base_model_prefix:
                    raise
                return file.get_tensor(name[len(self.base_model_prefix) + 1 :])


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replace the LoRA weights of a 4-bit (bitsandbytes) model by LoftQ's, read from the float checkpoint on disk.

    Args:
        peft_model: The model, with LoRA layers on 4-bit ones.
        model_path: The base model's safetensors file or its directory; by default looked up from the model's name.
        adapter_name: The adapter whose weights are replaced.
        callback: Called with the model and the layer's name after each replacement. If it returns False, the layer
            gets its old weights back. Use it to keep only what lowers the error; repeated calls may improve further.

    Raises:
        ValueError: without bitsandbytes, or if no layer is a LoRA layer on a 4-bit one.
        TypeError: if the model is no PeftModel.
    """
    if not is_bnb_4bit_available():
        raise ValueError("bitsandbytes must be installed and the model must be quantized in 4bits.")
    from ..tuners.lora import Linear4bit

    loader = _SafetensorLoader(peft_model, model_path)
    layers = [(name, module) for name, module in peft_model.named_modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ValueError("No bnb LoRA module found on the model")
    if not all(name.startswith(loader.prefix) for name, _ in layers):
        raise TypeError("The passed model does not appear to be a valid PeftModel")

    for full_name, module in layers:
        name = full_name.removeprefix(loader.prefix)
        params = (module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight)
        before = [param.data for param in params]
        weight = loader.get_tensor(f"{name}.weight")
        after = _loftq_init_new(module.weight, weight, num_bits=4, reduced_rank=module.r[adapter_name])
        for param, data in zip(params, after, strict=True):
            param.data = data
        if callback is not None and not callback(peft_model, name):
            for param, data in zip(params, before, strict=True):
                param.data = data
