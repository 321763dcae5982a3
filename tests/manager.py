"""A stand-in for the service manager: it hears sd_notify(3), keeps descriptors, and gives them to the next start.

Owns:    the datagram socket that NOTIFY_SOCKET names, everything that was said on it, and the store.
Runs in: the test process, with a thread of its own that receives.
Unaware: of what is stored: names and descriptors.
"""
from __future__ import annotations

import array
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Callable

from support import DEADLINE_SECS, MAIN, Server, short_dir, wait_until

#: becomes `serve`, after it has put what the manager stored where sd_listen_fds(3) looks for it
LAUNCHER = """
import os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
names, fds = [], []
while True:
    name, got, _, _ = socket.recv_fds(link, 256, 1)
    if not name:
        break
    names.append(name.decode()), fds.extend(got)
    link.sendall(b".")
link.close()
high = [os.dup2(fd, 500 + n, inheritable=False) for n, fd in enumerate(fds)]
for n, fd in enumerate(high):
    os.dup2(fd, 3 + n)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(names))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Manager:
    """See the module. `hear` False: it is stuck, and takes nothing until `resume`."""

    def __init__(self, home: Path, abstract: bool = False, hear: bool = True) -> None:
        self.address = f"@{home.name}-notify" if abstract else str(home / "notify")
        self.messages: list[dict[str, str]] = []
        self.store: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:] if abstract else self.address)
        self._launch_path = str(home / "launch")
        self._thread = threading.Thread(target=self._receive, daemon=True)
        if hear:
            self.resume()

    def resume(self) -> None:
        """Begin to take what is said."""
        self._thread.start()

    def _receive(self) -> None:
        while True:
            data, ancillary, flags, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC)
            if data == b"over":
                return
            fds = array.array("i")
            for _level, _type, payload in ancillary:
                fds.frombytes(payload[:len(payload) - len(payload) % fds.itemsize])
            words = dict(line.partition("=")[::2] for line in data.decode().split("\n") if line)
            self._keep(words, list(fds))
            self.messages.append(words)

    def _keep(self, words: dict[str, str], fds: list[int]) -> None:
        name = words.get("FDNAME", "stored")
        if words.get("FDSTORE") == "1" and fds:
            assert words["FDPOLL"] == "0" and len(fds) == 1 and name not in self.store, (words, self.store)
            self.store[name] = fds[0]
        elif words.get("FDSTOREREMOVE") == "1":
            os.close(self.store.pop(name))

    def heard(self, word: str) -> list[str]:
        """Return what was said of one kind, in order."""
        return [words[word] for words in self.messages if word in words]

    def await_word(self, word: str, value: str | None = None) -> None:
        """Wait until something was said."""
        wait_until(lambda: [v for v in self.heard(word) if value in (None, v)], what=f"{word}={value} to be said")

    def environ(self) -> dict[str, str]:
        """Return what a service finds in its environment."""
        return {"NOTIFY_SOCKET": self.address}

    def start_again(self, start_server: Callable[..., Server], state_dir: Path, **environ: str) -> Server:
        """Start `serve` with everything that is stored, as a manager does."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._launch_path)
        listener.listen(1)
        listener.settimeout(DEADLINE_SECS)
        handing = threading.Thread(target=self._hand_over, args=(listener, dict(self.store)))
        handing.start()
        try:
            return start_server(state_dir=state_dir, environ={**self.environ(), **environ},
                                program=[sys.executable, "-c", LAUNCHER, self._launch_path, str(MAIN)])
        finally:
            handing.join()
            listener.close()
            os.unlink(self._launch_path)

    @staticmethod
    def _hand_over(listener: socket.socket, store: dict[str, int]) -> None:
        link, _ = listener.accept()
        with link:
            for name, fd in store.items():
                socket.send_fds(link, [name.encode()], [fd])
                link.recv(1)

    def close(self) -> None:
        """Stop hearing, and let go of everything."""
        if self._thread.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.connect(self._socket.getsockname())
                end.send(b"over")
            self._thread.join()
        self._socket.close()
        for fd in self.store.values():
            os.close(fd)


def manager_in(run_dir: Path, **how: bool) -> Manager:
    """Return a manager with a fresh directory for its sockets."""
    return Manager(short_dir(run_dir), **how)
