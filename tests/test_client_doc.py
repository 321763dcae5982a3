"""docs/client.md: whatever it shows runs, and whatever the client has is in it.

Owns:    the Python shown there; that every public name, method, parameter and field is named.
Runs in: the test process; each piece of Python is a program of its own, against a real server.
Unaware: of what the methods do.
"""
from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from support import DEADLINE_SECS, ROOT, Server, clean_environ

import agentserver
from agentserver import results

TEXT = (ROOT / "docs" / "client.md").read_text("utf-8")
SHOWN = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
CLASSES = [agentserver.AgentClient, agentserver.Agent, agentserver.AgentServer]
TWINS = [(agentserver.AgentClient, agentserver.AsyncAgentClient), (agentserver.Agent, agentserver.AsyncAgent)]
RESULTS = [each for each in vars(results).values()
           if isinstance(each, type) and issubclass(each, results.Result) and each not in (results.Result,)]


def public(cls: type) -> dict[str, Any]:
    """Return the public methods and properties of a class."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


@pytest.mark.parametrize("code", SHOWN, ids=range(len(SHOWN)))
def test_the_python_that_is_shown_runs(code: str, server: Server) -> None:
    environ = clean_environ(server.state_dir, {"AGENTSERVER_SERVER": server.endpoint})
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environ, cwd=str(ROOT), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=4 * DEADLINE_SECS)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in re.findall(r"# prints (.*)", code):
        assert shown in done.stdout, done.stdout


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_method_is_told_with_its_parameters(cls: type) -> None:
    for name, value in public(cls).items():
        told = re.findall(rf"(?<![\w]){name}(?:\((.*?)\))?`", TEXT)
        assert told, f"{cls.__name__}.{name} is not in docs/client.md"
        if inspect.isfunction(value):
            wanted = [str(p) for p in inspect.signature(value).parameters if p != "self"]
            given = [re.findall(r"(\w+)(?:=|,|$)", re.sub(r'=("[^"]*"|\([^)]*\)|[^,]*)', "", each)) for each in told]
            assert any(set(wanted) - {"how"} <= set(each) for each in given), f"{cls.__name__}.{name}: {wanted}, {told}"


@pytest.mark.parametrize("one, twin", TWINS, ids=["client", "agent"])
def test_the_twins_have_the_same_methods(one: type, twin: type) -> None:
    assert set(public(one)) == set(public(twin))
    for name, value in public(one).items():
        if inspect.isfunction(value):
            assert str(inspect.signature(value)).partition(" -> ")[0] == \
                str(inspect.signature(public(twin)[name])).partition(" -> ")[0], name


@pytest.mark.parametrize("cls", RESULTS, ids=lambda cls: cls.__name__)
def test_every_field_of_a_result_is_told(cls: Any) -> None:
    if cls is results.StreamRange:
        return  # told where the output of AgentInfo is
    (row,) = re.findall(rf"^\| `{cls.__name__}` \|(.*)$", TEXT, re.M)
    names = {field.name for field in fields(cls)} - {"raw"} | {name for name, value in public(cls).items()
                                                              if isinstance(value, property)}
    missing = sorted(name for name in names if f"`{name}`" not in row)
    assert not missing, f"{cls.__name__}: {missing}"


def test_every_public_name_is_told() -> None:
    missing = [name for name in agentserver.__all__ if name != "__version__" and f"{name}" not in TEXT]
    assert not missing
