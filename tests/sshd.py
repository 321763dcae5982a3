"""A real sshd on loopback, for this user, with keys of its own.

Owns:    the daemon, its keys, and the configuration of the `ssh` that reaches it.
Runs in: the test process; sshd is a process beside it, and so is what it starts.
Unaware: of pytest and of what is run over it.
"""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

from support import wait_until

_SSHD = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host_key
AuthorizedKeysFile {home}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PermitUserEnvironment no
MaxStartups 100
"""
_SSH = """\
Host machine
    HostName 127.0.0.1
    Port {port}
Host *
    IdentityFile {home}/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {home}/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
"""


def missing() -> str:
    """Return why there can be no sshd here, or nothing."""
    lacking = [name for name in ("sshd", "ssh", "ssh-keygen") if not _find(name)]
    if lacking:
        return f"{lacking[0]} is not installed"
    if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
        try:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        except OSError as e:
            return f"sshd needs /run/sshd: {e}"
    return ""


def _find(name: str) -> str:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin") or ""


class Sshd:
    """Runs from birth to `close`. `ssh` is the command that reaches it, by the name `machine`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host_key", "key"):
            subprocess.run([_find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
        shutil.copy(home / "key.pub", home / "authorized_keys")
        (home / "sshd_config").write_text(_SSHD.format(port=self.port, home=home))
        (home / "ssh_config").write_text(_SSH.format(port=self.port, home=home))
        self.ssh = f"{_find('ssh')} -F {home}/ssh_config"
        with open(home / "sshd.log", "wb") as log:
            self.process = subprocess.Popen([_find("sshd"), "-D", "-e", "-f", str(home / "sshd_config")],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(self._listens, what="sshd to listen")
        except BaseException:
            self.close()
            raise

    def _listens(self) -> bool:
        assert self.process.poll() is None, (self.home / "sshd.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        """End the daemon; its connections end with their clients."""
        self.process.terminate()
        self.process.wait()
