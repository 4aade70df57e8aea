"""hr.models.Torch through the public API, beside torch itself."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.contracts.model import ModelAdapter, Place

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

ROWS = 37
INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}


class Net(nn.Module):
    """A tensor for a matrix of three columns; dropout tells whether it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Pair(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a - b, (a * b).bfloat16()


class Named(nn.Module):
    def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
        return {"difference": a - b, "product": a * b, "hidden": (a, b)}


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def rows() -> pa.Table:
    random = np.random.default_rng(0)
    return pa.table({name: random.normal(size=ROWS) for name in ("a", "b", "c")} | {"id": np.arange(ROWS)})


def direct(net: Any, rows: pa.Table) -> np.ndarray:
    """What torch says itself, on the whole."""
    matrix = torch.from_numpy(np.stack([rows[n].to_numpy() for n in ("a", "b", "c")], 1).astype(np.float32))
    with torch.no_grad():
        return net.eval()(matrix).numpy()


def predicted(adapter: Any, rows: pa.Table, **options: Any) -> np.ndarray:
    ds = hr.from_arrow(rows).predict(adapter, input=["a", "b", "c"], output="y", batch_size=10)
    made = ds.to_arrow(**(INLINE | options))
    assert made["id"].to_pylist() == list(range(ROWS))
    return np.stack(made["y"].combine_chunks().to_numpy_ndarray())


def test_it_is_an_adapter(net: Net) -> None:
    assert isinstance(hr.models.Torch(net), ModelAdapter)
    assert hr.models.Torch(net).name == "Torch(Net)"
    assert hr.models.Torch("s3://bucket/nets/net.pt").name == "Torch(net.pt)"


def test_a_live_module_and_the_user_s_own_is_left_alone(net: Net, rows: pa.Table) -> None:
    net.train()
    made = predicted(hr.models.Torch(net, stack=True), rows)
    assert net.training
    np.testing.assert_allclose(made, direct(net, rows), rtol=1e-5, atol=1e-6)


class Static(nn.Module):
    """One output buffer for all calls, as CUDA graphs have."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.zeros(ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sum(x, 1, out=self.out[: len(x)])


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"engine": "threads", "cpus": 1}])
def test_answers_in_the_same_memory_each_time(adapter: bool, options: dict[str, Any]) -> None:
    values = np.arange(ROWS * 2, dtype=np.float32).reshape(-1, 2)
    rows = hr.from_arrow(pa.table({"x": pa.FixedSizeListArray.from_arrays(values.ravel(), 2)}))
    model = hr.models.Torch(Static()) if adapter else Static()
    made = rows.predict(model, input="x", output="y", batch_size=5, device="cpu").to_arrow(**(INLINE | options))
    assert made["y"].to_pylist() == values.sum(1).tolist()


def test_parameters_are_shared_not_copied_unless_they_are_converted(net: Net) -> None:
    ours = hr.models.Torch(net)._module("cpu")
    assert next(ours.parameters()) is next(net.parameters())
    other = hr.models.Torch(Pictures(), channels_last=True)
    assert next(other._module("cpu").parameters()) is not next(other.model.parameters())
    assert next(other.model.parameters()).is_contiguous()


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint", "pickle", "script", "export"])
def test_every_kind_of_file(kind: str, net: Net, rows: pa.Table, tmp_path: Path) -> None:
    adapter = saved(kind, net, tmp_path)
    np.testing.assert_allclose(predicted(adapter, rows), direct(net, rows), rtol=1e-5, atol=1e-6)


def saved(kind: str, net: Net, folder: Path, *, trust: bool | None = None) -> Any:
    path = folder / {"safetensors": "net.safetensors", "export": "net.pt2"}.get(kind, "net.pt")
    options: dict[str, Any] = {"stack": True}
    net.eval()
    if kind == "safetensors":
        from safetensors.torch import save_model

        save_model(net, str(path))
    elif kind == "state_dict":
        torch.save(net.state_dict(), path)
    elif kind == "checkpoint":
        torch.save({"epoch": 3, "model_state_dict": net.state_dict()}, path)
    elif kind == "pickle":
        torch.save(net, path)
    elif kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(net).save(str(path))
    else:
        batch = torch.export.Dim("batch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(net, (torch.zeros(2, 3),), dynamic_shapes=({0: batch},)), path)
    if kind in ("safetensors", "state_dict", "checkpoint"):
        options["factory"] = Net
    else:
        options["trust"] = True
    if trust is not None:
        options["trust"] = trust
    return hr.models.Torch(str(path), **options)


@pytest.mark.parametrize("kind", ["pickle", "script", "export"])
def test_what_can_run_code_is_refused_without_trust(kind: str, net: Net, rows: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(hr.PlanError, match="any code") as refused:
        predicted(saved(kind, net, tmp_path, trust=False), rows)
    assert "trust=True" in refused.value.hint


def test_a_file_made_to_do_harm_is_not_opened(rows: pa.Table, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    for name, save in (("zip.pt", torch.save), ("old.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / name
        save({"weights": Harm()}, path)
        for factory in (None, Net):
            with pytest.raises(hr.PlanError, match="any code"):
                predicted(hr.models.Torch(path, factory=factory), rows)
    assert not (tmp_path / "harm").exists()


def test_weights_without_a_module(net: Net, rows: pa.Table, tmp_path: Path) -> None:
    for kind in ("safetensors", "state_dict"):
        path = saved(kind, net, tmp_path).model
        with pytest.raises(hr.PlanError, match="no module to put them into"):
            predicted(hr.models.Torch(path), rows)


def test_what_can_not_work_is_refused(net: Net, rows: pa.Table) -> None:
    with pytest.raises(hr.PlanError, match="no file or folder"):
        predicted(hr.models.Torch("nowhere.pt"), rows)
    words = hr.from_arrow(pa.table({"word": ["a"]}))
    with pytest.raises(hr.PlanError, match="can't use the column 'word' of type string"):
        words.predict(hr.models.Torch(net), input="word").take(**INLINE)
    for wrong in (
        {"dtype": "float8"},
        {"kwargs": True, "stack": True},
        {"factory": Net},
        {"normalize": (0.5, 0.5)},
        {"normalize": ((0.5,), (0.0,))},
    ):
        with pytest.raises(hr.PlanError):
            hr.models.Torch(net, **wrong)
    with pytest.raises(hr.PlanError, match="no module"):
        hr.models.Torch(3)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, net: Net, rows: pa.Table) -> None:
    import headrace.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(hr.PlanError, match="needs torch"):
        predicted(hr.models.Torch(net), rows)


def test_columns_are_positional_or_keywords(rows: pa.Table) -> None:
    a, b = (rows[n].to_numpy() for n in "ab")
    ds = hr.from_arrow(rows)
    pair = ds.predict(hr.models.Torch(Pair()), input=["a", "b"], output=["d", "p"]).to_arrow(**INLINE)
    np.testing.assert_array_equal(pair["d"], a - b)
    assert pair["p"].type == pa.float32()
    turned = ds.predict(hr.models.Torch(Pair()), input=["b", "a"], output=["d", "p"]).to_arrow(**INLINE)
    np.testing.assert_array_equal(turned["d"], b - a)
    named = ds.predict(hr.models.Torch(Named(), kwargs=True), input=["b", "a"]).to_arrow(**INLINE)
    np.testing.assert_array_equal(named["difference"], a - b)
    assert "hidden" not in named.column_names
    chosen = ds.predict(hr.models.Torch(Named(), kwargs=True, output="product"), input=["a", "b"]).to_arrow(**INLINE)
    assert set(chosen.column_names) - set(rows.column_names) == {"product"}
    renamed = ds.predict(hr.models.Torch(Pair(), output=["d", "p"]), input=["a", "b"]).to_arrow(**INLINE)
    np.testing.assert_array_equal(renamed["d"], a - b)
    with pytest.raises(hr.UserCodeError, match="no tensor 'hidden'"):
        ds.predict(hr.models.Torch(Named(), kwargs=True, output="hidden"), input=["a", "b"]).to_arrow(**INLINE)


def test_missing_values_are_told_by_column() -> None:
    ds = hr.from_arrow(pa.table({"flag": [True, None]}))
    with pytest.raises(hr.UserCodeError, match="column 'flag' has missing values"):
        ds.predict(hr.models.Torch(nn.Identity()), input="flag").take(**INLINE)


def test_images_travel_as_bytes_and_are_normalised_by_the_model() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    torch.manual_seed(0)
    net = Pictures().eval()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    adapter = hr.models.Torch(net, normalize=(mean, std), channels_last=True)
    made = hr.from_arrow(pa.table({"image": column})).predict(adapter, input="image", output="y").to_arrow(**INLINE)
    floats = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    with torch.no_grad():
        wanted = net(floats.float()).numpy()
    np.testing.assert_allclose(made["y"].combine_chunks().to_numpy_ndarray(), wanted, rtol=1e-4, atol=1e-5)


def test_autocast(net: Net, rows: pa.Table) -> None:
    made = predicted(hr.models.Torch(net, stack=True, dtype="bfloat16"), rows)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, direct(net, rows), atol=0.05)
    assert not np.array_equal(made, direct(net, rows))


def test_compiled(net: Net, rows: pa.Table) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = predicted(hr.models.Torch(net, stack=True, compile="eager"), rows)
    np.testing.assert_allclose(made, direct(net, rows), rtol=1e-5, atol=1e-6)


def test_one_batch_ahead_gives_the_same(net: Net, rows: pa.Table) -> None:
    loaded = hr.models.Torch(net, stack=True).load(Place(inputs=("a", "b", "c")))
    batches = [{n: torch.from_numpy(rows[n].to_numpy()[i : i + 10].copy()) for n in "abc"} for i in range(0, ROWS, 10)]
    handles = [loaded.submit(batch) for batch in batches]
    ahead = np.concatenate([loaded.collect(h) for h in handles])
    np.testing.assert_array_equal(ahead, np.concatenate([loaded(batch) for batch in batches]))
    loaded.close()


def test_out_of_memory_halves_the_batch(rows: pa.Table) -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 4:
                raise torch.OutOfMemoryError("too much")
            return 2 * x

    ds = hr.from_arrow(rows).predict(hr.models.Torch(Small()), input="a", output="y")
    np.testing.assert_array_equal(ds.to_arrow(**INLINE)["y"], 2 * rows["a"].to_numpy())


def test_a_run_is_another_when_the_weights_are(net: Net, rows: pa.Table, tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def run() -> Any:
        adapter = saved("state_dict", net, tmp_path)
        return hr.from_arrow(rows).predict(adapter, input=["a", "b", "c"]).write_parquet(out, **INLINE)

    run()
    assert run().already_done
    with torch.no_grad():
        net.layers[0].bias.add_(1.0)
    with pytest.raises(hr.DestinationError, match="predict"):
        run()


def test_in_worker_threads_that_share_the_weights(net: Net, rows: pa.Table) -> None:
    before = torch.get_num_threads()
    made = predicted(hr.models.Torch(net, stack=True), rows, engine="threads", cpus=2)
    np.testing.assert_allclose(made, direct(net, rows), rtol=1e-5, atol=1e-6)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the processes engine is for Linux")
def test_in_worker_processes(net: Net, rows: pa.Table, tmp_path: Path) -> None:
    adapter = saved("safetensors", net, tmp_path)
    made = predicted(adapter, rows, engine="processes", cpus=2)
    np.testing.assert_allclose(made, direct(net, rows), rtol=1e-5, atol=1e-6)
