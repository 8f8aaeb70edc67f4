"""Which optional libraries are installed, and which side of a version they are on; nothing is imported to find out.

The `is_transformers_...` names are booleans, worked out when first asked for; without transformers all are False.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from functools import lru_cache

import torch

# name -> (at least this version, below this version)
_TRANSFORMERS_VERSIONS = {
    "is_transformers_ge_v5": ("5.0.0.dev0", None),
    "is_transformers_ge_v5_1_0": ("5.1.0", None),
    "is_transformers_ge_v5_4_0": ("5.4.0", None),
    "is_transformers_ge_v5_6_0": ("5.6.0.dev0", None),
    "is_transformers_ge_v5_13_0": ("5.13.0.dev0", None),
    "is_transformers_ge_v5_17_0": ("5.17.0", None),
    "is_transformers_le_4_53": (None, "4.54.0.dev0"),
}


def _version(distribution: str):
    """The installed version, or None."""
    from packaging.version import parse

    try:
        return parse(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _transformers_is(at_least: str | None, below: str | None) -> bool:
    from packaging.version import parse

    loaded = getattr(sys.modules.get("transformers"), "__version__", None)
    if not loaded and not _installed("transformers"):
        return False
    version = parse(loaded) if loaded else _version("transformers")
    if version is None:
        return False
    return (at_least is None or version >= parse(at_least)) and (below is None or version < parse(below))


def _has_dtensor_tensor_parallelism() -> bool:
    """Whether transformers shards with DTensor. (This one does import transformers.)"""
    if not _installed("transformers"):
        return False
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401
    except ImportError:
        return False
    return True


def __getattr__(name: str) -> bool:
    if name in _TRANSFORMERS_VERSIONS:
        value = _transformers_is(*_TRANSFORMERS_VERSIONS[name])
    elif name == "is_transformers_dtensor_tp":
        value = _has_dtensor_tensor_parallelism()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def loaded(module: str, name: str):
    """`name` from `module` when that module is imported already, else None: no object can be of its types then."""
    return getattr(sys.modules.get(module), name, None)


@lru_cache
def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _installed("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has 4-bit layers."""
    if not is_bnb_available():
        return False
    import bitsandbytes

    return hasattr(bitsandbytes.nn, "Linear4bit")


@lru_cache
def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _installed("optimum")


@lru_cache
def is_gptqmodel_available() -> bool:
    """Whether gptqmodel is installed; `ImportError` when it, or optimum beside it, is too old."""
    from packaging.version import parse

    if not _installed("gptqmodel"):
        return False
    for distribution, minimum in (("gptqmodel", "7.0.0"), ("optimum", "1.24.0")):
        if distribution == "optimum" and not is_optimum_available():
            raise ImportError(f"gptqmodel requires optimum version `{minimum}` or higher to be installed.")
        version = _version(distribution)
        if version is not None and version < parse(minimum):
            raise ImportError(
                f"Found {distribution} version `{version}`, but gptqmodel layers need `{minimum}` or higher."
            )
    return True


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed and, with `check_device`, finds a device."""
    if not _installed("torch_xla"):
        return False
    if check_device:
        import torch_xla.core.xla_model as xm

        try:
            xm.xla_device()
        except RuntimeError:
            return False
    return True


@lru_cache
def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _installed("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _installed("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _installed("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Whether Intel's neural_compressor is installed."""
    return _installed("neural_compressor")


@lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is installed; `ImportError` when it is too old."""
    from packaging.version import parse

    version = _version("torchao") if _installed("torchao") else None
    if version is None:
        return False
    if version < parse("0.16.0"):
        raise ImportError(f"Found an incompatible version of torchao: {version}, but 0.16.0 or higher is needed.")
    return True


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed and is 0.18.0 or newer: it has only the second generation of tensor subclasses."""
    from packaging.version import parse

    return is_torchao_available() and _version("torchao") >= parse("0.18.0")


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an XPU."""
    if platform.system() == "Darwin" or not hasattr(torch, "xpu"):
        return False
    try:
        if check_device:
            torch.xpu.device_count()
        return torch.xpu.is_available()
    except RuntimeError:
        return False


@lru_cache
def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _installed("diffusers")


@lru_cache
def is_te_available() -> bool:
    """Whether transformer_engine is installed."""
    return _installed("transformer_engine")


@lru_cache
def is_te_pytorch_available() -> bool:
    """Whether transformer_engine is installed with its PyTorch layers."""
    if not is_te_available():
        return False
    import transformer_engine

    return hasattr(transformer_engine, "pytorch")
