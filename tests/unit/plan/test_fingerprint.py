"""Fingerprints: what changes meaning shows, what does not stays out, and every process finds the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import headrace as hr
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.contracts.sink import Sink
from headrace.plan.fingerprint import differences, fingerprint, models_of
from headrace.plan.nodes import Plan, Write

SETTINGS = {"on_error": "skip", "deterministic": False}
TABLE = pa.table({"x": list(range(10)), "y": ["a"] * 10})


def of(dataset: hr.Dataset, sink: Sink | None = None, **settings: Any) -> dict[str, Any]:
    plan = dataset._plan
    written = Plan(plan.read, plan.ops, Write(sink or ParquetSink("/tmp/somewhere/out")))
    return fingerprint(written, settings={**SETTINGS, **settings})


def of_function(fn: Any, **kwargs: Any) -> dict[str, Any]:
    return of(hr.from_arrow(TABLE).map_batches(fn, **kwargs))


def made(source: str, name: str = "f", folder: Path | None = None, module: str = "user_code") -> Any:
    """A function out of a source file, as a module of the user's has it."""
    assert folder is not None
    file = folder / f"{module}.py"
    file.write_text(source)
    space: dict[str, Any] = {"__name__": module, "__file__": str(file)}
    exec(compile(source, str(file), "exec"), space)
    return space[name]


def compare(tmp_path: Path, old: str, new: str, name: str = "f", **kwargs: Any) -> list[str]:
    """Both sources, one after the other in the same file."""
    before = of_function(made(old, name, tmp_path), **kwargs)
    return differences(before, of_function(made(new, name, tmp_path), **kwargs))


# ---------------------------------------------------------------- code


def test_layout_comments_docstrings_and_annotations_mean_nothing(tmp_path: Path) -> None:
    old = "def f(b):\n    return {'x': b['x'] + 1}\n"
    new = (
        "import os\n\n\ndef f(b: dict[str, int]) -> dict:\n    '''What it does.'''\n"
        "    # a comment\n    return {\n        'x': b['x'] + 1,\n    }\n"
    )
    assert compare(tmp_path, old, new) == []


def test_changed_code_shows_with_a_diff(tmp_path: Path) -> None:
    (line,) = compare(tmp_path, "def f(b):\n    return {'x': b['x'] + 1}\n", "def f(b):\n    return {'x': b['x'] + 2}\n")
    assert line.splitlines()[0] == "map_batches(f): its code changed"
    assert "    -    return {'x': b['x'] + 1}" in line.splitlines()
    assert "    +    return {'x': b['x'] + 2}" in line.splitlines()


def test_a_source_that_changes_between_two_plans_is_read_again(tmp_path: Path) -> None:
    """What one plan has found out is used by the next, and only while the source says the same."""
    source = "def f(b):\n    return {'x': b['x'] + 1}\n"
    path = tmp_path / "edited.py"
    path.write_text(source)
    names: dict[str, Any] = {"__name__": "edited"}
    exec(compile(source, str(path), "exec"), names)
    before = of_function(names["f"])
    assert of_function(names["f"]) == before
    path.write_text(source.replace("+ 1", "+ 200"))
    again: dict[str, Any] = {"__name__": "edited"}
    exec(compile(path.read_text(), str(path), "exec"), again)
    (line,) = differences(before, of_function(again["f"]))
    assert "b['x'] + 200" in line


def test_a_helper_of_a_helper_and_a_constant_show(tmp_path: Path) -> None:
    old = "K = 3\nunused = 1\ndef low(x):\n    return x * K\n"
    old += "def helper(x):\n    return low(x)\ndef f(b):\n    return {'x': helper(b['x'])}\n"
    (line,) = compare(tmp_path, old, old.replace("x * K", "x + K"))
    assert line.startswith("map_batches(f): low changed")
    assert compare(tmp_path, old, old.replace("K = 3", "K = 5")) == ["map_batches(f) K: 3 -> 5"]
    assert compare(tmp_path, old, old.replace("unused = 1", "unused = 2")) == []


