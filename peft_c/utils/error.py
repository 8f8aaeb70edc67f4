"""Exceptions of the package."""


class PeftError(Exception):
    """Base class of the package's own exceptions."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """An adapter's targets match no module and no parameter of the base model.

    It is a `ValueError` too, so that code which only knows that one catches it. Catch it to inject an adapter that may
    match nothing on purpose.
    """
