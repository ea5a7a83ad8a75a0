"""Names of files, folders and classes: which are passed over, which are refused, and which class a word means."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from stages.runtime.errors import InputError

_SYSTEM_NAMES = frozenset(
    {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found"}
    | {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)
_SPLIT_NAME = re.compile(
    r"(train|training|val|valid|validate|validation|test|testing|dev|devel|development|eval|evaluation|holdout|heldout)"
    r"s?([ _-]?(set|data|images?|imgs?|split|\d+))?"
)
_BREAKS_LINES = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, surrogates, separators of lines


def passed_over(name: str) -> str | None:
    """Why a file or folder with this name is never read: hidden, or an operating system's own; None if it is read."""
    if name.startswith("."):
        return "hidden"
    return "made by an operating system or a tool" if name.casefold() in _SYSTEM_NAMES else None


def is_split_name(name: str) -> bool:
    """Whether a name is one that parts of a data set have, such as `val`, `Training` or `test_set`."""
    return _SPLIT_NAME.fullmatch(name.casefold()) is not None


def require_utf8(place: object, name: str) -> None:
    """Check that a name is UTF-8: the index stores UTF-8.

    Raises:
        InputError: It is not.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} holds a file whose name is not UTF-8, {name!r}: rename it") from error


def require_usable(classes: Iterable[str], place: object) -> None:
    """Check names of classes, which are shown in pictures, tables and logs and typed on the command line.

    Raises:
        InputError: A name is empty, is not UTF-8, has a line break or another control character, or looks like another.
    """
    seen: dict[str, str] = {}
    for name in classes:
        require_utf8(place, name)
        if not name.strip() or any(unicodedata.category(character) in _BREAKS_LINES for character in name):
            raise InputError(f"{place} holds a class called {name!r}, expected a name of one line of text: rename it")
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise InputError(
                f"{place} holds two classes called {name}, whose letters are composed differently ({twin!a} and "
                f"{name!a}): rename one"
            )


def shown(name: str) -> str:
    """A name as one line of text: characters that cannot be printed are escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)


def labels_of(words: Sequence[str], names: Sequence[str]) -> list[int]:
    """Labels of the classes that the words of a list `A,B,...` mean: a name, else a name but for case, else a number.

    A comma inside a name is one of the list, too: of the words from the left, as many as make a name belong together.
    Names match however their letters are composed (NFC or NFD). Where all names are numbers, a number is a name.

    Raises:
        InputError: A word means no class, or several.
    """
    tables = [(form, _table(form, names)) for form in (_composed, _folded)]
    numbers_are_names = all(name.isdecimal() for name in names)
    numbers = {} if numbers_are_names else {str(label): [label] for label in range(len(names))}
    most = 1 + max(name.count(",") for name in names)
    labels, left = list[int](), list(words)
    while left:
        joined = [",".join(left[:count]) for count in range(min(most, len(left)), 0, -1)]
        word = next((word for word in joined if any(form(word) in table for form, table in tables)), left[0])
        del left[: word.count(",") + 1]
        found = next((table[form(word)] for form, table in tables if form(word) in table), numbers.get(word, []))
        if len(found) > 1:
            means = " and ".join(repr(names[label]) for label in found)
            raise InputError(f"class {word!r} may be {means}: write it as one of them")
        if not found:
            number = "" if numbers_are_names else f"a number 0..{len(names) - 1} or "
            raise InputError(f"class {word!r} is unknown, expected {number}a name, as {names[0]!r}")
        labels += found
    return labels


def _composed(name: str) -> str:
    """A name in NFC, without spaces around commas: those were lost when a list was cut into words."""
    return ",".join(part.strip() for part in unicodedata.normalize("NFC", name).split(","))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _composed(name).casefold())


def _table(form: Callable[[str], str], names: Sequence[str]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        table.setdefault(form(name), []).append(label)
    return table
