"""JPEG photographs in Parquet, for examples and benchmarks: `python examples/photos.py DIR --files 4 --rows 1000`.

Random crops, flips and exposures of the photographs that come inside scikit-image and scikit-learn, about 500 x 375 pixels
and 100 KB each. The same arguments give the same rows; files that are there already are kept.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "1"  # of the recipe below: files of another version are made anew
NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
ROW_GROUP_ROWS = 250
FIRST_TAKEN = datetime(2024, 1, 1, tzinfo=UTC)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("image", pa.binary()),
        ("label", pa.string()),
        ("crop", pa.struct([("x", pa.int32()), ("y", pa.int32()), ("width", pa.int32()), ("height", pa.int32())])),
        ("taken", pa.timestamp("us", tz="UTC")),
    ]
)


def make_photos(folder: str | Path, files: int = 4, rows: int = 1000, seed: int = 0) -> Path:
    """Fill `folder` with `files` Parquet files of `rows` photographs, unless they are there. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photos-{i:05d}.parquet" for i in range(files)]
    stamp = f"{VERSION} rows={rows} seed={seed}".encode()
    for stale in set(folder.glob("photos-*.parquet")) - set(paths):
        stale.unlink()
    missing = [i for i, path in enumerate(paths) if not _made(path, stamp)]
    if missing:
        sources = _sources()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda i: _write(paths[i], i, rows, seed, sources, stamp), missing))
    return folder


def _made(path: Path, stamp: bytes) -> bool:
    return path.exists() and (pq.read_schema(path).metadata or {}).get(b"photos") == stamp


def _sources() -> list[tuple[str, np.ndarray]]:
    """The photographs, read from the packages' own folders: nothing is downloaded."""
    try:
        import cv2
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as missing:
        raise SystemExit(f"photos.py needs {missing.name}: run ./dev setup, or pip install 'headrace[test]'") from None

    cv2.setNumThreads(0)  # the pool below has a thread per core
    found = [("china", 0), ("flower", 1)]
    sources = [(name, np.ascontiguousarray(load_sample_images().images[i])) for name, i in found]
    folder = Path(skimage.data.__file__).parent
    for name in NAMES:
        if (folder / name).exists():
            photo = cv2.imread(str(folder / name), cv2.IMREAD_COLOR_RGB)
            assert photo is not None, name
            sources.append((Path(name).stem, photo))
    return sources


def _write(path: Path, file: int, rows: int, seed: int, sources: list[tuple[str, np.ndarray]], stamp: bytes) -> None:
    rng = np.random.default_rng([seed, file])
    # Enlarged photographs have lost their grain, and would make small files.
    grain = rng.normal(0.0, 5.0, (700, 700, 3)).round().astype(np.int16)
    part = path.with_suffix(".part")
    schema = SCHEMA.with_metadata({"photos": stamp})
    with pq.ParquetWriter(part, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, rows, ROW_GROUP_ROWS):
            ids = range(file * rows + start, file * rows + min(start + ROW_GROUP_ROWS, rows))
            writer.write_table(pa.Table.from_pylist([_photo(rng, i, sources, grain) for i in ids], schema))
    part.rename(path)


def _photo(rng: np.random.Generator, row: int, sources: list[tuple[str, np.ndarray]], grain: np.ndarray) -> dict[str, Any]:
    import cv2
    import simplejpeg

    label, photo = sources[int(rng.integers(len(sources)))]
    portrait = rng.random() < 0.2
    ratio = rng.uniform(0.7, 0.8) if not portrait else rng.uniform(1.25, 1.4)  # height / width
    width = int(min(photo.shape[1], photo.shape[0] / ratio) * rng.uniform(0.7, 1.0))
    height = int(width * ratio)
    x = int(rng.integers(photo.shape[1] - width + 1))
    y = int(rng.integers(photo.shape[0] - height + 1))
    part = photo[y : y + height, x : x + width]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    long = int(rng.integers(490, 511))
    size = (int(long / ratio), long) if portrait else (long, int(long * ratio))
    part = cv2.resize(np.ascontiguousarray(part), size, interpolation=cv2.INTER_CUBIC)
    part = cv2.convertScaleAbs(part, alpha=rng.uniform(0.85, 1.1), beta=rng.uniform(-10, 10))
    top, left = rng.integers(grain.shape[0] - size[1]), rng.integers(grain.shape[1] - size[0])
    part = cv2.add(part, grain[top : top + size[1], left : left + size[0]], dtype=cv2.CV_8U)
    return {
        "id": row,
        "image": simplejpeg.encode_jpeg(part, quality=95, colorsubsampling="420"),
        "label": label,
        "crop": {"x": x, "y": y, "width": width, "height": height},
        "taken": FIRST_TAKEN + timedelta(minutes=7 * row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1000, help="per file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = make_photos(args.folder, args.files, args.rows, args.seed)
    size = sum(path.stat().st_size for path in folder.glob("photos-*.parquet"))
    print(f"{folder}: {args.files} x {args.rows} photographs, {size / args.files / args.rows / 1000:.0f} KB each")


if __name__ == "__main__":
    main()
