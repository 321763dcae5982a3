"""Where settings come from: defaults < file < environment < flags.

Owns:    the order of the sources, the place that a refusal names, and the INI reader.
Runs in: any process; reads one file, changes nothing.
Unaware: of what is set.

The INI reader is our own because `configparser` forgets line numbers; what it accepts is a part of what
`configparser` accepts, with the same meaning, and a test compares the two.
"""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

from .config import (
    BY_NAME,
    ServerConfig,
    Setting,
    at,
    check_backend_keys,
    did_you_mean,
    nearest,
    shown,
)
from .errors import ConfigError
from .paths import default_state_dir, expanded

#: variables with our prefix that are no settings: where clients look for a server, and whose process this is
NOT_SETTINGS = frozenset(("AGENTSERVER_SERVER", "AGENTSERVER_SSH", "AGENTSERVER_SSH_COMMAND", "AGENTSERVER_AGENT_ID",
                          "AGENTSERVER_DETACH_KEYS"))
MAX_FILE = 1024 * 1024     # bytes


def load(flags: Mapping[str, str], environ: Mapping[str, str], file: Optional[str]) -> ServerConfig:
    """Return the settings: defaults < `file` < AGENTSERVER_… in `environ` < `flags` (setting name -> text)."""
    texts: Dict[str, Tuple[str, str]] = {}   # setting -> (text, where it stands)
    backends: Dict[str, Dict[str, Any]] = {}
    if file is not None:
        texts, backends = _from_file(file)
    texts.update(_from_environment(environ))
    texts.update(_from_flags(flags))
    values = {name: _parsed(BY_NAME[name], text, place) for name, (text, place) in texts.items()}
    values["state_dir"] = values.get("state_dir") or default_state_dir(environ)
    for name, section in backends.items():
        check_backend_keys(name, section)
    try:
        return ServerConfig(backends=backends, **values)
    except ConfigError as e:  # each value is right, so the endpoints do not fit together: say where one was given
        places = [texts[name][1] for name in ("pub_endpoint", "endpoint") if name in texts]
        raise ConfigError(at(next(iter(places), None), str(e))) from None


def _parsed(setting: Setting, text: str, place: str) -> Any:
    try:
        return setting.parse(text)
    except ConfigError as e:
        raise ConfigError(f"{place}: {e}") from None


def _from_environment(environ: Mapping[str, str]) -> Dict[str, Tuple[str, str]]:
    """Read our variables; an empty one counts as absent.

    A misspelt setting is told. Others with our prefix are left alone: container platforms make up variables like
    AGENTSERVER_PORT for a service of this name, and they must not keep the server from starting.
    """
    found = {}
    for variable in sorted(environ):
        if not variable.startswith("AGENTSERVER_") or variable in NOT_SETTINGS or not environ[variable]:
            continue
        name = variable[len("AGENTSERVER_"):].lower()
        meant = name if name in BY_NAME else nearest(name, list(BY_NAME), 0.75)
        if meant and BY_NAME[meant].variable != variable:
            raise ConfigError(f"{variable} is no setting; did you mean {BY_NAME[meant].variable}?")
        if meant:
            found[name] = (environ[variable], variable)
    return found


def _from_flags(flags: Mapping[str, str]) -> Dict[str, Tuple[str, str]]:
    found = {}
    for name, text in flags.items():
        if name not in BY_NAME:
            raise ConfigError(f"--{name.replace('_', '-')} is no setting; " + did_you_mean(name, list(BY_NAME)))
        found[name] = (text, BY_NAME[name].flag)
    return found


def _from_file(path: str) -> Tuple[Dict[str, Tuple[str, str]], Dict[str, Dict[str, Any]]]:
    texts: Dict[str, Tuple[str, str]] = {}
    backends: Dict[str, Dict[str, Any]] = {}
    for title, header_place, entries in _sections(path):
        words = title.split()
        if words == ["server"]:
            texts = _server_section(entries)
        elif len(words) == 2 and words[0] == "backend":
            backends[words[1]] = {key: text for key, (text, _) in entries.items()}
            backends[words[1]]["where"] = {"": header_place, **{key: place for key, (_, place) in entries.items()}}
        else:
            raise ConfigError(f"{header_place}: there is no section [{title}]; settings stand in [server], "
                              "and each backend in a [backend NAME] of its own")
    return texts, backends


def _server_section(entries: Dict[str, Tuple[str, str]]) -> Dict[str, Tuple[str, str]]:
    for key, (_, place) in entries.items():
        if key not in BY_NAME:
            raise ConfigError(f"{place}: {shown(key)} is no setting; " + did_you_mean(key, list(BY_NAME)))
    return entries


# ---------------------------------------------------------------- INI

Section = Tuple[str, str, Dict[str, Tuple[str, str]]]   # title, place, key -> (value, place)


def _sections(path: str) -> List[Section]:
    """Return the sections of an INI file: `key = value`, deeper lines continue a value, `#` and `;` begin comments."""
    sections: List[Section] = []
    key, indent = "", 0
    for number, line in enumerate(_text(path).split("\n"), 1):
        place, stripped = f"{path}, line {number}", line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped[:1] in ("#", ";"):
            continue
        if key and (not stripped or depth > indent):
            value, first = sections[-1][2][key]
            sections[-1][2][key] = (value + "\n" + stripped, first)
        elif stripped.startswith("["):
            sections.append((_title(stripped, place, sections), place, {}))
            key = ""
        elif stripped:
            key, indent = _entry(stripped, place, sections), depth
    return [(title, place, {key: (value.rstrip(), at) for key, (value, at) in entries.items()})
            for title, place, entries in sections]


def _title(line: str, place: str, sections: List[Section]) -> str:
    title = " ".join(line[1:-1].split())
    if not line.endswith("]"):
        raise ConfigError(f"{place}: the section header {shown(line)} has no closing ]")
    for other, first, _ in sections:
        if other == title:
            raise ConfigError(f"{place}: section [{title}] is there twice, first in {first}; make them one")
    return title


def _entry(line: str, place: str, sections: List[Section]) -> str:
    """Add `key = value` to the last section and return the key. No sentence shows a value: it may be a secret."""
    key, equals, value = line.partition("=")
    key = key.strip()
    if not sections:
        raise ConfigError(f"{place}: nothing may stand before the first section; begin with [server]")
    if not equals or not key:
        raise ConfigError(f"{place}: this is neither [section] nor name = value")
    entries = sections[-1][2]
    if key in entries:
        raise ConfigError(f"{place}: {shown(key)} is set twice, first in {entries[key][1]}; keep one")
    entries[key] = (value.strip(), place)
    return key


def _text(path: str) -> str:
    try:
        with open(expanded(path), "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ConfigError(f"the configuration file {path} cannot be read: {reason}") from None
    if len(raw) > MAX_FILE:
        raise ConfigError(f"the configuration file {path} is larger than {MAX_FILE} bytes")
    try:
        text, bad = raw.decode("utf-8-sig"), raw.find(b"\0")
    except UnicodeDecodeError as e:
        text, bad = "", e.start
    if bad >= 0:
        line = raw[:bad].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: there is a byte that is not UTF-8 text; save the file as UTF-8")
    return text
