"""Commands of trivium, called in this process as from a shell."""

import sys
from collections.abc import Callable


def called(main: Callable[[], None], command: str, *arguments: object) -> None:
    """Call the function behind `trivium COMMAND` with these arguments. Raises: what it raises."""
    before = sys.argv
    sys.argv = [f"trivium {command}", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before
