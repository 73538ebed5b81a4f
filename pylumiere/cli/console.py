"""What the verbs show: progress bars, tables, paths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylumiere.request import Progress


def print_table(table) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200).print(table)


def absolute(path: str) -> str:
    return path if path == "-" else str(Path(path).absolute())


class Bars:
    """One progress bar per stage on a terminal; nothing elsewhere. `num_frames` is shown while no length is known."""

    def __init__(self, num_frames: int | None = None):
        self._num_frames = num_frames
        self._progress = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            name, left = TextColumn("{task.description:<17}"), TextColumn("{task.fields[left]}")
            self._progress = Progress(name, BarColumn(), MofNCompleteColumn(), left, console=Console(stderr=True))
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def callback(self):
        return None if self._progress is None else self._on_step

    def _on_step(self, progress: Progress) -> None:
        bars = self._progress
        if bars is None:
            return
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(progress.stage, total=progress.steps, left="")
        left = "" if progress.seconds_left is None else f"{progress.seconds_left:.0f} s left"
        done, of = progress.step, progress.steps
        if of is None and self._num_frames is not None:
            done, of = progress.frames_final, self._num_frames
        bars.update(self._tasks[progress.stage], completed=done, total=of, left=left)