def test_functions_that_call_each_other_end(tmp_path: Path) -> None:
    source = "def g(n):\n    return f(n - 1)\ndef f(n):\n    return g(n) if n else 0\n"
    assert compare(tmp_path, source, source) == []
    assert compare(tmp_path, source, source.replace("n - 1", "n - 2"))


def test_lambdas_on_one_line_are_told_apart(tmp_path: Path) -> None:
    source = "f, g = lambda b: {'x': b['x'] + 1}, lambda b: {'x': b['x'] + 2}\n"
    f, g = (of_function(made(source, name, tmp_path)) for name in "fg")
    (line,) = differences(f, g)
    assert "b['x'] + 2" in line
    assert differences(f, of_function(made(source, "f", tmp_path))) == []


def test_code_without_source_is_known_by_its_instructions() -> None:
    def at(text: str) -> dict[str, Any]:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(text, space)
        return of_function(space["f"])

    assert differences(at("def f(b): return {'x': b['x'] + 1}"), at("\n\ndef f(b):\n  return {'x': b['x'] + 1}")) == []
    assert differences(at("def f(b): return {'x': b['x'] + 1}"), at("def f(b): return {'x': b['x'] + 2}"))
    assert differences(
        at("def f(b): return {'x': b['x']} if b in {'a', 'b'} else b"),
        at("def f(b): return {'x': b['x']} if b in {'a', 'c'} else b"),
    )


def test_defaults_closures_and_partials() -> None:
    def make(k: int, *, d: int = 1) -> Any:
        def f(b: Any, n: int = d) -> Any:
            return {"x": b["x"] * k + n}

        return f

    assert differences(of_function(make(1)), of_function(make(1))) == []
    assert differences(of_function(make(1)), of_function(make(2))) == ["map_batches(f) k: 1 -> 2"]
    assert differences(of_function(make(1)), of_function(make(1, d=2))) == ["map_batches(f) n: 1 -> 2"]
    assert differences(of_function(functools.partial(make(1), n=3)), of_function(functools.partial(make(1), n=4)))


class Scaler:
    def __init__(self, factor: float = 1.0, path: str | None = None, api_key: str | None = None) -> None:
        self.factor = factor
        self.path = path
        self.calls = 0
        self.lock = threading.Lock()
        self.log = logging.getLogger("scaler")

    def __call__(self, batch: Any) -> Any:
        self.calls += 1
        return {"x": batch["x"] * self.factor}

    def method(self, batch: Any) -> Any:
        return {"x": batch["x"] - self.factor}


class Point(NamedTuple):
    x: int
    y: int


class Words(str):
    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    n: int


def test_objects_methods_and_classes() -> None:
    assert differences(of_function(Scaler(1.0)), of_function(Scaler(1.0))) == []
    assert differences(of_function(Scaler(1.0)), of_function(Scaler(2.0))) == [
        "map_batches(Scaler) function factor: 1.0 -> 2.0"
    ]
    assert differences(of_function(Scaler(1.0).method), of_function(Scaler(2.0).method))
    old = of_function(Scaler, fn_constructor_kwargs={"factor": 1.0})
    assert differences(old, of_function(Scaler, fn_constructor_kwargs={"factor": 2.0})) == [
        "map_batches(Scaler): argument factor: 1.0 -> 2.0"
    ]


def test_what_code_scribbles_on_has_no_meaning(tmp_path: Path) -> None:
    seen: list[int] = []

    def f(batch: Any) -> Any:
        seen.append(1)
        return batch

    scaler = Scaler()
    before = of_function(f), of_function(scaler)
    f({})
    scaler({"x": 1.0})
    assert differences(before[0], of_function(f)) == []
    assert differences(before[1], of_function(scaler)) == []


def test_a_base_class_shows(tmp_path: Path) -> None:
    source = "class Base:\n    def go(self, b):\n        return {'x': b['x'] + 1}\n"
    source += "class F(Base):\n    def __call__(self, b):\n        return self.go(b)\n"
    (line,) = compare(tmp_path, source, source.replace("+ 1", "+ 2"), "F")
    assert line.startswith("map_batches(F): Base changed")


