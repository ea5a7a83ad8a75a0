import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from conf.load import load_settings
from pipeline.cli import main as cli
from pipeline.cli.main import run_command
from pipeline.graph import STAGES
from pipeline.runner import Observer, run_stage


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Options for a run over four images in a new home."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), (60 * number, 0, 90)).save(tmp_path / "images" / name / f"{number}.png")
    return ["--set", f"dataset.root={tmp_path / 'images'}", "--set", f"runtime.home={tmp_path / 'home'}"]


def home(options: list[str]) -> list[str]:
    return options[2:]


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def states(capsys: pytest.CaptureFixture[str], options: list[str]) -> dict[str, str]:
    capsys.readouterr()
    assert run_command(["status", "--json", *options]) == 0
    return {stage["stage"]: stage["state"] for stage in answer(capsys)["stages"]}


def test_status_lists_every_stage_before_any_is_made(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["status", "--json", *options]) == 0
    stages = answer(capsys)["stages"]
    assert [stage["stage"] for stage in stages] == list(STAGES)
    assert {stage["state"] for stage in stages} == {"missing"}
    assert set(stages[0]) == {"stage", "state", "reason", "key", "path"}
    assert run_command(["status", *options]) == 0
    assert "not made yet" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_runs_once_and_is_cached_then(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["stage", "dataset", *options]) == 0
    assert "ran " in capsys.readouterr().out
    assert states(capsys, options) == dict.fromkeys(STAGES, "missing") | {"dataset": "cached"}
    assert run_command(["stage", "dataset", *options]) == 0
    assert "dataset        cached" in capsys.readouterr().out
    assert run_command(["stage", "dataset", "--force", "--json", *options]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["scores"]["num_images"] == 4
    assert "ran " in output.err


@pytest.mark.slow
def test_a_cached_run_answers_at_once_and_changes_nothing(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["stage", "dataset", *options]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert run_command(["run", "--until", "dataset", *options]) == 0
    text = capsys.readouterr().out
    assert "unchanged" in text
    assert "num_images" in text
    assert str(tmp_path / "home") in text
    assert run_command(["run", "--until", "dataset", "--json", *options]) == 0
    assert [stage["state"] for stage in answer(capsys)["stages"]] == ["cached"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "prefect" not in sys.modules


@pytest.mark.slow
def test_a_run_hands_the_choice_on_and_reports_what_was_made(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def run_pipeline(*given: Any, observer: Observer, **choice: Any) -> None:
        asked.append((given, choice))
        run_stage(STAGES["dataset"], *load_settings(*given), observer=observer)

    monkeypatch.setattr("pipeline.serving.local.run_pipeline", run_pipeline)
    half = [*options, "--set", "dataset.heldout_fraction=0.5"]  # the preset's share would hold out none of two images
    assert run_command(["run", "--preset", "tiny", "--until", "dataset", "--force", "dataset", *half]) == 0
    choice = {"from_stage": None, "until_stage": "dataset", "force": ["dataset"]}
    assert asked == [(("tiny", None, half[1::2]), choice)]
    text = capsys.readouterr().out
    assert text.index("ran ") < text.index("num_images")


def test_servers_that_do_not_run_can_be_stopped_and_have_missed_nothing(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["down", *home(options)]) == 0
    assert run_command(["mlflow", "sync", *home(options)]) == 0
    assert "runs sent: 0" in capsys.readouterr().out


def test_a_dry_run_makes_nothing(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["run", "--dry-run", "--json", *options]) == 0
    assert answer(capsys)["stages"][0]["state"] == "missing"
    assert run_command(["stage", "dataset", "--dry-run", *options]) == 0
    assert not list((tmp_path / "home").glob("dataset/*"))


@pytest.mark.slow
def test_why_names_the_setting_that_changed_and_accept_does_not_ignore_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [*options, "--set", "dataset.heldout_fraction=0.5"]
    assert run_command(["stage", "dataset", *options]) == 0
    capsys.readouterr()
    assert run_command(["why", "dataset", "--json", *changed]) == 0
    assert answer(capsys) == {"stage": "dataset", "changes": ["setting heldout_fraction: 0.0 -> 0.5"]}
    assert run_command(["why", "dataset", *options]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert states(capsys, changed)["dataset"] == "stale"
    assert run_command(["accept", "dataset", *changed]) == 2
    assert "setting heldout_fraction: 0.0 -> 0.5; run it" in capsys.readouterr().err


@pytest.mark.slow
def test_verify_finds_damage(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["stage", "dataset", *options]) == 0
    assert run_command(["verify", "--deep", *home(options)]) == 0
    (broken,) = (tmp_path / "home").glob("dataset/*/classes.json")
    broken.write_text(broken.read_text().replace("cat", "cow"))
    assert run_command(["verify", *home(options)]) == 0
    capsys.readouterr()
    assert run_command(["verify", "--deep", *home(options)]) == 1
    assert "classes.json" in capsys.readouterr().out


@pytest.mark.slow
def test_status_says_what_it_did_not_check(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["stage", "dataset", *options]) == 0
    capsys.readouterr()
    assert run_command(["status", *options]) == 0
    assert "files not checked; --deep checks them" in capsys.readouterr().out
    image = tmp_path / "images/cat/0.png"
    image.write_bytes(bytes(image.stat().st_size))  # overwritten in place: the folder does not change
    assert states(capsys, options)["dataset"] == "cached"
    assert run_command(["status", "--json", *options]) == 0
    assert answer(capsys)["folders_unchanged_since"] is not None
    assert run_command(["status", "--json", "--deep", *options]) == 0
    found = answer(capsys)
    assert found["folders_unchanged_since"] is None
    assert found["stages"][0]["state"] == "stale"
    assert found["stages"][0]["reason"] == "external files have changed"


@pytest.mark.slow
def test_a_damaged_input_is_one_line_and_code_1(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["stage", "dataset", *options]) == 0
    (index,) = (tmp_path / "home").glob("dataset/*/images.parquet")
    data = bytearray(index.read_bytes())
    data[100] ^= 1
    index.write_bytes(data)
    capsys.readouterr()
    tokenizer = ["--set", "tokenizer.source=train", "--set", "tokenizer.lpips_weight=0"]
    assert run_command(["stage", "tokenizer", *tokenizer, *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpar:")]
    assert line == (
        "dpar: tokenizer reads dataset, which is damaged: file images.parquet has other contents than when it was made "
        f"(in {index.parent}): make dataset again with `dpar run`"
    )
    assert not (tmp_path / "home" / "tokenizer").exists()
    assert states(capsys, options)["dataset"] == "stale"
    assert run_command(["stage", "dataset", *options]) == 0
    assert states(capsys, options)["dataset"] == "cached"
    assert (index.read_bytes() == data) is False


@pytest.mark.slow
def test_gc_lists_and_removes_when_told_to(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for _ in range(2):
        assert run_command(["stage", "dataset", "--force", *options]) == 0
    trash = tmp_path / "home" / ".trash"
    capsys.readouterr()
    assert run_command(["gc", *options]) == 0
    assert "(replaced by a forced run; preset imagenet128-b, imagenet256-b" in capsys.readouterr().out
    assert run_command(["gc", "--json", *options]) == 0
    listed = answer(capsys)
    (path,) = trash.iterdir()
    assert [entry["path"] for entry in listed["garbage"]] == [str(path)]
    assert listed["garbage"][0]["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert listed["removed"] == listed["left_alone"] == []
    assert run_command(["gc", "--yes", *options]) == 0
    assert list(trash.iterdir()) == []
    capsys.readouterr()
    assert run_command(["gc", *options]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_config_is_itself_a_preset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_command(["config", "--preset", "tiny", "--json"]) == 0
    tree = answer(capsys)
    assert run_command(["config", "--preset", "tiny"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == tree
    settings = load_settings("tiny")
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "copy.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text("")
    monkeypatch.setattr("conf.load.CONF_DIR", tmp_path)
    assert load_settings("copy") == settings


def test_presets_and_ablations_are_listed_with_their_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["presets", "--json"]) == 0
    found = answer(capsys)
    assert "demo" in found["preset"]
    assert run_command(["presets"]) == 0
    assert found["preset"]["demo"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["nosuch"], "No such command"),
        (["status", "--nosuch"], "No such option"),
        (["why"], "Missing argument"),
        (["status", "--preset", "nosuch"], "preset is 'nosuch', expected one of"),
        (["status", "--set", "train.seed=soon"], "train.seed"),
        (["stage", "nosuch"], "stage is 'nosuch', expected one of"),
        (["run", "--from", "train", "--until", "dataset"], "under these settings dataset does not depend on train"),
        (["status", "--set", "dataset.root=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_user_error_is_one_line_and_code_2(
    command: list[str], message: str, user_error: Callable[[list[str]], str]
) -> None:
    assert message in user_error(command)


def test_a_stage_without_its_inputs_says_what_to_run(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["stage", "tokenize", *options]) == 2
    assert "--until dataset`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_stage_passes_its_code_and_line_on(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no image")
    assert run_command(["stage", "dataset", *options]) == 2
    last = capsys.readouterr().err.splitlines()
    assert len(last) == 1
    assert last[0].startswith("dpar: stage dataset failed: ")


def test_a_traceback_is_printed_only_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("pipeline.cli.run.plan", fault)
    monkeypatch.setattr(cli.logger, "level", cli.logger.level)
    assert run_command(["status", "--preset", "demo"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run_command(["--debug", "status", "--preset", "demo"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_command(["status", "--preset", "demo", "--set", "runtime.log_level=debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_the_stage_and_says_how_to_go_on(options: list[str], tmp_path: Path) -> None:
    images = tmp_path / "images" / "cat"
    for number in range(3000):
        (images / f"copy-{number}.png").symlink_to(images / "0.png")
    command = [sys.executable, "-m", "pipeline.cli.main", "stage", "dataset", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores SIGINT in background jobs
    )
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert error == "dpar: interrupted; run again to resume\n"
    assert not list((tmp_path / "home").glob("dataset/*"))


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 0
    assert "status" in capsys.readouterr().out
