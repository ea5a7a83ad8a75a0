"""Checks of installed versions against those that the project requires."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from pipeline.doctor.finding import Finding, blocker, ok, warning

_OURS = "dpar"
_SHOWN = ("torch", "xformers", "prefect", "mlflow")
_OLDEST_PYTHON = (3, 11)
_INSTALL = "install the tested set: make install, or pip install -c constraints.txt"


def check_python(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Version of Python."""
    text = ".".join(map(str, found))
    if found[:2] < _OLDEST_PYTHON:
        return blocker("python", text, "install Python 3.11 or newer: make PYTHON=/path/to/python3.11")
    return ok("python", text)


def check_packages(
    required: Iterable[str] | None = None, installed: Callable[[str], str] = version
) -> Iterator[Finding]:
    """Versions of the required packages; a finding for each that is missing or outside its range."""
    try:
        wanted = [Requirement(text) for text in (requires(_OURS) if required is None else required) or ()]
    except PackageNotFoundError:
        yield warning("packages", "dpar is not installed: its requirements are unknown", _INSTALL)
        return
    shown = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            yield blocker(requirement.name, f"not installed, expected {requirement.specifier}", _INSTALL)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield warning(requirement.name, f"{found}, expected {requirement.specifier}", _INSTALL)
        elif requirement.name in _SHOWN:
            shown.append(f"{requirement.name} {found}")
    yield ok("packages", ", ".join(shown))
