"""What a run may set that was started from Prefect's page.

The page takes any text as an override. Such a run reads files below a few folders only, and does not change where it
runs, where its results go, or what is asked of a cluster: those settings belong to the person who started the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.environment import STARTED_IN
from conf.load import CONF_DIR, load_settings
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from stages.runtime.errors import InputError

SETTABLE = (
    *("device", "processes", "threads", "compile", "micro_batch", "checkpoint_activations", "checkpoint_minutes"),
    *("attention", "log_level", "tracking"),
)
"""Runtime settings that a run from the page may set."""


def load_page_settings(
    preset: str | None, ablation: str | None, overrides: Sequence[str]
) -> tuple[Settings, RuntimeConfig]:
    """Settings of a run that was started from the page. Relative paths start in the folder where `dpar up` was called.

    Raises:
        SettingsError: The settings are invalid.
        InputError: A setting is not for runs from the page.
    """
    started_in = Path(os.environ.get(STARTED_IN, "."))
    try:
        os.chdir(started_in)
    except OSError as error:
        raise InputError(f"{started_in}, where `dpar up` was called, cannot be entered: start it again") from error
    settings, runtime = load_settings(preset, ablation, overrides)
    _, own = load_settings()
    for name in RuntimeConfig.model_fields:
        if name not in SETTABLE and getattr(runtime, name) != getattr(own, name):
            raise InputError(
                f"runtime.{name} is set in a run from Prefect's page, expected none but {', '.join(SETTABLE)}: set it "
                "when you start `dpar up`"
            )
    roots = [root.resolve() for root in (own.home, started_in, *own.roots)]
    for name, path in _paths(settings.model_dump()):
        if not any(path.resolve().is_relative_to(root) for root in (CONF_DIR, *roots)):
            raise InputError(
                f"{name} is {path} in a run from Prefect's page, expected a path below {' or '.join(map(str, roots))}: "
                "name more folders when you start `dpar up`, e.g. DPAR_ROOTS='[\"/data\"]'"
            )
    return settings, runtime


def _paths(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Path]]:
    """Name and value of every setting that is a path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{name}.")
        elif isinstance(value, Path):
            yield f"{above}{name}", value
