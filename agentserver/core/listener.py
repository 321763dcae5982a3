"""The socket at which local clients, the shell and a next keeper reach the core.

Owns:    `core.sock`: its file in the working directory, the state directory. The core's lock is held, so that a socket
         which lies there already belongs to nobody.
Runs in: the core's thread.
Unaware: of who connects.

A cleaner of old files may remove the file while we serve (`there`); then another is made in its place.
"""
from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Iterator

NAME, NEW = "core.sock", "core.new"
WAITING_MOST = 128  # connections that are not accepted yet


class Listener:
    """See the module. Made when the core begins to serve; `OSError` if that cannot be."""

    def __init__(self) -> None:
        self._sock, self._inode = _listening()

    def fileno(self) -> int:
        """For the reactor."""
        return self._sock.fileno()

    def accept(self) -> socket.socket:
        """Return the next connection."""
        return self._sock.accept()[0]

    def last(self) -> Iterator[socket.socket]:
        """Refuse whoever comes from now on, as far as the system lets us (Linux does); yield who has come by now."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            while True:
                yield self.accept()

    @property
    def there(self) -> bool:
        """Whether who comes finds us: false when the file was removed, or another put in its place."""
        try:
            return os.stat(NAME).st_ino == self._inode
        except OSError:
            return False

    def close(self, followed: bool) -> None:
        """Stop listening. A successor puts its socket in the place of ours, which stays until then: to whoever comes
        meanwhile, the server is not gone."""
        self._sock.close()
        if self.there and not followed:
            os.unlink(NAME)


def _listening() -> tuple[socket.socket, int]:
    """Bind inside the directory, as a Unix address may have 107 bytes at most (unix(7)), and then rename: so there is a
    socket at any moment, for whoever looks."""
    if os.path.lexists(NEW):
        os.unlink(NEW)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(NEW)
        sock.listen(WAITING_MOST)
        os.rename(NEW, NAME)
        sock.setblocking(False)
        return sock, os.stat(NAME).st_ino
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
