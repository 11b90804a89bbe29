"""Servers as processes of their own: how a test ends one."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def stop(process: subprocess.Popen[Any], number: signal.Signals, seconds: float) -> int:
    """Send a signal and wait; the exit status."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(seconds)
    finally:
        process.kill()
