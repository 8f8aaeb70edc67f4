"""What peft_c has under a name of PEFT's, it has with PEFT's signature; what it does not have yet is listed here."""

import importlib
import inspect
import warnings
from dataclasses import is_dataclass

import pytest

# Public names of peft 0.21.2 that belong to methods peft_c does not have yet; each method's other names go with it.
NOT_YET_METHODS = """
adalora adamss adaption_prompt beft boft bone c3a cartridge cpt deft delora fourierft frod glora gralora hira hra ia3
lily ln_tuning loha lokr miss multitask_prompt_tuning oft osf p_tuning peanut poly prefix_tuning prompt_tuning psoft
pvera randlora road shadow shira supertuning tinylora unilora vblora vera waveft xlora
""".split()

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

# Modules whose public functions and classes other programs import by path.
MODULES = """
peft.config peft.functional peft.helpers peft.mapping peft.mapping_func peft.mixed_model peft.peft_model peft.auto
peft.tuners.tuners_utils peft.tuners.lora peft.tuners.lora.config peft.tuners.lora.layer peft.tuners.lora.model
peft.tuners.lora.conversion peft.tuners.lora.corda peft.tuners.lora.dora peft.tuners.lora.eva peft.tuners.mixed
peft.tuners.trainable_tokens peft.optimizers peft.utils peft.utils.constants peft.utils.hotswap
peft.utils.integrations peft.utils.incremental_pca peft.utils.loftq_utils peft.utils.merge_utils peft.utils.other
peft.utils.peft_types peft.utils.save_and_load
""".split()


def _method_of(thing) -> str:
    """The folder under peft.tuners that a name comes from, or ''."""
    parts = (getattr(thing, "__module__", "") or "").split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else ""


def _shared(module_name: str):
    """(name, peft's, peft_c's or None) for the public functions and classes of a module, later methods left out."""
    theirs = importlib.import_module(module_name)
    mine = importlib.import_module("peft_c" + module_name[len("peft") :])
    names = getattr(theirs, "__all__", None) or [n for n in vars(theirs) if not n.startswith("_")]
    for name in names:
        value = getattr(theirs, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        home = getattr(value, "__module__", "") or ""
        if not home.startswith("peft") or _method_of(value) in NOT_YET_METHODS:
            continue
        yield name, value, getattr(mine, name, None)


def _parameters(function):
    """(name, kind, default) of each parameter; a default is compared by its repr, where that says something."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    return [(p.name, p.kind.name, _default(p.default)) for p in parameters]


def _default(value):
    words = repr(value)
    return type(value).__name__ if " at 0x" in words or "factory" in words else words.replace("peft_c", "peft")


@pytest.fixture(autouse=True)
def _quiet(peft):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_public_names(peft):
    import peft_c

    wanted = {name for name in peft.__all__ if _method_of(getattr(peft, name)) not in NOT_YET_METHODS}
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
    different = []
    for name, theirs, mine in _shared(module):
        if mine is None:
            continue
        pairs = [(name, theirs, mine)]
        if inspect.isclass(theirs):
            pairs += [
                (f"{name}.{key}", getattr(theirs, key), getattr(mine, key, None))
                for key, value in vars(theirs).items()
                if not key.startswith("_") and inspect.isroutine(getattr(theirs, key))
            ]
        for path, their_call, my_call in pairs:
            if my_call is None:
                different.append(f"{path}: missing")
            elif (wanted := _parameters(their_call)) is not None and _parameters(my_call) != wanted:
                different.append(f"{path}: {inspect.signature(my_call)} instead of {inspect.signature(their_call)}")
    assert not different, "\n".join(different)


def test_configs_have_the_same_fields(peft):
    import peft_c

    for module, name in CONFIGS:
        theirs, mine = (
            getattr(importlib.import_module(package.__name__ + module), name) for package in (peft, peft_c)
        )
        assert is_dataclass(mine)
        assert list(mine.__dataclass_fields__) == list(theirs.__dataclass_fields__), name
