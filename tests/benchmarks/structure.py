"""How the code is built: rooms, levels and arrows of each package, and how long files and functions are.

Gates bound the levels and arrows of `pipeline` and `stages` by their present numbers.

A room is a module at a package's top level, or a folder with all it holds. An arrow leads from a room to one that it
imports from; levels are the rooms on the longest chain of arrows.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from report import report

from pipeline.bench.gates import Figures, Gate, gate

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "stages", "conf", "models")
MOST = {"pipeline": {"levels": 9, "arrows": 78}, "stages": {"levels": 7, "arrows": 73}}


def rooms(package: Path) -> dict[str, list[Path]]:
    """Python files of each room, the package's own `__init__` left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts != ("__init__.py",):
            found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, those in functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(package: Path) -> dict[str, set[str]]:
    """Rooms that each room imports from."""
    found = rooms(package)
    targets: dict[str, set[str]] = {}
    for room, paths in found.items():
        names = {name.split(".")[1] for path in paths for name in imported(path) if name.startswith(f"{package.name}.")}
        targets[room] = (names & found.keys()) - {room}
    return targets


def levels(targets: dict[str, set[str]]) -> int:
    """Rooms on the longest chain of arrows.

    Raises:
        ValueError: The arrows go round in a circle.
    """
    open_rooms: set[str] = set()

    @cache
    def depth(room: str) -> int:
        if room in open_rooms:
            raise ValueError(f"a circle of imports through {room}")
        open_rooms.add(room)
        result = 1 + max(map(depth, targets[room]), default=0)
        open_rooms.discard(room)
        return result

    return max(map(depth, targets))


def lengths(root: Path) -> tuple[list[int], list[int]]:
    """Lines of each file, and of each function."""
    files, functions = [], []
    for path in (path for name in PACKAGES for path in (root / name).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        files.append(text.count("\n"))
        functions += [
            (node.end_lineno or node.lineno) - node.lineno + 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
    return [length for length in files if length > 1], functions


def measure(root: Path) -> tuple[list[Gate], Figures]:
    """Gates of the packages that have bounds, and figures of all."""
    gates: list[Gate] = []
    figures: Figures = {}
    for name in PACKAGES:
        targets = arrows(root / name)
        found = {"levels": levels(targets), "arrows": sum(map(len, targets.values()))}
        figures[name] = {"rooms": len(targets), **found}
        gates += [gate(f"{name}, {what}", found[what], "<", most + 1) for what, most in MOST.get(name, {}).items()]
    for what, values in zip(("files", "functions"), lengths(root), strict=True):
        figures[what] = {
            "count": len(values),
            "lines, median": statistics.median(values),
            "lines, 90th percentile": statistics.quantiles(values, n=10)[8],
            "lines, longest": max(values),
        }
    return gates, figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Rooms, arrows and lengths of the code.")
    parser.add_argument("--root", type=Path, default=ROOT, help="A checkout of the project.")
    report(*measure(parser.parse_args().root))


if __name__ == "__main__":
    main()
