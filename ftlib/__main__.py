"""`python3 -m ftlib`, and the command `ftlib`. Pinned code of runs is called by this name, too."""

from __future__ import annotations

import sys

from ftlib.errors import EXIT_INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        from ftlib.cli.main import main as run_command
    except KeyboardInterrupt:  # Ctrl-C during the imports
        print("ftlib: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return run_command(argv)


if __name__ == "__main__":
    sys.exit(main())
