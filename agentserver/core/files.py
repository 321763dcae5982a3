"""Files in the directory of an agent, where the agent itself may have put anything under any name.

Owns:    how files below `agents/` are opened, found and made: only regular files, never through a link, never waiting.
Runs in: the core, and processes of its own that read output.
Unaware: of what is in the files.

An agent runs as the same user as we do. A named pipe in the place of a file would stop whoever opens it, until somebody
writes to it; a link would make us write to, or serve, another file; a lease (F_SETLEASE in fcntl(2)) would make an open
wait for most of a minute. So: O_NONBLOCK, O_NOFOLLOW, and a look at what was opened. What is found instead is named.
"""
from __future__ import annotations

import errno
import os
import stat
from typing import Iterator

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFLNK: "a link", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFREG: "a file"}
#: what open(2) says when something else than a file, or than a directory, has the name
_OTHER = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR, errno.ENODEV)


class NotAFile(OSError):
    """Something else has the name of a file of ours; `strerror` says what, and where."""


def make_directory(path: str) -> None:
    """Make the directory of an agent, and the one that holds those of all agents."""
    make_private(os.path.dirname(path))
    make_private(path)


def make_private(path: str) -> None:
    """Make a directory, if it is not there, for our own user only, whatever the umask is."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass


def open_file(directory: str, name: str, flags: int) -> int:
    """Open a file of ours in the directory of an agent, make it with O_CREAT; raise `NotAFile` for other things."""
    at = _enter(directory)
    try:
        try:
            fd = os.open(name, flags | _FLAGS, 0o600, dir_fd=at)
        except OSError as e:
            raise _other(e, directory, name, at) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _not_a_file(directory, name, at)
        return fd
    finally:
        os.close(at)


def new_file(directory: str, name: str) -> int:
    """Open a new file; what had its name before is gone, but for a directory, which is refused."""
    at = _enter(directory)
    try:
        try:
            os.unlink(name, dir_fd=at)
        except FileNotFoundError:
            pass
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=at)
    except OSError as e:
        raise _other(e, directory, name, at) from None
    finally:
        os.close(at)


def read_file(directory: str, name: str, position: int, count: int) -> bytes:
    """Return up to `count` bytes of a file."""
    fd = open_file(directory, name, os.O_RDONLY)
    try:
        return os.pread(fd, count, position)
    finally:
        os.close(fd)


def size_of(directory: str, name: str) -> int:
    """Return the size of a file; raise `NotAFile` for other things."""
    at = _enter(directory)
    try:
        status = os.stat(name, dir_fd=at, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(directory, name, at)
        return status.st_size
    finally:
        os.close(at)


def is_other(directory: str, name: str) -> bool:
    """Whether something else than a file has this name."""
    try:
        size_of(directory, name)
    except NotAFile:
        return True
    except OSError:
        pass
    return False


def rename(directory: str, before: str, after: str) -> None:
    """Give a file another name."""
    at = _enter(directory)
    try:
        os.rename(before, after, src_dir_fd=at, dst_dir_fd=at)
    finally:
        os.close(at)


def remove(directory: str, name: str) -> None:
    """Remove a file, or a link itself."""
    at = _enter(directory)
    try:
        os.unlink(name, dir_fd=at)
    finally:
        os.close(at)


def listed(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield name and status of all that is in a directory, links as themselves; nothing where there is no directory."""
    try:
        at = _enter(directory)
    except OSError as e:
        if isinstance(e, (FileNotFoundError, NotADirectoryError, NotAFile)):
            return
        raise
    try:
        with os.scandir(at) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # dropped meanwhile: a process that only reads looks while the core writes
                    continue
                yield entry.name, status
    finally:
        os.close(at)


def _enter(directory: str) -> int:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except OSError as e:
        if e.errno not in _OTHER or not os.path.lexists(directory):
            raise
        raise NotAFile(errno.ENOTDIR, f"{directory} is {_kind(os.lstat(directory))}, where the directory of an agent "
                       "should be; remove it") from None


def _other(e: OSError, directory: str, name: str, at: int) -> OSError:
    if isinstance(e, BlockingIOError):
        return OSError(errno.EBUSY, f"{directory}/{name} is held by another process, by a lease")
    return _not_a_file(directory, name, at) if e.errno in (*_OTHER, errno.EPERM) else e


def _not_a_file(directory: str, name: str, at: int) -> OSError:
    try:
        kind = _kind(os.stat(name, dir_fd=at, follow_symlinks=False))
    except OSError as e:
        return e
    return NotAFile(errno.EINVAL, f"{directory}/{name} is {kind}, where a file of the server should be; remove it")


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
