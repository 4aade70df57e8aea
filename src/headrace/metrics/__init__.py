"""`hr.metrics`: accumulators for `evaluate`, computed in the pass and merged over splits.

Invariant: states add exactly (whole numbers throughout), so that any order and grouping of rows gives the same result. The one
exception is Quantiles, whose sketches agree within their bound. States are JSON, and no metric keeps rows (but for the
areas with exact=True).
"""

from headrace.metrics.classification import F1, Accuracy, ConfusionMatrix, Precision, Recall, TopKAccuracy
from headrace.metrics.counts import Count, Max, Mean, Min, Sum
from headrace.metrics.custom import Custom
from headrace.metrics.probabilities import Brier, CalibrationError, CrossEntropy, LogLoss
from headrace.metrics.ranking import AUCPR, AUCROC
from headrace.metrics.regression import MAE, MSE, R2, RMSE
from headrace.metrics.sketches import DistinctCount, Quantiles
from headrace.metrics.spread import Histogram, Std, Variance

__all__ = [
    "AUCPR",
    "AUCROC",
    "F1",
    "MAE",
    "MSE",
    "R2",
    "RMSE",
    "Accuracy",
    "Brier",
    "CalibrationError",
    "ConfusionMatrix",
    "Count",
    "CrossEntropy",
    "Custom",
    "DistinctCount",
    "Histogram",
    "LogLoss",
    "Max",
    "Mean",
    "Min",
    "Precision",
    "Quantiles",
    "Recall",
    "Std",
    "Sum",
    "TopKAccuracy",
    "Variance",
]
