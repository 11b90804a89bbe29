"""`python -m trivium`, the same as the `trivium` command."""

from trivium.runtime.cli import main

main()
