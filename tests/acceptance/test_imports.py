"""What a run does not import: it would cost every short one more than its work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PLANS = {
    "predict": """
        class Half:
            def __call__(self, ids):
                return ids / 2

        made = hr.range(100).predict(Half, input="id", output="half").to_arrow(progress="quiet")
        assert made.num_rows == 100
    """,
    "rows": """
        def described(row):
            small = row["id"] < 5
            return {**row, "text": "ä" * row["id"], "half": row["id"] / 2, "small": small, "some": row["id"] if small else None}

        made = hr.range(100).map(described).filter(lambda row: row["id"] != 3).to_arrow(progress="quiet")
        assert made.num_rows == 99
        assert made.column("some").null_count == 95
    """,
    "lists and dicts": """
        def boxed(row):
            boxes = [{"label": "cat", "at": [1.0, 2.0]}, {"label": "dog", "at": []}]
            return {"boxes": boxes[: row["id"] % 3], "answer": {"text": "yes", "tokens": row["id"]}}

        made = hr.range(100).map(boxed).filter(lambda row: len(row["boxes"]) < 2).to_arrow(progress="quiet")
        assert made.num_rows == 67
    """,
    "items": """
        assert hr.from_items([{"text": str(i), "i": i} for i in range(9)]).map(dict).to_arrow(progress="quiet").num_rows == 9
    """,
    "one row becomes several": """
        made = hr.range(10).flat_map(lambda row: [{"name": f"{row['id']}-{i}"} for i in range(3)]).to_arrow(progress="quiet")
        assert made.num_rows == 30
    """,
    "batches": """
        import numpy as np

        def named(batch):
            return {"name": np.array([f"row {i}" for i in batch["id"]]), "vector": np.ones((len(batch["id"]), 4), np.float32)}

        made = hr.range(100).map_batches(named).to_arrow(progress="quiet")
        assert made.num_rows == 100
    """,
    "metrics": """
        def scored(row):
            return {"score": row["id"] / 100, "label": row["id"] % 2, "group": "a" if row["id"] < 30 else "b"}

        class AsIs:
            def __call__(self, score):
                return score

        data = hr.range(100).map(scored).predict(AsIs, input="score", output="p")
        counted = data.evaluate(auc=hr.metrics.AUCROC("p", "label", by="group"), groups=hr.metrics.Accuracy("label", "label"))
        assert counted.write_parquet(folder + "/out", progress="quiet").rows == 100
    """,
    "CSV": """
        data = hr.range(100).map(lambda row: {"text": f"{row['id']},", "half": row["id"] / 2})
        data.write_csv(folder + "/out", progress="quiet")
        assert hr.read_csv(folder + "/out").to_arrow(progress="quiet").num_rows == 100
    """,
    "JSON": """
        data = hr.range(100).map(lambda row: {"text": f'{row["id"]}"', "half": row["id"] / 2})
        data.write_json(folder + "/out", progress="quiet")
        assert hr.read_json(folder + "/out").to_arrow(progress="quiet").num_rows == 100
    """,
    "rows set aside": """
        def refused(row):
            if row["id"] == 7:
                raise ValueError("seven")
            return row

        hr.range(100).map(refused).write_parquet(folder + "/out", on_error="skip", progress="quiet")
        assert hr.read_parquet(folder + "/out").to_arrow(progress="quiet").num_rows == 99
    """,
}


@pytest.mark.parametrize("plan", PLANS)
def test_no_pandas_is_imported(plan: str, tmp_path: Path) -> None:
    """Arrow's own conversions import it wherever it is installed, 0.2 s of a core in each process."""
    lines = ["import sys", "import headrace as hr", f"folder = {str(tmp_path)!r}", textwrap.dedent(PLANS[plan])]
    program = "\n".join([*lines, 'print("pandas" in sys.modules)'])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_worker_processes_import_none_either(tmp_path: Path) -> None:
    program = """
        def where(row):
            import sys
            return {"id": row["id"], "imported": "pandas" in sys.modules, "text": str(row["id"])}

        data = hr.range(100).map(where).filter(lambda row: row["id"] >= 0).map(where)
        made = data.to_arrow(engine="processes", progress="quiet")
        print(any(made.column("imported").to_pylist()))
    """
    done = subprocess.run(
        [sys.executable, "-c", "import headrace as hr\n" + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
