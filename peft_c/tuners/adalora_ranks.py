"""AdaLoRA's allocation of ranks: the importance of directions, averaged over training, and the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..utils.integrations import full_gradient

if TYPE_CHECKING:
    from .adalora import AdaLoraConfig


class RankAllocator:
    """Shrinks the ranks of an adapter's layers by setting elements of E to zero, those of the least importance.

    The importance of a direction is that of its element of E plus the mean ones of its row of A and column of B; that
    of a weight is the averaged |weight * gradient| times its averaged deviation. All layers share the budget.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        self.peft_config, self.adapter_name = peft_config, adapter_name
        self.beta1, self.beta2 = peft_config.beta1, peft_config.beta2
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"`beta1` and `beta2` have to be between 0 and 1, got {self.beta1} and {self.beta2}.")
        self.reset_ipt()
        self._set_budget_scheduler(model)

    def _set_budget_scheduler(self, model: nn.Module) -> None:
        """Count the directions there are, and those that are to be left."""
        sizes = {name.replace("lora_A", "%s"): len(A) for name, A in self._parameters(model, "lora_A")}
        self.name_set = sorted(sizes)
        self.init_bgt = sum(sizes.values())
        self.target_bgt = self.peft_config.target_r * len(sizes)

    def _parameters(self, model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
        part = f"{kind}.{self.adapter_name}"
        return ((name, parameter) for name, parameter in model.named_parameters() if part in name)

    def set_total_step(self, total_step: int) -> None:
        """Change the length of the training."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget all importance."""
        self.ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_unc: dict[str, torch.Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """The sum of all ranks at a step, and whether ranks are to be allotted in it."""
        config = self.peft_config
        end = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.init_bgt, False
        if step > end:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (end - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Take the gradients of this step into the averages; parameters without one are left out."""
        for name, parameter in (item for kind in "EAB" for item in self._parameters(model, f"lora_{kind}")):
            grad = full_gradient(parameter)
            if grad is None:
                continue
            ipt = self.ipt[name] = (parameter * grad).abs()
            zeros = torch.zeros_like(ipt)
            average = self.beta1 * self.exp_avg_ipt.get(name, zeros) + (1 - self.beta1) * ipt
            self.exp_avg_ipt[name] = average
            uncertainty = self.exp_avg_unc.get(name, zeros)
            self.exp_avg_unc[name] = self.beta2 * uncertainty + (1 - self.beta2) * (ipt - average).abs()

    def _element_score(self, n: str) -> torch.Tensor:
        """The importance of each element of the parameter called `n`."""
        return self.exp_avg_ipt[n] * self.exp_avg_unc[n]

    def _combine_ipt(self, ipt_E: torch.Tensor, ipt_AB: torch.Tensor) -> torch.Tensor:
        """The importance of each direction (r): of its element of E, and of A and B, a column (r, 1) each."""
        return ipt_E.view(-1) + ipt_AB.sum(dim=1)

    def _scores(self, name: str) -> torch.Tensor:
        """The importance of each direction (r) of the layer whose parameter E is called `name`."""
        A, B = (self._element_score(name.replace("lora_E", kind)) for kind in ("lora_A", "lora_B"))
        return self._combine_ipt(self._element_score(name), torch.stack([A.mean(dim=1), B.mean(dim=0)], dim=1))

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Zero all but the `budget` most important elements of all E. Which are left, by name of E."""
        parameters = dict(self._parameters(model, "lora_E"))
        scores = {name: self._scores(name) for name in parameters}
        surplus = self.init_bgt - budget
        threshold = torch.cat(list(scores.values())).kthvalue(surplus)[0].item() if surplus > 0 else float("-inf")
        for name, E in parameters.items():
            E.masked_fill_((scores[name] <= threshold).view(-1, 1), 0.0)
        return {name: (score > threshold).tolist() for name, score in scores.items()}

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Update importance and, in the steps of the schedule, allot ranks: the budget and the ranks, if allotted."""
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if due or force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool]]) -> None:
        """Zero the elements of E that `rank_pattern` leaves out; its keys may lack the adapter's name."""
        for name, E in self._parameters(model, "lora_E"):
            left = rank_pattern.get(name)
            left = rank_pattern[name.replace(f".{self.adapter_name}", "")] if left is None else left
            E.masked_fill_(~torch.tensor(left, dtype=torch.bool, device=E.device).view(-1, 1), 0.0)
