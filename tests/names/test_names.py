"""peft_c has PEFT's names, with PEFT's signatures."""

import dataclasses
import importlib
import inspect
import warnings

import pytest

CONFIGS = [
    ("", "PeftConfig"),
    ("", "PromptLearningConfig"),
    ("", "LoraConfig"),
    ("", "TrainableTokensConfig"),
    ("", "LoftQConfig"),
    ("", "EvaConfig"),
    (".tuners.lora.config", "CordaConfig"),
    (".tuners.lora.config", "ArrowConfig"),
    (".tuners.lora.config", "LoraRuntimeConfig"),
]

# What is called differently, and why.
ON_PURPOSE = {
    "AuxiliaryTrainingWrapper.adapter_state_dict": "abstract: every subclass takes the state dict, in PEFT as well",
    "TrainableTokensWrapper.update": "the parameter has the name that the base class gives it, in PEFT as well",
    **{
        name: "takes what every BaseTuner takes; PEFT's calls the second parameter `config`"
        for name in ("MixedModel", "AdamssModel", "OSFModel", "TinyLoraModel", "UniLoraModel")
    },
}
# The same for layers of single methods.
LAYERS_ON_PURPOSE = {
    **{
        f"{layer}.get_delta_weight": "the name is called `adapter` on all layers"
        for layer in ("adamss.Linear", "deft.DeftLinear", "osf.OSFLayer", "psoft.Linear", "supertuning.Linear")
        + ("tinylora.TinyLoraLayer",)
    },
    "ln_tuning.LNTuningLayer.merge": "takes `safe_merge` first, as all layers",
    "miss.MissLinear.get_delta_weight": "needs no weight",
    "oft.OFTRotationModule": "made of the config",
    "psoft.OrthLayer": "made of the config",
    **{f"glora.Glora{form}Path": "made of a shape" for form in ("Empty", "Lora", "Scalar", "Vector")},
}
# Steps of PEFT's layers that carry no underscore but are called by the layers only, and its autograd functions.
STEPS = """
boft.FastBlockDiag.backward boft.FastBlockDiag.forward
frod.FrodLayer.reset_frod_parameters frod.Linear.unload_and_optionally_merge_module
glora.GloraEmptyPath.reset_parameters glora.GloraLoraPath.reset_parameters glora.GloraPath.reset_parameters
glora.GloraScalarPath.reset_parameters
glora.GloraVectorPath.reset_parameters loha.HadaWeight.backward loha.HadaWeight.forward loha.HadaWeightCP.backward
loha.HadaWeightCP.forward loha.LoHaLayer.create_adapter_parameters
lokr.LoKrLayer.create_adapter_parameters miss.MissLinear.get_delta_weight_miss oft.OFTLayer.adjust_oft_parameters
oft.OFTRotationModule.get_weight psoft.OrthLayer.forward psoft.OrthLayer.reset_parameters
randlora.Linear.get_scaled_bases randlora.UniqueBaseGrad.backward randlora.UniqueBaseGrad.forward
unilora.UniLoraLayer.reset_unilora_parameters unilora.UniLoraLayer.update_scaling xlora.XLoraLayer.apply_scalings_to_x
""".split()

# Helpers of PEFT that carry no underscore but are called by their own module only; here they are arranged otherwise.
INTERNAL = {
    "get_tp_plan_and_mesh",
    "add_lora_tp_hooks_dtensor",
    "dispatch_default",
    "patch_environment",
    "get_fbd_cuda",
}

