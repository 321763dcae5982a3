"""Words without which a pattern cannot match: they are looked for first, which is many times faster.

Owns:    reading them out of a regular expression.
Runs in: any thread; it is pure.
Unaware: of lines and of what is searched.

It reads the tree that Python's own parser makes. That tree is no documented interface, so whatever it does not know
holds no words: then a search is slower and finds the same.
"""
from __future__ import annotations

import re
from typing import Any, Iterable, NamedTuple

MOST = 8  # alternatives; beyond it looking for them costs more than it saves
_PARSER: Any = vars(re).get("_parser") or vars(re)["sre_parse"]  # its name since Python 3.11, and before
_IGNORES_CASE = re.compile(r"\(\?[aLmsux]*i")
_DOUBTFUL = re.compile("[\ufffd\ud800-\udfff]")  # in text it may stand for bytes that are something else
_ASCII = re.compile(r"[\x00-\x7f]+")
_NONE: frozenset[str] = frozenset()


class Literals(NamedTuple):
    """Every match holds one of `words`; none: nothing is known. With `fold` that is so in lower case, in ASCII text.
    With `exact` it matches wherever one of them is."""

    words: frozenset[str]
    fold: bool
    exact: bool


def literals(pattern: str) -> Literals:
    """Return what every match of a valid pattern holds."""
    fold = exact = False
    try:
        tree = _PARSER.parse(pattern)
        fold = bool(tree.state.flags & re.IGNORECASE or _IGNORES_CASE.search(pattern))
        words, exact = _of_all(tree), _is_words(tree)
    except Exception:  # of a parser that has changed: see the module
        words = _NONE
    if fold:
        exact = exact and all(map(str.isascii, words))
        words = frozenset(_lower(word) for word in words)
    if not all(words) or any(map(_DOUBTFUL.search, words)) or len(words) > MOST:
        words = _NONE
    return Literals(words, fold, exact and bool(words))


def _is_words(items: Any) -> bool:
    """Whether a pattern is nothing but a word, or several to choose from."""
    alternatives = items[0][1][1] if len(items) == 1 and str(items[0][0]) == "BRANCH" else [items]
    return all(str(op) == "LITERAL" for branch in alternatives for op, _value in branch)


def _lower(word: str) -> str:
    """Return the longest part that upper and lower case of ASCII letters tell everything about."""
    return max(_ASCII.findall(word), key=len, default="").lower()


def _of_all(items: Iterable[Any]) -> frozenset[str]:
    """Return the longest words that a sequence holds."""
    found, run = [], ""
    for op, value in items:
        if str(op) == "LITERAL":
            run += chr(value)
        else:
            found += [frozenset((run,)), _of_one(str(op), value)]
            run = ""
    return max([*found, frozenset((run,))], key=_worth)


def _of_one(op: str, value: Any) -> frozenset[str]:
    if op == "BRANCH":
        branches = [_of_all(branch) for branch in value[1]]
        return frozenset().union(*branches) if all(all(words) and words for words in branches) else _NONE
    if op == "SUBPATTERN":
        return _of_all(value[-1])
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and value[0]:
        return _of_all(value[2])
    return _NONE


def _worth(words: frozenset[str]) -> tuple[int, int]:
    """Return what is greater the rarer such words are: long ones, and few."""
    return min(map(len, words), default=0), -len(words)
