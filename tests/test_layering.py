"""Imports point one way, and one standard module has one home: the rules of docs/architecture.md, checked.

Owns:    the order of the files, and the table of which file may use which special module.
Runs in: the test process; it reads source and imports nothing of ours.
Unaware: of what the code does.
"""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import MAIN, ROOT

PACKAGE = MAIN.parent
FILES = sorted(PACKAGE.rglob("*.py"))
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def documented_order() -> list[str]:
    """Return the modules in the order of the layout in docs/architecture.md, as `core.link`."""
    block = ARCHITECTURE.read_text("utf-8").split("## Layout")[1].split("```")[1]
    order, folders = [], {0: ""}
    for indent, name in re.findall(r"^( *)([\w/]+(?:\.py)?)", block, re.M):
        depth = len(indent)
        if name.endswith("/"):
            folders[depth + 2] = folders[depth] + ("" if name == "agentserver/" else name[:-1] + ".")
        elif name.endswith(".py") and not name.startswith("__"):
            order.append(folders[depth] + name[:-3])
    return order


#: the reading order: a file may use what stands above it (in its own layer; see ACROSS for the others)
ORDER = documented_order()
COMMON = ("errors", "wire", "messages", "results", "endpoint", "paths", "config", "sources")
CLIENT = ("address", "talk", "calls", "hints", "follow", "lines", "client", "aclient")
#: what a layer may use of the others, besides COMMON
ACROSS = {
    "core": (),
    "shell": ("core.link", "core.framelink", "core.framing", "core.alink", "core.serving", "core.state_dir",
              "core.lock", "core.channel", "core.privacy", "core.quota"),
    # the client reaches a server over the core's socket, or over ZeroMQ when the address says so
    "client": ("core.link", "core.alink", "core.ssh", "core.lifecycle", "shell.link", "shell.alink"),
    # `serve` becomes a keeper, `stdio` a relay, and `doctor` looks at what one would need; all else goes through the
    # client
    "cli": ("client", "core.serving", "core.state_dir", "core.relay", "core.lifecycle", "core.process", "core.pidfd",
            "core.inherited"),
}
#: special modules of Python, and the only files (or folders) that may import them
HOMES = {
    "zmq": ("shell", "cli.doctor"),
    "selectors": ("core.reactor",),
    "sqlite3": ("core.database",),
    "argparse": ("cli",),
    "subprocess": ("core.process", "core.keeper"),
    "resource": ("core.process", "core.inherited", "core.privacy", "shell.descriptors", "cli.doctor"),
    "fcntl": ("core.lock", "core.output", "core.query", "core.run", "core.stdin", "core.pidfd", "core.terminal",
              "shell.connections", "shell.owed"),
    "ctypes": ("core.tree", "core.quota", "core.privacy", "cli.doctor"),
    "threading": ("shell", "cli"),
    "multiprocessing": (),
    "asyncio": ("aclient", "core.alink", "shell.alink"),
    "logging": (),
    "pickle": (),
    "uuid": (),
}


def module_name(path: Path) -> str:
    """Return `core.link` for agentserver/core/link.py, `core` for agentserver/core/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in FILES}


def _for_types_only(tree: ast.AST) -> set[ast.AST]:
    """Return all nodes under `if TYPE_CHECKING:`; they are never imported."""
    return {inner for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for child in node.body for inner in ast.walk(child)}


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """Return the full dotted name that a relative `from` means."""
    if not node.level:
        return node.module or ""
    parts = ["agentserver", *filter(None, name.split("."))]
    parts = parts[:len(parts) - node.level + is_package]
    return ".".join([*parts, *filter(None, [node.module])])


def imports(path: Path) -> set[str]:
    """Return what a file imports, at the top or inside functions: ours without `agentserver.`, others by root."""
    tree, name = ast.parse(path.read_text("utf-8")), module_name(path)
    unseen, found = _for_types_only(tree), set()
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, path.name == "__init__.py")
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {_ours(full) if full.split(".")[0] == "agentserver" else full.split(".")[0] for full in found}


def _ours(full: str) -> str:
    """Return the module of ours that an import means: `agentserver.core.link.LineLink` is `core.link`."""
    parts = full.split(".")[1:]
    while parts and ".".join(parts) not in NAMES:
        parts.pop()
    return "agentserver." + ".".join(parts) if parts else "agentserver"


def layer(name: str) -> str:
    """Return which layer a module belongs to."""
    if name in COMMON:
        return "common"
    return "client" if name in CLIENT else name.split(".")[0]


def may_use(name: str, used: str) -> bool:
    """Tell whether the module `name` may import the module of ours `used`."""
    if used in COMMON:
        return name not in COMMON or COMMON.index(used) < COMMON.index(name)
    mine = layer(name)
    if mine == layer(used):
        # cli/ has no order of its own; a folder may be named by its files
        return name not in ORDER or used not in ORDER or ORDER.index(used) < ORDER.index(name)
    return used in ACROSS.get(mine, ()) or used in {whole.split(".")[0] for whole in ACROSS.get(mine, ())}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    if name in ("", "__main__"):
        pytest.skip("the package itself and its door may name everything; both do so lazily")
    wrong = [used for used in sorted(imports(path)) if used.startswith("agentserver.")
             and used != f"agentserver.{name}" and not may_use(name, used.partition(".")[2])]
    assert not wrong, f"{name} must not import {wrong}; the order is in docs/architecture.md"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_of_python_has_one_home(path: Path) -> None:
    name = module_name(path)
    wrong = [used for used in imports(path) & HOMES.keys()
             if not any(name == home or name.startswith(home + ".") for home in HOMES[used])]
    assert not wrong, f"{name} must not import {wrong}; their homes are {[HOMES[used] for used in wrong]}"


def test_only_the_shell_needs_more_than_python() -> None:
    standard = set(sys.stdlib_module_names) if sys.version_info >= (3, 10) else None
    if standard is None:
        pytest.skip("this Python does not know the names of its own modules")
    for path in FILES:
        strangers = {used for used in imports(path) if not used.startswith("agentserver")} - standard - {"zmq"}
        assert not strangers, f"{module_name(path)} imports {strangers}"


def test_every_file_has_its_place_in_the_order() -> None:
    homeless = [name for name in sorted(NAMES - {"", "__main__", "core", "shell"} - set(ORDER))
                if not name.startswith("cli")]
    assert not homeless, f"add {homeless} to the layout in docs/architecture.md"
    assert not set(ORDER) - NAMES, "the layout in docs/architecture.md names files that are not there"


def test_the_documented_lifecycle_is_the_table() -> None:
    from agentserver.core.lifecycle import TRANSITIONS
    block = ARCHITECTURE.read_text("utf-8").split("## The life of an agent")[1].split("```")[1]
    documented = {}
    for line in block.strip().splitlines():
        statuses, steps = re.split(r"  +", line)
        for step in steps.split(", "):
            given, after = step.split(" -> ")
            documented.update({(status, given): after for status in statuses.split(", ")})
    assert documented == TRANSITIONS


def test_importing_the_package_needs_no_zmq_and_little_else() -> None:
    code = ("import sys; import agentserver, agentserver.core.service, agentserver.core.serving, agentserver.cli;"
            "print(*sorted({'zmq', 'asyncio', 'logging', 'multiprocessing'} & set(sys.modules)))")
    environ = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
