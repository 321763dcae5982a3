"""An agent that answers what is written to its stdin, about the Python files of a folder.

    python answerer.py FOLDER

It knows `lines FILE`, `where NAME` and `longest`. It ends with 0 when its stdin is closed.
"""
from __future__ import annotations

import ast
import sys
from pathlib import Path


def where(folder: Path, name: str) -> str:
    """Say where a function or class is defined."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return f"{name} is defined in {path.relative_to(folder)} at line {node.lineno}"
    return f"nobody here defines {name}"


def lines(folder: Path, name: str) -> str:
    """Say how long a file is."""
    try:
        return f"{name} has {len((folder / name).read_text('utf-8').splitlines())} lines"
    except OSError:
        return f"there is no file {name}"


def longest(folder: Path, _: str) -> str:
    """Say which file is the longest."""
    count, path = max((len(p.read_text("utf-8").splitlines()), p) for p in folder.rglob("*.py"))
    return f"the longest file is {path.relative_to(folder)} with {count} lines"


ANSWERS = {"where": where, "lines": lines, "longest": longest}


def main() -> int:
    """Answer line by line until there are no more."""
    folder = Path(sys.argv[1])
    print("ask me: lines FILE, where NAME, longest", flush=True)
    for question in sys.stdin:
        word, _, rest = question.strip().partition(" ")
        answer = ANSWERS.get(word)
        print(answer(folder, rest) if answer else f"I do not know {word!r}", flush=True)
    print("good-bye", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
