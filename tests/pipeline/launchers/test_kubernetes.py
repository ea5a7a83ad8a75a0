"""The TrainJob manifest against a schema written from the documented fields. No cluster has seen it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from conf.runtime import KubernetesConfig, RuntimeConfig
from pipeline.cli.main import run_command
from pipeline.launchers.commands import Process
from pipeline.launchers.kubernetes import manifest
from pipeline.runner import prepare
from stages.runtime.errors import InputError
from stages.runtime.job import Job

SCHEMA = Draft202012Validator(json.loads(Path(__file__).with_name("trainjob.schema.json").read_text()))


def rendered(output: Path = Path("/data/artifacts/.work/entropy_model-0123456789abcdef0123"), **settings: Any) -> Any:
    claims = KubernetesConfig(image="registry/dpar:1", claims={"data": Path("/data"), "images": Path("/images")})
    runtime = RuntimeConfig(kubernetes=claims, **settings)
    inputs = {"tokenize": Path("/data/artifacts/tokenize/tokenize-1"), "images": Path("/images/train")}
    job = Job(stage="entropy_model", config={}, inputs=inputs, output=output, runtime={})
    process = Process(
        name="entropy_model",
        module="stages.entropy_model",
        job=job,
        code_root=Path("/opt/dpar"),
        nodes=runtime.nodes,
        per_node=runtime.processes,
    )
    return manifest(process, runtime)


@pytest.mark.parametrize("settings", [{}, {"nodes": 4, "processes": 8, "gpus_per_node": 8}])
def test_the_manifest_fits_the_schema(settings: dict[str, int]) -> None:
    SCHEMA.validate(yaml.safe_load(yaml.safe_dump(rendered(**settings))))


def test_the_manifest_says_what_the_settings_say() -> None:
    found = rendered(nodes=4, processes=8, gpus_per_node=8)
    trainer, pod = found["spec"]["trainer"], found["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
    assert found["metadata"]["name"] == "dpar-entropy-model-01234567"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 8}}
    assert trainer["command"][-1] == "/data/artifacts/.work/entropy_model-0123456789abcdef0123/record/job.json"
    assert not {"PYTHONPATH", "RANK"} & {variable["name"] for variable in trainer["env"]}
    mounts = pod["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert mounts == [{"name": "data", "mountPath": "/data"}, {"name": "images", "mountPath": "/images"}]


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["spec"].pop("runtimeRef"),
        lambda found: found["metadata"].update(name="Dpar_train"),
        lambda found: found["spec"]["trainer"].update(nodes=2),
        lambda found: found["spec"]["trainer"].update(numNodes="2"),
        lambda found: found["spec"]["runtimePatches"][0].pop("manager"),
    ],
)
def test_the_schema_refuses_what_the_operator_would(change: Callable[[Any], object]) -> None:
    found = rendered()
    change(found)
    with pytest.raises(ValidationError):
        SCHEMA.validate(found)


def test_a_path_outside_all_claims_is_named() -> None:
    with pytest.raises(
        InputError, match=r"/home/x/train-1 is in no volume claim .*, found data: /data, images: /images"
    ):
        rendered(Path("/home/x/train-1"))


@pytest.mark.slow
def test_what_the_job_made_is_committed_by_the_next_run(tiny: Any) -> None:
    """The process that `prepare` describes stands for the TrainJob."""
    process = prepare(tiny.module.GRAPH["alpha"], tiny.settings(), tiny.runtime, tiny.project)
    assert Job.read(process.record / "job.json") == process.job
    (process.job.output / "made-elsewhere").touch()
    result = tiny.run("alpha")
    assert (result.state, (result.path / "made-elsewhere").exists()) == ("ran", True)


@pytest.mark.slow
def test_the_command_needs_finished_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    overrides = ["--set", f"dataset.root={tmp_path / 'images'}", "--set", f"runtime.home={tmp_path / 'home'}"]
    assert run_command(["k8s", "train", "--preset", "tiny", *overrides]) == 2
    assert "train reads tokenize, which is missing" in capsys.readouterr().err


def test_the_command_prints_yaml(tmp_path: Path, image_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = json.dumps({"home": str(tmp_path), "images": str(image_root)})
    overrides = [f"dataset.root={image_root}", f"runtime.home={tmp_path}", f"runtime.kubernetes.claims={claims}"]
    words = [word for override in overrides for word in ("--set", override)]
    assert run_command(["k8s", "dataset", "--preset", "tiny", *words]) == 0
    SCHEMA.validate(yaml.safe_load(capsys.readouterr().out))
