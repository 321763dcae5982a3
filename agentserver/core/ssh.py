"""The way to a server on another machine: the system's `ssh`, which runs `agentserver stdio` there.

Owns:    `ssh://` addresses, the command lines of both sides, the ssh process, and what it says when it fails.
Runs in: a client, in the thread that uses the link; imported only for `ssh://` addresses.
Unaware: of the protocol, and of keys: those are ssh's, with its configuration and its agent.

Nothing is started before the first request, and a new process only when the one before has ended. One end of
a socket pair is the process's stdin and stdout, so that the other is a connection like any other. A person on a
terminal may be asked for a password; without one, ssh is told to fail rather than to wait for an answer.
"""
from __future__ import annotations

import os
import re
import select
import shlex
import signal
import socket
import termios
import time
from typing import Dict, List, Mapping, NamedTuple, Optional, Set

from ..endpoint import MAX_PORT, port_number
from ..errors import LinkError
from ..paths import expanded
from . import process
from .link import NotThere

PROGRAM_VARIABLE = "AGENTSERVER_SSH"
COMMAND_VARIABLE = "AGENTSERVER_SSH_COMMAND"
COMMAND = "agentserver stdio"
#: as sftp does it: nothing but the command; and a network that has died is noticed within half a minute
_OPTIONS = ("-T", "-a", "-x", "-oClearAllForwardings=yes", "-oPermitLocalCommand=no", "-oRemoteCommand=none",
            "-oServerAliveInterval=10", "-oServerAliveCountMax=3")
_ADDRESS = re.compile(r"ssh://(?:([^/?#]*)@)?(\[[^]/?#]+\]|[^]\[@:/?#]+)(?::([^/?#]*))?(/[^?#]*)?(?:\?([^#]*))?")
_FORM = "ssh://[USER@]HOST[:PORT][/STATE_DIR][?command=COMMAND]"
_PREAMBLE = 100            # lines that a login shell there may print first
_LAST_WORDS_SECS = 1.0     # for the end of a process that has closed its stdout
_TERM_SECS = 0.3           # for one that still tries to connect
_SAID_BYTES = 64 * 1024
_SAID_SHOWN = 300
_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.5, 8.0   # between a failure and the next try
_NO_SERVER, _NO_PROGRAM, _SSH_FAILED = 3, 127, 255


class Target(NamedTuple):
    """What an address says; what it leaves out is empty, and ssh's configuration decides."""

    host: str
    user: str = ""
    port: str = ""
    state_dir: str = ""
    command: str = ""

    @property
    def name(self) -> str:
        """The address, without its options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user}{'@' * bool(self.user)}{host}{':' * bool(self.port)}{self.port}"


def parse(address: str) -> Target:
    """Return what an address says; raise `LinkError` with a sentence for one that means nothing."""
    from urllib.parse import unquote
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LinkError(f"{address!r} is not an address of a host; write {_FORM}")
    if match.group(3) is not None and port_number(match.group(3)) < 1:
        raise LinkError(f"{address!r}: {match.group(3)!r} is no port from 1 to {MAX_PORT}; write {_FORM}")
    user, host, path = (unquote(part or "") for part in match.group(1, 2, 4))
    target = Target(host.strip("[]"), user, match.group(3) or "", _state_dir(path), _options(address, match.group(5)))
    for word in (target.host, target.user):
        if word.startswith("-") or re.search(r"[\s\x00-\x1f\x7f]", word):
            raise LinkError(f"{address!r}: {word!r} is no name that ssh should be given")
    if ":" in user:
        raise LinkError(f"{target.host}: a password cannot be given in an address; use ssh's keys")
    if "\0" in target.state_dir + target.command:
        raise LinkError(f"{address!r} contains a NUL character")
    return target


def _state_dir(path: str) -> str:
    """Return the directory that a path means: `/~/x` is in the home directory there, `/` alone says nothing."""
    return path[1:] if path.startswith("/~") else path if path != "/" else ""


def _options(address: str, query: Optional[str]) -> str:
    from urllib.parse import parse_qsl
    given: Dict[str, str] = dict(parse_qsl((query or "").replace("+", "%2B"), keep_blank_values=True))
    command = given.pop("command", "")
    if given:
        raise LinkError(f"{address!r}: there is no option {sorted(given)[0]!r}; write {_FORM}")
    return command


def command_lines(target: Target, environ: Mapping[str, str], ask: bool) -> List[str]:
    """Return the command line that is run here; its last word is the one that is run there, by a shell."""
    there = target.command or environ.get(COMMAND_VARIABLE) or COMMAND
    if target.state_dir:
        there += f" --state-dir {shlex.quote(target.state_dir)}"
    try:
        here = shlex.split(environ.get(PROGRAM_VARIABLE) or "ssh")
        here[0] = expanded(here[0])
    except (ValueError, IndexError) as e:
        raise LinkError(f"{PROGRAM_VARIABLE} cannot be cut into words: {e}") from None
    port = ["-p", target.port] if target.port else []
    quiet = [] if ask else ["-oBatchMode=yes"]
    whom = f"{target.user}@{target.host}" if target.user else target.host
    return [*here, *_OPTIONS, *quiet, *port, "--", whom, there]


def may_ask() -> bool:
    """Whether a person sits at a terminal that is ours at this moment, and could be asked for a password; not while
    each key goes to an agent (raw mode)."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp() and bool(termios.tcgetattr(2)[3] & termios.ICANON)
    except (OSError, termios.error):
        return False


