"""The pipeline run from this process, with a Prefect server to look at it in, now or later."""

from __future__ import annotations

import os
from collections.abc import Sequence

from conf.load import load_settings
from pipeline.runner import NullObserver, Observer
from pipeline.servers import environment, prefect_server, server_folder


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
    """Make what is not made yet, as a run of the Prefect flow in this process.

    Args:
        preset: Settings to start from.
        ablation: Change to the preset.
        overrides: `stage.field=value` pairs.
        from_stage: Leave out what does not depend on this stage.
        until_stage: Leave out what this stage does not depend on.
        force: Stages to make again though they are cached.
        observer: Is told what happens.

    Raises:
        SettingsError: A setting cannot be used.
        InputError: A stage is asked for that cannot run, or a file that the settings name is missing.
        StageFailed: A stage's process did not end well.
        ServerError: The Prefect server did not start.
    """
    _, runtime = load_settings(preset, ablation, overrides)
    with prefect_server(runtime) as server:
        # Prefect reads these while it is imported. Its lines would break into the progress shown here; the run's page
        # has them.
        quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_API_URL": server.api_url}
        os.environ.update(quiet | environment(runtime))
        server_folder(runtime).mkdir(parents=True, exist_ok=True)  # of Prefect's own folder, which it makes itself
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
