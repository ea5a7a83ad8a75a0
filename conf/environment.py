"""Runtime settings from `DPAR_*` variables, and back.

`DPAR_<FIELD>` sets a field of `RuntimeConfig`, `DPAR_<SECTION>__<FIELD>` one of its sections. The text is read as that
of `--set`. An empty variable counts as unset, and an unknown one is an error: it would have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from conf.runtime import RuntimeConfig
from conf.values import value_of

PREFIX, _NESTED = "DPAR_", "__"
INIT_METHOD = "DPAR_INIT_METHOD"  # where the processes of a stage meet, as torch.distributed takes it
SERVERS = "DPAR_SERVERS"
"""Variable of the processes of `dpar up`: the folder of their files. `down` finds them by it without state.json."""
STARTED_IN = "DPAR_STARTED_IN"
"""Variable of the process that executes runs of Prefect's page: the folder in which `dpar up` was called."""
INTERNAL = (INIT_METHOD, SERVERS, STARTED_IN)  # variables that dpar sets for its own processes

Address = tuple[str, ...]


def from_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """The runtime settings in `DPAR_*` variables, as a tree.

    Raises:
        ValueError: A variable is unknown, or its text is no value of its field.
    """
    addresses = dict(_addresses(RuntimeConfig))
    tree: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.upper().startswith(PREFIX) or name in INTERNAL or not text:
            continue
        if name not in addresses:
            raise ValueError(_unknown(name, list(addresses)))
        (*sections, field), kind = addresses[name]
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        try:
            branch[field] = value_of(text, kind)
        except ValueError as error:
            raise ValueError(f"variable {name}: {error}") from error
    return tree


def as_variables(runtime: RuntimeConfig) -> dict[str, str]:
    """`DPAR_*` variables for another process, in which `from_variables` finds the same settings."""
    tree = runtime.model_dump(mode="json")
    return {name: _text(_at(tree, address)) for name, (address, _) in _addresses(RuntimeConfig)}


def _addresses(section: type[BaseModel], outer: Address = ()) -> Iterator[tuple[str, tuple[Address, Any]]]:
    """Every variable with the address and the kind of its field."""
    for name, field in section.model_fields.items():
        kind, address = field.annotation, (*outer, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _addresses(kind, address)
        else:
            yield PREFIX + _NESTED.join(address).upper(), (address, kind)


def _at(tree: Mapping[str, Any], address: Address) -> Any:
    value: Any = tree
    for name in address:
        value = value[name]
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _unknown(name: str, known: list[str]) -> str:
    close = get_close_matches(name.upper(), known, n=1)
    expected = f"did you mean {close[0]}" if close else f"expected one of {', '.join(known)}"
    return f"variable {name} sets nothing, {expected}: settings of stages are given by --set"
