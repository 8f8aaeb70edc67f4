"""What tuners are written in: a room declares parameters and mathematics, the shared base acts.

A method is one file with three classes and one call of `register`:

- a `RoomConfig`: the options, in PEFT's order, each with its help text, of which the docstring is made;
- a `Room`: the parameters of an adapter (`create`) and what they do to a layer (the law, below);
- a `RoomModel`: which base layers the method adapts with which room;

Everything else stands here, once: construction, adding adapters (all or nothing), the forward of active, disabled,
merged and mixed adapters, merging and exact unmerging (through `law`), injection, and PEFT's module paths.

The law of a room is the class it derives from:

| law      | a room writes                    | merged weight           | forward                                     |
|----------|----------------------------------|-------------------------|---------------------------------------------|
| AddRoom  | `delta(name)`                    | W + delta               | base(x) + term(name, x)                     |
|          | or `low_rank(name)`              | W + scale * B A         | the same, without building B A              |
|          | and, where it changes biases,    |                         |                                             |
|          | `bias_delta(name)`               | b + bias_delta          | part of term(name, x)                       |
| MapRoom  | `transform(name, weight, bias)`  | what that returns       | the base operation with these weights       |
|          | and, where it is cheaper,        |                         |                                             |
|          | `before(name, x)`,               |                         | base(before(x))                             |
|          | `after(name, y)`                 |                         | after(base(x))                              |
| SwapRoom | a module for each adapter        | that module's           | that module                                 |
"""

from __future__ import annotations

import sys

from ..config import PeftConfig
from ..reexports import elsewhere
from ..utils import constants
from ..utils.peft_types import add_peft_type, register_peft_method
from .layer_calls import DELTA_LIKE, argument_orders
from .products import (
    CONVOLUTIONS,
    FEW,
    apply_weight,
    einsum,
    into,
    linear,
    multipliable,
    multiply,
    product,
    rows_of,
)
from .resets import RESETS, reset_method
from .room_laws import AddRoom, MapRoom, SwapRoom
from .room_layer import Room, Unscaled, dropout, kaiming, weight_view
from .room_model import RoomModel, State
from .room_options import RoomConfig, documented, option, pattern_value, positive, shared
from .tensor_functions import FUNCTIONS, LAYERS
from .tuners_utils import BaseTuner

# the words in which rooms are written
__all__ = [
    "CONVOLUTIONS",
    "FEW",
    "AddRoom",
    "MapRoom",
    "Room",
    "RoomConfig",
    "RoomModel",
    "State",
    "SwapRoom",
    "Unscaled",
    "apply_weight",
    "dropout",
    "einsum",
    "into",
    "kaiming",
    "linear",
    "multipliable",
    "multiply",
    "option",
    "pattern_value",
    "positive",
    "product",
    "register",
    "rows_of",
    "shared",
    "weight_view",
]


def register(
    name: str,
    config: type[PeftConfig],
    model: type[BaseTuner],
    mixed: bool = False,
    parts: tuple[str, ...] = (),
) -> None:
    """Register a room's method, under a lower-case name; one that `PeftType` does not have is added to it.

    What the classes do not say themselves follows: the model's `prefix` from the name, its `tuner_layer_cls` from its
    rooms, its `target_module_mapping` from `utils.constants`; the config's docstring from the help of its options.
    PEFT's paths (`<method>.config`, `.layer`, `.model`, those named by `parts`) lead to a room in this package.
    """
    table = f"TRANSFORMERS_MODELS_TO_{name.replace('_', '').upper()}_TARGET_MODULES_MAPPING"
    defaults = {"prefix": f"{name}_", "target_module_mapping": getattr(constants, table, {})}
    module = sys.modules[config.__module__]
    if module.__package__ == __package__:
        setattr(module, table, defaults["target_module_mapping"])
        for part in ("config", "layer", "model", *parts):
            sys.modules.setdefault(f"{module.__name__}.{part}", module)
            if not hasattr(module, part):
                setattr(module, part, module)
        module.__path__ = []
        vars(module).update(FUNCTIONS.get(name, {}))
        module.__getattr__ = elsewhere(module.__name__, own=vars(module).get("__getattr__"))
    add_peft_type(name.upper())
    config.method, config.__doc__ = name, documented(config)
    if issubclass(model, RoomModel):
        first, *others = dict.fromkeys(model.rooms.values())
        common = next(c for c in first.__mro__ if all(issubclass(room, c) for room in others))
        defaults["tuner_layer_cls"] = common
        common.argument_orders, common.delta_like = argument_orders(name), DELTA_LIKE.get(name, "")
        for attribute, value in LAYERS.get(name, {}).items():
            setattr(common, attribute, value)
        if name in RESETS:
            common.resets = tuple(RESETS[name])
            for reset, options in RESETS[name].items():
                setattr(common, reset, reset_method(reset, options))
    for attribute in defaults.keys() - vars(model).keys():
        setattr(model, attribute, defaults[attribute])
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix, is_mixed_compatible=mixed)
