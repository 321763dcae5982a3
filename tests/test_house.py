"""The rules of the house that a machine can check.

Owns:    the rules for file heads, names, lengths and words; and that what the README names exists.
Runs in: the test process; it reads source.
Unaware: of what the code does.
"""
from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from lines import functions, sources  # noqa: E402

FILES = sources("agentserver")
IDS = [str(path.relative_to(ROOT)) for path in FILES]
FUNCTION_LINES = 60
NO_NAMES = ("utils", "util", "helpers", "helper", "misc", "common", "tools", "stuff")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_each_file_says_what_it_owns(path: Path) -> None:
    head = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    missing = [word for word in ("Owns:", "Runs in:", "Unaware:") if word not in head]
    assert not missing, f"the docstring of {path.name} lacks {missing}"
    assert len(head.splitlines()[0]) <= 120


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_functions_stay_small(path: Path) -> None:
    long = [where for lines, where in functions(path) if lines > FUNCTION_LINES]
    assert not long, f"split them: {long}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_public_classes_and_functions_are_documented(path: Path) -> None:
    if path.name == "messages.py":
        pytest.skip("the name of a message and of its fields says all")
    bare = [node.name for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            and not ast.get_docstring(node)]
    assert not bare, f"{path.name}: no docstring in {bare}"


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    assert not [path for path in FILES if path.stem in NO_NAMES or path.parent.name in NO_NAMES]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_is_evaluated_and_nothing_swallowed(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec", "__import__", "breakpoint"}
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None], "bare except"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_shell_and_no_metaclass(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(r"shell\s*=\s*True|os\.system\(|metaclass\s*=|preexec_fn", text)


def test_the_top_level_is_as_documented() -> None:
    for name in ("setup.py", "tox.ini", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore", ".ci/run",
                 "docs/architecture.md", "docs/protocol.md", "examples/demo.py", "examples/agentserver.ini"):
        assert (ROOT / name).exists(), f"{name} is missing"


def test_targets_that_the_readme_names_are_in_the_makefile() -> None:
    named = set(re.findall(r"`make (\w+)|^make (\w+)", (ROOT / "README.md").read_text("utf-8"), re.M))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    missing = [target for pair in named for target in pair if target and not re.search(rf"^{target}:", makefile, re.M)]
    assert {"demo", "test"} <= {target for pair in named for target in pair}
    assert not missing, f"README names {missing}, which the Makefile does not have"


def test_links_in_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text("utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_tests_that_documents_name_exist() -> None:
    named = [name for page in sorted((ROOT / "docs").glob("*.md"))
             for name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page.read_text("utf-8"))]
    wrong = [f"{file} {test}" for file, test in named if not (ROOT / "tests" / file).is_file()
             or (test and f"def {test}(" not in (ROOT / "tests" / file).read_text("utf-8"))]
    assert named and not wrong
