"""The layer of trainable tokens: an embedding (or a linear layer tied to one) some of whose rows are exchanged."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.integrations import check_deepspeed_zero3_enabled, gather_params_ctx
from .._buffer_dict import BufferDict
from ..tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from .config import TrainableTokensConfig


class TrainableTokensLayer(nn.Module, BaseTunerLayer):
    """Trains `trainable_tokens_delta[adapter]` (tokens, dim), which take the place of rows `token_indices[adapter]`.

    Rows are exchanged rather than added to, so the result is defined even if the embedding was resized, and the new
    rows initialised at random again, between training and loading. Merging writes the rows into the weight in place;
    unmerging writes back the very rows that stood there.

    Args:
        base_layer: The embedding, weight (vocabulary, dim), or a linear layer with the tied weight (vocabulary, dim).
        adapter_name: Name of the active adapter; `update_layer` gives it rows.
        config: Not used, `update_layer` takes it.
        tied_adapter: The layer of the embedding that this one is tied to. Its rows are used and none are kept here.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: TrainableTokensConfig | dict | None = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self.kwargs = kwargs
        self.merged_adapters: list[str] = []
        # in a list, so that it is no submodule and its rows are in the state dict once
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        if tied_adapter is None:
            self.trainable_tokens_delta = nn.ParameterDict({})
            self.trainable_tokens_original = BufferDict({})
            self.token_indices: dict[str, list[int]] = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
            self.token_indices = tied_adapter.token_indices
        # adapter: [rows of the weight before it was merged, number of layers that have it merged]
        self._replaced_rows: dict[str, list] = {}
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows this one uses, or None."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def _collect_token_weights(self, weight: torch.Tensor, rows: list[int], embed_dim: int) -> torch.Tensor:
        """The rows of a weight that DeepSpeed ZeRO-3 has sharded: gathered on the first rank, sent to the others."""
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device())
        with gather_params_ctx([weight], modifier_rank=None):
            if dist.is_available() and dist.is_initialized() and dist.get_rank() == 0:
                token_weights = weight[rows].clone()
            else:
                token_weights = torch.empty((len(rows), embed_dim), dtype=weight.dtype, device=device)
        dist.broadcast(token_weights, src=0)
        return token_weights

    def update_layer(
        self,
        adapter_name: str,
        config: TrainableTokensConfig | None = None,
        tied_adapter: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or start it anew; a tied layer has nothing to do.

        Args:
            adapter_name: Its name.
            config: Its config; without one, pass `token_indices` and, optionally, `init_weights` as keywords.
            tied_adapter: The layer this one is tied to.

        Raises:
            IndexError: for tokens that the embedding does not have.
        """
        if tied_adapter is not None or self.tied_adapter is not None:
            return
        token_indices = kwargs["token_indices"] if config is None else config.token_indices
        init_weights = kwargs.get("init_weights", True) if config is None else config.init_weights

        base_layer = self.get_base_layer()
        weight = base_layer.weight
        # a linear layer calls the width in_features
        embed_dim = getattr(base_layer, "embedding_dim", None) or base_layer.in_features
        if check_deepspeed_zero3_enabled():
            originals = self._collect_token_weights(weight, token_indices, embed_dim)
        else:
            outside = [index for index in token_indices if not 0 <= index < weight.shape[0]]
            if outside:
                raise IndexError(
                    f"Token indices {outside} of adapter {adapter_name} are out of bounds for an embedding with "
                    f"{weight.shape[0]} tokens."
                )
            originals = weight[token_indices]
        if init_weights:
            values = originals
        else:
            values = torch.randn((len(token_indices), embed_dim), dtype=weight.dtype, device=weight.device)

        self.token_indices[adapter_name] = token_indices
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(values.detach().clone(), requires_grad=True)
        self.trainable_tokens_original[adapter_name] = originals.detach().clone()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _check_overlapping_tokens(self, adapter_names: list[str]) -> None:
        """ValueError if one token is trained by two of the adapters, those that are merged included."""
        names = list(dict.fromkeys([*self.merged_adapters, *adapter_names]))
        taken: set[int] = set()
        for name in names if len(names) > 1 else ():
            indices = set(self.token_indices[name])
            if taken & indices:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    f"behavior: {sorted(taken & indices)} are trained by more than one of {names}. "
                    "Only disjunct token indices are currently supported."
                )
            taken |= indices

    def _index(self, adapter_name: str) -> torch.Tensor:
        return torch.tensor(self.token_indices[adapter_name], dtype=torch.long, device=self.base_layer.weight.device)

    def _records(self) -> dict[str, list]:
        """Where replaced rows are kept: with the embedding if the weight is really shared with it, else here."""
        tied = self.tied_adapter
        shared = tied is not None and tied.base_layer.weight is self.base_layer.weight
        return tied._replaced_rows if shared else self._replaced_rows

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows of the adapters (default: the active ones) into the base weight, in place.

        With `safe_merge`, ValueError if a row is not finite. ValueError if adapters overlap. In any error nothing has
        been written.
        """
        asked = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in asked if name in self.trainable_tokens_delta]
        if not adapter_names:
            return
        self._check_overlapping_tokens(adapter_names)
        weight = self.base_layer.weight
        if weight.is_meta:
            raise ValueError("Cannot merge trainable tokens into an embedding that is on the meta device.")
        rows = {name: self.trainable_tokens_delta[name].to(weight) for name in adapter_names}
        for name in adapter_names if safe_merge else ():
            if not torch.isfinite(rows[name]).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

        records = self._records()
        for name in adapter_names:
            index = self._index(name)
            if name not in records:
                records[name] = [weight[index].clone(), 0]
            records[name][1] += 1
            weight.index_copy_(0, index, rows[name])
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write back, in place, the rows that merging has replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        weight = self.base_layer.weight
        records = self._records()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight.index_copy_(0, self._index(name), self._rows_before(name).to(weight))
            if name in records:
                records[name][1] -= 1
                if records[name][1] <= 0:
                    del records[name]

    def _rows_before(self, adapter_name: str) -> torch.Tensor:
        record = self._records().get(adapter_name)
        return self.trainable_tokens_original[adapter_name] if record is None else record[0]

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """The weight (vocabulary, dim) with the rows of the adapters in place; a tensor that autograd sees through."""
        weight = self.base_layer.weight
        for name in active_adapters:
            if name in self.token_indices:
                weight = weight.index_copy(0, self._index(name), self.trainable_tokens_delta[name].to(weight))
        return weight

    def _base_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer does, with another weight."""
        base_layer = self.base_layer
        if isinstance(base_layer, nn.Embedding):
            options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
            result = F.embedding(x, weight, **{name: getattr(base_layer, name) for name in options})
            # some architectures multiply in their embedding's forward
            scale = self._get_embed_scale()
            return result if scale is None else result * scale.to(result.dtype)
        if isinstance(base_layer, nn.Linear):
            return F.linear(x, weight, base_layer.bias)
        raise ValueError(
            "TrainableTokensLayer wraps an unknown layer type, maybe you are targeting the wrong layer? "
            f"Expected an embedding or a linear layer tied to one, got {type(base_layer)}."
        )

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward with these adapters; extra arguments reach the base layer only if it runs itself."""
        if self.disable_adapters or not active_adapters:
            if self.merged:
                weight = self.base_layer.weight
                for name in self.merged_adapters:
                    weight = weight.index_copy(0, self._index(name), self._rows_before(name).to(weight))
                return self._base_forward(x, weight)
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        self._check_overlapping_tokens([name for name in active_adapters if name in self.token_indices])
        return self._base_forward(x, self.get_merged_weights(active_adapters))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward with the active adapters."""
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)
