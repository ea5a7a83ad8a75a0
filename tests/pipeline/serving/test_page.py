"""Overrides as a visitor of Prefect's page could type them."""

import json
from pathlib import Path

import pytest

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from pipeline.serving.page import SETTABLE, load_page_settings
from stages.runtime.errors import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where `dpar up` was called, with images and a link out of it; home and roots are beside it."""
    here = tmp_path / "here"
    (here / "images").mkdir(parents=True)
    (here / "link").symlink_to("/etc")
    monkeypatch.setenv("DPAR_STARTED_IN", str(here))
    monkeypatch.setenv("DPAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPAR_ROOTS", json.dumps([str(tmp_path / "data"), str(tmp_path / "more")]))
    monkeypatch.chdir(tmp_path)
    return here


def load(*overrides: str) -> Settings:
    return load_page_settings("tiny", None, overrides)[0]


@pytest.mark.parametrize(
    "override",
    [
        *("runtime.home=/tmp/elsewhere", "runtime.home=.", " runtime.home =x", "runtime.launcher=slurm"),
        *('runtime.slurm.options=["--wrap=id"]', 'runtime.slurm={"options": ["--uid=0"]}', "runtime.slurm.partition=x"),
        *("runtime.tracking_uri=http://evil.example", "runtime.lpips_weights=/etc/passwd", 'runtime.roots=["/"]'),
        *('runtime.kubernetes={"image": "evil"}', 'runtime.kubernetes.claims={"x": "/"}', "runtime.nodes=99"),
        *("runtime.prefect_port=1", "runtime.mlflow_port=1", "runtime.gpus_per_node=8"),
    ],
)
def test_where_a_run_goes_is_not_for_the_page(here: Path, override: str) -> None:
    with pytest.raises(InputError, match="is set in a run from Prefect's page") as refused:
        load("dataset.root=images", override)
    assert "\n" not in str(refused.value)


def test_the_message_says_what_may_be_set(here: Path) -> None:
    with pytest.raises(
        InputError, match=r"runtime.home is set in a run from Prefect's page, expected none but device, "
    ):
        load("dataset.root=images", "runtime.home=/tmp/elsewhere")


@pytest.mark.parametrize("name", RuntimeConfig.model_fields)
def test_each_runtime_setting_is_either_settable_or_named_above(name: str) -> None:
    own = {"home", "launcher", "nodes", "gpus_per_node", "tracking_uri", "roots", "prefect_port", "mlflow_port"}
    assert (name in SETTABLE) != (name in own | {"lpips_weights", "slurm", "kubernetes"})


def test_how_a_stage_computes_is_for_the_page(here: Path) -> None:
    overrides = ["dataset.root=images", "runtime.tracking=false", "runtime.processes=2", "runtime.device=cpu"]
    settings, runtime = load_page_settings("tiny", None, overrides)
    assert (runtime.tracking, runtime.processes, runtime.device) == (False, 2, "cpu")
    assert settings.dataset.root == here / "images"
    assert Path.cwd() == here  # relative paths start where `dpar up` was called


@pytest.mark.parametrize(
    "root", ["images", "./images", "{here}/images", "{here}/../data/x", "{here}/../more", "{here}/../home/dataset"]
)
def test_files_below_the_roots_may_be_read(here: Path, root: str) -> None:
    found = load(f"dataset.root={root.format(here=here)}").dataset.root
    assert found is not None
    assert found.resolve() == (here / root.format(here=here)).resolve()


@pytest.mark.parametrize(
    "path", ["/etc", "..", "{here}/../other", "link", "link/ssh", "images/../../other", "/", "{here}x"]
)
@pytest.mark.parametrize(
    "overrides",
    [
        ("dataset.root={}",),
        ("tokenizer.source=checkpoint", "tokenizer.checkpoint={}"),
        ("entropy_model.source=checkpoint", "entropy_model.checkpoint={}"),
        ("train.family=llamagen", "train.model=B", "train.source=checkpoint", "train.checkpoint={}"),
    ],
)
def test_files_elsewhere_are_not_read(here: Path, overrides: tuple[str, ...], path: str) -> None:
    with pytest.raises(
        InputError, match=r"expected a path below .* name more folders when you start `dpar up`, e.g. DPAR_ROOTS"
    ):
        load("dataset.root=images", *(each.format(path.format(here=here)) for each in overrides))


def test_a_folder_that_has_gone_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPAR_STARTED_IN", str(here / "gone"))
    with pytest.raises(InputError, match="where `dpar up` was called, cannot be entered"):
        load("dataset.root=images")
