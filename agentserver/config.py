"""The settings of a server: what may be set, where, and what is refused.

Owns:    ServerConfig; SETTINGS, the one table behind flags, variables, file and docs.
Runs in: any process.
Unaware: of where a value came from (sources.py), of what a setting does, and of what a `[backend NAME]` section means
         beyond the names of its keys.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from .endpoint import MAX_IPC_PATH, port_number, split
from .errors import ConfigError
from .paths import expanded, state_dir, working_directory

BACKEND_KEYS = ("like", "program", "argv", "argv_pipe", "stdin", "finish", "environment")
BACKEND_KEY_PREFIXES = ("environment.", "file.", "tools.")
KIB, MIB, DAY = 1024, 1024 * 1024, 86400.0
_MOST_SECS = 3650 * DAY

Check = Callable[[Any, str], Any]


# ---------------------------------------------------------------- checks: (value, name) -> value, or ConfigError

def shown(value: Any) -> str:
    """Return a value as a sentence may show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, known: List[str], least: float) -> str:
    """Return the known word that is most like this one, at least so much (0 to 1); "" if there is none."""
    import difflib
    return next(iter(difflib.get_close_matches(word, known, 1, least)), "")


def did_you_mean(word: str, known: List[str]) -> str:
    """Return the end of a sentence that refuses a word."""
    meant = nearest(word, known, 0.6)
    return f"did you mean {meant}?" if meant else f"known are {', '.join(known)}"


def _check_text(value: str, name: str) -> None:
    try:
        valid = b"\0" not in value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise ConfigError(f"{name} contains a NUL or a lone surrogate, which the system cannot be given; take it out")


