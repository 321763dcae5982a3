"""Why a program could not be executed: the true cause, in one sentence.

Owns:    the sentences for what execve(2) refuses, and reading a program's first bytes to find out which cause it is.
Runs in: the core's thread, after a start has failed.
Unaware: of agents and of how they are started. No sentence shows a value of the environment.

The kernel gives one errno for many causes: ENOENT is a missing program, interpreter or loader; EACCES is a mode, a
directory or a mount; ENOEXEC is another machine's program or no program at all.
"""
from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Mapping, NamedTuple, Sequence

HEAD_BYTES = 4096    # of a program that are looked at
NESTED_MOST = 5      # interpreters of interpreters, as the kernel has it (BINPRM_BUF_SIZE and search_binary_handler)
SHOWN_MOST = 200     # characters of a name
#: bytes of one argument or variable with its final NUL, MAX_ARG_STRLEN in linux/binfmts.h
STRING_BYTES = 32 * os.sysconf("SC_PAGE_SIZE")
_ELF, _INTERPRETER = b"\x7fELF", 3  # PT_INTERP, see elf(5)
_MACHINES = {3: "i386", 8: "MIPS", 20: "PowerPC", 21: "64-bit PowerPC", 22: "S/390", 40: "32-bit ARM", 62: "x86-64",
             183: "64-bit ARM", 243: "RISC-V", 258: "LoongArch"}
_MARKED = b"\xef\xbb\xbf#!"
_FOREIGN = {b"MZ": "Windows", b"\xcf\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS"}


def no_program(program: str) -> str:
    """Return what is said of a program that is not on the PATH of its agent."""
    return (f"there is no program {shown(program)} on the agent's PATH; give its full path, or a PATH that it is on in "
            "config.environment")


def no_directory(cwd: str, e: OSError) -> str:
    """Return what is said of a working directory that cannot be entered."""
    if e.errno == errno.ENOTDIR:
        return f"cannot start in {shown(cwd)}: that is not a directory; give a cwd that is one on the server"
    if e.errno == errno.ENOENT:
        return (f"cannot start in the directory {shown(cwd)}: it does not exist, or not any more; give a cwd that "
                "exists on the server")
    return f"cannot start in the directory {shown(cwd)}: {os.strerror(e.errno or 0)}; give a cwd that can be entered"


def why_not(e: OSError, program: str, argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return why `program`, with these arguments, could not be executed."""
    if e.errno == errno.E2BIG:
        return _too_big(argv, environment)
    number = e.errno or 0
    return _cause(number, program, NESTED_MOST) or f"{shown(program)} could not be started: {_error(number)}"


def shown(name: str) -> str:
    """Return a name for a sentence, not all of it if it is long."""
    return repr(name if len(name) <= SHOWN_MOST else name[:SHOWN_MOST] + "…")


def _error(number: int) -> str:
    if number == errno.EAGAIN:
        return ("this user has as many processes as it may have (RLIMIT_NPROC, or the pids limit of a container); "
                "end some, or raise that limit")
    if number == errno.ENOENT:  # the program is there, and so is all that it names
        return ("a file that the server itself needs for a start is not there; its state directory may have been moved "
                "or deleted")
    if number == errno.ETXTBSY:
        return "it is being written just now; try again when that is done"
    return os.strerror(number)


# ---------------------------------------------------------------- too big

def _too_big(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    sizes = [len(os.fsencode(argument)) + 1 for argument in argv]
    variables = {name: len(os.fsencode(name)) + len(os.fsencode(value)) + 2 for name, value in environment.items()}
    hand = "hand large input over by stdin or a file"
    for number, size in enumerate(sizes):
        if size > STRING_BYTES:
            what = f"argument {number}" if number else "the name of the program"
            return f"{what} has {size - 1} bytes, and this system passes at most {STRING_BYTES - 1} in one; {hand}"
    for name, size in variables.items():
        if size > STRING_BYTES:
            return (f"the variable {shown(name)} has {size - 2} bytes with its name, and this system passes at most "
                    f"{STRING_BYTES - 2} in one; {hand}")
    return (f"the arguments and the environment have {sum(sizes) + sum(variables.values())} bytes, more than this "
            f"system passes to a program (execve(2): E2BIG); {hand}")


# ---------------------------------------------------------------- what the file is

def _cause(number: int, program: str, depth: int) -> str:
    """Return the cause as far as the file tells, "" if it does not; of a script it may be its interpreter's."""
    try:
        status = os.stat(program)
    except OSError as e:
        return _not_there(program, e)
    if stat.S_ISDIR(status.st_mode):
        return f"{shown(program)} is a directory, not a program"
    if not stat.S_ISREG(status.st_mode):
        return f"{shown(program)} is not a file, and so not a program"
    if number == errno.EACCES and not os.access(program, os.X_OK):
        return _not_executable(program)
    if number not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.ELOOP):
        return ""
    head = _head(program)
    if head is None:
        return ""
    if head[:2] == b"#!":
        return _script(number, program, head, depth)
    return _binary(number, program, head)


