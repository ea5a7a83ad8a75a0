"""Reads statements for the code fingerprint: their canonical text and the definitions that their names refer to."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.cache.module_code import (
    DEFINITIONS,
    Module,
    Target,
    bindings,
    chain,
    imports_in,
    is_first_party,
    modules_run,
    without_docstrings,
)

if TYPE_CHECKING:
    from pipeline.cache.fingerprint import Code

Place = tuple[str, str]  # a module, and a name in it, AT_IMPORT or EVERYTHING


class FingerprintError(ValueError):
    """Code that cannot be resolved statically."""


@dataclass(frozen=True)
class Uses:
    """Text of some statements and the names they use."""

    text: str
    """Canonical text, without first-party module names."""
    places: frozenset[tuple[str, Place]] = frozenset()
    """First-party definitions, each with the name used for it."""
    outside: frozenset[tuple[str, str]] = frozenset()
    """Names from other packages, each with the name used for it."""
    imported: frozenset[Place] = frozenset()
    """Modules that imports inside the statements run."""


@dataclass
class _Found:
    """What a `Reader` has found so far."""

    places: set[tuple[str, Place]] = field(default_factory=set)
    outside: set[tuple[str, str]] = field(default_factory=set)
    imported: set[Place] = field(default_factory=set)


class Reader:
    """Reads some statements of a module and collects the names they use."""

    def __init__(self, code: Code, module: Module, nodes: list[ast.stmt]) -> None:
        self._code, self._module, self._nodes = code, module, nodes
        self._found = _Found()
        self._imports = {name: list(targets) for name, targets in module.imports.items()}
        for node in nodes:
            for inner in imports_in(node):
                self._found.imported |= set(code.importing(modules_run(inner, module.package)))
                for name, target in bindings(inner, module.package):
                    self._imports.setdefault(name, []).append(target)

    def uses(self) -> Uses:
        """Text and uses of the statements."""
        text, found = "".join(map(self._text, self._nodes)), self._found
        return Uses(text, frozenset(found.places), frozenset(found.outside), frozenset(found.imported))

    def _text(self, node: object) -> str:
        """Text of a syntax tree without positions, docstrings and empty fields, equal for all Python versions.

        First-party imports are left out: their names are recorded where they are used.
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
        """Record the use of a dotted name; return its text without first-party module names."""
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
        """Resolve an imported name and the attributes after it, as long as they are modules."""
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
        self._found.outside.update((label, other) for other in self._code.outside(module, name))
        return ".".join([label, *rest])

    def _computed_import(self, node: ast.Call) -> None:
        called = chain(node.func) or [""]
        if called[-1] not in {"import_module", "__import__"}:
            return
        argument = node.args[0] if node.args else None
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            raise FingerprintError(
                f"{self._module.name} line {node.lineno} imports a module by a computed name, expected a literal name: "
                "the fingerprint of a stage's code is found without running it"
            )
        self._found.places.update(("*", place) for place in self._code.resolve(argument.value, None))
