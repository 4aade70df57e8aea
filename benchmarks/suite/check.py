"""Are two outputs the same, whatever their order, files, chunks and widths of types?

A column is hashed after its rows were sorted by the key. Integers count as int64, floats as float64, all strings and all lists
as one kind: engines have their own widths, and a value that survives them is the same value. Columns with a tolerance are
compared by value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

HIDDEN = ("_", ".")


@dataclass(frozen=True)
class Reference:
    """What an output must be. folder: where it is kept: digests.json, and the columns with a tolerance as .npy."""

    folder: Path

    @property
    def there(self) -> bool:
        return (self.folder / "digests.json").exists()

    @property
    def told(self) -> dict[str, Any]:
        return json.loads((self.folder / "digests.json").read_text())

    def keep(self, out: Path, key: Sequence[str], near: Sequence[str], metrics: Mapping[str, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        digests: dict[str, str] = {}
        output = Output(out, key)
        for name in output.names:
            if name in near:
                np.save(self.folder / f"{name}.npy", output.values(name))
            digests[name] = output.digest(name)
        told = {"rows": output.rows, "files": len(output.paths), "columns": digests, "metrics": dict(metrics)}
        (self.folder / "digests.json").write_text(json.dumps(told, indent=1))

    def differences(
        self, out: Path, key: Sequence[str], near: Mapping[str, tuple[float, float]], metrics: Mapping[str, float]
    ) -> list[str]:
        """What is not as it must be; empty when all is."""
        told, output = self.told, Output(out, key)
        if output.rows != told["rows"]:
            return [f"{output.rows} rows instead of {told['rows']}"]
        found: list[str] = []
        if missing := set(told["columns"]) - set(output.names):
            found.append(f"no columns {sorted(missing)}")
        if more := set(output.names) - set(told["columns"]):
            found.append(f"columns {sorted(more)} too many")
        for name in sorted(set(told["columns"]) & set(output.names)):
            if name in near:
                values, wanted = output.values(name), np.load(self.folder / f"{name}.npy", mmap_mode="r")
                relative, absolute = near[name]
                if values.shape != wanted.shape or not np.allclose(values, wanted, relative, absolute, equal_nan=True):
                    found.append(f"column {name} is not near enough")
            elif output.digest(name) != told["columns"][name]:
                found.append(f"column {name} has other values")
        for name, wanted in told["metrics"].items():
            if name not in metrics or not np.isclose(metrics[name], wanted, rtol=2e-3, atol=1e-4):
                found.append(f"{name} is {metrics.get(name)} instead of {wanted}")
        return found


class Output:
    """Parquet files under a folder, their rows sorted by `key`; a column in memory at a time."""

    def __init__(self, out: Path, key: Sequence[str]) -> None:
        self.paths = parts(out)
        self.names = pq.read_schema(self.paths[0]).names if self.paths else []
        self.rows = count(out)
        keys = pa.table({name: self._read(name) for name in key}) if self.rows else pa.table({name: [] for name in key})
        self._order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in key])

    def _read(self, name: str) -> pa.ChunkedArray:
        columns = [pq.read_table(path, columns=[name], partitioning=None).column(0) for path in self.paths]
        kinds = {str(column.type) for column in columns}
        if len(kinds) > 1:  # such as list<element> beside list<item>
            columns = [column.cast(columns[0].type) for column in columns]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)

    def _sorted(self, name: str) -> pa.Array:
        column = _plain(self._read(name)).take(self._order).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        return column

    def digest(self, name: str) -> str:
        hashed = hashlib.sha256()
        _add(hashed, self._sorted(name))
        return hashed.hexdigest()[:16]

    def values(self, name: str) -> np.ndarray:
        """Of a column of numbers or of lists of them, flat."""
        column = self._sorted(name)
        while _is_list(column.type):
            column = column.flatten()
        return column.to_numpy(zero_copy_only=False).astype(np.float64)


def parts(out: Path) -> list[Path]:
    """Parquet files under `out`, but those of hidden folders."""
    found = sorted(out.rglob("*.parquet"))
    return [path for path in found if not any(part.startswith(HIDDEN) for part in path.relative_to(out).parts)]


def count(out: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in parts(out))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):
        return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if pa.types.is_string(column.type):
        return column.cast(pa.large_string())  # take may pass 2 GiB
    return column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _add(hashed: Any, array: pa.Array) -> None:
    kind = array.type
    hashed.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        for name in sorted(field.name for field in kind):
            hashed.update(name.encode())
            _add(hashed, pc.struct_field(array, name))
    elif _is_list(kind):
        hashed.update(pc.list_value_length(array).cast(pa.int64()).fill_null(-1).to_numpy().tobytes())
        _add(hashed, array.flatten())
    elif (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    ):
        hashed.update(pc.binary_length(array).cast(pa.int64()).fill_null(-1).to_numpy().tobytes())
        wide = array.drop_null().cast(pa.large_string() if "string" in str(kind) else pa.large_binary())
        if len(wide):
            offsets = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset : wide.offset + len(wide) + 1]
            hashed.update(memoryview(wide.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    elif pa.types.is_timestamp(kind):
        hashed.update(array.cast(pa.timestamp("us", kind.tz)).cast(pa.int64()).fill_null(0).to_numpy().tobytes())
    elif pa.types.is_floating(kind):
        hashed.update(array.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        hashed.update(array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False).tobytes())
    else:
        hashed.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())
