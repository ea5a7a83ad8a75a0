"""Fingerprint of the code that a stage runs: the definitions it reaches, wherever they stand.

The closure starts at the stage's function and follows the names it uses, through imports, with classes whole and with
what the modules on the way do when they are imported. Docstrings and comments do not count. Where a name cannot be
resolved by reading (a star import, a module passed around) the whole module counts. So an unused function changes
nothing, and an edit of a shared layer changes exactly the stages that use it.

The fingerprint is the set of digests of these definitions. A digest covers a definition's text and, for each name in
it, the digest of what the name stands for, but no module's name: code that is moved, split or renamed by module keeps
its fingerprint, and a name that is bound to another definition changes it.

Annotations count like any other use: to leave them out would need to know that nothing reads them. An assignment counts
where its name is used, so one that is made for what its right side does must be a call instead.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cache.module_code import (
    AT_IMPORT,
    DEFINITIONS,
    EVERYTHING,
    Module,
    Target,
    bindings,
    chain,
    imports_in,
    is_first_party,
    load_module,
    runs,
    without_docstrings,
)

CODE_PACKAGES = ("stages", "models")  # conf holds values, which are in the key; pipeline runs stages and changes none
Place = tuple[str, str]  # a module, and a name in it, AT_IMPORT or EVERYTHING


class FingerprintError(ValueError):
    """Code that cannot be followed by reading it."""


@dataclass(frozen=True)
class Fingerprint:
    """A closure of definitions."""

    digests: list[str]
    """Sorted digests of its definitions, equal ones once: what a key holds."""
    definitions: dict[str, str]
    """Digest of each definition's own text by "module:name", for people."""


@dataclass(frozen=True)
class _Uses:
    """What some statements say and which names they use."""

    text: str
    """Canonical, without first-party module names."""
    places: frozenset[tuple[str, Place]] = frozenset()
    """First-party definitions, each with the name it is used by."""
    outside: frozenset[tuple[str, str]] = frozenset()
    """Names of other packages, each with the name it is used by."""
    imported: frozenset[Place] = frozenset()
    """What runs because of imports inside the statements."""


class Code:
    """The first-party code below a root folder. It remembers what it has read until a file changes.

    Args:
        root: Folder of the packages.
        neutral: Modules and packages, by dotted name, whose code cannot change a result.
        counted: Modules below `neutral` whose code counts all the same.
        packages: Top-level packages whose code counts.
    """

    def __init__(
        self,
        root: Path,
        neutral: frozenset[str] = frozenset(),
        counted: frozenset[str] = frozenset(),
        packages: tuple[str, ...] = CODE_PACKAGES,
    ) -> None:
        self.root, self.neutral, self.counted, self.packages = root, neutral, counted, packages
        self._modules: dict[str, Module | None] = {}
        self._uses: dict[Place, list[_Uses]] = {}

    def fingerprint(self, entry: Place) -> Fingerprint:
        """Fingerprint of everything that the function `entry` (module, name) reaches.

        Raises:
            FingerprintError: No such function, or a dynamic import on the way.
        """
        self._forget_if_changed()
        module = self.module(entry[0])
        if module is None or not module.nodes(entry[1]):
            raise FingerprintError(f"{entry[0]}:{entry[1]} is no definition below {self.root}")
        reached: set[Place] = set()
        waiting = [entry]
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                waiting.extend(self._reach(place))
        digests = self._told_apart(reached)
        counted = {_digest(uses, digests) for place in reached for uses in self.uses(place) if uses.text}
        texts = {f"{module}:{name}": "".join(u.text for u in self.uses((module, name))) for module, name in reached}
        return Fingerprint(sorted(counted), {place: _sha(text) for place, text in sorted(texts.items()) if text})

    def module(self, name: str) -> Module | None:
        """The module of that name, None when there is none whose code counts."""
        if name.partition(".")[0] not in self.packages or self._is_neutral(name):
            return None
        if name not in self._modules:
            self._modules[name] = self._load(name)
        return self._modules[name]

    def resolve(self, module_name: str, name: str | None) -> Iterator[Place]:
        """Places that `name` of a module stands for; (module, EVERYTHING) where that cannot be told."""
        module = self.module(module_name)
        if module is None:
            return
        if name is None:
            yield module_name, EVERYTHING
            return
        if name in module.definitions:
            yield module_name, name
        # A package that says `from . import part` binds the name to its own part: that leads back here.
        targets = [target for target in module.imports.get(name, []) if target != (module_name, name)]
        for target in targets:
            yield from self.resolve(*target)
        if name not in module.definitions and not targets:
            submodule = f"{module_name}.{name}"
            yield (submodule if self.module(submodule) else module_name), EVERYTHING

    def importing(self, names: set[str]) -> Iterator[Place]:
        """What runs when these modules, and so the packages that they lie in, are imported."""
        for name in names:
            parts = name.split(".")
            parents = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            yield from ((parent, AT_IMPORT) for parent in parents if self.module(parent))

    def uses(self, place: Place) -> list[_Uses]:
        """What a place says and uses; of AT_IMPORT statement by statement, for a module may be split between them."""
        if place not in self._uses:
            module = self._module(place[0])
            if place[1] == EVERYTHING:
                self._uses[place] = [self._everything(module)]
            else:
                nodes = module.nodes(place[1])
                groups = [[node] for node in nodes] if place[1] == AT_IMPORT else [nodes]
                self._uses[place] = [_Reader(self, module, group).uses() for group in groups]
        return self._uses[place]

    def _reach(self, place: Place) -> set[Place]:
        """Places that one place leads to."""
        found = set(self.importing({place[0]}))
        if place[1] == AT_IMPORT:
            found |= set(self.importing(self._module(place[0]).imported))
        for uses in self.uses(place):
            found |= {target for _, target in uses.places} | uses.imported
        return found

    def _everything(self, module: Module) -> _Uses:
        """A module that is passed around: all it defines, and all it passes on."""
        found = {(name, (module.name, name)) for name in module.definitions}
        passed_on = [(name, target) for name, targets in module.imports.items() for target in targets]
        for name, target in [*passed_on, *(("*", (star, None)) for star in module.stars)]:
            found |= {(name, place) for place in self.resolve(*target)}
        return _Uses("", frozenset(found))

    def _told_apart(self, places: set[Place]) -> dict[Place, str]:
        """A digest of each place that differs where its text or anything it leads to differs.

        Each round takes in what lies one name further. It ends when no two places are told apart that were alike.
        """
        digests = dict.fromkeys(places, "")
        while True:
            refined = {place: _sha("".join(_digest(uses, digests) for uses in self.uses(place))) for place in places}
            if len(set(refined.values())) == len(set(digests.values())):
                return refined
            digests = refined

    def _is_neutral(self, name: str) -> bool:
        parts = name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return bool(above & self.neutral) and not above & self.counted

    def _module(self, name: str) -> Module:
        module = self.module(name)
        assert module is not None
        return module

    @property
    def looked_up(self) -> list[str]:
        """Names of all modules that were looked for, found or not."""
        return sorted(self._modules)

    def file_of(self, name: str) -> Path | None:
        """The file of a module or package, None when there is none."""
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        return path if path.is_file() else None

    def _load(self, name: str) -> Module | None:
        path = self.file_of(name)
        return None if path is None else load_module(path, name)

    def _forget_if_changed(self) -> None:
        if any(self._load(name) is not module for name, module in self._modules.items()):
            self._modules.clear()
            self._uses.clear()


