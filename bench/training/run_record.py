"""run.json: how a run's training stands, whoever launched it. The only place that writes it; it loads no torch.

state      means                                                                beside it
queued     a job for it waits                                                   error: "" or of the last start
running    a process trains it; one that was killed leaves this: see `alive`    steps to train, changed, pid, host
preempted  interrupted, and the same command goes on                            the same
failed     ended by an error                                                    the same, error
finished   trained to the end of its budget                                     changed, what the training came to

`changed` holds what the names of model, size, data and recipe do not say (`bench.config.changed_settings`).
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.console import is_main_process
from bench.errors import Paused, UserError
from bench.files import atomic_write
from bench.locks import is_held, working


class RunRecord:
    """The run.json of a run directory, and the lock that its training holds."""

    def __init__(self, directory: Path) -> None:
        self.path, self.lock = directory / "run.json", directory / ".train.lock"

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, state: str, **values: Any) -> None:
        """A new state; running and finished start afresh, the others keep what stands there."""
        before = {} if state in ("running", "finished") else self.read()
        with atomic_write(self.path) as file:
            json.dump(before | {"state": state} | values, file, indent=2)

    def alive(self) -> bool:
        """Whether a process trains the run; taken on trust for another machine, whose locks do not show here."""
        record = self.read()
        if record.get("state") != "running":
            return False
        return record.get("host") != socket.gethostname() or is_held(self.lock)

    @contextmanager
    def training(self, steps: int, changed: Mapping[str, Any]) -> Iterator[None]:
        """The run is running while the block lasts; preempted or failed where the block ends early.

        Raises: UserError if another process trains it.
        """
        with working(self.lock) as alone:
            if not alone:
                who = self.read()
                raise UserError(
                    f"{self.path.parent} is being trained by another process ({who.get('pid')} on {who.get('host')}). "
                    "Wait for it, or end it."
                )
            if is_main_process():
                since = datetime.now(UTC).isoformat(timespec="seconds")
                about = {"steps": steps, "changed": changed, "pid": os.getpid(), "host": socket.gethostname()}
                self.write("running", **about, since=since)
            try:
                yield
            except Paused:
                raise
            except KeyboardInterrupt:
                if is_main_process() and self.read().get("state") == "running":
                    self.write("preempted")
                raise
            except BaseException as error:
                self.fail(error)
                raise

    def fail(self, error: BaseException) -> None:
        """By any process: the first one may be waiting for the one that failed, and the first to fail knows why."""
        if self.read().get("state") != "failed":
            with suppress(OSError, UserError):  # a full disk is what it may have failed of
                self.write("failed", error=sentence(error))


def sentence(error: BaseException) -> str:
    """One line that says what went wrong."""
    return str(error) if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()


def read_state(directory: Path) -> dict[str, Any]:
    """The run.json of a run directory; {} if there is none."""
    return RunRecord(directory).read()


def write_state(directory: Path, state: str, **values: Any) -> None:
    """As `RunRecord.write`, on the first process."""
    if is_main_process():
        RunRecord(directory).write(state, **values)
