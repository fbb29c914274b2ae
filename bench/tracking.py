"""Weights & Biases as a mirror: the only file that knows it, and nothing here can stop the work.

metrics.jsonl and results.jsonl are the record. When W&B cannot start, write or answer, one warning is printed and the
mirror is off from then on.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bench.console import is_main_process, say

if TYPE_CHECKING:
    import pandas as pd

START_S = 30  # for which W&B's server may not answer
FINISH_S = 300  # for the upload at the end
HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}  # W&B's own servers, as `wandb login` writes them to netrc


class Tracker:
    """Opens W&B runs; after the first failure, and on all processes but the first, it does nothing."""

    def __init__(self, mode: str, project: str, directory: Path) -> None:
        """mode: off | offline | online, which becomes offline where no API key is found; files go to `directory`."""
        self.mode = mode if is_main_process() else "off"
        self.project, self.directory = project, directory
        if self.mode == "online" and not _has_key():
            say(
                "W&B: no API key (WANDB_API_KEY or `wandb login`), so runs stay offline; upload them with `wandb sync`."
            )
            self.mode = "offline"

    @contextmanager
    def run(self, run_id: str, *, group: str, config: Mapping[str, Any], job_type: str) -> Iterator[Mirror]:
        """A W&B run of that id while the block lasts; opened again, it goes on. `config` is stored as it is."""
        run = self.attempt(lambda: self._start(run_id, group, config, job_type))
        mirror, exit_code = Mirror(self, run), 1
        try:
            yield mirror
            exit_code = 0
        finally:
            self.attempt(lambda: run.finish(exit_code=exit_code))

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` returns; None if the mirror is off or goes off because of it."""
        if self.mode == "off":
            return None
        try:
            return action()
        except Exception as error:  # whatever W&B raises, the work goes on
            self.mode = "off"
            say(
                f"W&B is off from here on ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
                "Nothing is lost: metrics.jsonl and results.jsonl are the record."
            )
            with suppress(Exception):  # else its exit hook prints the error once more when Python ends
                import wandb

                wandb.teardown()
            return None

    def _start(self, run_id: str, group: str, config: Mapping[str, Any], job_type: str) -> Any:
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK):  # W&B would go to a temporary directory
            raise PermissionError(f"{self.directory} is not writable")
        # The agent of a W&B sweep has named the run already, and waits for the scores there.
        agent = job_type == "train" and "WANDB_SWEEP_ID" in os.environ
        run = wandb.init(
            project=self.project,
            id=os.environ.get("WANDB_RUN_ID", run_id) if agent else run_id,
            name=run_id,
            group=group or None,
            job_type=job_type,
            config=dict(config),
            dir=self.directory,
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",  # progress bars stay as they are
                disable_git=True,  # the remote's address may hold a token
                disable_code=True,
                init_timeout=START_S,
                finish_timeout=FINISH_S,  # W&B waits for ever by default; what is not uploaded stays on disk
            ),
        )
        # Steps are fields: W&B's own step starts at 0 again when an offline run goes on.
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        return run


class Mirror:
    """What a run logs."""

    def __init__(self, tracker: Tracker, run: Any) -> None:
        self._tracker, self._run = tracker, run

    def log(self, row: Mapping[str, Any]) -> None:
        """A line of numbers; `train/step`, `images_seen` and `train_gflops` among them are axes."""
        self._tracker.attempt(lambda: self._run.log(dict(row)))

    def log_table(self, name: str, frame: pd.DataFrame) -> None:
        def log() -> None:
            import wandb

            self._run.log({name: wandb.Table(dataframe=frame)})

        self._tracker.attempt(log)

    def log_image(self, name: str, path: Path, step: int | None = None) -> None:
        """`step`: of training, where an image is one of a series."""

        def log() -> None:
            import wandb

            axis = {} if step is None else {"train/step": step}
            self._run.log({name: wandb.Image(str(path)), **axis})

        self._tracker.attempt(log)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = HOSTS | {urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc}
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if path and hosts & set(netrc.netrc(path).hosts):
                return True
    return False
