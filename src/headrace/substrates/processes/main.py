"""A worker process: `python -m headrace.substrates.processes.main <control fd> <lifeline fd> <report fd>`.

It never imports the user's `__main__`: the program arrives pickled, with functions of `__main__` by value. Steps run in
the main thread, one at a time. When the driver is gone the worker is gone too, whatever user code does: a watchdog
thread waits for the driver's end, and where user code never lets go of the GIL the kernel kills (the lifeline).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InternalError
from headrace.core.frames import with_room
from headrace.core.process import leave_interrupts_to_the_driver
from headrace.core.steps import Step, StepFailed
from headrace.substrates.malloc import keep_large_allocations
from headrace.substrates.processes import stacks, wire

if TYPE_CHECKING:
    from headrace.substrates.processes.store import ArenaStore

IDLE_S = 0.5  # idle for this long: collect garbage cycles that hold views, give unused arena memory back
forked = False  # by a fork server, which is then the parent, and not started by the driver
_READY = "ready"  # a message of this process to itself: a step that was begun need not be waited for any more


def main(control_fd: int, lifeline_fd: int, report_fd: int) -> None:
    """Serve the driver until it says STOP."""
    leave_signals_to_the_driver()
    for fd in (control_fd, lifeline_fd, report_fd):
        os.set_inheritable(fd, False)
    die_with_driver(lifeline_fd)
    keep_large_allocations()
    stacks.report_to(report_fd)
    channel = _Channel(socket.socket(fileno=control_fd))
    hello = channel.next_message()
    if hello is None:
        os._exit(0)
    _, spec, driver_pid, cwd, sys_path, payload = hello
    watch_driver(driver_pid, control_fd)
    with_room(_serve, channel, spec, cwd, sys_path, payload)


def _serve(channel: _Channel, spec: Any, cwd: str, sys_path: list[str], payload: bytes) -> None:
    try:
        sys.path[:] = sys_path
        with contextlib.suppress(OSError):  # a directory that is gone matters only to code that uses relative paths
            os.chdir(cwd)
        store = channel.make_store(spec.id)
        body = _make_body(payload, spec, store)
    except BaseException as exc:
        import traceback

        channel.send((wire.BROKEN, "".join(traceback.format_exception(exc)).strip()))
        os._exit(1)
    channel.send((wire.UP,))
    while (message := channel.next_message()) is not None:
        kind = message[0]
        if kind == wire.STEP:
            if not _begins(body, store, channel, message[2]):
                channel.answer(_run(body, store, message[2]))
        elif kind == _READY:
            store.resume(message[1])
            channel.answer(_run(body, store, message[1]))
        elif kind == wire.DISCARD:
            body.discard(message[2])
            store.close_cursor(message[2])
        elif kind == wire.STOP:
            body.close()
            break
        del message  # it must not keep inputs alive while the worker is idle
    flush_prints()
    os._exit(0)  # without waiting for threads of user code; the body has been closed


def flush_prints() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # user code may have closed or taken them away
        sys.stdout.flush()
        sys.stderr.flush()


def _make_body(payload: bytes, spec: Any, store: ArenaStore) -> Any:
    import pickle

    program, factory = pickle.loads(payload)
    if factory is None:
        from headrace.substrates.bodies import default_body

        factory = default_body
    return factory(program, spec, store)


def _begins(body: Any, store: ArenaStore, channel: _Channel, step: Step) -> bool:
    """Take a step in, and start it if it goes on beside others."""
    from headrace.substrates.bodies import begins

    store.begin(step)
    if not begins(body, step, lambda: channel.is_ready(step)):
        return False
    store.pause()
    return True


def _run(body: Any, store: ArenaStore, step: Step) -> Any:
    from headrace.substrates.bodies import run_guarded

    answer = run_guarded(body, step)
    store.end(answer)
    return answer


class _Channel:
    """The worker's end of the control socket, and what it does while no step is at hand.

    A child that user code forked and that came back to our code ends when it would use it: what it took, its parent would miss.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pid = os.getpid()
        self._reader = wire.FrameReader()
        self._inbox: deque[Any] = deque()
        self._fds: deque[int] = deque()
        self._store: ArenaStore | None = None
        self._idle = False
        self._ready: deque[Step] = deque()  # filled from any thread
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)

    def make_store(self, worker: int) -> ArenaStore:
        from headrace.substrates.processes.crumb import CrumbWriter
        from headrace.substrates.processes.store import ArenaStore

        arena, crumb = self._fds.popleft(), CrumbWriter(self._fds.popleft())  # came with HELLO
        size = os.fstat(arena).st_size
        self._store = ArenaStore(worker, arena, size, drain=self._take_available, on_view_death=self._view_died, crumb=crumb)
        return self._store

    def send(self, message: tuple[Any, ...]) -> None:
        self._sock.sendall(wire.frame(message))

    def answer(self, event: Any) -> None:
        """Send a step's answer, with the leases that ended."""
        views = self._store.take_dead() if self._store else ()
        try:
            data = wire.frame((wire.ANSWER, event, views))
        except Exception as exc:  # e.g. a metric's state, or an error's detail, that can't be pickled
            error = InternalError(f"the answer to a step can't be sent to the driver: {exc!r}")
            data = wire.frame((wire.ANSWER, StepFailed(event.step, event.worker, error), views))
        self._sock.sendall(data)

    def next_message(self) -> Any:
        """The next message that needs the loop's attention; None when the driver has closed the channel."""
        self._take_available()
        while not self._inbox and not self._ready:
            if not self._wait_idle():
                return None
        return (_READY, self._ready.popleft()) if self._ready else self._inbox.popleft()

    def is_ready(self, step: Step) -> None:
        """Bring the step up as a message; from any thread."""
        self._ready.append(step)
        with contextlib.suppress(BlockingIOError):  # the counter is full: then it wakes us anyway
            os.eventfd_write(self._wake_fd, 1)

    def _wait_idle(self) -> bool:
        """Block until something came. False at the driver's end."""
        store, settled = self._store, False
        while True:
            self._idle = True  # from here on a view's death wakes us; those before are seen by the check below
            if store is not None and store.has_dead:
                views = store.take_dead()
                if views:
                    self.send((wire.VIEWS, views))
                continue
            useful = store is not None and not settled and (store.has_leases or store.idle_bytes > 0)
            ready = self._poll.poll(IDLE_S * 1000 if useful else None)
            self._idle = False
            if not ready and store is not None:
                settled = True
                if store.has_leases:
                    gc.collect()
                store.trim()
            for fd, _ in ready:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    if self._ready:
                        return True
                else:
                    return self._receive(block=True)

    def _take_available(self) -> None:
        """Take in what has arrived, without waiting."""
        with contextlib.suppress(BlockingIOError):
            self._receive(block=False)

    def _receive(self, *, block: bool) -> bool:
        if os.getpid() != self._pid:
            os._exit(1)
        data = wire.receive(self._sock, self._fds, block=block)
        for message in self._reader.feed(data):
            self._take(message)
        return bool(data)

    def _take(self, message: Any) -> None:
        """Memory news count at once, even during a step; the rest queues in order."""
        kind, store = message[0], self._store
        if kind == wire.ARENAS and store is not None:
            for arena in message[1]:
                store.add_arena(arena, self._fds.popleft())
            return
        if kind == wire.GONE and store is not None:
            store.drop_arenas(message[1])
            return
        if store is not None and kind in (wire.STEP, wire.DISCARD, wire.FREE):
            store.free(message[1])
        if kind != wire.FREE:
            self._inbox.append(message)

    def _view_died(self) -> None:
        if self._idle:
            with contextlib.suppress(BlockingIOError):  # the counter is full: then it wakes us anyway
                os.eventfd_write(self._wake_fd, 1)


