from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from headrace.core.errors import UserCodeError
from headrace.runtime.signals import GRACE_S, Stopped, ending_at_once, handling_signals
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.threads import ThreadsSubstrate

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Driver:
    """What signals ask of a driver, noted."""

    def __init__(self) -> None:
        self.interruptible = False
        self.over = False
        self.asked: list[tuple[str, ...]] = []
        self.survived: list[int] = []

    def drain(self, why: str, note: str, grace_s: float) -> None:
        assert grace_s == GRACE_S
        self.asked.append(("drain", why, note))

    def stop(self, why: str = "stopped") -> None:
        self.asked.append(("stop", why))

    def progress(self) -> str:
        return "3 of 10 splits are committed"


def act(driver: Driver, *signals: int, end: BaseException | None = None, resumable: bool = True) -> None:
    """An action that is sent signals, and ends so."""
    with handling_signals(driver, resumable=resumable):
        for signum in signals:
            signal.raise_signal(signum)
            driver.survived.append(signum)
        if end is not None:
            raise end


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Generator[None]:
    """Python's own handlers to begin with, whatever a library that another test loaded (Ray) has set; the same ones after."""
    found = [signal.getsignal(s) for s in SIGNALS]
    own = [signal.default_int_handler, signal.SIG_DFL]
    for signum, handler in zip(SIGNALS, own, strict=True):
        signal.signal(signum, handler)
    yield
    left = [signal.getsignal(s) for s in SIGNALS]
    for signum, handler in zip(SIGNALS, found, strict=True):
        signal.signal(signum, handler)
    assert left == own


def test_sigterm_drains_and_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver()
    with pytest.raises(SystemExit) as caught:
        act(driver, signal.SIGTERM, end=Stopped("stopped by SIGTERM"))  # what the driver raises when it has drained
    assert caught.value.code == 143
    ((asked, why, note),) = driver.asked
    assert (asked, why) == ("drain", "stopped by SIGTERM")
    assert note == "SIGTERM: finishing what is open, for 20 s at most; a second signal stops at once"
    said = "headrace: stopped by SIGTERM; 3 of 10 splits are committed; resumable: run the same command again\n"
    assert capsys.readouterr().err == said


def test_ctrl_c_twice_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver()
    with pytest.raises(KeyboardInterrupt):
        act(driver, signal.SIGINT, signal.SIGINT, end=Stopped("stopped by Ctrl-C"))
    assert [asked[:2] for asked in driver.asked] == [("drain", "stopped by Ctrl-C"), ("stop", "stopped by Ctrl-C")]
    assert "resumable" in capsys.readouterr().err


def test_user_code_in_this_thread_is_interrupted_by_the_second() -> None:
    driver = Driver()
    driver.interruptible = True
    with pytest.raises(SystemExit):
        act(driver, signal.SIGTERM, signal.SIGTERM)
    assert driver.survived == [signal.SIGTERM]


@pytest.mark.parametrize("interruptible", [False, True])
def test_a_run_that_can_not_be_resumed_is_not_drained(interruptible: bool, capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver()
    driver.interruptible = interruptible
    with pytest.raises(KeyboardInterrupt):
        act(driver, signal.SIGINT, end=Stopped("stopped by Ctrl-C"), resumable=False)
    assert driver.asked == ([] if interruptible else [("stop", "stopped by Ctrl-C")])
    assert capsys.readouterr().err == "headrace: stopped by Ctrl-C\n"


@pytest.mark.parametrize(("signum", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_at_the_very_end_lets_the_run_finish_but_is_not_lost(
    signum: signal.Signals, ends: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    driver = Driver()
    driver.over = True
    with pytest.raises(ends):
        act(driver, signum)
    assert driver.survived == [signum]
    assert driver.asked == []
    assert "it is finished" in capsys.readouterr().err


def test_an_error_of_the_run_goes_first() -> None:
    with pytest.raises(UserCodeError):
        act(Driver(), signal.SIGTERM, end=UserCodeError("no"))


def test_stopped_by_others_than_signals_passes_through() -> None:
    with pytest.raises(Stopped):
        act(Driver(), end=Stopped("stopped"))


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and for background jobs of a shell."""
    driver = Driver()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        act(driver, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert driver.asked == []


def test_other_threads_handle_none() -> None:
    seen: list[object] = []

    def work() -> None:
        with handling_signals(Driver()):
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("make", [InlineSubstrate, ThreadsSubstrate, ProcessesSubstrate])
def test_a_handler_wakes_a_blocked_wait(make: type[InlineSubstrate | ThreadsSubstrate | ProcessesSubstrate]) -> None:
    """A signal from outside, while the main thread blocks: the wait has no timeout, so only the handler can end it."""
    substrate = make()

    class Waking(Driver):
        def drain(self, why: str, note: str, grace_s: float) -> None:
            super().drain(why, note, grace_s)
            substrate.wake()

    driver = Waking()
    sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))

    def wait_for_it() -> None:
        with handling_signals(driver):
            sender.start()
            while not driver.asked:
                assert substrate.wait(None) == []

    try:
        substrate.start(None, ())
        with pytest.raises(SystemExit):
            wait_for_it()
    finally:
        sender.join()
        substrate.stop()


def test_sigterm_before_there_is_a_driver(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, ending_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert "resumable" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_handler_of_the_user_is_left_in_place() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
    try:
        with ending_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("action", [lambda: handling_signals(Driver()), ending_at_once], ids=["run", "trial"])
def test_processes_that_user_code_forks_end_as_without_us(action: Callable[[], AbstractContextManager[None]]) -> None:
    """Whoever ends a helper waits for it to go (multiprocessing.Pool does)."""

    def forked_and_ended() -> int:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(1)
        os.kill(child, signal.SIGTERM)  # perhaps before it is itself
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with action(), ThreadPoolExecutor(1) as pool:
        assert forked_and_ended() == -signal.SIGTERM
        assert pool.submit(forked_and_ended).result() == -signal.SIGTERM
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