# ---------------------------------------------------------------- the process

class _Call(NamedTuple):
    """An ssh process, and the read end of its stderr."""

    pid: int
    stderr: int

    def said(self, secs: float) -> str:
        """Return the last line on stderr, once it has ended or after `secs`."""
        waiter, data, until = select.poll(), b"", time.monotonic() + secs
        waiter.register(self.stderr, select.POLLIN)
        while waiter.poll(max(int((until - time.monotonic()) * 1000), 0)):
            piece = os.read(self.stderr, _SAID_BYTES)
            if not piece:
                break
            data = (data + piece)[-_SAID_BYTES:]
        lines = [line.strip() for line in data.decode("utf-8", "replace").replace("\r", "\n").split("\n")]
        last = next((line for line in reversed(lines) if line), "")
        return "".join(char if char.isprintable() else " " for char in last)[:_SAID_SHOWN]

    def end(self) -> Optional[int]:
        """End it, if it has not ended by itself; return how it did."""
        code = process.reap_within(self.pid, 0)
        try:
            for number, secs in ((signal.SIGTERM, _TERM_SECS), (signal.SIGKILL, _LAST_WORDS_SECS)):
                if code is None:
                    process.send(self.pid, number)
                    code = process.reap_within(self.pid, secs)
        except BaseException:  # Ctrl-C, or the end of the time that was given, while we wait for it
            process.send(self.pid, signal.SIGKILL)
            raise
        return code


#: processes whose connection was closed, and which end by themselves a moment later
_leaving: Set[int] = set()


def _reap_leaving() -> None:
    for pid in list(_leaving):
        if process.reap_within(pid, 0) is not None:
            _leaving.discard(pid)


class SshRoute:
    """A `Route` over ssh; `core.link.LineLink.over` makes it a link."""

    shared = True
    preamble = _PREAMBLE

    def __init__(self, address: str) -> None:
        self._target = parse(address)
        self.name = self._target.name
        self._call: Optional[_Call] = None
        self._failure: Optional[LinkError] = None
        self._pause = _PAUSE_SECS
        self._not_before = 0.0

    def dial(self) -> socket.socket:
        """Start ssh and return our end of its stdin and stdout; raise `LinkError`. Never waits.

        A host that refused is left alone for a while: trying again at once locks people out."""
        _reap_leaving()
        if self._failure is not None and time.monotonic() < self._not_before:
            raise self._failure
        ask = may_ask()
        argv = command_lines(self._target, os.environ, ask)
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)  # who writes there never waits for us; what does not fit is dropped
        try:
            # Ctrl-C is for whoever uses the link, not for the link
            pid = process.start(argv, {0: theirs.fileno(), 1: theirs.fileno(), 2: write}, not ask, (signal.SIGINT,))
        except (OSError, ValueError) as e:
            ours.close()
            os.close(read)
            raise NotThere(f"{argv[0]!r}, which is to reach {self.name}, could not be started: {e}; install OpenSSH's "
                           f"client, or name it in {PROGRAM_VARIABLE}") from None
        finally:
            theirs.close()
            os.close(write)
        self._call = _Call(pid, read)
        return ours

    def broke(self, why: str, heard: bool) -> LinkError:
        """Return what ssh, or the command there, said of its end."""
        call, self._call = self._call, None
        if call is None:
            return LinkError(f"the link to {self.name} broke: {why}")
        said = call.said(_LAST_WORDS_SECS)
        code = process.reap_within(call.pid, _LAST_WORDS_SECS / 2)
        if code is None:
            code = call.end()
        os.close(call.stderr)
        sentence = self._sentence(said, code, why, heard)
        if heard:
            self._failure, self._pause = None, _PAUSE_SECS
            return LinkError(sentence)
        self._failure = NotThere(sentence)
        self._not_before = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECS)
        return self._failure

    def _sentence(self, said: str, code: Optional[int], why: str, heard: bool) -> str:
        host = self._target.host
        if code == _NO_SERVER and said:
            return f"{host}: " + re.sub(r"^agentserver: error \(\w+\): ", "", said)
        if code == _NO_PROGRAM and not heard:
            return (f"agentserver is not installed on {host}, or not on the PATH of a command that ssh runs there "
                    f"({said or 'exit code 127'}); name it with {COMMAND_VARIABLE}, such as "
                    "'python3 ~/agentserver.pyz stdio'")
        if code == _SSH_FAILED and not heard:
            return f"ssh to {host} failed: {said or 'it ended without saying why; try it by hand'}"
        if heard:
            return f"the link to {self.name} broke: {said or why}"
        ended = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"{host} ended the link before it began, with {ended}{': ' + said if said else ''}"

    def hang_up(self, heard: bool) -> None:
        """Let the process end by itself, which it does when its stdin ends; one that still tries to connect is ended.

        Not killed once it is connected: others may share its connection (ControlMaster)."""
        call, self._call = self._call, None
        if call is None:
            return
        os.close(call.stderr)
        if not heard:
            call.end()
        elif process.reap_within(call.pid, 0) is None:
            _leaving.add(call.pid)