def test_what_a_decorator_wraps_and_the_decorator_show(tmp_path: Path) -> None:
    source = (
        "import functools\ndef twice(k):\n    def make(f):\n        @functools.wraps(f)\n        def inner(b):\n"
        "            return [f(b)] * k\n        return inner\n    return make\n@twice(2)\ndef f(b):\n    return b + 1\n"
    )
    (line,) = compare(tmp_path, source, source.replace("b + 1", "b + 2"))
    assert line.startswith("map_batches(f): f changed")
    lines = compare(tmp_path, source, source.replace("[f(b)] * k", "[f(b) * k]"))
    assert lines[0].startswith("map_batches(f): its code changed")
    assert "map_batches(f) k: 2 -> 3" in compare(tmp_path, source, source.replace("@twice(2)", "@twice(3)"))


def test_a_version_stands_for_the_code(tmp_path: Path) -> None:
    one = "def f(b):\n    return {'x': b['x'] + 1}\nf.headrace_version = '1'\n"
    assert compare(tmp_path, one, one.replace("+ 1", "+ 2")) == []
    assert compare(tmp_path, one, one.replace("'1'", "'2'")) == ["map_batches(f): version: 1 -> 2"]
    cls = "class F:\n    headrace_version = 1\n    def __call__(self, b):\n        return {'x': b['x'] + 1}\n"
    assert compare(tmp_path, cls, cls.replace("+ 1", "+ 2"), "F") == []
    assert compare(tmp_path, cls, cls.replace("version = 1", "version = 2"), "F") == ["map_batches(F): version: 1 -> 2"]


# ---------------------------------------------------------------- steps


def test_steps_and_options() -> None:
    ds = hr.from_arrow(TABLE)

    def f(batch: Any) -> Any:
        return batch

    assert differences(of(ds.limit(100)), of(ds.limit(200))) == ["limit: 100 -> 200"]
    filtered = ds.filter(pc.field("x") > 1)
    assert differences(of(filtered), of(filtered.map(f))) == ["a new step map(f) after filter"]
    assert differences(of(filtered.map(f)), of(filtered)) == ["the step map(f) is gone"]
    (line,) = differences(of(filtered), of(ds.filter(pc.field("x") > 2)))
    assert line == "filter expression: (x > 1) -> (x > 2)"
    assert differences(of(ds, on_error="skip"), of(ds, on_error="quarantine")) == ["on_error: skip -> quarantine"]
    assert differences(of(ds, on_error="fail"), of(ds, on_error="skip")) == [], "what it settled holds no bad row"
    assert differences(of(ds.map_batches(f, batch_size=8)), of(ds.map_batches(f, batch_size=9))) == [
        "map_batches(f) batch_size: 8 -> 9"
    ]
    assert differences(of(ds.select("x")), of(ds.select("y")))
    assert differences(of(ds.drop("x")), of(ds.drop("y")))
    assert differences(of(ds.evaluate(n=hr.metrics.Accuracy("x", "y"))), of(ds.evaluate(n=hr.metrics.Accuracy("x", "x"))))
    small, large = (of(ds.apply(hr.images.decode("y", resize=n))) for n in (8, 9))
    (line,) = differences(small, large)
    assert line.endswith("resize: 8 -> 9")


def test_what_only_changes_how_fast_it_is_stays_out() -> None:
    ds = hr.from_arrow(TABLE)

    def f(batch: Any) -> Any:
        return batch

    assert of(ds.map_batches(f, concurrency=1)) == of(ds.map_batches(f))
    slow, quick = (ds.predict(f, batch_size=n, device=d, replicas=n) for n, d in ((1, "cpu"), (2, "sim")))
    assert of(slow) == of(quick)
    assert differences(of(slow, deterministic=True), of(quick, deterministic=True)) == ["predict(f) batch_size: 1 -> 2"]


