"""Run the pipeline in this process, as a flow run recorded by a Prefect server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from conf.load import load_settings
from pipeline.runner import NullObserver, Observer
from pipeline.servers import empty_folder, environment, prefect_server


def run_pipeline(
    preset: str | None = None,
    ablation: str | None = None,
    overrides: Sequence[str] = (),
    *,
    from_stage: str | None = None,
    until_stage: str | None = None,
    force: Sequence[str] = (),
    observer: Observer | None = None,
) -> None:
    """Run all stages that are not cached, as a run of the Prefect flow in this process.

    Args:
        preset: Named settings to start from.
        ablation: Named change to the preset.
        overrides: `stage.field=value` pairs.
        from_stage: First stage; stages that do not depend on it are left out.
        until_stage: Last stage; stages that it does not depend on are left out.
        force: Stages to run even if they are cached.
        observer: Observer of the run.

    Raises:
        SettingsError: The settings are invalid.
        InputError: A selected stage cannot run, or a file named in the settings is missing.
        StageFailed: A stage's process failed.
        ServerError: The Prefect server did not start.
    """
    _, runtime = load_settings(preset, ablation, overrides)
    with prefect_server(runtime) as server:
        # Prefect reads these variables when it is imported. Its console log is off: it would break up the progress
        # bars, and the run's page shows it.
        quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
        os.environ.update(quiet | environment(runtime) | server.variables)
        with contextlib.chdir(empty_folder(runtime)):  # Prefect reads settings from files of the current folder
            from pipeline.serving import flows

        server.wait()
        parameters = {
            "preset": preset,
            "ablation": ablation,
            "overrides": list(overrides),
            "from_stage": from_stage,
            "until_stage": until_stage,
            "force": list(force),
        }
        flows.run_here(parameters, observer or NullObserver())