def leave_signals_to_the_driver() -> None:
    """Ctrl-C reaches the whole terminal, SIGTERM may reach all processes of a job: the driver drains, workers leave with it.

    SIGTERM gets a handler, which programs that user code starts don't inherit, because they must be stopped somehow; they
    inherit that SIGINT is ignored.
    """

    def nothing(*_: object) -> None:
        return

    leave_interrupts_to_the_driver()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, nothing)
    signal.siginterrupt(signal.SIGTERM, False)  # native code need not know
    _let_forks_end()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])


def _let_forks_end() -> None:
    """SIGTERM ends processes that user code forks, also when it comes before they have said so: it is blocked until then."""

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock()

    def before() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    os.register_at_fork(before=before, after_in_parent=unblock, after_in_child=in_child)


def watch_driver(driver_pid: int, control_fd: int) -> None:
    """Leave at once when the driver's process ends or closes the channel, even in the middle of a step."""
    try:
        driver = os.pidfd_open(driver_pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel or sandbox without pidfd: the channel alone tells
        driver = -1
    if not forked and os.getppid() != driver_pid:  # it died before the pidfd was opened, and its number may be another's by now
        os._exit(1)
    poll = select.poll()
    poll.register(control_fd, 0)  # only hang-up and errors, which poll always reports
    if driver >= 0:
        poll.register(driver, select.POLLIN)

    def wait_for_the_end() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, name="headrace-watchdog", daemon=True).start()


def die_with_driver(lifeline_fd: int) -> None:
    """Ask the kernel to kill this process when the lifeline's other end, which only the driver holds, is closed.

    The kernel does it without the GIL. (PR_SET_PDEATHSIG would fire at the end of the driver's *thread*.)
    """
    set_signal = 10  # F_SETSIG of <linux/fcntl.h>
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, set_signal, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
