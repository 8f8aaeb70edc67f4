"""PEFT's names for giving the parameters of an adapter new initial values, one or more for each method's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

START, RANDOM, GIVEN = {"init_weights": True}, {"init_weights": False}, {"init_weights": None}

# method -> name -> the options in which that differs from how the adapter was made, in the order in which they may be
# passed, with their defaults (None: as it was made)
RESETS: dict[str, dict[str, dict[str, Any]]] = {
    "adalora": {"reset_lora_parameters": {"init_lora_weights": True}},
    "beft": {"reset_beft_parameters": START},
    "boft": {"reset_boft_parameters": GIVEN},
    "c3a": {"reset_c3a_parameters": GIVEN},
    "deft": {"reset_deft_parameters": START},
    "delora": {"reset_delora_parameters": {**START, "delora_lambda": 15.0}},
    "fourierft": {"reset_fourier_parameters": START},
    "hira": {"reset_hira_parameters": GIVEN},
    "hra": {"reset_hra_parameters": START, "reset_hra_parameters_random": RANDOM},
    "ia3": {"reset_ia3_parameters": {"init_ia3_weights": True}},
    "lily": {"reset_lily_parameters": START},
    "loha": {"reset_adapter_parameters": START, "reset_adapter_parameters_random": RANDOM},
    "lokr": {
        "reset_adapter_parameters": START,
        "reset_adapter_parameters_random": RANDOM,
        "reset_adapter_parameters_lycoris_way": {"init_weights": "lycoris"},
    },
    "miss": {
        "reset_miss_parameters": {"r": None, "init_weights": True},
        "reset_bat_parameters": {"r": None, "init_weights": "bat"},
        "reset_mini_parameters": {"r": None, "mini_r": None, "init_weights": "mini"},
        "reset_miss_parameters_random": RANDOM,
    },
    "oft": {"reset_oft_parameters": GIVEN},
    "peanut": {"reset_peanut_parameters": START},
    "poly": {"reset_poly_parameters": GIVEN},
    "pvera": {"reset_pvera_parameters": {"d_initial": 0.1, **START}},
    "randlora": {"reset_randlora_parameters": START},
    "road": {"reset_parameters": GIVEN},
    "shira": {"reset_shira_parameters": START},
    "vblora": {"reset_vblora_logits": {"init_logits_std": None}},
    "vera": {"reset_vera_parameters": {"d_initial": 0.1, **START}},
    "waveft": {"reset_wave_parameters": START},
}


def reset_method(name: str, options: dict[str, Any]) -> Callable[..., None]:
    """The method of a room of that name."""

    def reset(self: Any, adapter_name: str, *values: Any, **named: Any) -> None:
        changed = options | dict(zip(options, values, strict=False)) | named
        self.reset(adapter_name, **{option: value for option, value in changed.items() if value is not None})

    reset.__name__, reset.__doc__ = name, f"See `Room.reset`. Further arguments: {', '.join(options)}."
    return reset