def _not_there(program: str, e: OSError) -> str:
    if e.errno == errno.ELOOP:
        return f"{shown(program)} is a link that leads in a circle"
    if os.path.islink(program):
        return f"{shown(program)} is a link to {shown(os.readlink(program))}, which is not there"
    if e.errno == errno.EACCES:
        return f"{shown(program)} cannot be reached: the server's user may not search a directory on the way to it"
    if e.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"there is no program {shown(program)}"
    return ""


def _not_executable(program: str) -> str:
    if os.statvfs(program).f_flag & getattr(os, "ST_NOEXEC", 8):
        return (f"{shown(program)} is on a file system that is mounted noexec, from which nothing can be executed; put "
                "it elsewhere, or run it by its interpreter")
    return f"{shown(program)} is not executable for the server's user; chmod +x it, or run it by its interpreter"


def _head(program: str) -> bytes | None:
    try:
        fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # it may be executable and not readable
        return None
    try:
        return os.read(fd, HEAD_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def _script(number: int, program: str, head: bytes, depth: int) -> str:
    line = head[2:].split(b"\n", 1)[0]
    words = line.split(None, 1)
    if not words:
        return f"{shown(program)} names no interpreter in its first line; begin it with a line such as #!/bin/sh"
    interpreter = os.fsdecode(words[0])
    if line.endswith(b"\r") and not os.path.exists(os.fsdecode(line.strip(b" \t"))):
        return (f"the lines of {shown(program)} end as on Windows (CR LF), so that the interpreter in its first line "
                f"would be {shown(os.fsdecode(line.strip(b' ')))}; save it with LF alone: sed -i 's/\\r$//' FILE")
    named = f"{shown(program)} names in its first line the interpreter {shown(interpreter)}"
    if not os.path.exists(interpreter):
        return f"{named}, which does not exist; install that, or name another one"
    if depth <= 1 or number == errno.ELOOP:
        return f"{named}, which is a script itself, and so on; name a program there"
    cause = _cause(number, interpreter, depth - 1)
    return f"{named}, and that cannot be executed: {cause}" if cause else ""


def _binary(number: int, program: str, head: bytes) -> str:
    if head[:4] == _ELF:
        return _elf(number, program, head)
    if number != errno.ENOEXEC:
        return ""
    for magic, system in _FOREIGN.items():
        if head.startswith(magic):
            return f"{shown(program)} is a program for {system}, and cannot run here"
    if not head:
        return f"{shown(program)} is empty, and so not a program"
    if head.startswith(_MARKED):
        return (f"{shown(program)} begins with a byte order mark, before its #!; save it as UTF-8 without one: "
                "sed -i '1s/^\\xEF\\xBB\\xBF//' FILE")
    return f"{shown(program)} is not a program: it has neither a known format nor a first line such as #!/bin/sh"


class _Elf(NamedTuple):
    bits: int
    machine: int
    loader: str  # "" if it needs none


def _elf(number: int, program: str, head: bytes) -> str:
    try:
        elf = _parsed(program, head)
    except (OSError, struct.error, KeyError, ValueError, IndexError):
        return _damaged(program) if number == errno.ENOEXEC else ""
    if elf.loader and not os.path.exists(elf.loader):
        return (f"{shown(program)} needs the loader {shown(elf.loader)}, which does not exist: it was built for "
                "another C library or another machine; install that, or take a build for this system")
    ours = _own()
    if number == errno.ENOEXEC and ours is not None and (elf.machine, elf.bits) != (ours.machine, ours.bits):
        return (f"{shown(program)} is a program for {_machine(elf)}, and this machine runs programs for "
                f"{_machine(ours)}; take a build for it")
    return _damaged(program) if number == errno.ENOEXEC else ""


def _damaged(program: str) -> str:
    return f"{shown(program)} is damaged: it begins as a program, and cannot be one"


def _own() -> _Elf | None:
    """Return what a program of this machine is like: the one that we run in."""
    head = _head("/proc/self/exe") or b""
    try:
        return _parsed("/proc/self/exe", head) if head[:4] == _ELF else None
    except (OSError, struct.error, KeyError, ValueError, IndexError):
        return None


def _machine(elf: _Elf) -> str:
    return _MACHINES.get(elf.machine, f"machine {elf.machine} of elf.h") + (" (32 bits)" if elf.bits == 32 else "")


def _parsed(program: str, head: bytes) -> _Elf:
    """Read the header of an ELF file and, of its program headers, the name of the loader (elf(5))."""
    order = {1: "<", 2: ">"}[head[5]]
    wide = {1: False, 2: True}[head[4]]
    machine, = struct.unpack_from(order + "H", head, 18)
    at, = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    with open(program, "rb") as file:
        for n in range(min(count, HEAD_BYTES)):
            file.seek(at + n * size)
            entry = file.read(size)
            if struct.unpack_from(order + "I", entry)[0] == _INTERPRETER:
                place, = struct.unpack_from(order + ("Q" if wide else "I"), entry, 8 if wide else 4)
                length, = struct.unpack_from(order + ("Q" if wide else "I"), entry, 32 if wide else 16)
                file.seek(place)
                return _Elf(64 if wide else 32, machine, os.fsdecode(file.read(min(length, HEAD_BYTES)).rstrip(b"\0")))
    return _Elf(64 if wide else 32, machine, "")
