"""User code: constructing functions and models once per worker, and turning what they raise into errors to read.

Invariants: an error carries text only, never the user's exception, so that it always pickles; the user's own frames
appear once, Headrace's not at all; classes are constructed one at a time in the whole process, because two threads that
import the same package for the first time at once can see it half initialised.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sysconfig
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from headrace.contracts.model import ModelAdapter, Place
from headrace.contracts.substrate import Crumb
from headrace.core.errors import HeadraceError, InternalError, UserCodeError
from headrace.core.extras import is_instance
from headrace.core.process import end_if_forked, is_interrupted
from headrace.core.redact import redact
from headrace.core.refs import Origin
from headrace.core.steps import CONSTRUCTING, Doing
from headrace.plan.nodes import UserFunction
from headrace.worker.guarded import Guarded
from headrace.worker.loads import Loads
from headrace.worker.refused import Refused

MESSAGE_CHARS = 2000  # an exception's text may hold a whole batch
SHOWN_PLACES = 256  # whose frames are known as text

_CONSTRUCTION = threading.RLock()


def abandon_construction() -> None:
    """A thread that may be constructing is left behind: others need not wait for it."""
    global _CONSTRUCTION
    _CONSTRUCTION = threading.RLock()


_WORKER = str(Path(__file__).resolve().parent) + os.sep
_OURS = str(Path(__file__).resolve().parent.parent) + os.sep
_LIBRARIES = tuple({p + os.sep for k, p in sysconfig.get_paths().items() if k in ("stdlib", "purelib", "platlib")})


@dataclass(frozen=True, slots=True)
class _Shown:
    """The frames of exceptions that came from one place, as text. theirs: there is a frame that is not Headrace's. codes: keeps
    the identities of the place from being anybody else's.
    """

    text: str
    theirs: bool
    codes: list[CodeType]


_shown: dict[tuple[int, ...], _Shown] = {}


class Functions:
    """The user's functions in one worker; classes are constructed at first use."""

    def __init__(
        self,
        device: str,
        *,
        threads: int = 1,
        deterministic: bool = False,
        crumb: Crumb | None = None,
        loads: Loads | None = None,
    ) -> None:
        """crumb: says what is being constructed, should the worker not live through it. loads: of all workers here."""
        self.device = device
        self._loads = loads or Loads()
        self._crumb = crumb
        self.threads = threads
        self.deterministic = deterministic
        self._made: dict[int, Callable[..., Any]] = {}
        self._constructed: dict[int, Any] = {}

    def get(self, index: int, fn: UserFunction, op: str, inputs: tuple[str, ...] = ()) -> Callable[..., Any]:
        """What to call for operator `index`. Raises UserCodeError when its construction fails. inputs: of a model."""
        found = self._made.get(index)
        if found is None:
            if _is_constructed(fn):
                with _CONSTRUCTION, self._loads.loading(index):
                    if self._crumb is not None:
                        self._crumb.write(Doing(CONSTRUCTING, op))
                    found = self._make(index, fn, op, inputs)
                    if self._crumb is not None:
                        self._crumb.clear()
            else:
                found = self._make(index, fn, op, inputs)
            self._made[index] = found
        return found

    def warm(
        self, index: int, fn: UserFunction, op: str, inputs: tuple[str, ...], over: Callable[[], bool], since_s: float
    ) -> None:
        """Construct it before it is needed, if that may take long, and after another worker has. What fails then will be told
        when it is needed. over: is it too late? since_s: when the worker began to warm.
        """
        if not _is_constructed(fn):
            return
        while self._loads.await_turn(index, over, since_s):
            with _CONSTRUCTION:
                if over() or not self._loads.may_begin(index):
                    continue
                with contextlib.suppress(Exception):
                    self.get(index, fn, op, inputs)
                return

    def keep(self, indices: Collection[int]) -> None:
        """Close and forget all others: they are constructed anew when they are needed."""
        for index in [i for i in self._made if i not in indices]:
            del self._made[index]
            self._loads.forget(index)
            if index in self._constructed:
                _close(self._constructed.pop(index))

    def close(self) -> None:
        """Close the instances that were constructed here and can be closed."""
        while self._constructed:
            _close(self._constructed.popitem()[1])
        self._made.clear()

    def _make(self, index: int, fn: UserFunction, op: str, inputs: tuple[str, ...]) -> Callable[..., Any]:
        made: Any = fn.target
        if not fn.is_class and isinstance(fn.target, ModelAdapter):
            try:
                made = fn.target.load(Place(self.device, self.threads, inputs, self.deterministic))
            except BaseException as exc:
                raise explain(exc, op, doing="loading the model") from None
            self._constructed[index] = made
            return made
        if fn.is_class:
            kwargs = dict(fn.ctor_kwargs)
            if _wants_device(fn):
                kwargs["device"] = self.device
            try:
                made = fn.target(*fn.ctor_args, **kwargs)
            except BaseException as exc:
                raise explain(exc, op, doing=f"constructing {fn.name}") from None
            self._constructed[index] = made
        if is_instance(made, "torch.nn", "Module"):
            return self._module_model(made, own=fn.is_class)
        return made

    def _module_model(self, module: Any, *, own: bool) -> TorchModule:
        """own: it was constructed here, for this worker alone."""
        from headrace.models.torch import all_their_own, same_weights
        from headrace.models.torch_device import is_accelerator

        if own:
            return TorchModule(module, self.device)
        if is_accelerator(self.device):
            return TorchModule(all_their_own(module), self.device)
        try:
            return TorchModule(same_weights(module), self.device)
        except Exception:
            return TorchModule(module, self.device, Guarded(module, lambda: _evaluating(module)))


