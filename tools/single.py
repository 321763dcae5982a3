"""Build dist/agentserver.pyz: the server, the client and the library in one file (`make single`).

Owns:    what goes into the file, in which order and with which times, so that equal sources give equal bytes.
Runs in: a process of its own.
Unaware: of what the code does. pyzmq stays outside: it is compiled, and the file works without it.
"""
from __future__ import annotations

import os
import sys
import tempfile
import time
import zipapp
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: a zip holds local times, so the same moment would differ between time zones
EPOCH = time.mktime((2000, 1, 1, 0, 0, 0, 0, 0, -1))

#: zipapp's own `-m` would drop the exit code of main()
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("agentserver needs Python 3.9 or newer, and this is " + sys.version.split()[0])

from agentserver.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
"""


def stage(folder: Path) -> None:
    """Put a clean copy of what goes in into `folder`, all of it with one time and one mode."""
    package = ROOT / "agentserver"
    wanted = {p.relative_to(ROOT): p.read_bytes() for p in package.rglob("*.py")}
    wanted[Path("LICENSE")] = (ROOT / "LICENSE").read_bytes()
    wanted[Path("__main__.py")] = MAIN.encode()
    for name, content in wanted.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    for place in folder.rglob("*"):
        place.chmod(0o755 if place.is_dir() else 0o644)
        os.utime(place, (EPOCH, EPOCH))


def build(target: Path) -> None:
    """Write the file beside its place and move it there, executable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".new")
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder))
        zipapp.create_archive(folder, draft, interpreter="/usr/bin/env python3", compressed=True)
    draft.chmod(0o755)
    os.replace(draft, target)


def main(argv: list[str]) -> int:
    """Build to the path given, or to dist/agentserver.pyz."""
    target = Path(argv[0]) if argv else ROOT / "dist" / "agentserver.pyz"
    build(target)
    print(f"{target}: {target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
