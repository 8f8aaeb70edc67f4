"""Warning categories of the package."""


class PeftWarning(UserWarning):
    """Base class of the package's own warnings."""
