"""The trial's thread, and who gets what was constructed in it."""

from __future__ import annotations

import pickle
import signal
import threading
from typing import Any

import pytest

from headrace.plan.nodes import UserFunction
from headrace.worker.tried import Tried
from headrace.worker.user_code import Functions


class Model:
    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.closed: list[int] = []

    def close(self) -> None:
        self.closed.append(threading.get_ident())


def constructed(tried: Tried) -> Model:
    """In the trial's thread."""

    def construct() -> tuple[Functions, Any]:
        functions = Functions("cpu")
        return functions, functions.get(0, UserFunction(Model, is_class=True), "predict")

    functions, model = tried.call(construct)
    tried.keep(functions)
    return model


def test_calls_share_a_thread_and_raise_what_they_raise() -> None:
    tried = Tried()
    first, second = tried.call(threading.get_ident), tried.call(threading.get_ident)
    assert first == second != threading.get_ident()
    with pytest.raises(SystemExit):
        tried.call(lambda: (_ for _ in ()).throw(SystemExit(3)))
    tried.close()
    tried.close()


def test_what_nobody_took_is_closed_where_it_was_made() -> None:
    tried = Tried()
    model = constructed(tried)
    tried.close()
    assert model.closed == [model.thread]


def test_a_worker_takes_thread_and_models_once() -> None:
    tried = Tried()
    model = constructed(tried)
    assert tried.take() is None
    found: list[Any] = []

    def work() -> None:
        functions = tried.take()
        assert functions is not None
        found.append((threading.get_ident(), functions.get(0, UserFunction(Model, is_class=True), "predict"), tried.take()))

    thread = tried.go_on(work, "worker")
    assert thread is not None
    assert tried.go_on(work, "another") is None
    thread.join()
    assert found == [(model.thread, model, None)]
    tried.close()
    assert not model.closed  # the worker's affair


def test_a_worker_that_ends_before_it_took_them_leaves_them_to_be_closed() -> None:
    tried = Tried()
    model = constructed(tried)
    thread = tried.go_on(lambda: None, "worker")
    assert thread is not None
    thread.join()
    tried.close()
    assert len(model.closed) == 1


def test_an_interrupted_call_is_left_behind() -> None:
    tried, gate, ended = Tried(), threading.Event(), threading.Event()

    def hangs() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        gate.wait()
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        tried.call(hangs)
    assert tried.go_on(lambda: None, "worker") is None
    tried.close()
    gate.set()
    assert ended.wait(10)


def test_what_an_interrupted_trial_constructed_is_closed() -> None:
    tried, gate = Tried(), threading.Event()
    functions = Functions("cpu")
    tried.begin(functions.close)
    model: Any = tried.call(lambda: functions.get(0, UserFunction(Model, is_class=True), "predict"))

    def hangs() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        gate.wait()

    with pytest.raises(KeyboardInterrupt):
        tried.call(hangs)
    thread = next(t for t in threading.enumerate() if t.ident == model.thread)
    tried.close()
    gate.set()
    thread.join()
    assert model.closed == [model.thread]


def test_a_constructor_that_is_left_behind_holds_nobody_up() -> None:
    tried, gate = Tried(), threading.Event()

    class Hangs:
        def __init__(self) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            gate.wait()

    functions = Functions("cpu")
    with pytest.raises(KeyboardInterrupt):
        tried.call(lambda: functions.get(0, UserFunction(Hangs, is_class=True), "map"))
    found: list[Any] = []
    other = threading.Thread(
        target=lambda: found.append(Functions("cpu").get(0, UserFunction(Model, is_class=True), "predict"))
    )
    other.start()
    other.join()
    assert found
    tried.close()
    gate.set()


def test_functions_that_do_not_go_on_are_closed_and_made_anew() -> None:
    functions, fn = Functions("cpu"), UserFunction(Model, is_class=True)
    model: Any = functions.get(0, fn, "predict")
    other: Any = functions.get(1, fn, "map")
    functions.keep([0])
    assert (len(model.closed), len(other.closed)) == (0, 1)
    assert functions.get(0, fn, "predict") is model
    assert functions.get(1, fn, "map") is not other


def test_elsewhere_there_is_none() -> None:
    tried = Tried()
    model = constructed(tried)
    there = pickle.loads(pickle.dumps(tried))
    assert there.take() is None
    assert there.go_on(lambda: None, "worker") is None
    tried.close()
    assert len(model.closed) == 1
