"""Arrow routing (https://arxiv.org/abs/2405.11157) and GenKnowSub over the LoRA adapters of a model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import ArrowConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
ROUTER_ADAPTER = "arrow_router"


class ArrowLoraLinearLayer(nn.Module):
    """The router of one linear layer: which experts each token goes to, and their weighted output.

    An expert's prototype is the leading right singular vector of its update B A; a token's similarity to the expert is
    the absolute inner product with it. Prototypes are made lazily, and again after the set of experts has changed.
    """

    def __init__(self, in_features: int, arrow_config: ArrowConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.top_k = arrow_config.top_k
        self.temperature = arrow_config.router_temperature
        self.rng_seed = arrow_config.rng_seed
        self.task_adapter_names = arrow_config.task_adapter_names.copy()
        self.gks_adapter_names = arrow_config.gks_adapter_names
        self.use_gks = arrow_config.use_gks
        self.gks_done = False
        self.gks_added_adapter_names: list[str] = []
        self.cast_input_dtype_enabled = True
        self._protos_ready = False

    def on_adapter_change(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> None:
        """Take note of added and removed experts: every adapter but the router and `gks_<number>`."""

        def is_expert(name: str) -> bool:
            general = name.startswith(GKS_ADAPTER_PREFIX) and name[len(GKS_ADAPTER_PREFIX) :].isdigit()
            return name in lora_B and name != ROUTER_ADAPTER and not general

        experts = [name for name in lora_A if is_expert(name)]
        if set(experts) == set(self.task_adapter_names):
            return
        if len(experts) > len(self.task_adapter_names):
            self.gks_added_adapter_names = [name for name in experts if name not in self.task_adapter_names]
        self.task_adapter_names = experts
        self._protos_ready = False

    def top_right_singular_vec_from_BA(
        self, A: torch.Tensor, B: torch.Tensor, iters: int = 15, eps: float = 1e-8
    ) -> torch.Tensor:
        """The leading right singular vector (in,) of B A in fp32, up to sign, by power iteration with A^T B^T B A."""
        A, B = A.float(), B.float()
        gram = B.T @ B
        generator = None
        if self.rng_seed is not None:
            generator = torch.Generator(device=A.device.type)
            generator.manual_seed(int(self.rng_seed))
        v = torch.randn(A.size(1), dtype=A.dtype, device=A.device, generator=generator)
        v = v / (v.norm() + eps)
        for _ in range(iters):
            v = A.T @ (gram @ (A @ v))
            v = v / (v.norm() + eps)
        return v

    @torch.no_grad()
    def build_prototypes(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> None:
        """Set the buffer `prototypes` (experts, in), unless it is up to date."""
        if self._protos_ready:
            return
        weights = [(lora_A[name].weight, lora_B[name].weight) for name in self.task_adapter_names]
        prototypes = torch.stack([self.top_right_singular_vec_from_BA(A, B).to(A.dtype) for A, B in weights])
        self.register_buffer("prototypes", prototypes, persistent=False)
        self._protos_ready = True

    @torch.no_grad()
    def gen_know_sub(self, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict) -> None:
        """Subtract the mean of the general adapters' factors from those experts it was not subtracted from yet."""
        names = self.gks_added_adapter_names if self.gks_done else self.task_adapter_names
        if not self.use_gks or not names:
            return
        for factors in (lora_A, lora_B):
            mean = torch.stack([factors[name].weight for name in self.gks_adapter_names]).mean(0)
            for name in names:
                factors[name].weight.data.sub_(mean)
        self.gks_done = True
        self.gks_added_adapter_names = []

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """x in the given type, unless casting is disabled (`helpers.disable_input_dtype_casting`)."""
        return x.to(dtype) if x is not None and self.cast_input_dtype_enabled else x

    def forward(
        self, x: torch.Tensor, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict, dropout: nn.Module, scaling: dict
    ) -> torch.Tensor:
        """The experts' share of the output, (..., out) for x (..., in); `scaling` is the layer's dict."""
        names = self.task_adapter_names
        x = self._cast_input_dtype(x, lora_A[names[0]].weight.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        similarity = (tokens @ self.prototypes.T).abs()  # (tokens, experts)
        best, index = similarity.topk(self.top_k, dim=1)
        score = torch.full_like(similarity, float("-inf")).scatter(1, index, best)
        share = torch.softmax(score / self.temperature, dim=1)
        share = share * torch.tensor([scaling[name] for name in names], device=x.device, dtype=share.dtype)
        A = torch.stack([lora_A[name].weight for name in names])  # (experts, r, in)
        B = torch.stack([lora_B[name].weight for name in names])  # (experts, out, r)
        # the shares act on the narrow side, so that no (tokens, experts, out) tensor is made
        narrow = torch.einsum("tf,erf->ter", tokens, A) * share.unsqueeze(-1)
        delta = torch.einsum("ter,eor->to", narrow, B)
        return dropout(delta).view(*x.shape[:-1], -1)


def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: list[str]) -> tuple[list[str], int]:
    """The target module names (last parts, sorted) and the rank that all given adapters share.

    ValueError names the first adapter whose rank, shapes or targets differ from the first one's.
    """
    reference: dict[str, Any] = {}
    for name in adapter_names:
        found: dict[str, Any] = {"rank": None, "shape": None, "target_modules": set()}
        for path, module in model.named_modules():
            if name in getattr(module, "lora_A", ()):
                A, B = module.lora_A[name].weight, module.lora_B[name].weight
                found.update(rank=A.shape[0], shape=(tuple(A.shape), tuple(B.shape)))
                found["target_modules"].add(path.rpartition(".")[2])
        reference = reference or found
        for what, value in found.items():
            if value != reference[what]:
                raise ValueError(
                    f"[{name}] {what} mismatch: {_show(value)} != {_show(reference[what])} of [{adapter_names[0]}]"
                )
    return sorted(reference["target_modules"]), int(reference["rank"])