def _is_constructed(fn: UserFunction) -> bool:
    return fn.is_class or isinstance(fn.target, ModelAdapter)


def _close(instance: Any) -> None:
    close = getattr(instance, "close", None)
    if callable(close):
        with contextlib.suppress(Exception):  # the run is decided; nobody is left to act on it
            close()


def _wants_device(fn: UserFunction) -> bool:
    try:
        signature = inspect.signature(fn.target)
        given = signature.bind_partial(*fn.ctor_args, **fn.ctor_kwargs).arguments
    except (TypeError, ValueError):  # no signature, or arguments that the constructor itself will refuse
        return False
    return "device" in signature.parameters and "device" not in given


class TorchModule:
    """A torch module as a model: evaluation mode, no gradients, on the worker's device. Wants torch batches.

    module: the worker's own. guarded: it is the user's, which can't be copied; what to call instead of it, in evaluation mode.
    """

    batch_format = "torch"

    def __init__(self, module: Any, device: str, guarded: Guarded | None = None) -> None:
        from headrace.models.torch_device import is_accelerator

        self.accelerated = is_accelerator(device)
        self.uploads = self.accelerated  # what it is given stays as it is
        self.device = device
        if guarded is not None:
            self.module: Any = guarded
        else:
            self.module = (module.to(device) if self.accelerated else module).eval()

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.module(self._moved(batch), *args, **kwargs)

    def _moved(self, batch: Any) -> Any:
        if not self.accelerated:
            return batch
        if isinstance(batch, dict):
            return {name: self._moved(value) for name, value in batch.items()}
        return batch.to(self.device) if hasattr(batch, "to") else batch


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode inside, as it was afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


# --- errors ----------------------------------------------------------------------------------------------------------


def explain(
    exc: BaseException,
    op: str,
    origin: Origin | None = None,
    *,
    row: int | None = None,
    columns: Sequence[str] = (),
    doing: str = "",
) -> HeadraceError:
    """The error that says what user code did, in which operator, on which rows.

    row: the one to blame, within `origin`. columns: what the code was given. doing: what it was at, if not being called.
    Raises KeyboardInterrupt again where it is the person at the keyboard who speaks. A child that user code forked ends here.
    """
    end_if_forked()
    if is_interrupted(exc):
        raise exc
    where = _where(op, origin, row, columns)
    if isinstance(exc, HeadraceError):
        return _placed(exc, origin).at(*where)
    if isinstance(exc, Refused):
        return UserCodeError(f"{op} {exc}", where=where, hint=exc.hint, frames="")
    text = exception_text(exc)
    message = f"{op} raised {type(exc).__name__}" + (f" while {doing}" if doing else "") + (f": {text}" if text else "")
    frames = user_frames(exc)
    hint = CALLED_WITH if isinstance(exc, TypeError) and not frames and "positional argument" in text else _hint(exc, text)
    if doing.startswith(("constructing", "loading")) and not is_for_main_threads(text):
        hint = 'engine="inline" runs it under pdb; on_error= is for rows, and without this none can be done'
    return UserCodeError(message, where=where, hint=hint, frames=frames)


def internal_error(exc: BaseException, what: str) -> InternalError:
    """A fault of ours, with all frames."""
    return InternalError(
        f"{what} failed: {type(exc).__name__}: {exception_text(exc)}",
        frames="".join(traceback.format_exception(exc)),
        hint="this is a fault of Headrace; please report it with the frames above",
    )


