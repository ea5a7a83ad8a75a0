"""Fingerprint of the code that a stage runs: the definitions it reaches, not the files they stand in.

From the stage's function along the names it uses, through imports, classes whole, and what the modules on the way do
when they are imported. Docstrings and comments do not count. Where a name cannot be resolved by reading (a star import,
a module passed around) the whole module counts. So an unused function changes nothing, and an edit of a shared layer
changes exactly the stages that use it.

Annotations count like any other use: to leave them out would need to know that nothing reads them. An assignment counts
where its name is used, so one that is made for what its right side does must be a call instead.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.module_code import AT_IMPORT, EVERYTHING, Module, Target, bindings, chain, load_module, runs

CODE_PACKAGES = ("stages", "models")  # conf holds values, which are in the key; pipeline runs stages and changes none
Place = tuple[str, str]  # a module, and a name in it, AT_IMPORT or EVERYTHING


class FingerprintError(ValueError):
    """Code that cannot be followed by reading it."""


@dataclass(frozen=True)
class Fingerprint:
    """Digest of a closure, and of each definition in it, by "module:name"."""

    digest: str
    definitions: dict[str, str]


class Code:
    """The first-party code below a root folder. What it has read it remembers until a file changes."""

    def __init__(self, root: Path, neutral: frozenset[str] = frozenset(), packages: tuple[str, ...] = CODE_PACKAGES):
        self.root, self.neutral, self.packages = root, neutral, packages
        self._modules: dict[str, Module | None] = {}
        self._reached: dict[Place, frozenset[Place]] = {}

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
        digests = {f"{module}:{name}": self._module(module).digest(name) for module, name in sorted(reached)}
        digests = {place: digest for place, digest in digests.items() if digest}
        text = "\n".join(f"{place} {digest}" for place, digest in digests.items())
        return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), digests)

    def module(self, name: str) -> Module | None:
        """The module of that name, None when there is none whose code counts."""
        if name.partition(".")[0] not in self.packages or name in self.neutral:
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

    def _reach(self, place: Place) -> frozenset[Place]:
        """Places that one place leads to."""
        if place not in self._reached:
            module = self._module(place[0])
            found = _Uses(self, module, module.nodes(place[1])).found | set(self.importing({place[0]}))
            if place[1] == AT_IMPORT:
                found |= set(self.importing(module.imported))
            elif place[1] == EVERYTHING:
                found |= {(place[0], name) for name in module.definitions}
                passed_on: list[Target] = [target for targets in module.imports.values() for target in targets]
                for target in [*passed_on, *((star, None) for star in module.stars)]:
                    found |= set(self.resolve(*target))
            self._reached[place] = frozenset(found)
        return self._reached[place]

    def _module(self, name: str) -> Module:
        module = self.module(name)
        assert module is not None
        return module

    def _load(self, name: str) -> Module | None:
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        return load_module(path, name) if path.is_file() else None

    def _forget_if_changed(self) -> None:
        if any(self._load(name) is not module for name, module in self._modules.items()):
            self._modules.clear()
            self._reached.clear()


class _Uses(ast.NodeVisitor):
    """Places that some statements of a module use."""

    def __init__(self, code: Code, module: Module, nodes: list[ast.stmt]) -> None:
        self.code, self.module = code, module
        self.found: set[Place] = set()
        self._imports = {name: list(targets) for name, targets in module.imports.items()}
        for node in nodes:
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    self.found |= set(code.importing(runs(inner, module.package)))
                    for name, target in bindings(inner, module.package):
                        self._imports.setdefault(name, []).append(target)
        for node in nodes:
            self.visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._use([node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = chain(node)
        if parts is None:
            self.generic_visit(node)
        else:
            self._use(parts)

    def visit_Call(self, node: ast.Call) -> None:
        called = chain(node.func) or [""]
        if called[-1] in {"import_module", "__import__"}:
            argument = node.args[0] if node.args else None
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise FingerprintError(
                    f"{self.module.name} line {node.lineno} imports a module by a computed name: the code that a stage "
                    "runs must be known by reading it, import it by name"
                )
            self.found.update(self.code.resolve(argument.value, None))
        self.generic_visit(node)

    def _use(self, parts: list[str]) -> None:
        """Take up a dotted name."""
        name = parts[0]
        if name in self.module.definitions:
            self.found.add((self.module.name, name))
        for target in self._imports.get(name, []):
            self._follow(target, parts[1:])
        if name not in self.module.definitions and name not in self._imports:
            for star in self.module.stars:
                self.found.update(self.code.resolve(star, None))

    def _follow(self, target: Target, rest: list[str]) -> None:
        """Follow what an import bound, and the names after it, as far as they lead through modules."""
        module, name = target
        if name is not None and self.code.module(f"{module}.{name}"):
            module, name = f"{module}.{name}", None
        while name is None and rest:
            if self.code.module(f"{module}.{rest[0]}"):
                module, rest = f"{module}.{rest[0]}", rest[1:]
            else:
                name = rest[0]
        self.found.update(self.code.resolve(module, name))
