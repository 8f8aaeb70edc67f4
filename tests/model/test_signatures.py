"""Signatures of the public classes and functions of these modules, against the installed peft."""

import dataclasses
import importlib
import inspect

import pytest

peft = pytest.importorskip("peft")

MODULES = (
    "auto",
    "config",
    "helpers",
    "import_utils",
    "mapping",
    "mapping_func",
    "mixed_model",
    "peft_model",
    "utils.save_and_load",
)


def described(function):
    """(name, kind, default) of each parameter."""
    return [(p.name, p.kind, repr(p.default)) for p in inspect.signature(function).parameters.values()]


def own(module):
    """The public classes and functions that are defined in the module."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or callable(value))
        if getattr(value, "__module__", None) == module.__name__
    }


def pairs():
    for name in MODULES:
        theirs, ours = importlib.import_module(f"peft.{name}"), importlib.import_module(f"peft_c.{name}")
        for public, value in own(theirs).items():
            yield pytest.param(value, ours, public, id=f"{name}.{public}")


@pytest.mark.parametrize("theirs,module,name", list(pairs()))
def test_same_parameters(theirs, module, name):
    ours = getattr(module, name)
    if not inspect.isclass(theirs):
        assert described(ours) == described(theirs)
        return
    if dataclasses.is_dataclass(theirs):
        assert [field.name for field in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    for method, value in vars(theirs).items():
        if method.startswith("_") and method != "__init__":
            continue
        assert hasattr(ours, method), method
        if isinstance(value, (staticmethod, classmethod)) or inspect.isfunction(value):
            assert described(getattr(ours, method)) == described(getattr(theirs, method)), method
        elif isinstance(value, property):
            assert isinstance(inspect.getattr_static(ours, method), property), method
