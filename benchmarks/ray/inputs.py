"""Inputs of the comparison, made by the makers of the other benchmarks. A folder that is there already is kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

import images
import pyarrow as pa
import pyarrow.parquet as pq
import small_files
import tabular


def make(folder: Path, workload: str, files: int, rows: int) -> Path:
    """A folder of `files` Parquet files, `rows` rows each, with a unique column id."""
    made = folder / f"{workload}-{files}x{rows}"
    if not (made / "done").exists():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        if workload == "images":
            images.photographs(made / "in", files, rows)
        elif workload == "tabular":
            tabular.make(made / "in", files, rows)
            for i, path in enumerate(sorted((made / "in").glob("*.parquet"))):
                ids = pa.array(range(i * rows, (i + 1) * rows))
                pq.write_table(pq.read_table(path).append_column("id", ids), path)
        else:
            small_files.make(made / "in", files, rows)
        (made / "done").touch()
    if workload == "images":
        number_rows(made / "in")
    return made


def number_rows(folder: Path) -> None:
    """Refuse photographs whose ids are not unique: outputs are compared by them."""
    ids = pa.concat_tables([pq.read_table(path, columns=["id"]) for path in folder.glob("*.parquet")])["id"]
    if len(ids.unique()) != len(ids):
        raise SystemExit(f"ids in {folder} are not unique")
