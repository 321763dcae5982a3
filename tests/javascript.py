"""Node and its zeromq module, for the example in JavaScript, where a machine has them or can get them.

Owns:    `.node/`, a cache in the checkout (git ignores it), and the reason why there is none.
Runs in: the test process; npm is a process of its own, with a deadline.
Unaware: of what is run with it.
"""
from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

EXAMPLE = ROOT / "examples" / "javascript"
CACHE = ROOT / ".node"
NPM_SECS = 60


def node() -> str:
    """Return the program, or skip the test."""
    found = shutil.which("node")
    if not found:
        pytest.skip("node is not installed")
    return found


@functools.lru_cache(maxsize=None)
def _why_not() -> str:
    """Install what the example needs, if that was not done before; return why that failed, or nothing."""
    if not _works():
        npm = shutil.which("npm")
        if not npm:
            return "the zeromq module of node is not installed, and there is no npm to install it"
        CACHE.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(EXAMPLE / name, CACHE)
        try:  # the package brings its binaries: nothing is compiled, and no script of a stranger runs
            done = subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"],
                                  cwd=CACHE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=NPM_SECS, text=True)
        except subprocess.TimeoutExpired:
            return f"npm did not install zeromq within {NPM_SECS} s"
        if done.returncode:
            return "npm cannot install zeromq: " + " ".join(done.stdout.split())[:200]
    return "" if _works() else "the zeromq module of node does not load here"


def _works() -> bool:
    return os.path.isdir(CACHE) and subprocess.run(
        [node(), "--input-type=module", "-e", 'import "zeromq"'], cwd=CACHE, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def script(directory: Path) -> list[str]:
    """Return the argv that runs the example, with the modules beside it; or skip the test."""
    program = node()
    why_not = _why_not()
    if why_not:
        pytest.skip(why_not)
    home = directory / "javascript"
    if not home.exists():
        home.mkdir(parents=True)
        shutil.copy(EXAMPLE / "follow.mjs", home)
        (home / "node_modules").symlink_to(CACHE / "node_modules")
    return [program, str(home / "follow.mjs")]
