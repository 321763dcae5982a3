"""The main job of agentserver, shown on this checkout: `make demo`.

A server is started in a temporary state directory on free loopback ports, five agents work at once, each
is treated as one treats agents, and at the end nothing is left behind. Ends with 0 only if all went as it should.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator

from agentserver import Agent, AgentClient, AgentServerError

ROOT = Path(__file__).resolve().parent.parent
AGENTS = ROOT / "examples" / "agents"
SOURCES = ROOT / "agentserver"
CLIS = ("claude", "codex", "opencode", "gemini", "aider")
PATIENCE_SECS = 60.0
COLOURS = {"reviewer": 36, "chat": 32, "build": 33, "stubborn": 35, "release-check": 31}


class Screen:
    """Prints what happens, one whole line at a time, and lets others wait for a line."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seen: dict[str, list[str]] = {}
        self.failed: list[str] = []
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def say(self, text: str) -> None:
        """Print a line of the story."""
        with self._changed:
            print(f"\n\x1b[1m{text}\x1b[0m" if self._colour else f"\n== {text}", flush=True)

    def show(self, name: str, line: str) -> None:
        """Print a line that an agent wrote."""
        with self._changed:
            prefix = f"{name:>13} | "
            if self._colour:
                prefix = f"\x1b[{COLOURS.get(name, 37)}m{prefix}\x1b[0m"
            print(prefix + line, flush=True)
            self._seen.setdefault(name, []).append(line)
            self._changed.notify_all()

    def check(self, what: str, held: object) -> None:
        """Print whether something is as it should be, and remember if not."""
        with self._changed:
            print(f"   {'ok  ' if held else 'FAIL'} {what}", flush=True)
            if not held:
                self.failed.append(what)

    def wait_for(self, name: str, words: str) -> bool:
        """Wait until an agent has written a line with these words."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(words in line for line in self._seen.get(name, ())), PATIENCE_SECS)


def command_line(*args: str) -> list[str]:
    """Return the argv of our own command line."""
    return [sys.executable, "-m", "agentserver", *args]


@contextlib.contextmanager
def serving(state_dir: str, screen: Screen) -> Iterator[str]:
    """Run a server while the body runs; yield its endpoint. At the end it must leave by itself, with 0."""
    argv = command_line("serve", "--state-dir", state_dir,
                        "--endpoint", "tcp://127.0.0.1:0", "--pub-endpoint", "tcp://127.0.0.1:0")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            print(server.stdout.readline().strip())
            with AgentClient(f"unix:{state_dir}") as client:
                endpoint = client.health().metadata["endpoint"]
            yield endpoint
        finally:
            screen.say("The end: SIGTERM to the server")
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(PATIENCE_SECS)
            except subprocess.TimeoutExpired:
                server.kill()
            screen.check(f"the server ended with code {server.returncode}", server.returncode == 0)


def follow(endpoint: str, names: dict[str, str], screen: Screen) -> None:
    """Show the output of all agents as it comes, cut into lines, until they have ended."""
    rest: dict[tuple[str, str], bytes] = {}
    with AgentClient(endpoint) as client:
        for agent_id, stream, chunk in client.follow(list(names)):
            *lines, rest[agent_id, stream] = (rest.get((agent_id, stream), b"") + chunk.data).split(b"\n")
            for line in lines:
                screen.show(names[agent_id], line.decode(errors="replace").replace(f"{ROOT}/", ""))


def spawn_all(client: AgentClient, scratch: str) -> dict[str, Agent]:
    """Start the five agents."""
    def python(name: str, *args: str) -> list[str]:
        return [sys.executable, str(AGENTS / f"{name}.py"), *args]
    return {
        "reviewer": client.spawn(python("reviewer", str(SOURCES), "--pace", "0.07"), name="reviewer", stdin="null"),
        "chat": client.spawn(python("answerer", str(SOURCES)), name="chat"),
        "build": client.spawn(python("builder", str(SOURCES / "core"), scratch, "--pace", "0.04"),
                              name="build", stdin="null"),
        "stubborn": client.spawn(python("stubborn"), name="stubborn", stdin="null"),
        "release-check": client.spawn(python("checker", str(ROOT), "README.md", "LICENSE", "docs/signature.md"),
                                      name="release-check", stdin="null"),
    }


def talk(chat: Agent, screen: Screen) -> None:
    """Ask the interactive agent two things."""
    screen.say("Talking to an agent over its stdin")
    for question, answer in (("where AgentClient", "client.py at line"), ("lines core/lifecycle.py", "has 69 lines")):
        screen.show("you to chat", question)
        chat.write(question + "\n")
        screen.check(f"it answered {question!r}", screen.wait_for("chat", answer.split(" at ")[0].split(" has ")[0]))
    chat.close_stdin()
    screen.check("it ended by itself when its stdin was closed", chat.wait(PATIENCE_SECS).code == 0)


def pause_and_resume(build: Agent, screen: Screen) -> None:
    """Hold the build for a moment."""
    screen.wait_for("build", "[10/")
    build.pause()
    screen.say("The build is paused; the others go on")
    time.sleep(0.3)
    before = build.info().output["stdout"].end_offset
    time.sleep(1.0)
    info = build.info()
    screen.check(f"it is {info.status} and wrote nothing for a second",
                 info.status == "paused" and info.output["stdout"].end_offset == before)
    build.resume()
    screen.say("The build is resumed")


def stop_the_stubborn(stubborn: Agent, screen: Screen) -> list[int]:
    """End the agent that ignores SIGTERM, and its daemon; return the pids that must be gone."""
    screen.wait_for("stubborn", "a daemon is loose")
    pid = stubborn.info().pid or 0
    screen.say("Stopping the stubborn one: SIGTERM, a second of grace, SIGKILL for its whole tree")
    stubborn.stop(grace_secs=1)
    end = stubborn.wait(PATIENCE_SECS)
    screen.check(f"it was ended by {end.signal}, reason {end.reason}", end.signal == "SIGKILL" and end.reason == "stop")
    daemons = [found for found in end.leaked if "--daemon" in str(found["command"])]
    screen.check(f"its daemon was killed and named: {daemons}", len(daemons) == 1)
    return [pid, *(int(found["pid"]) for found in end.leaked)]


def explain(endpoint: str, failing: Agent, screen: Screen) -> None:
    """Ask why an agent failed, on the command line."""
    code = failing.wait(PATIENCE_SECS).code
    screen.say("$ agentserver why release-check")
    done = subprocess.run(command_line("why", "release-check", "--server", endpoint), stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    screen.check("it failed with code 3, and why says so", code == 3 and "3" in done.stdout)


def work(endpoint: str, scratch: str, screen: Screen) -> list[int]:
    """Run the main job; return the pids of all that ran."""
    with AgentClient(endpoint) as client:
        screen.say(f"Five agents at work on {ROOT}")
        agents = spawn_all(client, scratch)
        pids = [info.pid or 0 for info in client.list(all=True)]
        follower = threading.Thread(target=follow, args=(endpoint, {a.id: n for n, a in agents.items()}, screen))
        follower.start()
        talk(agents["chat"], screen)
        pause_and_resume(agents["build"], screen)
        pids += stop_the_stubborn(agents["stubborn"], screen)
        explain(endpoint, agents["release-check"], screen)
        screen.say("Waiting for the reviewer and the build")
        for name in ("reviewer", "build"):
            screen.check(f"{name} ended well", agents[name].wait(PATIENCE_SECS).code == 0)
        follower.join(PATIENCE_SECS)
        screen.check("all output was shown", not follower.is_alive() and screen.wait_for("build", "sha256"))
    screen.say("$ agentserver ps -a")
    subprocess.run(command_line("ps", "-a", "--server", endpoint), check=False)
    return pids


def alive(pid: int) -> bool:
    """Tell whether a process is still there."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def main() -> int:
    """Run the demonstration and sum up."""
    screen, home = Screen(), tempfile.mkdtemp(prefix="agentserver-demo-")
    try:
        screen.say("Starting a server")
        with serving(os.path.join(home, "state"), screen) as endpoint:
            pids = work(endpoint, os.path.join(home, "build"), screen)
        screen.check("nothing that ran is still running", not [pid for pid in pids if pid > 1 and alive(pid)])
    except AgentServerError as error:
        screen.check(f"the server did as it was asked: {error} ({error.code})", False)
    finally:
        shutil.rmtree(home)
    for cli in filter(shutil.which, CLIS):
        print(f"\n{cli} is on your PATH. With a server running, try:\n"
              f"    agentserver run --backend {cli} --task 'Say what this repository is for.'")
    print(f"\n{len(screen.failed)} things went wrong: {screen.failed}" if screen.failed else "\nAll went as it should.")
    return 1 if screen.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
