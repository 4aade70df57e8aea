"""The demo: read handwritten digits, look at them, count how often we are right, write. `./dev demo` runs it.

scikit-learn's 1,797 scans (8 x 8 pixels) are enlarged and stored as JPEG and PNG bytes in Parquet. A classifier is
trained on one half; the other half goes read -> decode -> predict -> accuracy and AUC -> Parquet.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import headrace as hr

SIDE = 32  # pixels of a stored scan: small, but large enough for JPEG's 8 x 8 blocks not to spoil it
FILES = 6

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("image", pa.binary()),
        ("label", pa.int64()),
        ("scan", pa.struct([("format", pa.string()), ("page", pa.int32()), ("stroke", pa.list_(pa.float32()))])),
        ("scanned_at", pa.timestamp("ms", tz="UTC")),
    ]
)


class DigitClassifier:
    """scikit-learn's, trained at set-up; what Headrace sees is any class that takes arrays and returns arrays."""

    def __init__(self, path: str) -> None:
        self.model = joblib.load(path)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """image: uint8 (rows, 8, 8, 1)."""
        probability = self.model.predict_proba(_features(image)).astype(np.float32)
        return {"digit": probability.argmax(axis=1), "score": probability.max(axis=1), "probability": probability}


def _features(image: np.ndarray) -> np.ndarray:
    return image.reshape(len(image), -1).astype(np.float32) / 255.0


def prepare(home: Path) -> None:
    """Write the input and train the classifier, unless a run before this one did."""
    if (home / "ready.json").exists():
        return
    digits: Any = load_digits()
    scans = [_enlarge(image) for image in digits.images]
    held_out = np.arange(len(scans)) % 2 == 1
    training = _shrink([scans[i] for i in np.flatnonzero(~held_out)])
    model = LogisticRegression(C=10.0, max_iter=2000)
    model.fit(_features(training), digits.target[~held_out])
    home.mkdir(parents=True, exist_ok=True)
    joblib.dump(model, home / "digits.joblib")
    rows = [_row(int(i), scans[i], int(digits.target[i])) for i in np.flatnonzero(held_out)]
    (home / "input").mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(len(rows)), FILES)):
        table = pa.Table.from_pylist([rows[j] for j in part], SCHEMA)
        pq.write_table(table, home / "input" / f"digits-{i}.parquet", compression="none")
    (home / "ready.json").write_text(json.dumps({"rows": len(rows)}))


def _enlarge(image: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.resize((image * (255 / 16)).astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def _shrink(scans: list[np.ndarray]) -> np.ndarray:
    """What the pipeline's decoding makes of the scans, so that the classifier is trained on what it will see."""
    batch = pa.RecordBatch.from_pydict({"image": [_png(scan) for scan in scans]})
    decoded: Any = DECODE.apply(batch).column("image")
    return decoded.to_numpy_ndarray()


def _png(scan: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(".png", scan)[1].tobytes()


def _row(i: int, scan: np.ndarray, label: int) -> dict[str, Any]:
    import simplejpeg

    jpeg = i % 4 == 1
    return {
        "id": i,
        "image": simplejpeg.encode_jpeg(scan[:, :, None], quality=92, colorspace="GRAY") if jpeg else _png(scan),
        "label": label,
        "scan": {"format": "jpeg" if jpeg else "png", "page": i // 100, "stroke": [scan.mean() / 255, scan.std() / 255]},
        "scanned_at": datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=11 * i),
    }


DECODE = hr.images.decode("image", mode="L", resize=(8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".headrace-demo"), help="where input, model and output go")
    home = parser.parse_args().home
    started = time.perf_counter()
    prepare(home)
    print(f"Set-up (scans as JPEG and PNG in Parquet, a classifier trained on the other half): {_since(started)}\n")

    pipeline = (
        hr.read_parquet(str(home / "input"))
        .apply(DECODE)
        .predict(
            DigitClassifier,
            input="image",
            output=("digit", "score", "probability"),
            constructor_args=(str(home / "digits.joblib"),),
        )
        .evaluate(
            rows=hr.metrics.Count(),
            accuracy=hr.metrics.Accuracy("digit", "label"),
            auc=hr.metrics.AUCROC("probability", "label", classes=10),
            log_loss=hr.metrics.LogLoss("probability", "label"),
        )
        .drop("image", "probability")
    )
    run = pipeline.write_parquet(str(home / "output"), fresh=True)

    print("Predictions beside the columns that were carried over:")
    hr.read_parquet(str(home / "output")).show(6)
    print("\nMetrics, computed in the same pass:")
    for name, value in run.metrics.items():
        print(f"  {name:<10}{value:>8,.4f}" if isinstance(value, float) else f"  {name:<10}{value:>8,}")
    print("\nWhere time went:")
    print(run)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    main()
