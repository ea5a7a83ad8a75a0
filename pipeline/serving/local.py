"""Run the pipeline in this process, recorded by a Prefect server if one answers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from conf.runtime import RuntimeConfig
from pipeline.runner import NullObserver, Observer
from pipeline.servers import environment, prefect_server
from pipeline.serving.record import prefect_view, run_recorded
from pipeline.serving.whole_run import Request, plan_run
from pipeline.tracking.view import Server, first_line

logger = logging.getLogger(__name__)


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
    """Run all stages that are not cached, in this process. Prefect shows it as a run of its flow.

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
        ArtifactError: An input is damaged.
        StageFailed: A stage's process failed.
        SystemExit: SIGTERM arrived. The running stage was terminated in order, as after Ctrl-C.
    """
    run = plan_run(Request(preset, ablation, tuple(overrides), from_stage, until_stage, tuple(force)))
    with _orderly_end(), _prefect(run.runtime) as prefect:
        run_recorded(run, prefect, [observer or NullObserver()])


@contextmanager
def _prefect(runtime: RuntimeConfig) -> Iterator[Server | None]:
    """The Prefect server for a run; None, with a warning, if it cannot be started. No error of it leaves the block."""
    os.environ.update(environment(runtime))  # of MLflow, when it is imported
    stack, server = ExitStack(), None
    try:
        server = stack.enter_context(prefect_server(runtime))
    except Exception as error:  # a full disk, a damaged state.json, no memory for a process
        logger.warning("Prefect's server does not start: %s: going on without it", first_line(error))
    try:
        yield None if server is None else prefect_view(runtime, server, own=server.auth is not None)
    finally:
        try:
            stack.close()
        except Exception as error:
            logger.warning("Prefect's server did not end: %s", first_line(error))


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that the running stage is terminated and recorded before this process ends."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
