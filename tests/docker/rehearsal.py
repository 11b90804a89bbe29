"""A Dockerfile carried out in a directory in place of a container: COPY, ENV, RUN and then its process.

The image's directories lie below one root, and commands name them there. What belongs to the base is this machine's:
the interpreter, and the packages of apt-get, which is only asked whether it knows them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .dockerfile import Stage, context, parse, variables

ROOT = Path(__file__).parents[2]
DIRECTORIES = ("opt", "src", "wheels", "bundle", "models")
"""Of the images; those of the base are left alone."""
USER = 65532
SECONDS = 900


@dataclass
class Rehearsal:
    """One image.

    Args:
        dockerfile: below docker.
        root: what stands for /; empty.
        python: the directory of the interpreter that stands for the base's.
    """

    dockerfile: Path
    root: Path
    python: Path
    environment: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    """The commands, as they stand in the file."""
    nobody: bool = True
    """Start processes by the image's user, where this process may choose one."""

    @property
    def log(self) -> Path:
        """What the processes say."""
        return self.root.with_name(f"{self.root.name}.log")

    def build(self) -> Stage:
        """Carry out all stages; returns the last.

        Raises: AssertionError with its output where a command fails.
        """
        finished: dict[str, Path] = {}
        for stage in parse(self.dockerfile):
            self.root.mkdir()
            self.environment = {**os.environ, "PATH": f"{self.python}:/usr/bin:/bin"}
            for keyword, text in stage.instructions:
                if keyword == "ENV":
                    new = variables(self.within(text))
                    self.environment |= {k: v.replace("$PATH", self.environment["PATH"]) for k, v in new.items()}
                elif keyword == "COPY":
                    self._copy(text, finished)
                elif keyword == "RUN":
                    self._run(text)
            if stage.name:
                finished[stage.name] = self.root.with_name(f"{self.root.name}.{stage.name}")
                self.root.rename(finished[stage.name])
        for folder in finished.values():
            shutil.rmtree(folder)
        return stage

    def within(self, text: str) -> str:
        """The text with the image's directories below the root."""
        return re.sub(rf"(?<![\w.$/*-])/({'|'.join(DIRECTORIES)})(?![\w.-])", rf"{self.root}/\1", text)

    def process(self, words: list[str], **changes: str) -> subprocess.Popen[bytes]:
        """Start a command of the image, by its user where this process may choose one."""
        identity = {"user": USER, "group": USER, "extra_groups": []} if self.nobody and os.geteuid() == 0 else {}
        mapped = [self.within(word) for word in words]
        environment = self.environment | changes
        program = shutil.which(mapped[0], path=environment["PATH"])
        assert program is not None, f"{mapped[0]} is not in the image"
        with self.log.open("ab") as output:
            return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
                [program, *mapped[1:]], env=environment, cwd="/", stdout=output, stderr=subprocess.STDOUT, **identity
            )

    def _copy(self, text: str, finished: dict[str, Path]) -> None:
        *options, source, target = shlex.split(text)
        place = Path(self.within(target))
        if options:
            (option,) = options
            shutil.copytree(finished[option.removeprefix("--from=")] / source[1:], place, symlinks=True)
            return
        files = [path for path in context(ROOT) if source == "." or path.is_relative_to(source)]
        assert files, f"nothing for COPY {text} in the context"
        for path in files:
            goal = place / (path if source == "." else path.relative_to(source))
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, goal)

    def _run(self, text: str) -> None:
        for command in re.split(r"\s&&\s", text):
            if command.startswith(("apt-get update", "rm -rf /var/lib/apt")):
                continue
            if command.startswith("apt-get install"):
                if shutil.which("apt-get") is None:
                    continue
                self._sh(command.replace("apt-get install", "apt-get install --simulate"))
            else:
                self._sh(self.within(command))
            self.done.append(command)

    def _sh(self, command: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env=self.environment,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
