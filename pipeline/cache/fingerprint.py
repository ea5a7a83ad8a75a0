"""Fingerprint of the code that a stage runs: all definitions that its function reaches.

The closure starts at the stage's function and follows every name it uses, through imports. Classes count as a whole.
Statements that a module on the way runs at import count too. Docstrings and comments do not count. Where a name cannot
be resolved statically (a star import, a module passed as a value), the whole module counts. An unused function
therefore changes nothing, and an edit of a shared layer changes exactly the stages that use it.

The fingerprint is the set of digests of these definitions. A digest covers the definition's text and the digest of
every definition that it names. It does not cover module names: moving code between modules, or splitting or renaming a
module, keeps the fingerprint. Binding a name to another definition changes it.

Annotations count as uses, since code may read them at run time. An assignment counts only where its name is used: write
an assignment with a side effect as a plain call.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.code_reader import FingerprintError, Place, Reader, Uses
from pipeline.cache.module_code import AT_IMPORT, EVERYTHING, Module, load_module

__all__ = ["Code", "Fingerprint", "FingerprintError", "Place"]
# conf holds values, which are in the key. pipeline runs stages and does not change their results.
CODE_PACKAGES = ("stages", "models")


@dataclass(frozen=True)
class Fingerprint:
    """A closure of definitions."""

    digests: list[str]
    """Sorted digests of the definitions, without duplicates. They are part of the key."""
    definitions: dict[str, str]
    """Digest of each definition's own text by "module:name"; only `dpar why` reads it."""


class Code:
    """The first-party code below a root folder. Parsed modules are kept until a file changes.

    Args:
        root: Folder of the packages.
        neutral: Modules and packages, by dotted name, whose code cannot change a result.
        counted: Modules inside `neutral` packages whose code counts nevertheless.
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
        self._uses: dict[Place, list[Uses]] = {}

    def fingerprint(self, entry: Place) -> Fingerprint:
        """Fingerprint of everything that the function `entry` (module, name) reaches.

        Raises:
            FingerprintError: The function does not exist, or code on the way imports a module by a computed name.
        """
        self._forget_if_changed()
        module = self.module(entry[0])
        if module is None or not module.nodes(entry[1]):
            raise FingerprintError(f"{entry[0]}:{entry[1]} is not defined in the code below {self.root}")
        reached: set[Place] = set()
        waiting = [entry]
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                waiting.extend(self._reach(place))
        digests = self._refined_digests(reached)
        counted = {_digest(uses, digests) for place in reached for uses in self.uses(place) if uses.text}
        texts = {f"{module}:{name}": "".join(u.text for u in self.uses((module, name))) for module, name in reached}
        return Fingerprint(sorted(counted), {place: _sha(text) for place, text in sorted(texts.items()) if text})

    def module(self, name: str) -> Module | None:
        """The module `name`; None if there is no such module or its code does not count."""
        if name.partition(".")[0] not in self.packages or self._is_neutral(name):
            return None
        if name not in self._modules:
            self._modules[name] = self._load(name)
        return self._modules[name]

    def resolve(self, module_name: str, name: str | None) -> Iterator[Place]:
        """Definitions that `name` of a module refers to; (module, EVERYTHING) if it cannot be resolved."""
        module = self.module(module_name)
        if module is None:
            return
        if name is None:
            yield module_name, EVERYTHING
            return
        if name in module.definitions:
            yield module_name, name
        # A package with `from . import part` binds the name to its own submodule, which resolves to this same place.
        targets = [target for target in module.imports.get(name, []) if target != (module_name, name)]
        for target in targets:
            yield from self.resolve(*target)
        if name not in module.definitions and not targets:
            submodule = f"{module_name}.{name}"
            yield (submodule if self.module(submodule) else module_name), EVERYTHING

    def outside(self, module_name: str, name: str | None) -> Iterator[str]:
        """Names of other packages, as "module:name", that `name` of a module is imported from."""
        module = self.module(module_name)
        for target in module.imports.get(name, []) if module and name else []:
            if target[0].partition(".")[0] not in self.packages:
                yield f"{target[0]}:{target[1]}"
            elif target != (module_name, name):
                yield from self.outside(*target)

    def importing(self, names: set[str]) -> Iterator[Place]:
        """Import-time code of these modules and of the packages that contain them."""
        for name in names:
            parts = name.split(".")
            parents = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            yield from ((parent, AT_IMPORT) for parent in parents if self.module(parent))

    def uses(self, place: Place) -> list[Uses]:
        """Text and uses of a place. AT_IMPORT has one entry per statement, since a module may be split between two."""
        if place not in self._uses:
            module = self._module(place[0])
            if place[1] == EVERYTHING:
                self._uses[place] = [self._everything(module)]
            else:
                nodes = module.nodes(place[1])
                groups = [[node] for node in nodes] if place[1] == AT_IMPORT else [nodes]
                self._uses[place] = [Reader(self, module, group).uses() for group in groups]
        return self._uses[place]

    def _reach(self, place: Place) -> set[Place]:
        """Places that `place` uses directly."""
        found = set(self.importing({place[0]}))
        if place[1] == AT_IMPORT:
            found |= set(self.importing(self._module(place[0]).imported))
        for uses in self.uses(place):
            found |= {target for _, target in uses.places} | uses.imported
        return found

    def _everything(self, module: Module) -> Uses:
        """Uses of a module passed as a value: all that it defines and all that it imports."""
        found = {(name, (module.name, name)) for name in module.definitions}
        passed_on = [(name, target) for name, targets in module.imports.items() for target in targets]
        for name, target in [*passed_on, *(("*", (star, None)) for star in module.stars)]:
            found |= {(name, place) for place in self.resolve(*target)}
        outside = {(name, other) for name in module.imports for other in self.outside(module.name, name)}
        return Uses("", frozenset(found), frozenset(outside))

    def _refined_digests(self, places: set[Place]) -> dict[Place, str]:
        """Digest of each place that covers its text and, transitively, everything it uses.

        This is partition refinement: each round extends the digests by one step of uses, and the loop ends when a round
        separates no further places. It works for cycles too.
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
        """Names of all modules that were looked up, found or not."""
        return sorted(self._modules)

    def file_of(self, name: str) -> Path | None:
        """The file of a module or package; None if there is none."""
        base = os.path.join(self.root, *name.split("."))  # a command asks some 2,000 times: os.path is faster than Path
        path = os.path.join(base, "__init__.py") if os.path.isdir(base) else f"{base}.py"
        return Path(path) if os.path.isfile(path) else None

    def _load(self, name: str) -> Module | None:
        path = self.file_of(name)
        return None if path is None else load_module(path, name)

    def _forget_if_changed(self) -> None:
        if any(self._load(name) is not module for name, module in self._modules.items()):
            self._modules.clear()
            self._uses.clear()


def _digest(uses: Uses, digests: dict[Place, str]) -> str:
    """Digest of statements, given the digests of the places they use."""
    names = {(label, digests[place]) for label, place in uses.places} | uses.outside
    return _sha("\n".join([uses.text, *(f"{label} {target}" for label, target in sorted(names))]))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
