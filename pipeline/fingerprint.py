"""Fingerprint of the code that a stage runs: the definitions it reaches, not the files they stand in.

From the stage's function along the names it uses, through imports, classes whole. Docstrings and comments do not count.
Where a name cannot be resolved by reading (a star import, a module passed around) the whole module counts. So an unused
function changes nothing, and an edit of a shared layer changes exactly the stages that use it.

Annotations count like any other use: to leave them out would need to know that nothing reads them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

CODE_PACKAGES = ("stages", "models")  # conf holds values, which are in the key; pipeline runs stages and changes none
EVERYTHING = "*"
AT_IMPORT = "<import>"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class FingerprintError(ValueError):
    """Code that cannot be followed by reading it."""


@dataclass(frozen=True)
class Fingerprint:
    """Digest of a closure, and of each definition in it, by "module:name"."""

    digest: str
    definitions: dict[str, str]


@dataclass
class Module:
    """What a module's top level binds and does."""

    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local name to (module, name in it), or (module, None) for the module itself."""
    stars: list[str] = field(default_factory=list)
    at_import: list[ast.stmt] = field(default_factory=list)
    """Statements that run on import and bind nothing that could be followed by name."""


class Code:
    """The first-party code below a root folder."""

    def __init__(self, root: Path, neutral: frozenset[str] = frozenset(), packages: tuple[str, ...] = CODE_PACKAGES):
        self.root, self.neutral, self.packages = root, neutral, packages
        self._uses: dict[tuple[str, str], frozenset[tuple[str, str]]] = {}

    def fingerprint(self, entry: tuple[str, str]) -> Fingerprint:
        """Fingerprint of everything that the function `entry` (module, name) reaches.

        Raises:
            FingerprintError: No such function, or a dynamic import on the way.
        """
        if self._module(entry[0]) is None or not self._nodes(*entry):
            raise FingerprintError(f"{entry[0]}:{entry[1]} is no definition below {self.root}")
        reached: set[tuple[str, str]] = set()
        waiting = [entry]
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                waiting.extend(self._reach(place))
        digests = {f"{module}:{name}": self._digest(module, name) for module, name in sorted(reached)}
        digests = {place: digest for place, digest in digests.items() if digest}
        text = "\n".join(f"{place} {digest}" for place, digest in digests.items())
        return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), digests)

    def _reach(self, place: tuple[str, str]) -> frozenset[tuple[str, str]]:
        if place not in self._uses:
            module = self._module(place[0])
            assert module is not None
            found = set(_Uses(self, module, self._nodes(*place)).found)
            found |= {(package, AT_IMPORT) for package in _with_parents(place[0]) if self._module(package)}
            if place[1] == EVERYTHING:
                found |= {(place[0], name) for name in module.definitions}
            self._uses[place] = frozenset(found)
        return self._uses[place]

    def resolve(self, module_name: str, name: str | None) -> Iterator[tuple[str, str]]:
        """Places that `name` of a module stands for; (module, "*") where that cannot be told."""
        module = self._module(module_name)
        if module is None:
            return
        if name is None:
            yield module_name, EVERYTHING
        elif name in module.definitions:
            yield module_name, name
        elif name in module.imports:
            yield from self.resolve(*module.imports[name])
        elif self._module(f"{module_name}.{name}") is not None:
            yield f"{module_name}.{name}", EVERYTHING
        elif module_name not in self.neutral:
            yield module_name, EVERYTHING

    def is_module(self, name: str) -> bool:
        """Whether `name` is a module whose code counts."""
        return self._module(name) is not None

    def _module(self, name: str) -> Module | None:
        if name.partition(".")[0] not in self.packages or name in self.neutral:
            return None
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not path.is_file():
            return None
        stat = path.stat()
        return _parse(path, name, stat.st_mtime_ns, stat.st_size)

    def _nodes(self, module_name: str, name: str) -> list[ast.stmt]:
        module = self._module(module_name)
        assert module is not None
        if name == AT_IMPORT:
            return module.at_import
        return [] if name == EVERYTHING else module.definitions.get(name, [])

    def _digest(self, module_name: str, name: str) -> str:
        nodes = self._nodes(module_name, name)
        return hashlib.sha256("".join(map(_canonical, nodes)).encode()).hexdigest()[:16] if nodes else ""


class _Uses(ast.NodeVisitor):
    """Places that some statements of a module use."""

    def __init__(self, code: Code, module: Module, nodes: list[ast.stmt]) -> None:
        self.code, self.module = code, module
        self.found: set[tuple[str, str]] = set()
        self._local_imports: dict[str, tuple[str, str | None]] = {}
        for node in nodes:
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    self._local_imports |= _bound(inner, module.name)
        for node in nodes:
            self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._use([node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = _chain(node)
        if chain is None:
            self.generic_visit(node)
        else:
            self._use(chain)

    def visit_Call(self, node: ast.Call) -> None:
        chain = _chain(node.func) or [""]
        if chain[-1] in {"import_module", "__import__"}:
            argument = node.args[0] if node.args else None
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise FingerprintError(
                    f"{self.module.name} line {node.lineno} imports a module by a computed name: the code that a stage "
                    "runs must be known by reading it, import it by name"
                )
            self.found.update(self.code.resolve(argument.value, None))
        self.generic_visit(node)

    def _use(self, chain: list[str]) -> None:
        """Follow a dotted name as far as it leads through modules."""
        target = self._local_imports.get(chain[0]) or self.module.imports.get(chain[0])
        if target is None:
            if chain[0] in self.module.definitions:
                self.found.add((self.module.name, chain[0]))
            else:
                for star in self.module.stars:
                    self.found.update(self.code.resolve(star, None))
            return
        module, name = target
        rest = chain[1:]
        if name is not None and self.code.is_module(f"{module}.{name}"):
            module, name = f"{module}.{name}", None
        while name is None and rest:
            if self.code.is_module(f"{module}.{rest[0]}"):
                module, rest = f"{module}.{rest[0]}", rest[1:]
            else:
                name = rest[0]
        self.found.update(self.code.resolve(module, name))


@lru_cache(maxsize=1024)
def _parse(path: Path, name: str, mtime_ns: int, size: int) -> Module:
    """Parse a file; `mtime_ns` and `size` are there to forget it when it changes."""
    module = Module(name)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        _record(module, package, node)
    return module


def _record(module: Module, package: str, node: ast.stmt) -> None:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            module.stars.append(_source(node, package))
        module.imports |= _bound(node, package, absolute=True)
    elif isinstance(node, _DEFINITIONS):
        module.definitions.setdefault(node.name, []).append(node)
    elif names := _assigned(node):
        for name in names:
            module.definitions.setdefault(name, []).append(node)
    elif isinstance(node, ast.If) and _is_guard(node.test):
        pass  # for type checkers, or for `python -m`: no part of what the stage's function does
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        _record_compound(module, package, node)


def _record_compound(module: Module, package: str, node: ast.stmt) -> None:
    """An `if`, `try`, call …: it runs on import, and the names that it binds stand for all of it."""
    module.at_import.append(node)
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            module.imports |= _bound(inner, package, absolute=True)
        elif isinstance(inner, _DEFINITIONS):
            module.definitions.setdefault(inner.name, []).append(node)
        elif isinstance(inner, ast.stmt):
            for name in _assigned(inner):
                module.definitions.setdefault(name, []).append(node)


def _bound(
    node: ast.Import | ast.ImportFrom, package: str, *, absolute: bool = False
) -> dict[str, tuple[str, str | None]]:
    """Names that an import binds. `package` is the importing module's package, or (not `absolute`) the module."""
    if isinstance(node, ast.Import):
        # `import a.b` binds a; `import a.b as c` binds c to a.b.
        named = [(alias.asname or alias.name.partition(".")[0], alias) for alias in node.names]
        return {name: (alias.name if alias.asname else name, None) for name, alias in named}
    source = _source(node, package if absolute else package.rpartition(".")[0])
    return {alias.asname or alias.name: (source, alias.name) for alias in node.names if alias.name != "*"}


def _source(node: ast.ImportFrom, package: str) -> str:
    """Absolute name of the module that names are imported from."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    base = parents[: len(parents) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _assigned(node: ast.stmt) -> list[str]:
    """Names that an assignment binds."""
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return []
    return [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]


def _is_guard(test: ast.expr) -> bool:
    """`if TYPE_CHECKING` and `if __name__ == "__main__"`."""
    if isinstance(test, ast.Compare):
        test = test.left
    return (_chain(test) or [""])[-1] in {"TYPE_CHECKING", "__name__"}


def _chain(node: ast.expr) -> list[str] | None:
    """`a.b.c` as its parts, None when it does not start at a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _canonical(node: object) -> str:
    """A text of a syntax tree without places, docstrings and empty fields, so that Python versions agree on it."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, _DEFINITIONS):
            value = _without_docstring(value)
        if value is not None and value != [] and name not in {"type_comment", "kind", "ctx"}:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """A body without its docstring and without the strings that document fields."""
    return [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
