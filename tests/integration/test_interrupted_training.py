"""A training cancelled under a real torchrun saves the step it is in, on all processes, and the next run resumes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.graph import STAGES
from pipeline.launch import launch
from pipeline.project import DPAR
from stages.runtime.job import Job
from stages.training.checkpoint import load_latest
from stages.training.loop import CHECKPOINTS

pytestmark = pytest.mark.slow


def test_a_cancelled_training_goes_on_where_it_was(
    tmp_path: Path, tiny_settings: Settings, tiny_artifacts: dict[str, Path]
) -> None:
    stage, output = STAGES["entropy_model"], tmp_path / "out"
    runtime = RuntimeConfig(home=tmp_path, device="cpu", threads=1)
    changes = {"steps": 100_000, "checkpoint_every": 100_000}
    training = tiny_settings.entropy_model.training.model_copy(update=changes)
    job = Job(
        stage=stage.name,
        config=tiny_settings.entropy_model.model_copy(update={"training": training}).model_dump(mode="json"),
        inputs={"tokenize": tiny_artifacts["tokenize"]},
        output=output,
        runtime=runtime.model_dump(mode="json"),
    )
    seen: list[int] = []

    def cancel_at(least: int, processes: int) -> None:
        """Run until progress reports so many steps, then cancel as Ctrl-C does."""
        seen.clear()

        def on_progress(progress: dict[str, Any]) -> None:
            seen.append(progress["done"])
            if progress["done"] >= least:
                raise KeyboardInterrupt

        lock = os.open(tmp_path / "lock", os.O_CREAT)
        try:
            with pytest.raises(KeyboardInterrupt):
                launch(
                    stage.name,
                    stage.entry[0],
                    job,
                    runtime.model_copy(update={"processes": processes}),
                    code_root=DPAR.code_root,
                    locks=(lock,),
                    spmd=stage.spmd,
                    on_progress=on_progress,
                )
        finally:
            os.close(lock)

    cancel_at(5, processes=2)
    state = load_latest(output / CHECKPOINTS, torch.device("cpu"))
    assert state is not None
    assert state["step"] >= seen[-1]
    assert f"interrupted by SIGTERM after step {state['step']} of 100000" in (output / "record/log.txt").read_text()
    cancel_at(0, processes=1)
    assert seen[0] == state["step"]
