"""An agent that fails when it should: it checks that the files a release needs are there.

    python checker.py FOLDER FILE...

It ends with 0 if all are there, and with 3 if not.
"""
from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Check each file; complain on stderr."""
    folder = Path(sys.argv[1])
    missing = 0
    for name in sys.argv[2:]:
        if (folder / name).exists():
            print(f"found {name}", flush=True)
        else:
            print(f"checker: {name} is missing, so there can be no release", file=sys.stderr, flush=True)
            missing += 1
    return 3 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
