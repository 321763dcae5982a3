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
        self._make_key("host_key")
        self.add_key("key")
        (home / "sshd_config").write_text(_SSHD.format(port=self.port, home=home))
        (home / "ssh_config").write_text(_SSH.format(port=self.port, home=home))
        self.ssh = f"{_find('ssh')} -F {home}/ssh_config -i {home}/key"
        with open(home / "sshd.log", "wb") as log:
            self.process = subprocess.Popen([_find("sshd"), "-D", "-e", "-f", str(home / "sshd_config")],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(self._listens, what="sshd to listen")
        except BaseException:
            self.close()
            raise

    def _make_key(self, name: str) -> Path:
        key = self.home / name
        subprocess.run([_find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        return key

    def add_key(self, name: str, restriction: str = "") -> Path:
        """Make a key and let who has it in, as far as the restriction goes."""
        key = self._make_key(name)
        with open(self.home / "authorized_keys", "a") as keys:
            keys.write(f"{restriction} {key.with_suffix('.pub').read_text()}".lstrip())
        return key

    def ssh_with(self, key: Path) -> str:
        """Return the command that comes with another key."""
        return self.ssh.rpartition(" ")[0] + f" {key}"

    def _listens(self) -> bool:
        assert self.process.poll() is None, (self.home / "sshd.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        """End the daemon; its connections end with their clients."""
        self.process.terminate()
        self.process.wait()