def _where(op: str, origin: Origin | None, row: int | None, columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    where = [("stage", op)]
    if origin is not None:
        at = None if row is None else origin.locate(row)
        if at is not None:
            where.append(("row", f"{at[1]} of {at[0]}"))
        elif origin.segments:
            where.append(("rows", origin.label if origin.exact else f"among {origin.label}"))
    if columns:
        where.append(("columns", ", ".join(columns)))
    return tuple(where)


def _placed(error: HeadraceError, origin: Origin | None) -> HeadraceError:
    """A transform names the row within the batch; say which row of which input that is."""
    rows = [value for label, value in error.where if label == "row"]
    if origin is not None and rows and rows[0].isdigit():
        at = origin.locate(int(rows[0]))
        named = (("row", f"{at[1]} of {at[0]}"),) if at else ()
        error.where = tuple(pair for pair in error.where if pair[0] != "row") + named
    return error


def exception_text(exc: BaseException) -> str:
    """Its message, not too long, without secrets."""
    try:
        text = str(exc)
    except Exception:  # an exception whose own __str__ fails
        text = "(its message can't be shown)"
    return redact(text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + " ...")


# As Python says it: signal.signal and its like; asyncio.get_event_loop, which makes a loop in a main thread only.
_MAIN_THREAD_ONLY = ("only works in main thread", "There is no current event loop in thread")
CALLED_WITH = "it is called with one argument: a dict of columns, or the one column that input= names, by itself"


def is_for_main_threads(text: str) -> bool:
    """Does this error say that what was called can't be called in other threads?"""
    return any(words in text for words in _MAIN_THREAD_ONLY)


def _hint(exc: BaseException, text: str) -> str:
    if is_for_main_threads(text):
        return 'engine="processes" calls it in the main threads of processes'
    if "attribute lookup" in text and "on __main__ failed" in text:  # pickle's words
        return "put what is sent to other processes into a module, and import it: a program's own file is not imported there"
    if "read-only" in text or "WRITEABLE" in text:
        return "a batch's arrays are views of memory that others read too: copy what you change, x = x.copy()"
    if isinstance(exc, (KeyboardInterrupt, SystemExit)):
        return "raise an ordinary exception instead of ending the process"
    if isinstance(exc, MemoryError):
        return "try a smaller batch_size"
    return 'engine="inline" runs it under pdb; on_error="skip", or "quarantine" for a write, goes on without such rows'


def is_ours(file: str) -> bool:
    """Is it a file of Headrace's?"""
    return file.startswith(_OURS)


def is_library(file: str) -> bool:
    """Is it Python's own, or of an installed package?"""
    return file.startswith((*_LIBRARIES, "<frozen "))


def user_frames(exc: BaseException) -> str:
    """The traceback from the user's own function downwards; long tails inside libraries are cut."""
    codes: list[CodeType] = []
    place: list[int] = []
    tb = exc.__traceback__
    while tb is not None:
        codes.append(tb.tb_frame.f_code)
        place += (id(codes[-1]), tb.tb_lasti)
        tb = tb.tb_next
    key = tuple(place)
    if (shown := _shown.get(key)) is None:  # many rows may fail at one place, and this takes more than all else about them
        if len(_shown) >= SHOWN_PLACES:
            _shown.clear()
        lines, theirs = _frame_lines(exc)
        shown = _shown[key] = _Shown(redact("".join(lines)), theirs, codes)
    cause = exc.__cause__
    if cause is None or not shown.theirs:
        return shown.text
    return shown.text + redact(f"  caused by {type(cause).__name__}: {exception_text(cause)}\n")


def _frame_lines(exc: BaseException) -> tuple[list[str], bool]:
    """(the lines, is there a frame that is not Headrace's?)"""
    frames = list(traceback.extract_tb(exc.__traceback__))
    start = next((i for i, f in enumerate(frames) if not f.filename.startswith(_OURS)), None)
    if start is None:  # a model or transform of Headrace itself: its innermost frames tell most
        called = bool(frames) and not frames[-1].filename.startswith(_WORKER)  # else the call itself failed: no frame helps
        return (traceback.format_list(frames[-2:]) if called else []), False
    frames = frames[start:]
    last = max((i for i, f in enumerate(frames) if not f.filename.startswith(_LIBRARIES)), default=0)
    tail = frames[last + 1 :]
    lines = traceback.format_list(frames[: last + 1])
    if len(tail) > 2:
        lines += [*traceback.format_list(tail[:1]), f"  ... {len(tail) - 2} more frames inside libraries\n"]
        tail = tail[-1:]
    return lines + traceback.format_list(tail), True