def _show(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def ensure_adapters_target_linear_layers_only(model: nn.Module, adapter_names: list[str]) -> None:
    """TypeError that lists every layer with one of the adapters that is not linear-like: nn.Linear, nn.Conv1d,
    transformers' Conv1D or bitsandbytes' Linear4bit."""
    allowed: tuple[type, ...] = (nn.Linear, nn.Conv1d)
    # an instance of these can only exist if its module was imported
    for module_name, cls in (("bitsandbytes.nn", "Linear4bit"), ("transformers.pytorch_utils", "Conv1D")):
        if module_name in sys.modules:
            allowed += (getattr(sys.modules[module_name], cls),)
    offenders = []
    for path, module in model.named_modules():
        for name in adapter_names:
            if name in getattr(module, "lora_A", ()):
                layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
                if not isinstance(layer, allowed):
                    offenders.append(f"  - adapter '{name}' on module '{path}' of type {type(layer).__name__}")
    if offenders:
        raise TypeError(
            "LoRA adapters must only target Linear-like layers (nn.Linear, nn.Conv1d, HF Conv1D, or "
            "bitsandbytes.nn.Linear4bit). Found:\n" + "\n".join(offenders)
        )


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """Split into model id and subfolder: a local folder is taken whole, "user/repo/a/b" is ("user/repo", "a/b").

    ValueError for a local folder without an adapter.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ValueError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return path, None
    parts = path.strip("/").split("/")
    if len(parts) < 2:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def create_arrow_model(
    base_model: PreTrainedModel,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
):
    """Load trained LoRA adapters as experts and add the router, which becomes the active adapter.

    Args:
        base_model: The model the adapters were trained on.
        task_specific_adapter_paths: Folders or Hub ids ("user/repo" or "user/repo/subfolder") of the experts. They
            become "task_0", "task_1", ...
        arrow_config: Options of the routing; its adapter names are filled in.
        general_adapter_paths: Adapters whose mean is subtracted from the experts if `arrow_config.use_gks`. They
            become "gks_0", ...
        adapter_kwargs: Passed on to `PeftModel.from_pretrained` and `load_adapter`.

    Returns:
        The `PeftModel`.

    Raises:
        ValueError: if a list that is needed is empty, or the adapters differ in rank, shapes or targets.
        TypeError: if an adapter targets something other than linear layers.
    """
    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    from peft_c.peft_model import PeftModel

    from .config import LoraConfig

    general = general_adapter_paths if arrow_config.use_gks else []
    tasks = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    generals = {f"{GKS_ADAPTER_PREFIX}{i}": path for i, path in enumerate(general)}
    model = None
    for name, path in {**tasks, **generals}.items():
        model_id, subfolder = _resolve_adapter_source(path)
        kwargs = {**({} if subfolder is None else {"subfolder": subfolder}), **adapter_kwargs}
        if model is None:
            model = PeftModel.from_pretrained(base_model, model_id=model_id, adapter_name=name, **kwargs)
        else:
            model.load_adapter(model_id=model_id, adapter_name=name, **kwargs)
    arrow_config.task_adapter_names = list(tasks)
    arrow_config.gks_adapter_names = list(generals)

    names = [*tasks, *generals]
    target_modules, r = check_loaded_lora_compatibility_arrow(model, adapter_names=names)
    ensure_adapters_target_linear_layers_only(model, adapter_names=names)
    router = LoraConfig(arrow_config=arrow_config, target_modules=target_modules, r=r)
    model.add_adapter(adapter_name=ROUTER_ADAPTER, peft_config=router)
    model.set_adapter(ROUTER_ADAPTER)
    return model
