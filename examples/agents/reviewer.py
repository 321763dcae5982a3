"""An agent that reviews Python files line by line and says what it finds as it goes.

    python reviewer.py FILE_OR_FOLDER... [--pace SECONDS]

It stands for any program that works for a while and streams its findings. It ends with 0.
"""
from __future__ import annotations

import argparse
import ast
import re
import time
from pathlib import Path
from typing import Iterator

LONG_LINE = 120
LONG_FUNCTION = 20
LINE_RULES = (
    (re.compile(rf".{{{LONG_LINE + 1},}}"), f"longer than {LONG_LINE} characters"),
    (re.compile(r"\b(TODO|FIXME|XXX)\b"), "a loose end"),
    (re.compile(r"#\s*type:\s*ignore"), "the type checker was told to look away"),
    (re.compile(r"except\s+(Base)?Exception\b"), "catches nearly everything"),
    (re.compile(r"\s+$"), "blanks at the end"),
)


def line_findings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and finding for what a single line shows."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, finding in LINE_RULES:
            if pattern.search(line):
                yield number, finding


def function_findings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and finding for functions that are long or that nobody documented."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield error.lineno or 1, f"this is not Python: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONG_FUNCTION:
                yield node.lineno, f"{node.name}() has {lines} lines"
            if not node.name.startswith("_") and lines > 5 and not ast.get_docstring(node):
                yield node.lineno, f"{node.name}() says nothing about itself"


def review(path: Path, pace: float) -> int:
    """Print the findings of one file as they are made, and return how many there were."""
    text = path.read_text("utf-8")
    findings = sorted([*line_findings(text), *function_findings(text)])
    for number, finding in findings:
        print(f"{path}:{number}: {finding}", flush=True)
        time.sleep(pace)
    return len(findings)


def main() -> int:
    """Review all that was named and sum up."""
    options = argparse.ArgumentParser()
    options.add_argument("paths", nargs="+", type=Path)
    options.add_argument("--pace", type=float, default=0.0)
    given = options.parse_args()
    files = [f for path in given.paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    total = sum(review(path, given.pace) for path in files)
    print(f"reviewed {len(files)} files, {total} findings", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