def test_input_and_output(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for name in "ab":
        pq.write_table(TABLE, tmp_path / f"{name}.parquet")
    a, b = (hr.read_parquet(str(tmp_path / f"{name}.parquet")) for name in "ab")
    (line,) = differences(of(a), of(b))
    assert line.startswith("input paths: ")
    assert "a.parquet" in line
    assert of(a)["input"]["columns"] == {"x": "int64", "y": "string"}
    looked_up = hr.read_parquet(str(tmp_path / "a.parquet"))
    looked_up.schema()
    assert of(a) == of(looked_up)
    assert of(a, ParquetSink("/tmp/x/1")) == of(a, ParquetSink("/tmp/x/2", fresh=True))
    assert differences(of(a), of(a, JsonSink("/tmp/x/1")))
    assert differences(of(a), of(a, ParquetSink("/tmp/x/1", compression="zstd"))) == ["output compression: auto -> zstd"]
    assert differences(of(a), of(a, ParquetSink("/tmp/x/1", outputs="per_input"))) == ["output outputs: packed -> per_input"]
    changed = hr.from_arrow(TABLE.set_column(0, "x", pa.array([9] * 10)))
    assert differences(of(hr.from_arrow(TABLE)), of(changed))


def test_another_format_is_said() -> None:
    new = of(hr.from_arrow(TABLE))
    (line,) = differences({**new, "format": 0}, new)
    assert "another format" in line
    assert differences({}, new)


def test_anything_may_stand_in_an_old_fingerprint() -> None:
    new = of(hr.from_arrow(TABLE).limit(3))
    for value in (None, 1, "x", [], [[]], [1], {"a": []}, [{"name": [], "kind": {}, "code": 3, "function": 4}]):
        for key in ("input", "steps", "output", "settings"):
            assert differences({**new, key: value}, new)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _leaves(value[key], (*path, key))
    else:
        yield path


def test_every_change_but_of_what_is_only_told_shows(tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(b"1")
    ds = hr.from_arrow(TABLE).filter(pc.field("x") > 1).map(lambda r: r).rename({"y": "z"}).select("x", "z")
    ds = ds.predict(Scaler, input="x", constructor_kwargs={"path": [str(model)], "factor": {"a": 1.5}}).limit(3)
    ds = ds.map_batches(functools.partial(Scaler(2.0).method)).evaluate(n=hr.metrics.Accuracy("x", "x"))
    found = of(ds)
    checked = 0
    for path in _leaves(found):
        told = path[0] == "about" or path[-1] == "text" or (path[0] == "steps" and path[2:] == ("digest",))
        changed = json.loads(json.dumps(found))
        at = changed
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = "something else"
        assert bool(differences(found, changed)) != told, path
        checked += 1
    assert checked > 50


# ---------------------------------------------------------------- values, files, secrets


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(5), np.arange(5) + 1),
        (np.arange(4), np.arange(4).astype("int32")),
        (TABLE, TABLE.slice(1)),
        (pa.array([1, 2]), pa.array([1, 3])),
        ({"a": [1, (2, 3)]}, {"a": [1, (2, 4)]}),
        ({1, 2, 3}, {1, 2, 4}),
        (b"abc", b"abd"),
        (float("nan"), float("inf")),
        (list(range(1000)), list(range(1001))),
        ({i: str(i) for i in range(500)}, {i: str(i + 1) for i in range(500)}),
        (Scaler(1.0), Scaler(2.0)),
        (Point(1, 2), Point(1, 3)),
        (Words("a"), Words("b")),
        (Part(1), Part(2)),
        ("x" * 1000, "x" * 999 + "y"),
    ],
)
def test_values_by_content(one: Any, other: Any) -> None:
    import copy

    def with_value(value: Any) -> dict[str, Any]:
        return of_function(Scaler, fn_constructor_args=(value,))

    assert with_value(one) == with_value(copy.copy(one))
    assert differences(with_value(one), with_value(other))


def test_pandas_and_sklearn() -> None:
    pd = pytest.importorskip("pandas")
    linear = pytest.importorskip("sklearn.ensemble")
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert differences(of_function(Scaler(frame)), of_function(Scaler(frame.copy()))) == []
    assert differences(of_function(Scaler(frame)), of_function(Scaler(frame.assign(a=[1, 3]))))

    def fitted(seed: int) -> Any:
        x = np.random.default_rng(0).normal(size=(60, 3))
        return linear.RandomForestClassifier(5, random_state=seed).fit(x, x[:, 0] > 0)

    assert differences(of_function(Scaler(fitted(1))), of_function(Scaler(fitted(1)))) == []
    assert differences(of_function(Scaler(fitted(1))), of_function(Scaler(fitted(2))))


