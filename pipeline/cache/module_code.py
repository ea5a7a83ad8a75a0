"""Static view of a module: the names its top level binds and the statements it runs on import. Nothing is executed."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

EVERYTHING = "*"
AT_IMPORT = "<import>"
Target = tuple[str, str | None]  # a module and a name in it, or None for the module itself
Import = ast.Import | ast.ImportFrom
FIRST_PARTY = ("pipeline", "stages", "models", "conf")
_DISTURBED = 20  # times that a file is parsed again
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Module:
    """Names and import-time statements of a module's top level.

    A name may have several bindings, such as an import and its fallback after `except ImportError`. All of them count.
    """

    name: str
    package: str
    """Package that its relative imports start from."""
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Target]] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    """Names of possible modules that importing this one runs."""
    stars: list[str] = field(default_factory=list)
    at_import: list[ast.stmt] = field(default_factory=list)
    """Statements that do more on import than bind names."""

    def nodes(self, name: str) -> list[ast.stmt]:
        """Statements of a definition; empty for `EVERYTHING`, which has no text of its own."""
        return self.at_import if name == AT_IMPORT else self.definitions.get(name, [])


def load_module(path: Path, name: str) -> Module:
    """The module in a file. It is parsed again only when the file changes."""
    stat = path.stat()
    return _parse(path, name, stat.st_mtime_ns, stat.st_size)


def bindings(node: Import, package: str) -> Iterator[tuple[str, Target]]:
    """Names that an import binds, and their targets; nothing for a star import."""
    if isinstance(node, ast.Import):
        for alias in node.names:  # `import a.b` binds a; `import a.b as c` binds c to a.b
            name = alias.asname or alias.name.partition(".")[0]
            yield name, (alias.name if alias.asname else name, None)
    else:
        source = _source(node, package)
        yield from ((alias.asname or alias.name, (source, alias.name)) for alias in node.names if alias.name != "*")


def modules_run(node: Import, package: str) -> set[str]:
    """Names of possible modules that an import runs: `from a import b` may import a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    source = _source(node, package)
    return {source} | {f"{source}.{alias.name}" for alias in node.names}


def chain(node: ast.expr) -> list[str] | None:
    """Parts of `a.b.c`; None if the expression does not start with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


@lru_cache(maxsize=1024)
def _parse(path: Path, name: str, mtime_ns: int, size: int) -> Module:
    """Parse a file; `mtime_ns` and `size` are part of the cache key, so a changed file is parsed again."""
    module = Module(name, name if path.name == "__init__.py" else name.rpartition(".")[0])
    for node in _syntax_tree(path).body:
        _record(module, node)
    return module


def _syntax_tree(path: Path) -> ast.Module:
    """Parse a file; again if another thread disturbed it.

    Python 3.11.7 and older count the depth of the tree once for all threads. If the garbage collector runs Python code
    meanwhile, and another thread parses (as MLflow's import does), the count is wrong and `ast.parse` raises
    SystemError, although the file is in order.
    """
    source = path.read_bytes()
    for _ in range(_DISTURBED):
        with contextlib.suppress(SystemError):
            return ast.parse(source, filename=str(path))
    return ast.parse(source, filename=str(path))


def _record(module: Module, node: ast.stmt) -> None:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        _record_import(module, node)
    elif isinstance(node, DEFINITIONS):
        module.definitions.setdefault(node.name, []).append(node)
    elif names := _plainly_assigned(node):
        for name in names:
            module.definitions.setdefault(name, []).append(node)
    elif isinstance(node, ast.If) and _is_guard(node.test):
        # The body is for type checkers or `python -m`; the stage's function does not run it.
        for otherwise in node.orelse:
            _record(module, otherwise)
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        _record_statement(module, node)


def _record_import(module: Module, node: Import) -> None:
    for name, target in bindings(node, module.package):
        module.imports.setdefault(name, []).append(target)
    module.imported |= modules_run(node, module.package)
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        module.stars.append(_source(node, module.package))


def _record_statement(module: Module, node: ast.stmt) -> None:
    """Record an `if`, `try`, call or `module.flag = …`: it runs on import and defines every name it binds."""
    module.at_import.append(node)
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            _record_import(module, inner)
        elif isinstance(inner, DEFINITIONS):
            module.definitions.setdefault(inner.name, []).append(node)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            module.definitions.setdefault(inner.id, []).append(node)


def _plainly_assigned(node: ast.stmt) -> list[str]:
    """Names that an assignment binds; empty if it also modifies an object: `a.b = …`, `a[0] = …`."""
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return []
    parts = [inner for target in targets for inner in ast.walk(target)]
    changes = any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in parts)
    return [] if changes else [part.id for part in parts if isinstance(part, ast.Name)]


def _source(node: ast.ImportFrom, package: str) -> str:
    """Absolute name of the module in `from module import …`."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    base = parents[: len(parents) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _is_guard(test: ast.expr) -> bool:
    """Whether a test is `TYPE_CHECKING` or `__name__ == "__main__"`."""
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
        test = test.left
    return (chain(test) or [""])[-1] in {"TYPE_CHECKING", "__name__"}


def imports_in(node: ast.stmt) -> Iterator[Import]:
    """All imports in a statement, including those inside functions. Expressions contain none and are skipped."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, name, None)
        for statement in inner if isinstance(inner, list) else []:
            yield from imports_in(statement)


def is_first_party(node: Import, package: str) -> bool:
    """Whether an import names first-party modules only."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [_source(node, package)]
    return all(name.partition(".")[0] in FIRST_PARTY for name in names)


def without_docstrings(body: list[ast.stmt]) -> list[ast.stmt]:
    """The body without its docstring and without the strings that document fields."""
    return [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
