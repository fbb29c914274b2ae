"""Signals that ask a command to stop: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2, which clusters send before they kill.

The first one lets a training finish its step and save; whatever else is under way ends where it is, by `Stopped`. The
second one ends the process at once. This module loads no torch, so that a command listens before it imports it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(KeyboardInterrupt):
    """This process was asked to stop. The same command goes on where it was."""


@dataclass
class _State:
    pid: int = 0  # of the process that listens; 0: none does
    asked: int = 0  # the first signal that came; 0: none
    patient: bool = False  # more of them change nothing
    finishing: bool = False  # a training is under way, which asks `asked()` after each step
    speaks: bool = True  # the first process alone does


_state = _State()


def listen(patient: bool = False) -> dict[int, Any]:
    """Answer the signals from here on -> the handlers they had. `patient`: a second one does not end the process."""
    _state.pid, _state.patient = os.getpid(), patient
    return take_back()


def take_back() -> dict[int, Any]:
    """Answer them again where a library has put its own handlers -> those."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            before[signum] = signal.getsignal(signum)
            if before[signum] is not signal.SIG_IGN:  # as for a job in a shell's background
                signal.signal(signum, _answer)
    return before


def asked() -> int:
    """The signal that asked this process to stop; 0: none."""
    return _state.asked


def heed(signum: int) -> None:
    """Take a signal that another process of this training got for one of this process, too."""
    _state.asked = _state.asked or signum


def check() -> None:
    """Raises: Stopped if this process was asked to stop."""
    if _state.asked:
        raise Stopped


def exit_code() -> int:
    """128 + the signal, as shells put it."""
    return 128 + (_state.asked or signal.SIGINT)


@contextmanager
def finishing_steps() -> Iterator[None]:
    """A block that asks `asked()` at moments when it can save; signals do not break it off.

    Raises: Stopped if one has come before.
    """
    from bench.console import is_main_process

    _state.speaks = is_main_process()
    listening = _state.pid == os.getpid()
    before = {} if listening else listen()  # a call from Python, not a command
    try:
        check()
        _state.finishing = True
        yield
    finally:
        _state.finishing = False
        if not listening:
            _state.pid = _state.asked = 0
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _answer(signum: int, frame: Any) -> None:
    if os.getpid() != _state.pid:  # a forked helper, such as a loader's worker; Ctrl-C reaches the whole group
        if signum != signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    if _state.asked:
        if not _state.patient:
            os._exit(128 + signum)
        return
    _state.asked = signum
    if not _state.finishing:
        raise Stopped
    if _state.speaks:  # not by print: the signal may have come in the middle of one
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: finishing this step, then saving. A second signal ends at once.\n".encode())
