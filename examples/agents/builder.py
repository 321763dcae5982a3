"""An agent that builds for a while: it compiles every Python file of a folder, three times, into another folder.

    python builder.py SOURCE TARGET [--pace SECONDS]

It prints a line per step, and ends with 0.
"""
from __future__ import annotations

import argparse
import hashlib
import marshal
import time
from pathlib import Path


def main() -> int:
    """Compile everything, step by step."""
    options = argparse.ArgumentParser()
    options.add_argument("source", type=Path)
    options.add_argument("target", type=Path)
    options.add_argument("--pace", type=float, default=0.0)
    given = options.parse_args()
    steps = [(path, level) for level in (0, 1, 2) for path in sorted(given.source.rglob("*.py"))]
    digest = hashlib.sha256()
    for number, (path, level) in enumerate(steps, 1):
        name = path.relative_to(given.source)
        code = marshal.dumps(compile(path.read_text("utf-8"), str(name), "exec", optimize=level))
        target = given.target / f"O{level}" / name.with_suffix(".bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(code)
        digest.update(code)
        print(f"[{number}/{len(steps)}] {name} -O{level}: {len(code):,} bytes", flush=True)
        time.sleep(given.pace)
    print(f"built {len(steps)} objects, sha256 {digest.hexdigest()[:16]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
