"""What a person sees of a run: progress bars, one line an epoch, TensorBoard logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .distributed import first


class Show:
    """The open bar of one stage."""

    def __init__(
        self, watch: Watch, writer: SummaryWriter | None, bar: Progress, name: str, epochs: int, steps: int
    ) -> None:
        self._watch, self._writer, self._bar = watch, writer, bar
        self._name, self._epochs, self._at = name, epochs, 0
        self._task: TaskID = bar.add_task(name, total=epochs * steps, loss="")

    def start(self, at: int) -> None:
        """Begin at this step, after a resume."""
        self._at = at
        self._bar.update(self._task, completed=at)

    def step(self, loss: float, parts: Mapping[str, float]) -> None:
        """One step was taken."""
        self._at += 1
        self._bar.update(self._task, completed=self._at, loss=f"loss {loss:.3f}")
        if self._writer and self._at % 10 == 0:
            for key, value in {"loss": loss, **parts}.items():
                self._writer.add_scalar(f"{self._name}/{key}", value, self._at)

    def epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """An epoch is on disk."""
        if self._writer:
            for key, value in figures.items():
                self._writer.add_scalar(f"{self._name}/epoch_{key}", value, epoch + 1)
        text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        self._watch.say(f"{self._name}: epoch {epoch + 1}/{self._epochs}  {text}")


class Watch:
    """Console and logs of a run; of several processes only the first speaks and writes."""

    def __init__(self, console: Console, logs: Path) -> None:
        self.console, self._logs = console if first() else Console(quiet=True), logs

    def say(self, text: str) -> None:
        """One line; brackets stay brackets and nothing is wrapped, so that logs can be searched."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, epochs: int, steps: int, begin: int) -> Iterator[Show]:
        """Show one stage, from epoch number `begin`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        if 0 < begin < epochs:
            self.say(f"{name}: resumed after epoch {begin}")
        purge = begin * steps + 1 if begin else None
        writer = SummaryWriter(str(self._logs / name), purge_step=purge) if first() else None
        quiet = not self.console.is_terminal
        try:
            with Progress(*columns, console=self.console, transient=True, disable=quiet) as bar:
                show = Show(self, writer, bar, name, epochs, steps)
                show.start(begin * steps)
                yield show
        finally:
            if writer:
                writer.close()


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over pictures."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
