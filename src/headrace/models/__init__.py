"""`hr.models`: models of common libraries, named by an artifact or held as an object.

    ds.predict(hr.models.Sklearn("churn.joblib", trust=True), input=["age", "income"], output="p")

An adapter is a description: it imports no library before it is checked or loaded, so that this module is cheap. One file each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.models.endpoint import Endpoint
    from headrace.models.keras import Keras
    from headrace.models.lightgbm import LightGBM
    from headrace.models.onnx import Onnx
    from headrace.models.openai import OpenAI
    from headrace.models.sentence_transformers import SentenceTransformers
    from headrace.models.sklearn import Sklearn
    from headrace.models.tensorflow import TensorFlow
    from headrace.models.torch import Torch
    from headrace.models.transformers import Transformers
    from headrace.models.vllm import VLLM
    from headrace.models.xgboost import XGBoost

_PLACES = {
    "Endpoint": "endpoint",
    "Keras": "keras",
    "LightGBM": "lightgbm",
    "Onnx": "onnx",
    "OpenAI": "openai",
    "SentenceTransformers": "sentence_transformers",
    "Sklearn": "sklearn",
    "TensorFlow": "tensorflow",
    "Torch": "torch",
    "Transformers": "transformers",
    "VLLM": "vllm",
    "XGBoost": "xgboost",
}

__all__ = [
    "VLLM",
    "Endpoint",
    "Keras",
    "LightGBM",
    "Onnx",
    "OpenAI",
    "SentenceTransformers",
    "Sklearn",
    "TensorFlow",
    "Torch",
    "Transformers",
    "XGBoost",
]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'headrace.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headrace.models.{place}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