def check_endpoint(endpoint: str, name: str = "endpoint") -> str:
    """Return an endpoint to bind in its plain form (`localhost` as 127.0.0.1); refuse all but loopback and ipc."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "tcp":
        return _check_tcp(address, name)
    if scheme == "ipc":
        return _check_ipc(address, name)
    raise ConfigError(f"{name} must be tcp://127.0.0.1:PORT or ipc:///PATH, not {shown(endpoint)}")


def _check_tcp(address: str, name: str) -> str:
    host, port = split(address)
    if port_number(port) < 0:
        raise ConfigError(f"{name} must end in :PORT, a number from 0 to 65535 (0 takes a free one), "
                          f"not tcp://{shown(address)[1:-1]}")
    if host == "localhost":  # not looked up: what a resolver says about it decides who can reach us
        host = "127.0.0.1"
    if not _is_loopback(host):
        raise ConfigError(f"{name} may not listen on {shown(host)}, which is no loopback address: this version has "
                          "no keys, so whoever reached it could run commands here; use tcp://127.0.0.1:PORT (and a "
                          "tunnel such as `ssh -L` from other machines) or ipc:///PATH")
    return f"tcp://{host}:{int(port)}"


def _is_loopback(host: str) -> bool:
    parts = host.split(".")
    return host == "[::1]" or (len(parts) == 4 and parts[0] == "127" and all(
        re.fullmatch(r"0|[1-9][0-9]{0,2}", part) and int(part) <= 255 for part in parts))


def _check_ipc(path: str, name: str) -> str:
    if path in ("", "*") or path.startswith("@"):
        # an abstract socket has no permissions, so every local user could connect to it
        raise ConfigError(f"{name} must name a socket file, such as ipc:///run/user/1000/agentserver, "
                          f"not {shown('ipc://' + path)}")
    size = len(os.fsencode(path))
    if size > MAX_IPC_PATH:
        raise ConfigError(f"{name} has a path of {size} bytes and a socket's may have at most {MAX_IPC_PATH}; "
                          f"use a shorter one than {shown(path)}")
    return "ipc://" + path


def _check_pub_endpoint(endpoint: str, name: str) -> str:
    return endpoint if endpoint == "none" else check_endpoint(endpoint, name)


def _check_server_id(value: str, name: str) -> str:
    if len(value) > 128 or not value.isprintable():
        raise ConfigError(f"{name} must be at most 128 printable characters, not {shown(value)}")
    return value


def _check_orphans(value: str, name: str) -> str:
    if value not in ("kill", "leave"):
        raise ConfigError(f"{name} must be kill or leave, not {shown(value)}")
    return value


def _check_names(names: Tuple[str, ...], name: str) -> Tuple[str, ...]:
    for item in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*\*?", item):
            raise ConfigError(f"{name} takes names of variables, or beginnings of names such as CLAUDE_*, "
                              f"not {shown(item)}")
    return names


# ---------------------------------------------------------------- the settings

def _setting(default: Any, help: str, unit: str = "", least: Optional[float] = None, most: Optional[float] = None,
             *, check: Optional[Check] = None, shown: str = "") -> Any:
    return field(default=default, metadata={
        "help": help, "unit": unit, "least": least, "most": most, "check": check, "shown": shown})


@dataclass(frozen=True)
class ServerConfig:
    """Every setting of one server. Valid from birth; `repr` leaves the backends out, they may hold secrets."""

    state_dir: str = _setting(
        "", "directory for everything the server keeps; one server per directory; on a local disk",
        shown="`$XDG_STATE_HOME/agentserver`, else `~/.local/state/agentserver`")
    server_id: str = _setting(
        "", "name of this server in replies and messages; at most 128 characters", check=_check_server_id,
        shown="the host's name")
    endpoint: str = _setting(
        "tcp://127.0.0.1:5555", "where requests are answered: `tcp://` on loopback (port 0: a free one) or `ipc://`",
        check=check_endpoint)
    pub_endpoint: str = _setting(
        "tcp://127.0.0.1:5556", "where output and events are published, likewise; `none`: nowhere",
        check=_check_pub_endpoint)
    agent_dir: str = _setting(
        "", "working directory of agents whose request names none", shown="where `serve` was started")
    max_agents: int = _setting(100, "how many agents may be alive at once", "agents", 1, 65536)
    status_update_interval_secs: float = _setting(
        10.0, "time between heartbeats of the server and its agents", "seconds", 0.1, DAY)
    request_timeout_secs: float = _setting(
        30.0, "how long a request is held while a part of the server is started again", "seconds", 0.1, DAY)
    shutdown_timeout_secs: float = _setting(
        20.0, "bound of a graceful end; agents left then are killed", "seconds", 0, DAY)
    message_bytes: int = _setting(10 * MIB, "longest request and reply", "bytes", 64 * KIB, 10 * MIB)
    output_cap_bytes: int = _setting(
        64 * MIB, "output kept per agent, index included; the oldest goes first", "bytes", 64 * KIB, MIB ** 2)
    orphans: str = _setting(
        "kill", "what is done with processes of agents of which nothing is held any more, after all our processes "
        "died: kill or leave", check=_check_orphans)
    history_agents: int = _setting(1000, "how many finished agents are kept", "agents", 0, 1_000_000)
    history_secs: float = _setting(7 * DAY, "how long finished agents are kept", "seconds", 0, _MOST_SECS)
    stdin_buffer_bytes: int = _setting(
        MIB, "input accepted for an agent that does not read it yet", "bytes", 4 * KIB, 64 * MIB)
    grace_secs: float = _setting(10.0, "time between SIGTERM and SIGKILL, unless a request says", "seconds", 0, DAY)
    finish_secs: float = _setting(
        2.0, "time for a backend's own way to finish, before SIGTERM", "seconds", 0, 3600)
    drain_secs: float = _setting(
        0.2, "how long output is still read when an agent ended and others hold its pipe", "seconds", 0, 60)
    runtime_secs: float = _setting(
        0.0, "longest run of an agent whose request sets no limit; 0: no limit", "seconds", 0, _MOST_SECS)
    events_kept: int = _setting(100_000, "how many events are kept for replay", "events", 100, 10_000_000)
    events_secs: float = _setting(7 * DAY, "how long events are kept for replay", "seconds", 1, _MOST_SECS)
    requests_kept: int = _setting(
        100_000, "how many answered request ids are remembered", "requests", 100, 10_000_000)
    backlog_bytes: int = _setting(
        4 * MIB, "events queued for a local subscriber that does not read", "bytes", 64 * KIB, 1024 * MIB)
    pub_hwm: int = _setting(
        1000, "messages queued for a subscriber of `pub_endpoint` that does not read; one of output brings at most "
        "32 KiB", "messages", 1, 1_000_000)
    shell_memory_bytes: int = _setting(
        1024 * MIB, "most memory of the process with the ZeroMQ sockets; beyond, that one is ended and started anew "
        "(Linux)", "bytes", 64 * MIB, 1024 * 1024 * MIB)
    pattern_timeout_secs: float = _setting(
        0.25, "how long the pattern of one search in output may be at work", "seconds", 0.01, 10)
    queries: int = _setting(
        4, "how many searches in output run at once, each in a process of its own; others wait", "processes", 1, 32)
    log_bytes: int = _setting(
        MIB, "size at which a log of the server's own is rotated", "bytes", 4 * KIB, 1024 * MIB)
    pass_environment: Tuple[str, ...] = _setting(
        (), "variables of the server that agents get too, besides the base environment; `NAME` or `PREFIX_*`, "
            "separated by blanks or commas", check=_check_names)
    #: `[backend NAME]` sections: key -> value, and under "where" key -> place in the file; "" is the header's
    backends: Dict[str, Dict[str, Any]] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            object.__setattr__(self, setting.name, setting.checked(getattr(self, setting.name)))
        if self.endpoint == self.pub_endpoint and not self.endpoint.endswith(":0"):
            raise ConfigError(f"endpoint and pub_endpoint are both {self.endpoint}; give each its own")
        for name, section in self.backends.items():
            check_backend_keys(name, section)

    def resolved(self, cwd: Optional[str] = None) -> ServerConfig:
        """Return the settings without what depends on where we are: absolute paths, `~` expanded, a server id.

        `cwd` is where we are; `None`: ask the system, where any path needs it."""
        def absolute(path: str) -> str:
            path = expanded(path)
            here = "" if os.path.isabs(path) else cwd or working_directory()
            return os.path.normpath(os.path.join(here, path))

        def bound(endpoint: str) -> str:
            return "ipc://" + absolute(endpoint[6:]) if endpoint.startswith("ipc://") else endpoint

        return replace(self, state_dir=absolute(state_dir(os.environ, self.state_dir)),
                       agent_dir=absolute(self.agent_dir), server_id=self.server_id or os.uname().nodename,
                       endpoint=bound(self.endpoint), pub_endpoint=bound(self.pub_endpoint))

    def to_json(self) -> Dict[str, Any]:
        """Return the settings as a JSON object, backends and their secrets included: for our own processes only."""
        return {**{s.name: getattr(self, s.name) for s in SETTINGS},
                "pass_environment": list(self.pass_environment), "backends": self.backends}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> ServerConfig:
        """Return what `to_json` gave; what another version wrote and this one does not know is ignored."""
        return cls(**{f.name: obj[f.name] for f in fields(cls) if f.name in obj})


@dataclass(frozen=True)
class Setting:
    """One setting: its name, its bounds, and how it is read from text."""

    name: str
    type: type
    default: Any
    help: str
    unit: str
    least: Optional[float]
    most: Optional[float]
    check: Optional[Check]
    shown: str

    @property
    def flag(self) -> str:
        """The flag of `serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "AGENTSERVER_" + self.name.upper()

    @property
    def shown_default(self) -> str:
        """The default as documentation shows it (Markdown)."""
        return self.shown or (f"`{_plain(self.default)}`" if self.default != () else "none")

    @property
    def wanted(self) -> str:
        """What a value has to be, in words."""
        kind = {int: "a whole number", float: "a number", str: "text", tuple: "a list of names"}[self.type]
        if self.least is None or self.most is None:
            return kind
        return f"{kind} of {self.unit} from {_plain(self.least)} to {_plain(self.most)}"

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for, or raise `ConfigError`."""
        try:
            return self.checked(_PARSERS[self.type](text))
        except ValueError:
            raise self._wrong(text) from None

    def checked(self, value: Any) -> Any:
        """Return a value in its plain type, or raise `ConfigError` if it has the wrong one or is out of bounds."""
        value = _plain_type(value, self.type)
        if not self._fits(value):
            raise self._wrong(value)
        if isinstance(value, str):
            _check_text(value, self.name)
        return self.check(value, self.name) if self.check else value

    def _fits(self, value: Any) -> bool:
        right_type = isinstance(value, self.type) and not isinstance(value, bool)
        return right_type and (self.least is None or self.most is None or self.least <= value <= self.most)

    def _wrong(self, value: Any) -> ConfigError:
        return ConfigError(f"{self.name} must be {self.wanted}, not {shown(value)}")


def _plain_type(value: Any, wanted: type) -> Any:
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value


def _plain(number: Any) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()):
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text.strip(), re.IGNORECASE):
        raise ValueError
    return float(text)


def _name_list(text: str) -> Tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


_PARSERS: Dict[type, Callable[[str], Any]] = {int: _whole, float: _number, str: str, tuple: _name_list}

SETTINGS: Tuple[Setting, ...] = tuple(
    Setting(name=f.name, type=type(f.default), default=f.default, **f.metadata)
    for f in fields(ServerConfig) if f.metadata)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def check_backend_keys(name: str, section: Mapping[str, Any]) -> None:
    """Refuse a backend name that cannot be asked for, and keys that mean nothing."""
    where = section.get("where", {})
    if not re.fullmatch(r"\S{1,128}", name) or not name.isprintable():
        raise ConfigError(at(where.get(""), f"a backend needs a name without blanks, not {shown(name)}"))
    for key in section:
        known = key == "where" or key in BACKEND_KEYS or any(
            key.startswith(prefix) and key != prefix for prefix in BACKEND_KEY_PREFIXES)
        if not known:
            words = list(BACKEND_KEYS) + [prefix + "NAME" for prefix in BACKEND_KEY_PREFIXES]
            raise ConfigError(at(where.get(key), f"[backend {name}] has no key {shown(key)}; "
                                                  + did_you_mean(key, words)))


def at(place: Optional[str], sentence: str) -> str:
    """Put the place before a sentence, if there is one."""
    return f"{place}: {sentence}" if place else sentence


# ---------------------------------------------------------------- documentation

def settings_table() -> str:
    """Return all settings as a Markdown table, as docs/configuration.md shows it."""
    rows = ["| setting | unit | from | to | default | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for s in SETTINGS:
        bounds = ["" if bound is None else _plain(bound) for bound in (s.least, s.most)]
        rows.append(f"| `{s.name}` | {s.unit} | {bounds[0]} | {bounds[1]} | {s.shown_default} | {s.help} |")
    return "\n".join(rows) + "\n"
