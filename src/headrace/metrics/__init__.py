"""`hr.metrics`: accumulators for `evaluate`, computed in the pass and merged over splits.

Invariant: states add exactly (whole numbers throughout), so that any order and grouping of rows gives the same state.
"""

from headrace.metrics.classification import Accuracy, LogLoss
from headrace.metrics.counts import Count, Mean
from headrace.metrics.ranking import AUCROC

__all__ = ["AUCROC", "Accuracy", "Count", "LogLoss", "Mean"]
