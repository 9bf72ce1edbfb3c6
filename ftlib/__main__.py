"""`python3 -m ftlib`. Pinned code of runs is called by this name, too."""

from __future__ import annotations

import sys

from ftlib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
