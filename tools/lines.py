"""Print files by size and functions by length, so that growth is seen: `make lines`.

Owns:    the measuring of source files, and the two limits after which one has outgrown.
Runs in: a process of its own; tests/test_house.py imports `functions`.
Unaware: of what the code does.

With `--all` everything is listed, not only the largest.
"""
from __future__ import annotations

import ast
import sys
from pathlib import Path
from statistics import median
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agentserver", "tests", "examples", "tools", "bench")
FILE_LINES = 400
FUNCTION_LINES = 40
SHOWN = 15


def sources(folder: str) -> list[Path]:
    """Return the Python files of a folder of the checkout, in reading order."""
    return sorted((ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield length in lines and place of each function, docstring included."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{shown}:{node.lineno} {node.name}"


def _table(title: str, rows: list[tuple[int, str]], limit: int, shown: int) -> None:
    print(f"\n{title}")
    for lines, what in sorted(rows, reverse=True)[:shown]:
        print(f"{lines:6d}  {what}{f'   <-- outgrown: more than {limit}' if lines > limit else ''}")


def main(argv: list[str]) -> int:
    """Print the tables; say at the end how much has outgrown."""
    shown = sys.maxsize if "--all" in argv else SHOWN
    files = [(len(p.read_text("utf-8").splitlines()), str(p.relative_to(ROOT)))
             for folder in FOLDERS for p in sources(folder)]
    lengths = [row for p in sources("agentserver") for row in functions(p)]
    _table("Files by lines", files, FILE_LINES, shown)
    _table("Functions of agentserver by lines", lengths, FUNCTION_LINES, shown)
    print("\nIn all")
    for folder in FOLDERS:
        sizes = [lines for lines, name in files if name.startswith(folder + "/")]
        print(f"{sum(sizes):6d}  {folder} ({len(sizes)} files)")
    ordered = sorted(lines for lines, _ in lengths) or [0]
    print(f"Functions of agentserver: {len(ordered)}, median {median(ordered):g} lines, "
          f"90 % have at most {ordered[int(len(ordered) * 0.9)]}.")
    outgrown = sum(lines > FILE_LINES for lines, _ in files) + sum(lines > FUNCTION_LINES for lines, _ in lengths)
    print(f"{outgrown} outgrown." if outgrown else "Nothing has outgrown.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
