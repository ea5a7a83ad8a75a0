"""A process that runs several stages in turn, so that a group of processes is started once for all of them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from conf.environment import INIT_METHOD
from conf.places import Place
from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.section import Section
from pipeline.graph import STAGES
from stages.runtime.job import Inputs, Job, main


class InTurn(Section):
    """The job files of the stages to run."""

    jobs: list[Place]


def in_turn(config: InTurn, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Call the function of each stage. Its process group meets where no other has met before."""
    for path in config.jobs:
        job = Job.read(path)
        os.environ[INIT_METHOD] = f"file://{job.output}-ranks"
        section = Settings.model_fields[job.stage].annotation.model_validate(job.config)  # type: ignore[union-attr]
        module, function = STAGES[job.stage].entry
        getattr(importlib.import_module(module), function)(section, job.inputs, job.output, runtime)


if __name__ == "__main__":
    main(in_turn, InTurn)
