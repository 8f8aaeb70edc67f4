"""Configuration of LoRA, its variants and its initialisation schemes.

Every field carries its explanation once, as `metadata["help"]`. Two further metadata keys steer
`LoraLayer.resolve_lora_variant`: `is_lora_variant` marks a field that switches a variant on when it is truthy, and
`lora_variants` (on `init_lora_weights`) lists the values that do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from peft_c.config import PeftConfig
from peft_c.utils.peft_types import PeftType


def _opt(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and its help text; a callable default is a factory."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


def _variant(default: Any, help: str) -> Any:
    return _opt(default, help, is_lora_variant=True)


def _get_lora_subconfig(value: Any, config_cls: type) -> Any:
    """Turn what `adapter_config.json` holds for a nested config (a dict, or null) back into `config_cls`.

    Keys that `config_cls.__init__` does not take (fields with `init=False`) are dropped. Raises TypeError when `value`
    is neither None, a dict nor a `config_cls`.
    """
    if value is None or isinstance(value, config_cls):
        return value
    if not isinstance(value, dict):
        raise TypeError(
            f"`{config_cls.__name__}` must be a `{config_cls.__name__}`, a dict, or None, got {type(value).__name__}."
        )
    accepted = {f.name for f in dataclasses.fields(config_cls) if f.init}
    return config_cls(**{key: val for key, val in value.items() if key in accepted})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class LoraRuntimeConfig:
    """Settings that only concern the running process; they are never written to `adapter_config.json`."""

    ephemeral_gpu_offload: bool = _opt(
        False,
        "Move data that lives on the CPU to the accelerator just for one expensive operation, and its result back. "
        "Costs accelerator memory for a moment and saves time when parts of the model are kept on the CPU. At the "
        "moment only the initialisation of DoRA makes use of it.",
    )


@dataclass
class VeloraConfig:
    """VeLoRA (https://arxiv.org/abs/2405.17991): keep compressed activations for the gradient of `lora_A`.

    Raises ValueError for a non-positive `num_groups` or `scale` and for an unknown `init_type`.
    """

    num_groups: int = _opt(
        64,
        "Into how many groups the features of an input are split before each group is reduced to one number. More "
        "groups mean a better reconstruction and more memory.",
    )
    scale: float = _opt(1.0, "Factor on the activations that the backward pass reconstructs.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = _opt(
        "batch_average",
        "Where the projection comes from: 'batch_average' takes the mean sub-token of every training batch, "
        "'batch_average_once' only that of the first batch (cheaper, less exact), 'random' a random direction.",
    )

    def __post_init__(self):
        _require(self.num_groups > 0, f"`num_groups` should be positive, got {self.num_groups}.")
        _require(self.scale > 0, f"`scale` should be positive, got {self.scale}.")
        _require(
            self.init_type in ("batch_average_once", "batch_average", "random"),
            f"Unsupported `init_type` {self.init_type!r}. "
            "Supported values are 'batch_average_once', 'batch_average', and 'random'.",
        )


@dataclass
class LoftQConfig:
    """LoftQ (https://arxiv.org/abs/2310.08659): quantise the base weight and start from its quantisation error."""

    loftq_bits: int = _opt(4, "Bits per weight of the quantised base.")
    loftq_iter: int = _opt(1, "How many times quantisation and low-rank fit alternate.")


@dataclass
class ArrowConfig:
    """Arrow routing (https://arxiv.org/abs/2405.11157) among trained LoRA experts, with optional GenKnowSub
    (https://aclanthology.org/2025.acl-short.54/), which subtracts general knowledge from them first.

    Raises ValueError unless `top_k` and `router_temperature` are positive.
    """

    top_k: int = _opt(3, "How many experts each token is routed to.")
    router_temperature: float = _opt(1.0, "Temperature of the softmax over the selected experts' similarities.")
    use_gks: bool = _opt(False, "Subtract the mean of the general adapters from every expert (GenKnowSub).")
    task_adapter_names: list[str] | None = field(
        default=None, init=False, metadata={"help": "Names of the experts; `create_arrow_model` fills them in."}
    )
    gks_adapter_names: list[str] | None = field(
        default=None, init=False, metadata={"help": "Names of the general adapters; set by `create_arrow_model`."}
    )
    rng_seed: int | None = _opt(None, "Seed of the power iteration's start vector; None draws a fresh one.")

    def __post_init__(self):
        _require(self.top_k > 0, f"`top_k` must be at least 1, got {self.top_k}: top_k cannot be negative.")
        _require(
            self.router_temperature > 0, f"router_temperature must be greater than 0, got {self.router_temperature}."
        )


@dataclass
class BdLoraConfig:
    """BD-LoRA: one LoRA factor is block-diagonal, so that sharded multi-adapter serving needs no extra communication.

    Column-sharded modules (query, key, value, up, gate projections) want a block-diagonal B, row-sharded ones (output
    and down projections) a block-diagonal A; what matters is how the serving engine shards them. Raises ValueError
    when a pattern is in both lists.
    """

    target_modules_bd_a: list[str] | None = _opt(
        None, "Modules whose A is block-diagonal: every module whose name contains one of these strings."
    )
    target_modules_bd_b: list[str] | None = _opt(
        None, "Modules whose B is block-diagonal: every module whose name contains one of these strings."
    )
    nblocks: int = _opt(1, "Number of diagonal blocks; for faster serving, the degree of sharding there.")
    match_strict: bool = _opt(
        True,
        "Demand that every target module matches one of the two lists. Set to False to train plain LoRA on the rest.",
    )

    def __post_init__(self):
        overlap = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        _require(
            not overlap,
            f"Found overlapping modules in target_modules_bd lists: {sorted(overlap)} is in both "
            f"{self.target_modules_bd_a} (A) and {self.target_modules_bd_b} (B).",
        )


@dataclass
class EvaConfig:
    """EVA (https://arxiv.org/abs/2410.07170): A starts from the principal directions of a layer's inputs.

    Raises ValueError for `rho` below 1 and `tau` outside [0, 1].
    """

    rho: float = _opt(
        2.0,
        "How far ranks may be redistributed: no layer gets more than `rho * r`. 1.0 keeps the same rank everywhere.",
    )
    tau: float = _opt(
        0.99, "Cosine similarity between the directions of two consecutive SVD steps at which a layer has converged."
    )
    use_label_mask: bool = _opt(True, "Leave out the positions whose label is `label_mask_value`.")
    label_mask_value: int = _opt(-100, "The label that marks positions to leave out.")
    whiten: bool = _opt(False, "Divide the directions by the square roots of their singular values.")
    adjust_scaling_factors: bool = _opt(
        True, "After the redistribution adapt `lora_alpha` so that every layer keeps the same scaling."
    )

    def __post_init__(self):
        _require(self.rho >= 1.0, f"`rho` must be >= 1.0, got {self.rho}.")
        _require(0.0 <= self.tau <= 1.0, f"`tau` must be between 0.0 and 1.0, got {self.tau}.")


@dataclass
class KasaConfig:
    """KaSA (https://arxiv.org/abs/2412.06071): `delta = scaling * B @ diag(lora_diag) @ A` on a base weight that has
    lost its `r` smallest singular components.

    The truncation of the base weight is permanent: disabling, unloading or unmerging the adapter does not bring the
    original weight back. KaSA adapters therefore share a model with other KaSA adapters only and cannot be converted
    to plain LoRA. The two regularisers of the paper are yours to add to the loss, through `LoraModel._get_kasa_loss`.
    Raises ValueError for negative coefficients.
    """

    beta: float = _opt(
        1e-4, "Coefficient of `sum(lora_diag ** 2)` in `LoraModel._get_kasa_loss` (equations 9 and 10 of the paper)."
    )
    gamma: float = _opt(
        1e-3,
        "Coefficient of `||B^T B - I|| + ||A A^T - I||` in `LoraModel._get_kasa_loss` (equation 11 of the paper).",
    )

    def __post_init__(self):
        for name in ("beta", "gamma"):
            _require(getattr(self, name) >= 0, f"`{name}` must be non-negative, got {getattr(self, name)}.")


@dataclass
class CordaConfig:
    """CorDA (https://arxiv.org/abs/2406.05223): decompose the base weight along the covariance of its inputs."""

    cache_file: str | None = _opt(
        None,
        "File for the decomposition, read if it exists and written otherwise. It is far smaller than a residual model "
        "and, with the original weights, rebuilds one quickly.",
    )
    covariance_file: str | None = _opt(
        None,
        "File for the covariance matrices, read if it exists and written otherwise; useful for several ranks on the "
        "same data. It is about as large as the model.",
    )
    corda_method: Literal["ipm", "kpm"] = _opt(
        "ipm",
        "'ipm' (instruction previewed) adapts the largest components and learns fastest; 'kpm' (knowledge preserved) "
        "adapts the smallest ones and forgets least.",
    )
    verbose: bool = _opt(False, "Show a progress bar.")
    use_float16_for_covariance: bool = _opt(
        False, "Accumulate covariances in the inputs' own (half) precision: half the memory, less stable."
    )
    prune_temporary_fields: bool = _opt(True, "Remove the attributes that preprocessing leaves on the modules.")


_INIT_HELP = (
    "How the LoRA weights start. True: A as in Microsoft's reference implementation and B = 0, so that the adapter is "
    "a no-op at first. False: both random, to debug. 'gaussian': A normal with deviation 1/r, B = 0. 'orthogonal': "
    "A and B orthogonal (linear layers, even `r`). 'olora', 'pissa' and 'pissa_niter_[number of iters]' (with a "
    "randomised SVD): factors of the base weight, which keeps the residual. 'corda' and 'eva': data-driven, see "
    "`corda_config` and `eva_config`. 'lora_ga': from the first gradient, see `lora_ga_config`. 'loftq': the error of "
    "quantising the base weight, see `loftq_config`. 'mica': B from the singular vectors of the base weight with the "
    "smallest singular values and frozen, A = 0 (linear and embedding layers)."
)

_LAYER_REPLICATION_HELP = (
    "Grow the model by repeating ranges of its layers: a list of [start, end) pairs. With five layers, "
    "[[0, 4], [2, 5]] stacks layers 0 1 2 3 2 3 4. Base weights are shared between repetitions, adapters are not. "
    "Works for Llama, Bert and Falcon like models."
)


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of LoRA (https://arxiv.org/abs/2106.09685). What each field does is in its `help` metadata."""

    r: int = _opt(8, "Rank of the update.")
    target_modules: list[str] | str | None = _opt(
        None,
        "Which modules get an adapter: a list of names, of which a module's full name must be one or end in one; a "
        "regular expression for the full name; or 'all-linear' for every linear layer but a transformers model's "
        "output layer. None picks by model architecture and raises if that is unknown. [] targets none, for use with "
        "`target_parameters`.",
    )
    exclude_modules: list[str] | str | None = _opt(
        None, "Modules to leave out although targeted: a list of names (suffixes) or a regular expression."
    )
    lora_alpha: int = _opt(8, "The update is scaled by `lora_alpha / r` (see `use_rslora`).")
    lora_dropout: float = _opt(0.0, "Dropout probability on the input of the adapter.")
    fan_in_fan_out: bool = _opt(
        False, "True if the target stores its weight as (in, out), as GPT-2's Conv1D does. It is detected for Conv1D."
    )
    bias: Literal["none", "all", "lora_only"] = _opt(
        "none",
        "Which biases of the base model are trained: 'none', 'all' or those of the adapted layers ('lora_only'). "
        "Trained biases stay in effect when adapters are disabled.",
    )
    use_rslora: bool = _opt(
        False, "Scale by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA, https://arxiv.org/abs/2312.03732)."
    )
    modules_to_save: list[str] | None = _opt(
        None, "Modules that are trained in full and saved with the adapter, for instance a new classification head."
    )
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "mica",
        ]
    ) = _opt(True, _INIT_HELP, lora_variants=["mica"])
    layers_to_transform: list[int] | int | None = _opt(
        None, "Index or indices of the layers to adapt. Needs `target_modules` to be a list."
    )
    layers_pattern: list[str] | str | None = _opt(
        None,
        "Name of the `nn.ModuleList` that `layers_to_transform` counts in, if it is none of the common ones ("
        "'layers', 'h', ...). Needs `target_modules` to be a list.",
    )
    rank_pattern: dict | None = _opt(
        dict, "Ranks other than `r`, by layer name or regular expression: `{'^model.layers.0.self_attn.k_proj': 16}`."
    )
    alpha_pattern: dict | None = _opt(
        dict, "Alphas other than `lora_alpha`, by layer name or regular expression, like `rank_pattern`."
    )
    megatron_config: dict | None = _opt(
        None,
        "Megatron's TransformerConfig, or its arguments; needed to adapt Megatron's ColumnParallelLinear and "
        "RowParallelLinear. It may not be serialisable: then save with `get_peft_model_state_dict` "
        "and Megatron's own tools.",
    )
    megatron_core: str | None = _opt("megatron.core", "Import path of the Megatron core module.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _opt(
        None,
        "Tokens whose embeddings are trained along, without the whole matrix: a list for the input embedding, "
        "or a dict from embedding name to list. FSDP needs `use_orig_params=True`.",
    )
    # a dict once loaded from adapter_config.json
    loftq_config: LoftQConfig | dict = _opt(
        dict, "Options of LoftQ; requires `init_lora_weights='loftq'` and a base model that is not quantised yet."
    )
    eva_config: EvaConfig | None = _opt(None, "Options of EVA; use with `init_lora_weights='eva'`.")
    corda_config: CordaConfig | None = _opt(None, "Options of CorDA; use with `init_lora_weights='corda'`.")
    lora_ga_config: LoraGAConfig | None = _opt(None, "Options of LoRA-GA; use with `init_lora_weights='lora_ga'`.")
    use_dora: bool = _variant(
        False,
        "DoRA (https://arxiv.org/abs/2402.09353): learn the magnitude of each output direction apart from the update. "
        "Often better at low rank and slower, so merge for inference. For linear, embedding and convolution layers.",
    )
    velora_config: VeloraConfig | dict | None = _variant(
        None, "Options of VeLoRA, which keeps compressed activations for the gradient of A; setting them enables it."
    )
    alora_invocation_tokens: list[int] | None = _variant(
        None,
        "Enables activated LoRA (https://arxiv.org/abs/2504.12397): the adapter acts only from the last occurrence of "
        "this token sequence on, so the KV cache before it is the base model's and can be shared. Cannot be merged.",
    )
    use_qalora: bool = _opt(
        False,
        "Quantisation-aware LoRA (https://arxiv.org/abs/2309.14717): A sees pooled inputs. GPTQ layers only.",
    )
    qalora_group_size: int = _opt(
        16,
        "Inputs pooled into one for `use_qalora`; must divide the layer's input size. Larger: cheaper, coarser.",
    )
    monteclora_config: MontecloraConfig | None = _variant(
        None, "Options of MonteCLoRA, which trains with sampled perturbations of A; setting them enables it."
    )
    layer_replication: list[tuple[int, int]] | None = _opt(None, _LAYER_REPLICATION_HELP)
    runtime_config: LoraRuntimeConfig = _opt(LoraRuntimeConfig, "Settings of the running process; never saved.")
    lora_bias: bool = _opt(
        False,
        "Give B a bias of its own. Meant for adapters that were extracted from a full fine-tuning; works with "
        "`init_lora_weights` True or False only.",
    )
    target_parameters: list[str] | None = _opt(
        None,
        "Names (suffixes) of `nn.Parameter`s to adapt where there is no module to target, as in many "
        "mixture-of-experts layers: `['feed_forward.experts.down_proj']`. No regular expressions. Expect graph breaks "
        "under torch.compile.",
    )
    use_bdlora: BdLoraConfig | None = _variant(
        None, "Options of BD-LoRA, which makes one factor block-diagonal; setting them enables it."
    )
    arrow_config: ArrowConfig | None = _variant(
        None, "Options of Arrow routing; set by `create_arrow_model` on the router adapter."
    )
    kasa_config: KasaConfig | None = _variant(
        None, "Options of KaSA (linear layers); setting them enables it and truncates the base weight for good."
    )
    ensure_weight_tying: bool = _opt(
        False,
        "Keep tied layers tied: the adapters, modules_to_save copies or token embeddings added to them share weights.",
    )

    def to_dict(self) -> dict:
        """The fields as a dict, nested configs included, without `runtime_config`."""
        fields = super().to_dict()
        del fields["runtime_config"]
        return fields

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.ensure_weight_tying:
            self.modules_to_tie = None
            self.target_modules_to_tie = None
        for name, config_cls in _SUBCONFIGS.items():
            setattr(self, name, _get_lora_subconfig(getattr(self, name), config_cls))

        self._check_targets()
        self._check_init_options()
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias:
            _require(
                self.init_lora_weights in (True, False),
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead.",
            )
            _require(
                not self.use_dora,
                "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False",
            )
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.")
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None

    def _check_targets(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                _require(getattr(self, name) is None, f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def _check_init_options(self) -> None:
        """Let `init_lora_weights` and the options of the schemes agree; options of a scheme not in use only warn."""
        scheme = self.init_lora_weights
        if scheme == "loftq":
            if not importlib.util.find_spec("scipy"):
                raise ImportError("The required package 'scipy' is not installed; LoftQ needs it.")
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if dataclasses.is_dataclass(self.loftq_config):
                self.loftq_config = dataclasses.asdict(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")

        for name, config_cls, label in (("eva", EvaConfig, "EVA"), ("corda", CordaConfig, "CorDA")):
            given = getattr(self, f"{name}_config") is not None
            if scheme == name and not given:
                warnings.warn(
                    f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. "
                    f"Using default {label} config."
                )
                setattr(self, f"{name}_config", config_cls())
            elif scheme != name and given:
                warnings.warn(
                    f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'."
                )

        changes_base = isinstance(scheme, str) and (scheme.startswith("pissa") or scheme in _RESIDUAL_SCHEMES)
        if changes_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                "base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
                "`path_initial_model_for_weight_conversion` to `save_pretrained` to restore the initial values of the "
                "base weights; if you intend to do this, please ensure not to use rslora or "
                "rank_pattern/alpha_pattern."
            )

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt layers of type `key` with the LoRA layer class `value`, for every entry of `mapping` (experimental).

        The classes are called as `value(target, adapter_name, config=..., **kwargs)` and follow the conventions of
        `LoraLayer`. The mapping is not saved with the config.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


@dataclass
class LoraGAConfig:
    """LoRA-GA (https://arxiv.org/abs/2407.05000): start along the first full fine-tuning gradient.

    With `U S V^T` the SVD of the gradient, A takes rows of V^T and B columns of U S.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = _opt(
        "ArB2r",
        "Which of the 2r leading components go where: 'ArB2r' A the first r, B the next r; 'A2rBr' the reverse; "
        "'ArBr' A the odd ones, B the even ones; 'random' the same random r for both.",
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = _opt(
        "stable",
        "'stable' scales B by out_features^(1/4) / sqrt(stable_gamma); 'weight_svd' brings it to the largest "
        "singular value of the base weight; 'gd_scale' divides both factors by the scaling; 'unit' leaves them.",
    )
    stable_gamma: int = _opt(16, "Gamma of the 'stable' scale.")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: a learned posterior over A, sampled in training, for a better calibrated adapter.

    Raises ValueError unless `num_samples`, `dirichlet_prior` and `buffer_size` are positive.
    """

    num_samples: int = _opt(8, "Perturbations of A that each training forward averages; more is smoother and dearer.")
    use_entropy: bool = _opt(False, "Add a term that keeps the mixture weights from collapsing onto one sample.")
    dirichlet_prior: float = _opt(
        0.1, "Concentration of the prior on the mixture weights; larger pulls them towards uniform."
    )
    sample_scaler: float = _opt(1e-4, "Size of the perturbations; near 0 this is plain LoRA.")
    kl_loss_weight: float = _opt(1e-5, "Weight of the KL divergence from the prior in the variational loss.")
    buffer_size: int = _opt(150, "How many draws of noise are made at once and used up one by one.")

    def __post_init__(self):
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _require(getattr(self, name) > 0, f"`{name}` must be greater than 0, got {getattr(self, name)}.")


_SUBCONFIGS = {
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
}

# schemes (besides pissa*) that leave a residual in the base weight
_RESIDUAL_SCHEMES = ("olora", "corda", "lora_ga")