# Modules whose public functions and classes other programs import by path.
MODULES = """
peft.config peft.functional peft.helpers peft.mapping peft.mapping_func peft.mixed_model peft.peft_model peft.auto
peft.tuners.tuners_utils peft.tuners.lora peft.tuners.lora.config peft.tuners.lora.layer peft.tuners.lora.model
peft.tuners.lora.conversion peft.tuners.lora.corda peft.tuners.lora.dora peft.tuners.lora.eva peft.tuners.mixed
peft.tuners peft.tuners.adaption_prompt peft.tuners.adaption_prompt.config peft.tuners.adaption_prompt.layer
peft.tuners.adaption_prompt.model peft.tuners.adaption_prompt.utils peft.tuners.cartridge peft.tuners.cartridge.model
peft.tuners.cartridge.utils peft.tuners.cpt.config peft.tuners.cpt.model peft.tuners.multitask_prompt_tuning
peft.tuners.multitask_prompt_tuning.model peft.tuners.p_tuning.config peft.tuners.p_tuning.model
peft.tuners.prefix_tuning peft.tuners.prefix_tuning.model peft.tuners.prompt_tuning peft.tuners.prompt_tuning.model
peft.tuners.trainable_tokens peft.optimizers peft.utils peft.utils.constants peft.utils.hotswap
peft.utils.integrations peft.utils.incremental_pca peft.utils.loftq_utils peft.utils.merge_utils peft.utils.other
peft.utils.peft_types peft.utils.save_and_load
""".split()
METHODS = """
adalora adamss beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 lily ln_tuning loha lokr miss oft
osf peanut poly psoft pvera randlora road shira supertuning tinylora unilora vblora vera waveft xlora
""".split()
MODULES += [f"peft.tuners.{method}.{part}" for method in METHODS for part in ("config", "layer", "model")]


def _shared(module_name: str):
    """(name, peft's, peft_c's or None): a package's public functions and classes, or those that a module defines."""
    theirs = importlib.import_module(module_name)
    mine = importlib.import_module("peft_c" + module_name[len("peft") :])
    package = hasattr(theirs, "__path__")
    for name in getattr(theirs, "__all__", None) or [n for n in vars(theirs) if not n.startswith("_")]:
        value = getattr(theirs, name)
        if name in INTERNAL or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        home = getattr(value, "__module__", "") or ""
        if home == module_name or (package and home.startswith("peft")):
            yield name, value, getattr(mine, name, None)


def _parameters(function) -> list[inspect.Parameter] | None:
    try:
        return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    except (ValueError, TypeError):
        return None


def _default(value) -> str:
    """A default as text: a class by its name, what has an address by its type."""
    if inspect.isclass(value):
        return value.__name__
    words = repr(value)
    return type(value).__name__ if " at 0x" in words or "factory" in words else words.replace("peft_c", "peft")


def _why_not_called_alike(theirs, mine) -> str | None:
    """None where each call that fits PEFT's signature means the same with peft_c's; peft_c's may accept more."""
    wanted, given = _parameters(theirs), _parameters(mine)
    if wanted is None or given is None:
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in given if p.kind not in variable]
    open_ended = {p.kind for p in given if p.kind in variable}
    plain = [p for p in wanted if p.kind not in variable]
    for index, p in enumerate(plain):
        other = next((q for q in named if q.name == p.name), None)
        if other is None:
            if set(variable) <= open_ended:
                continue
            return f"has no parameter {p.name!r}"
        moved = other.kind is not p.kind or named.index(other) != index
        if p.kind is p.POSITIONAL_OR_KEYWORD and moved:
            return f"takes {p.name!r} at another place"
        if p.default is not p.empty and _default(p.default) != _default(other.default):
            return f"has the default {other.default!r} for {p.name!r}, not {p.default!r}"
    if len(plain) == len(wanted):
        more = [q.name for q in named if q.name not in {p.name for p in plain} and q.default is q.empty]
        if more:
            return f"requires {', '.join(more)}"
    return None


@pytest.fixture(autouse=True)
def _quiet(peft):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_public_names(peft):
    import peft_c

    wanted = set(peft.__all__)
    missing = sorted(name for name in wanted if not hasattr(peft_c, name))
    assert not missing, f"peft has these names, peft_c does not: {', '.join(missing)}"
    listed = set(peft_c.__all__)
    assert wanted <= listed, f"not in peft_c.__all__: {sorted(wanted - listed)}"
    assert set(dir(peft_c)) >= listed


