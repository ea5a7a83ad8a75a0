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

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.code_reader import FingerprintError, Place, Reader, Uses
from pipeline.cache.module_code import AT_IMPORT, EVERYTHING, Module, load_module

__all__ = ["Code", "Fingerprint", "FingerprintError", "Place"]
CODE_PACKAGES = ("stages", "models")  # conf holds values, which are in the key; pipeline runs stages and changes none


@dataclass(frozen=True)
class Fingerprint:
    """A closure of definitions."""

    digests: list[str]
    """Sorted digests of its definitions, equal ones once: what a key holds."""
    definitions: dict[str, str]
    """Digest of each definition's own text by "module:name", for people."""


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
        self._uses: dict[Place, list[Uses]] = {}

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

    def outside(self, module_name: str, name: str | None) -> Iterator[str]:
        """Names of other packages, as "module:name", that `name` of a module is imported from."""
        module = self.module(module_name)
        for target in module.imports.get(name, []) if module and name else []:
            if target[0].partition(".")[0] not in self.packages:
                yield f"{target[0]}:{target[1]}"
            elif target != (module_name, name):
                yield from self.outside(*target)

    def importing(self, names: set[str]) -> Iterator[Place]:
        """What runs when these modules, and so the packages that they lie in, are imported."""
        for name in names:
            parts = name.split(".")
            parents = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            yield from ((parent, AT_IMPORT) for parent in parents if self.module(parent))

    def uses(self, place: Place) -> list[Uses]:
        """What a place says and uses; of AT_IMPORT statement by statement, for a module may be split between them."""
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
        """Places that one place leads to."""
        found = set(self.importing({place[0]}))
        if place[1] == AT_IMPORT:
            found |= set(self.importing(self._module(place[0]).imported))
        for uses in self.uses(place):
            found |= {target for _, target in uses.places} | uses.imported
        return found

    def _everything(self, module: Module) -> Uses:
        """A module that is passed around: all it defines, and all it passes on."""
        found = {(name, (module.name, name)) for name in module.definitions}
        passed_on = [(name, target) for name, targets in module.imports.items() for target in targets]
        for name, target in [*passed_on, *(("*", (star, None)) for star in module.stars)]:
            found |= {(name, place) for place in self.resolve(*target)}
        outside = {(name, other) for name in module.imports for other in self.outside(module.name, name)}
        return Uses("", frozenset(found), frozenset(outside))

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


def _digest(uses: Uses, digests: dict[Place, str]) -> str:
    """Digest of statements, given those of the places that they name."""
    names = {(label, digests[place]) for label, place in uses.places} | uses.outside
    return _sha("\n".join([uses.text, *(f"{label} {target}" for label, target in sorted(names))]))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