def test_torch_weights() -> None:
    torch = pytest.importorskip("torch")

    def module(seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)

    def at(seed: int) -> dict[str, Any]:
        return of(hr.from_arrow(TABLE).predict(module(seed), input="x"))

    assert at(1) == at(1)
    assert differences(at(1), at(2))
    assert "torch" in at(1)["about"]["packages"]


def test_attributes_of_torch_modules_and_torch_decorators(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = (
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, t):\n        super().__init__()\n        self.t = t\n"
        "    def forward(self, x):\n        return x + self.t\n"
        "@torch.no_grad()\ndef f(b):\n    return {'x': b['x'] + 1}\n"
        "one, two = Net(1), Net(2)\n"
    )
    (line,) = compare(tmp_path, source, source.replace("b['x'] + 1", "b['x'] + 2"))
    assert line.startswith("map_batches(f): its code changed")
    wrapped = of_function(made(source, "f", tmp_path))
    assert "_contextlib" not in json.dumps(wrapped)
    assert wrapped == of_function(made(source, "f", tmp_path))
    net = functools.partial(made, source, folder=tmp_path)
    assert of_function(net("one")) == of_function(net("one"))
    assert differences(of_function(net("one")), of_function(net("two"))) == ["map_batches(Net) function . t: 1 -> 2"]


def test_what_can_not_be_described_does_not_stop_a_run() -> None:
    class Odd:
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise RuntimeError("no")

        def __getstate__(self) -> Any:
            raise RuntimeError("no")

    assert of_function(Scaler(Odd())) == of_function(Scaler(Odd()))  # type: ignore[arg-type]


def test_model_files(tmp_path: Path) -> None:
    model = tmp_path / "model.bin"

    def at(path: Any) -> dict[str, Any]:
        return of(hr.from_arrow(TABLE).predict(Scaler, constructor_kwargs={"path": str(path)}))

    absent = at(model)
    model.write_bytes(b"1")
    one = at(model)
    model.write_bytes(b"2")
    assert differences(one, at(model)) == [f"predict(Scaler): argument path: the file {model} changed"]
    assert differences(absent, at(model)) == []  # nothing was known of it: it may be made by the run itself
    other = tmp_path / "model-2.bin"
    other.write_bytes(b"2")
    (line,) = differences(one, at(other))
    assert line == f"predict(Scaler): argument path: {model} -> {other}"
    folder = tmp_path / "checkpoint.d"
    folder.mkdir()
    (folder / "w").write_bytes(b"1")
    before = at(folder)
    (folder / "w").write_bytes(b"2")
    assert differences(before, at(folder)) == [f"predict(Scaler): argument path: the folder {folder} changed"]


def test_large_files_are_sampled(tmp_path: Path) -> None:
    file = tmp_path / "big.bin"
    with open(file, "wb") as f:
        f.truncate(65 << 20)
    before = of_function(Scaler, fn_constructor_kwargs={"path": str(file)})
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert "sampled" in json.dumps(before)
    assert differences(before, of_function(Scaler, fn_constructor_kwargs={"path": str(file)}))


def test_secrets_stay_out(tmp_path: Path) -> None:
    source = "API_KEY = 'hunter2-{0}'\nURL = 'https://u:hunter2-{0}@h/x?sig=hunter2-{0}'\n"
    source += "def f(b, token='hunter2-{0}'):\n    call(URL, API_KEY, password='hunter2-{0}')\n    return b\n"
    kwargs: dict[str, Any] = {"fn_kwargs": {"secret_key": "hunter2", "options": {"password": "hunter2"}}}
    one, two = (of_function(made(source.format(n), "f", tmp_path), **kwargs) for n in (1, 2))
    assert "hunter2" not in json.dumps(one)
    assert differences(one, two) == []
    bare = of_function(Scaler, fn_constructor_kwargs={"api_key": None})
    assert differences(bare, of_function(Scaler, fn_constructor_kwargs={"api_key": "hunter2"})) == []