def test_unknown_name_is_an_attribute_error():
    import peft_c

    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        peft_c.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_the_names(module):
    missing = [name for name, _, mine in _shared(module) if mine is None]
    assert not missing, f"{module} has these names, peft_c's module does not: {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_signatures(module):
    different, method = [], ".".join(module.split(".")[2:3])
    for name, theirs, mine in _shared(module):
        if mine is None:
            continue
        pairs = [(name, theirs, mine)]
        if inspect.isclass(theirs):
            pairs += [
                (f"{name}.{key}", getattr(theirs, key), getattr(mine, key, None))
                for key in vars(theirs)
                if not key.startswith("_") and inspect.isroutine(getattr(theirs, key))
            ]
        for path, their_call, my_call in pairs:
            reason = "is missing" if my_call is None else _why_not_called_alike(their_call, my_call)
            if reason and path not in ON_PURPOSE and f"{method}.{path}" not in (*LAYERS_ON_PURPOSE, *STEPS):
                different.append(f"{path} {reason}")
    assert not different, "\n".join(different)


PROMPTS = """
AdaptionPromptConfig CPTConfig CartridgeConfig MultitaskPromptTuningConfig PrefixTuningConfig PromptEncoderConfig
PromptTuningConfig
""".split()


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_configs_are_exchanged(peft, name, tmp_path):
    import peft_c

    mine, theirs = (getattr(package, name)(task_type="CAUSAL_LM", inference_mode=True) for package in (peft_c, peft))
    assert mine.to_dict() == theirs.to_dict()
    assert mine.is_prompt_learning == theirs.is_prompt_learning
    assert mine.is_adaption_prompt == theirs.is_adaption_prompt
    theirs.save_pretrained(tmp_path)
    read = peft_c.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is type(mine)
    assert read.to_dict() == mine.to_dict()


# Modules from which programs take names that stand elsewhere.
PASSED_ON = """
mapping_func mixed_model peft_model tuners.tuners_utils tuners.lora tuners.lora.model tuners.lora.layer
tuners.boft.model tuners.ia3.layer tuners.loha.layer tuners.lycoris_utils tuners.mixed.model tuners.oft.config
tuners.vera.model tuners.lora.aqlm tuners.lora.awq tuners.lora.eetq tuners.lora.gptq tuners.lora.hqq tuners.lora.inc
tuners.lora.te tuners.lora.torchao tuners.lora.tp_layer
""".split()


@pytest.mark.parametrize("module", PASSED_ON)
def test_names_that_modules_import_are_there(peft, module):
    theirs, ours = (importlib.import_module(f"{package}.{module}") for package in ("peft", "peft_c"))
    shared = {
        name: value
        for name, value in vars(theirs).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not name.startswith("_")
        if value.__module__.startswith("peft.") and value.__module__ != theirs.__name__
    }
    assert shared
    missing = sorted(name for name in shared if not hasattr(ours, name))
    assert not missing, missing
    with pytest.raises(ImportError):
        exec(f"from peft_c.{module} import nothing_of_that_name")


def test_what_the_layers_of_bitsandbytes_import_is_found_there():
    """PEFT has that module with bitsandbytes only."""
    from peft_c.tuners.lora import bnb, layer

    assert bnb.VARIANT_KWARG_KEYS is layer.VARIANT_KWARG_KEYS and bnb.LoraLayer is layer.LoraLayer


def test_configs_have_the_same_fields(peft):
    import peft_c

    for module, name in CONFIGS:
        theirs, mine = (
            getattr(importlib.import_module(package.__name__ + module), name) for package in (peft, peft_c)
        )
        assert dataclasses.is_dataclass(mine)
        assert list(mine.__dataclass_fields__) == list(theirs.__dataclass_fields__), name


def test_configs_of_methods_are_called_alike(peft):
    import peft_c

    def parameters(config):
        made = {f.name: f.default_factory for f in dataclasses.fields(config)}
        start = {name: made[name]() for name in made if made[name] is not dataclasses.MISSING}
        return [(p.name, p.kind, repr(start.get(p.name, p.default))) for p in _parameters(config)]

    for method, theirs in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        mine = peft_c.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method]
        assert parameters(mine) == parameters(theirs), method


@pytest.mark.parametrize("module", ["adamss.layer", "shadow.layers", "vera.layer"])
def test_what_layers_modules_import_is_found_there(module):
    found = importlib.import_module(f"peft_c.tuners.{module}")
    assert found.BaseTunerLayer is importlib.import_module("peft_c.tuners.tuners_utils").BaseTunerLayer
    assert not hasattr(found, "nothing_of_that_name")
