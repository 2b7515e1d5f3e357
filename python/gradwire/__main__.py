"""The command `gradwire`, also `python -m gradwire`: `gradwire trace merge FOLDER...`, see `gradwire trace --help`."""

from __future__ import annotations

import sys

from . import trace


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "trace":
        return trace.main(arguments)
    print(__doc__, file=sys.stdout if command == "--help" else sys.stderr)
    return 0 if command == "--help" else 2


if __name__ == "__main__":
    sys.exit(main())
