"""VeLoRA's projection (https://arxiv.org/abs/2405.17991): what is kept of the inputs for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _get_group_dim(in_features: int, num_groups: int) -> int:
    """Features per group, rounded up."""
    return -(-in_features // num_groups)


def _reshape_to_grouped_subtokens(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(..., in) -> (tokens, num_groups, group_dim), zero-padded at the end where the groups do not come out even."""
    group_dim = _get_group_dim(x.shape[-1], num_groups)
    missing = num_groups * group_dim - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, num_groups, group_dim)


def _compress_activations(x: torch.Tensor, embed: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(..., in) -> (tokens, num_groups): the component of each group along `embed` (group_dim,)."""
    return _reshape_to_grouped_subtokens(x, num_groups) @ embed


def _reconstruct_activations(
    compressed: torch.Tensor, embed: torch.Tensor, in_features: int, velora_scale: float
) -> torch.Tensor:
    """(tokens, num_groups) -> (tokens, in): the compressed components times `embed`, padding removed, scaled."""
    return torch.einsum("tg,d->tgd", compressed, embed).flatten(1)[:, :in_features] * velora_scale


def _normalize_projection(embed: torch.Tensor) -> torch.Tensor:
    """`embed` in fp32 with length 1; a zero vector becomes the diagonal direction."""
    embed = embed.float()
    embed = torch.where(torch.linalg.vector_norm(embed) == 0, torch.ones_like(embed), embed)
    return embed / torch.linalg.vector_norm(embed)


class VeloraFunction(torch.autograd.Function):
    """`F.linear(input, weight, bias)` whose weight gradient comes from compressed, reconstructed inputs."""

    @staticmethod
    def forward(ctx, input, weight, bias, embed, num_groups: int, velora_scale: float) -> torch.Tensor:
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
        ctx.velora_scale = velora_scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(_compress_activations(input, embed.to(input.dtype), num_groups), weight, embed)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        compressed, weight, embed = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ weight.to(grad.dtype)).reshape(ctx.input_shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            inputs = _reconstruct_activations(
                compressed.to(grad.dtype), embed.to(grad.dtype), ctx.input_shape[-1], ctx.velora_scale
            )
            grad_weight = (grad.T @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None
