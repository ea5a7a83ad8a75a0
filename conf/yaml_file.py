"""Presets and ablations: YAML whose plain scalars are those of JSON.

YAML 1.1 reads `010` as 8, `1:30` as 90, `yes` as true and `.inf` as a number, and takes the last of two equal names.
Here these are text or errors, so that a file means what it says. Anchors, tags and merge keys are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from conf.values import scalar

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # the one in C takes a tenth of the time
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}  # all that the base loader gives


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings by section in a YAML file; none in an empty file.

    Raises:
        ValueError: The file is no such YAML; the message is one line with the place.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    tree = None if root is None else _Reader(path).value(root)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {tree!r}, expected sections with settings")
    return tree


class _Reader:
    """Turns nodes into values."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = set[int]()

    def value(self, node: yaml.Node) -> Any:
        """The value of a node."""
        if id(node) in self._seen:
            raise self._error(node, "an anchor is used again, expected the value itself")
        if node.tag not in _PLAIN_TAGS:
            raise self._error(node, f"the tag {node.tag} is set, expected none")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each) for each in node.value]
        assert isinstance(node, yaml.ScalarNode)
        if node.style:  # quoted
            return node.value
        return None if node.value == "" else scalar(node.value)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise self._error(name, "a name is a list or a mapping, expected the name of a setting")
            if name.value in found:
                raise self._error(name, f"{name.value} is set twice, expected it once")
            found[name.value] = self.value(value)
        return found

    def _error(self, node: yaml.Node, what: str) -> ValueError:
        return ValueError(f"{self._path}, line {node.start_mark.line + 1}: {what}")
