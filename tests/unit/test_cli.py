"""The `trivium` command: help, version, unknown commands, and the pip line where an extra is missing."""

import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points, version

import pytest

from trivium.runtime.cli import COMMANDS, call
from trivium.runtime.errors import MissingExtra


def trivium(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "trivium", *arguments], capture_output=True, text=True, check=False)


def test_help_names_every_command() -> None:
    done = trivium("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_the_table_of_commands_is_the_entry_points() -> None:
    assert {entry.name for entry in entry_points(group="trivium.commands")} == set(COMMANDS)


def test_version() -> None:
    assert trivium("--version").stdout.strip() == f"trivium {version('trivium')}"


def test_no_command_and_an_unknown_one_exit_with_2() -> None:
    assert trivium().returncode == 2
    done = trivium("sevre")
    assert done.returncode == 2
    assert "no command 'sevre'" in done.stderr
    assert "Traceback" not in done.stderr


def starts() -> None:
    """A subcommand that loads more only when it has begun."""
    importlib.import_module("a_package_that_is_absent")


@pytest.mark.parametrize("function", ["a_package_that_is_absent.cli:main", f"{__name__}:starts"])
def test_a_missing_extra_answers_with_the_pip_line(function: str) -> None:
    entry = EntryPoint("train", function, "trivium.commands")
    with pytest.raises(MissingExtra, match=r"'a_package_that_is_absent' is not installed; run: pip install 'trivium\["):
        call(entry)