def test_devices_and_threads_of_models_stay_out() -> None:
    def at(**kwargs: Any) -> dict[str, Any]:
        return of(hr.from_arrow(TABLE).predict(Scaler, constructor_kwargs=kwargs))

    assert at(device="cuda:0", n_jobs=4) == at(device="cpu", n_jobs=None)
    assert differences(at(device="phone"), at(device="tablet"))  # a column's value, say


def test_models_by_version_or_digest() -> None:
    class Churn:
        headrace_version = "2024-01"

        def __call__(self, batch: Any) -> Any:
            return batch

    ds = hr.from_arrow(TABLE)
    assert models_of(of(ds.predict(Churn))) == {"predict(Churn)": "version 2024-01"}
    assert models_of(of(ds.predict(Scaler)))["predict(Scaler)"].startswith("digest ")
    assert models_of({"steps": 3}) == {}


# ---------------------------------------------------------------- the same everywhere

SCRIPT = """
import functools, json, sys, re
import numpy as np
import pyarrow as pa
import headrace as hr
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.plan.fingerprint import fingerprint
from headrace.plan.nodes import Plan, Write

NAMES = {"b", "a", "zebra", "yak", "wolf"}
PATTERN = re.compile("x+")
TABLE = {name: i for i, name in enumerate(sorted(NAMES))}

def helper(x):
    return x if x in NAMES else PATTERN.sub("", TABLE.get(x, ""))

class Model:
    kinds = frozenset(NAMES)
    def __init__(self, weights, device="cpu"):
        self.weights = weights
    def __call__(self, x):
        return np.asarray([helper(v) for v in x])

def f(batch, k=3):
    return batch if k in {1, 2, "three"} else batch

def make():
    ds = hr.from_arrow(pa.table({"x": ["a", "b"]})).map_batches(functools.partial(f, k=4))
    ds = ds.map(lambda r: r).filter(lambda r: True)
    plan = ds.predict(Model, input="x", constructor_args=(np.arange(4.0),))._plan
    plan = Plan(plan.read, plan.ops, Write(ParquetSink("/tmp/somewhere/out")))
    return json.dumps(fingerprint(plan, settings={"on_error": "fail"}), sort_keys=True)

if __name__ == "__main__":
    print(make())
"""


def test_every_process_finds_the_same(tmp_path: Path) -> None:
    script = tmp_path / "scoring_job.py"
    script.write_text(SCRIPT)
    found = set()
    commands = [[str(script)], [str(script)], ["-c", "import scoring_job; print(scoring_job.make())"]]
    for seed, arguments in enumerate(commands):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = os.pathsep.join([str(tmp_path), *[p for p in sys.path if p]])
        env = {**os.environ, "PYTHONHASHSEED": str(seed + 1), "PYTHONPATH": path}
        out = subprocess.run([sys.executable, *arguments], env=env, cwd=folder, capture_output=True, text=True, check=True)
        found.add(out.stdout)
    assert len(found) == 1
    assert "helper" in found.pop()


def test_a_library_that_is_not_loaded_yet_is_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "site-packages"
    library.mkdir()
    (library / "lazy_library.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(library))
    f = made("def f(b):\n    import lazy_library\n    return b\n", folder=tmp_path)
    before = of_function(f)
    assert "lazy_library" not in sys.modules
    f({})
    assert "lazy_library" in sys.modules
    assert not differences(before, of_function(f))
    del sys.modules["lazy_library"]


def test_it_is_json_and_stays_so() -> None:
    found = of(hr.from_arrow(TABLE).map_batches(Scaler, fn_constructor_args=(1.5, "a")).limit(3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (1, True), (0, False), ([1, 2], [1, 2.0])])
def test_equal_numbers_of_other_types_are_other_arguments(old: Any, new: Any) -> None:
    plans = [{"format": 1, "steps": [{"name": "map(f)", "kind": "map", "arguments": {"k": k}}]} for k in (old, new)]
    assert differences(plans[0], plans[1])
    assert differences(plans[0], plans[0]) == []
