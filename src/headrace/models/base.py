"""What the adapters of `hr.models` share: names, the checks before a run, and what a model means.

What must not live here: anything of one library. Invariants: nothing is imported or read before `check`; an artifact whose
loading can run code of its author's is never opened unless the user said `trust=True`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from headrace.core.errors import PlanError
from headrace.core.extras import require

if TYPE_CHECKING:
    import pyarrow as pa


class Adapter:
    """The base of adapters, which are frozen dataclasses with a field `model`: a path or uri, or a live object.

    A subclass names its extra, and says in the hooks what its library needs: `check_artifact`, `check_inputs`. `load` is its
    own. unsaid: fields that answers do not depend on.
    """

    extra: ClassVar[str] = ""
    unsaid: ClassVar[tuple[str, ...]] = ("trust",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    streams: ClassVar[bool] = False
    batch_format: ClassVar[str] = "pyarrow"

    if TYPE_CHECKING:
        model: Any

    @property
    def name(self) -> str:
        """Such as "Sklearn(churn.joblib)"; of a live object its type."""
        uri = self.uri
        label = type(self.model).__name__ if uri is None else uri.rstrip("/").rpartition("/")[2]
        return f"{type(self).__name__}({label})"

    @property
    def uri(self) -> str | None:
        """The artifact's path or uri; None for a live object."""
        return os.fspath(self.model) if isinstance(self.model, str | os.PathLike) else None  # type: ignore[return-value]

    def local_path(self) -> str:
        """Where the artifact lies on this machine, downloaded if need be. For `load`. Only for artifacts."""
        from headrace.connectors.artifacts import local_path

        assert self.uri is not None
        return local_path(self.uri)

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Raise PlanError for what can't work. schema: of the rows that come in, None when only running tells."""
        if self.extra:
            require(self.extra, self.name)
        if self.uri is not None:
            from headrace.connectors.artifacts import check_exists

            check_exists(self.uri, self.name)
            self.check_artifact()
        self.check_inputs(schema, inputs)

    def check_artifact(self) -> None:
        """Hook: refuse an artifact that is there, such as one that would have to be trusted. Raises PlanError."""

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Hook: refuse columns that the model can't use. Raises PlanError."""

    def meaning(self) -> Mapping[str, Any]:
        """The parameters, and what is in the artifact: where it lies has no meaning. Of a live object, the object itself, whose
        state the fingerprint describes.
        """
        from headrace.connectors.artifacts import identity

        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        said = {f.name: getattr(self, f.name) for f in fields if f.name != "model" and f.name not in self.unsaid}
        return {"model": self.model if self.uri is None else identity(self.uri), **said}


def refuse_untrusted(name: str, what: str, *, trust: bool, instead: str = "") -> None:
    """Raise PlanError unless the user trusts what can run code while it is loaded.

    what: such as "a pickle". instead: what would need no trust, for the hint.
    """
    if trust:
        return
    hint = "pass trust=True if you know who made it" + (f", or {instead}" if instead else "")
    raise PlanError(f"{name}: loading {what} can run any code that its author put into it", hint=hint)


def check_columns(
    name: str,
    schema: pa.Schema | None,
    columns: Sequence[str],
    accepts: Callable[[pa.DataType], bool],
    wanted: str,
    hint: str = "cast it, or leave it out of input=[...]",
) -> None:
    """Raise PlanError unless the schema, where known, has these columns with types that are accepted.

    name: the adapter's. wanted: the accepted types in words, such as "numbers".
    """
    if schema is None:
        return
    for column in columns:
        index = schema.get_field_index(column)
        if index < 0:
            there = ", ".join(schema.names)
            raise PlanError(f"{name} reads the column {column!r}, which is not there", hint=f"the columns are: {there}")
        type = schema.field(index).type
        if not accepts(type):
            raise PlanError(f"{name} can't use the column {column!r} of type {type}: it wants {wanted}", hint=hint)


def check_choice(name: str, parameter: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise PlanError unless `value` is one of the choices."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise PlanError(f"{name}: there is no {parameter}={value!r}", hint=f"it can be {listed}")
