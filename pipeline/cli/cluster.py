"""The command `dpar k8s`: a stage as a Kubernetes manifest."""

from __future__ import annotations

import typer
import yaml

from pipeline.cache.home import require_writable
from pipeline.cli.options import Ablation, AsJson, Overrides, Preset, StageName, load, show_json
from pipeline.graph import STAGES
from pipeline.launchers.kubernetes import manifest
from pipeline.runner import prepare
from pipeline.selection import known_stage

app = typer.Typer(rich_markup_mode=None)


@app.command()
def k8s(
    name: StageName,
    *,
    preset: Preset = None,
    ablation: Ablation = None,
    overrides: Overrides,
    as_json: AsJson = False,
) -> None:
    """Print a Kubernetes manifest that runs one stage, a TrainJob of Kubeflow Trainer.

    Its inputs must be cached. When the TrainJob is complete, `dpar stage` commits what it made.
    """
    known_stage(name)
    settings, runtime = load(preset, ablation, overrides)
    require_writable(runtime.home)
    rendered = manifest(prepare(STAGES[name], settings, runtime), runtime)
    if as_json:
        show_json(rendered)
    else:
        typer.echo(yaml.safe_dump(rendered, sort_keys=False), nl=False)
