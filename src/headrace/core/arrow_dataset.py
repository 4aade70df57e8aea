"""pyarrow.dataset, for who evaluates or narrows by expressions.

It imports pandas where that is installed, a quarter of a second: worker processes begin with it if this module has been
imported, and not because their driver's program has it for itself.
"""

from __future__ import annotations

from typing import Any

import pyarrow.dataset  # pyright: ignore[reportMissingTypeStubs]

ds: Any = pyarrow.dataset
