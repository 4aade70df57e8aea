"""Optional packages: which extra of Headrace brings them, the error for one that is missing, and types of those in use.

Invariant: nothing is imported here. Looking for a package lets a verb refuse at once what would fail in a worker later; and a
value can only be of a package that somebody has imported already.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from headrace.core.errors import PlanError

# extra -> the modules that it brings. As in pyproject.toml.
_EXTRAS = {
    "images": ("simplejpeg", "cv2", "PIL"),
    "pandas": ("pandas",),
    "torch": ("torch",),
    "sklearn": ("sklearn", "joblib"),
    "xgboost": ("xgboost",),
    "lightgbm": ("lightgbm",),
    "onnx": ("onnxruntime",),
    "transformers": ("torch", "transformers"),
    "sentence-transformers": ("sentence_transformers",),
    "keras": ("keras",),
    "tensorflow": ("tensorflow",),
    "endpoint": ("aiohttp",),
    "openai": ("aiohttp",),
    "vllm": ("vllm",),
    "sketches": ("datasketches",),
    "ray": ("ray",),
}


def require(extra: str, what: str) -> None:
    """Raise PlanError, with what to install, unless everything that `extra` brings is there. what: that which needs it."""
    missing = [module for module in _EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise PlanError(f"{what} needs {' and '.join(missing)}, not installed here", hint=f"pip install 'headrace[{extra}]'")


def require_format(batch_format: str, what: str) -> None:
    """The same for a batch format: pandas and torch come with the extra of that name."""
    if batch_format in ("pandas", "torch"):
        require(batch_format, f'{what} with batch_format="{batch_format}"')


def is_instance(value: Any, module: str, kind: str) -> bool:
    """Is `value` a `module.kind`, such as ("pandas", "DataFrame")? False while the module is not imported, or only half:
    another thread may be at it.
    """
    found = getattr(sys.modules.get(module), kind, None)
    return isinstance(found, type) and isinstance(value, found)
