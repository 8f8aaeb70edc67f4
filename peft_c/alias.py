"""`import peft` as another name of peft_c: the very same module objects, for programs that know only that name."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from contextlib import suppress
from types import ModuleType

_OURS, _NAME = __package__, "peft"


class _Distribution(importlib.metadata.Distribution):
    """What libraries see that ask for the installed version of "peft"."""

    def read_text(self, filename: str) -> str | None:
        from . import __version__

        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n",
            "top_level.txt": f"{_NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path):
        return path


class _Loader(importlib.abc.Loader):
    """Hands out our module under the other name, and gives it back its own `__spec__`, which the import system
    overwrites."""

    def __init__(self, ours: str) -> None:
        self.ours = ours

    def create_module(self, spec) -> ModuleType:
        module = importlib.import_module(self.ours)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _named_as_theirs(module: ModuleType) -> None:
    """Lets the classes of one of our modules say that they are PEFT's: some programs know them by `__module__` alone,
    and pickles name them so."""
    sys.modules.setdefault(_NAME + module.__name__.removeprefix(_OURS), module)
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__.startswith(f"{_OURS}.") and value.__module__ in sys.modules:
            with suppress(TypeError):  # of C
                value.__module__ = _NAME + value.__module__.removeprefix(_OURS)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith(f"{_OURS}."):
            return self._ours(fullname, path)
        if fullname.partition(".")[0] != _NAME:
            return None
        ours = _OURS + fullname.removeprefix(_NAME)
        try:
            found = importlib.util.find_spec(ours)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, _Loader(ours), origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    @staticmethod
    def _ours(fullname: str, path) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _named_as_theirs(module)

            spec.loader.exec_module = exec_module
        return spec

    def find_distributions(self, context=None):
        if context is None or context.name in (None, _NAME):
            yield _Distribution()


def install_as_peft() -> None:
    """From now on `import peft` and `import peft.anything` give peft_c and its modules, in this process.

    Calling it again does nothing. Raises `RuntimeError` when the real peft has been imported: classes of both would
    mix. To run a whole program like that, use `python -m peft_c program.py`.
    """
    ours = sys.modules[_OURS]
    present = sys.modules.get(_NAME)
    if present is not None and present is not ours:
        raise RuntimeError(
            f"'{_NAME}' is already imported, from {getattr(present, '__file__', 'an unknown place')}. Call "
            "`peft_c.install_as_peft()` before anything imports peft (in a notebook: restart the kernel and call it "
            "in the first cell), or run the program with `python -m peft_c`."
        )
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        importlib.invalidate_caches()
    sys.modules[_NAME] = ours
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{_OURS}.") and name == module.__name__ and hasattr(module, "__file__"):
            _named_as_theirs(module)
    # transformers remembers whether there is a peft.
    for name in ("is_peft_available", "is_peft_greater_or_equal"):
        check = getattr(sys.modules.get("transformers.utils.import_utils"), name, None)
        if hasattr(check, "cache_clear"):
            check.cache_clear()