@dataclass
class _Found:
    """What a reader has found so far."""

    places: set[tuple[str, Place]] = field(default_factory=set)
    outside: set[tuple[str, str]] = field(default_factory=set)
    imported: set[Place] = field(default_factory=set)


class _Reader:
    """Reads some statements of a module."""

    def __init__(self, code: Code, module: Module, nodes: list[ast.stmt]) -> None:
        self._code, self._module, self._nodes = code, module, nodes
        self._found = _Found()
        self._imports = {name: list(targets) for name, targets in module.imports.items()}
        for node in nodes:
            for inner in imports_in(node):
                self._found.imported |= set(code.importing(runs(inner, module.package)))
                for name, target in bindings(inner, module.package):
                    self._imports.setdefault(name, []).append(target)

    def uses(self) -> _Uses:
        """What the statements say and use."""
        text, found = "".join(map(self._text, self._nodes)), self._found
        return _Uses(text, frozenset(found.places), frozenset(found.outside), frozenset(found.imported))

    def _text(self, node: object) -> str:
        """A syntax tree without places, docstrings and empty fields, so that Python versions agree on it.

        First-party imports are left out: what they bind is told by its use.
        """
        if isinstance(node, list):
            return "[" + ",".join(filter(None, map(self._text, node))) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, (ast.Name, ast.Attribute)) and (parts := chain(node)) is not None:
            return self._name(parts)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and is_first_party(node, self._module.package):
            return ""
        if isinstance(node, ast.Call):
            self._computed_import(node)
        fields = []
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(node, DEFINITIONS):
                value = without_docstrings(value or [])
            if value is not None and value != [] and name not in {"type_comment", "kind", "ctx"}:
                fields.append(f"{name}={self._text(value)}")
        return f"{type(node).__name__}({','.join(fields)})"

    def _name(self, parts: list[str]) -> str:
        """Take up a dotted name; its text without the first-party modules that it leads through."""
        name, text = parts[0], ".".join(parts)
        if name in self._module.definitions:
            self._found.places.add((name, (self._module.name, name)))
        for target in self._imports.get(name, []):
            text = self._follow(target, parts)
        if name not in self._module.definitions and name not in self._imports:
            for star in self._module.stars:
                self._found.places.update((name, place) for place in self._code.resolve(star, None))
        return text

    def _follow(self, target: Target, parts: list[str]) -> str:
        """Follow what an import bound, and the names after it, as far as they lead through modules."""
        (module, name), label, rest = target, parts[0], parts[1:]
        if module.partition(".")[0] not in self._code.packages:
            self._found.outside.add((label, f"{module}:{name}"))
            return ".".join(parts)
        through = name is None
        if name is not None and self._code.module(f"{module}.{name}"):
            module, name, through = f"{module}.{name}", None, True
        while name is None and rest:
            if self._code.module(f"{module}.{rest[0]}"):
                module, rest = f"{module}.{rest[0]}", rest[1:]
            else:
                name, rest = rest[0], rest[1:]
        if through:
            label = name or "*"
        self._found.places.update((label, place) for place in self._code.resolve(module, name))
        return ".".join([label, *rest])

    def _computed_import(self, node: ast.Call) -> None:
        called = chain(node.func) or [""]
        if called[-1] not in {"import_module", "__import__"}:
            return
        argument = node.args[0] if node.args else None
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            raise FingerprintError(
                f"{self._module.name} line {node.lineno} imports a module by a computed name: the code that a stage "
                "runs must be known by reading it, import it by name"
            )
        self._found.places.update(("*", place) for place in self._code.resolve(argument.value, None))


def _digest(uses: _Uses, digests: dict[Place, str]) -> str:
    """Digest of statements, given those of the places that they name."""
    names = {(label, digests[place]) for label, place in uses.places} | uses.outside
    return _sha("\n".join([uses.text, *(f"{label} {target}" for label, target in sorted(names))]))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
