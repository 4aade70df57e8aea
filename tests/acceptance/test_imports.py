"""What a run does not import: it would cost every short one more than its work."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import headrace as hr

class Half:
    def __call__(self, ids):
        return ids / 2

made = hr.range(100).predict(Half, input="id", output="half").to_arrow(progress="quiet")
assert made.num_rows == 100
print("pandas" in sys.modules)
"""


def test_a_prediction_needs_no_pandas() -> None:
    """Arrow's own conversion to NumPy imports it wherever it is installed: 0.16 s."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
