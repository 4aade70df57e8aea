"""Docs that can't lie: their Python runs, their links lead somewhere, the reference is what the code says.

The ```python blocks of a page are one script, run as a user would run it, in a folder with a few photographs. A block
under `<!-- skip -->` needs what not every machine has (S3, a torch model file) and is only compiled.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("tutorial/*.md")), *sorted((ROOT / "docs").glob("howto/*.md"))]
ALL_PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
SKIPPABLE = {"s3.md", "models.md", "models-deep.md", "models-remote.md"}

_BLOCK = re.compile(r"(<!-- skip -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """(skipped, code) of the page's Python blocks."""
    return [(bool(skip), code) for skip, code in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as the pages assume it."""
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(300, 400), (256, 256), (480, 320), (224, 500)]):
        smooth = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((64, 64, 1)))[:height, :width].astype(np.uint8)
        Image.fromarray(smooth).save(photos / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_of_the_page_runs(page: Path, place: Path) -> None:
    code = [code for skipped, code in blocks(page) if not skipped]
    if not code:
        assert page.name in SKIPPABLE
        return
    script = place / "page.py"
    script.write_text("\n".join(code), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, script.name], cwd=place, env=env, capture_output=True, text=True, encoding="utf-8", timeout=100
    )
    assert done.returncode == 0, f"{name(page)}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_skipped_python_is_rare_and_parses(page: Path) -> None:
    skipped = [code for skip, code in blocks(page) if skip]
    assert not skipped or page.name in SKIPPABLE
    for code in skipped:
        ast.parse(code)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_reference_is_up_to_date() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    script = ROOT / "docs" / "reference" / "generate.py"
    done = subprocess.run([sys.executable, script, "--check"], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_the_architecture_page_exists() -> None:
    """The page's folders are the tree's, and the other way round."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page[page.index("## Folders") : page.index("## Invariants")]
    named = set(re.findall(r"^  (\w+)/", section, flags=re.MULTILINE))
    real = {p.name for p in (ROOT / "src" / "headrace").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert named == real
