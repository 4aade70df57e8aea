"""Optional packages: which extra of Headrace brings them, and the error for one that is missing.

Looking for a package does not import it, so that a verb can refuse at once what would fail in a worker later.
"""

from __future__ import annotations

from importlib.util import find_spec

from headrace.core.errors import PlanError

# extra -> the modules that it brings. As in pyproject.toml.
_EXTRAS = {
    "images": ("simplejpeg", "cv2", "PIL"),
    "pandas": ("pandas",),
    "torch": ("torch",),
}


def require(extra: str, what: str) -> None:
    """Raise PlanError, with what to install, unless everything that `extra` brings is there. what: that which needs it."""
    missing = [module for module in _EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise PlanError(
            f"{what} needs {' and '.join(missing)}, not installed here", hint=f"pip install 'headrace[{extra}]'"
        )


def require_format(batch_format: str, what: str) -> None:
    """The same for a batch format: pandas and torch come with the extra of that name."""
    if batch_format in _EXTRAS:
        require(batch_format, f'{what} with batch_format="{batch_format}"')
