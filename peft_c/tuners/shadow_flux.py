"""ShadowPEFT for Flux2 models of diffusers: a shadow of fewer, narrower layers, cut out of the base's weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

_EMBEDDINGS = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
_STACKS = ("transformer_blocks", "single_transformer_blocks")
# where weights have several parts in their rows or columns: ending of the key -> the parts' sizes (hidden: H, MLP: M)
_PARTS = {
    ".attn.to_qkv_mlp_proj.weight": ("HHHMM", "H"),
    ".attn.to_out.weight": ("H", "HM"),
    "double_stream_modulation_img.linear.weight": ("HHHHHH", "H"),
    "double_stream_modulation_txt.linear.weight": ("HHHHHH", "H"),
    "single_stream_modulation.linear.weight": ("HHH", "H"),
    "norm_out.linear.weight": ("HH", "H"),
    ".ff.linear_in.weight": ("MM", "H"),
    ".ff_context.linear_in.weight": ("MM", "H"),
}


def _width(config: Any) -> int:
    return int(config.num_attention_heads) * int(config.attention_head_dim)


class _Shared(nn.Module):
    """Another model's module, called but not owned."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]

    @property
    def shared_module(self) -> nn.Module:
        return self._module[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_module":
                raise
            return getattr(self.shared_module, name)


class Sizes(NamedTuple):
    """A size in the base model and in its shadow."""

    base: int
    shadow: int


def _cut(source: torch.Tensor, dim: int, parts: list[Sizes]) -> torch.Tensor:
    """The beginning of each part of a dimension."""
    pieces, start = [], 0
    for base, shadow in parts:
        pieces.append(source.narrow(dim, start, shadow))
        start += base
    return torch.cat(pieces, dim=dim)


def _reduced(key: str, source: torch.Tensor, shape: torch.Size, sizes: dict[str, Sizes]) -> torch.Tensor:
    """The weight called `key` of a shadow, of that shape, from the base model's; ValueError if it has no such part."""
    parts = next((parts for ending, parts in _PARTS.items() if f".{key}".endswith(ending)), None)
    if source.shape == shape:
        return source.clone()
    if parts is not None and source.ndim == len(parts):
        for dim, names in enumerate(parts):
            source = _cut(source, dim, [sizes[name] for name in names])
    else:
        source = source[tuple(slice(0, size) for size in shape)] if source.ndim == len(shape) else source
    if source.shape != shape:
        raise ValueError(f"Flux shadow tensor '{key}' of shape {tuple(shape)} cannot be cut from the base model's.")
    return source.clone()


def _spread(total: int, count: int) -> list[int]:
    """`count` of `total` layers, evenly spread, the last one among them."""
    if not 1 <= count <= total:
        raise ValueError(f"The reduced Flux shadow needs between 1 and {total} layers, got {count}.")
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _heads(config: Any, hidden_size: int | None, heads: int | None) -> int:
    """The number of a shadow's heads, which are as large as the base model's."""
    size, most = int(config.attention_head_dim), int(config.num_attention_heads)
    if hidden_size is not None and heads is not None and hidden_size != heads * size:
        raise ValueError(
            "A pretrained-initialized Flux2 shadow must preserve the base attention head dimension: expected "
            f"shadow_hidden_size == shadow_num_attention_heads * {size}, got {hidden_size} and {heads}."
        )
    if hidden_size is not None and hidden_size % size:
        raise ValueError(f"`shadow_hidden_size` ({hidden_size}) must be divisible by the head dimension ({size}).")
    count = heads if heads is not None else most if hidden_size is None else hidden_size // size
    if not 1 <= count <= most:
        raise ValueError(f"`shadow_num_attention_heads` must be between 1 and the base model's {most}, got {count}.")
    return count


class DetachedFluxShadowModel(nn.Module):
    """A Flux2 model as a shadow: its single-stream blocks compute the shadow of the blocks' input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    @classmethod
    @torch.no_grad()
    def from_base(
        cls,
        base_model: nn.Module,
        *,
        num_layers: int,
        num_single_layers: int,
        share_embeddings: bool,
        hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
    ) -> DetachedFluxShadowModel:
        """A shadow of so many layers and these sizes (None: the base model's) with weights cut from `base_model`."""
        config = base_model.config
        chosen = {
            stack: _spread(len(getattr(base_model, stack)), count)
            for stack, count in zip(_STACKS, (num_layers, num_single_layers), strict=True)
        }
        heads = _heads(config, hidden_size, num_attention_heads)
        hidden = Sizes(_width(config), heads * int(config.attention_head_dim))
        most = int(hidden.base * float(config.mlp_ratio))
        mlp = Sizes(most, most if intermediate_size is None else int(intermediate_size))
        if not 1 <= mlp.shadow <= most:
            raise ValueError(f"`shadow_intermediate_size` must be between 1 and the base model's {most}.")
        counts = {"num_layers": num_layers, "num_single_layers": num_single_layers, "num_attention_heads": heads}
        reduced = type(base_model).from_config({**config, **counts, "mlp_ratio": mlp.shadow / hidden.shadow})
        sizes = {"H": hidden, "M": mlp}
        blocks = {}
        for stack, sources in chosen.items():
            for i, source in enumerate(sources):
                block = getattr(base_model, stack)[source]
                blocks[f"{stack}.{i}"] = getattr(block, "base_layer", block)
        for key, target in reduced.state_dict().items():
            block = ".".join(key.split(".")[:2])
            owner, name = (blocks[block], key.removeprefix(f"{block}.")) if block in blocks else (base_model, key)
            path, _, leaf = name.rpartition(".")
            target.copy_(_reduced(key, getattr(owner.get_submodule(path), leaf), target.shape, sizes))
        if share_embeddings and hidden.base == hidden.shadow:
            for name in _EMBEDDINGS:
                if isinstance(getattr(base_model, name, None), nn.Module):
                    setattr(reduced, name, _Shared(getattr(base_model, name)))
        if getattr(base_model, "gradient_checkpointing", False):
            reduced.enable_gradient_checkpointing()
        return cls(reduced)

    def forward(self, inputs_embeds: torch.Tensor, block_kwargs: dict[str, Any] | None = None, **_: Any) -> Any:
        """The shadow (`last_hidden_state`) of a block's input, given the block's other arguments."""
        given, width = block_kwargs or {}, _width(self.config)
        if inputs_embeds.shape[-1] < width:
            raise ValueError(
                f"The Flux shadow received hidden size {inputs_embeds.shape[-1]}, smaller than its {width}."
            )
        text, modulation = given.get("encoder_hidden_states"), given.get("temb_mod")
        if modulation is not None:
            modulation = _cut(modulation, -1, [Sizes(modulation.shape[-1] // 3, width)] * 3)
        hidden = inputs_embeds[..., :width]
        for block in self.model.single_transformer_blocks:
            hidden = block(
                hidden_states=hidden,
                encoder_hidden_states=None if text is None else text[..., :width],
                temb_mod=modulation,
                image_rotary_emb=given.get("image_rotary_emb"),
                joint_attention_kwargs=given.get("joint_attention_kwargs"),
            )
        return SimpleNamespace(last_hidden_state=hidden)


_SAME = "in_channels out_channels joint_attention_dim timestep_guidance_channels attention_head_dim".split()
_SAME += ["axes_dims_rope", "guidance_embeds"]


class Flux2ShadowBackend:
    """What `shadow_backbone` asks for."""

    @staticmethod
    def mirror(model: nn.Module, config: Any) -> DetachedFluxShadowModel:
        """A shadow of the sizes in a ShadowConfig."""
        layers = config.shadow_num_hidden_layers or 1
        return DetachedFluxShadowModel.from_base(
            model,
            num_layers=layers,
            num_single_layers=2 * layers,
            share_embeddings=config.share_embeddings,
            hidden_size=config.shadow_hidden_size,
            num_attention_heads=config.shadow_num_attention_heads,
            intermediate_size=config.shadow_intermediate_size,
        )

    @staticmethod
    def load(model: nn.Module, path: str) -> DetachedFluxShadowModel:
        """A pretrained shadow; ValueError if it does not fit the base model."""
        from diffusers import Flux2Transformer2DModel

        shadow = Flux2Transformer2DModel.from_pretrained(path)
        plain = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
            for config in (dict(model.config), dict(shadow.config))
        ]
        for name in _SAME:
            base, own = (config.get(name) for config in plain)
            if base != own:
                raise ValueError(
                    f"The pretrained Flux2 shadow has incompatible `{name}`: expected {base!r}, got {own!r}."
                )
        sizes = [
            {
                **{name: int(c[name]) for name in ("num_attention_heads", "num_layers", "num_single_layers")},
                "hidden size": c["num_attention_heads"] * c["attention_head_dim"],
                "intermediate size": int(c["num_attention_heads"] * c["attention_head_dim"] * float(c["mlp_ratio"])),
            }
            for c in plain
        ]
        for name, most in sizes[0].items():
            if not 1 <= sizes[1][name] <= most:
                raise ValueError(
                    f"The pretrained Flux2 shadow `{name}` must be between 1 and the base value {most}, got "
                    f"{sizes[1][name]}."
                )
        return DetachedFluxShadowModel(shadow)

    @staticmethod
    def block_inputs(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `DetachedFluxShadowModel.forward` from those of a block, which may be positional."""
        names = ("encoder_hidden_states", "temb_mod", "image_rotary_emb", "joint_attention_kwargs")
        return {"block_kwargs": {**dict(zip(names, args[1:], strict=False)), **kwargs}}

    @staticmethod
    def freeze_embeddings(backbone: nn.Module) -> None:
        """Freeze what embeds inputs and conditions."""
        for name in _EMBEDDINGS:
            module = getattr(backbone.model, name, None)
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
