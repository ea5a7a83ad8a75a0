"""`DPAR_*` variables: read like `--set`, refused where they would have no effect, and handed on to other processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conf.environment import INIT_METHOD, as_variables, from_variables
from conf.load import SettingsError, load_settings
from conf.runtime import KubernetesConfig, RuntimeConfig, SlurmConfig


@pytest.mark.parametrize(
    ("name", "text", "tree"),
    [
        ("DPAR_HOME", "/data/base #2", {"home": "/data/base #2"}),
        ("DPAR_HOME", "010", {"home": "010"}),
        ("DPAR_PROCESSES", "8", {"processes": 8}),
        ("DPAR_COMPILE", "false", {"compile": False}),
        ("DPAR_COMPILE", "null", {"compile": None}),
        ("DPAR_SLURM__PARTITION", "1e3", {"slurm": {"partition": "1e3"}}),
        ("DPAR_SLURM__OPTIONS", '["--exclusive"]', {"slurm": {"options": ["--exclusive"]}}),
        ("DPAR_KUBERNETES__CLAIMS", '{"data": "/data"}', {"kubernetes": {"claims": {"data": "/data"}}}),
        ("DPAR_HOME", "", {}),
        ("DPAR_PROCESSES", "", {}),
        ("DPAR_COMPILE", "", {}),
        ("DPAR_NOTHING", "", {}),
        (INIT_METHOD, "file:///a", {}),
        ("DPARTY", "1", {}),
        ("XDPAR_HOME", "1", {}),
    ],
)
def test_variables_are_read_like_overrides_and_empty_ones_are_unset(name: str, text: str, tree: object) -> None:
    assert from_variables({name: text, "PATH": "/bin"}) == tree


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPAR_HOM", "DPAR_HOME"),
        ("dpar_home", "DPAR_HOME"),
        ("DPAR__HOME", "DPAR_HOME"),
        ("DPAR_PROCESS", "DPAR_PROCESSES"),
        ("DPAR_SLURM_PARTITION", "DPAR_SLURM__PARTITION"),
        ("DPAR_TRACKING_URL", "DPAR_TRACKING_URI"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_close_one(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"variable {name} sets nothing, did you mean {meant}: "):
        from_variables({name: "1"})


def test_a_setting_of_a_stage_is_no_variable() -> None:
    with pytest.raises(ValueError, match=r"DPAR_QQQQ sets nothing, expected one of DPAR_HOME, .*: .* given by --set"):
        from_variables({"DPAR_QQQQ": "9"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("DPAR_PROCESSES", "0x2", "variable DPAR_PROCESSES: expected a whole number such as 10, found '0x2'"),
        ("DPAR_COMPILE", "1", "variable DPAR_COMPILE: expected true or false or null, found '1'"),
        ("DPAR_TRACKING", "off", "variable DPAR_TRACKING: expected true or false, found 'off'"),
        ("DPAR_SLURM__HOURS", "1:30", "DPAR_SLURM__HOURS: expected a decimal number"),
        ("DPAR_PROCESSES", "0", "runtime.processes: .*greater than 0, found 0"),
        ("DPAR_DEVICE", "tpu", "runtime.device: .*found 'tpu'"),
        ("DPAR_NOWHERE", "1", "variable DPAR_NOWHERE sets nothing"),
        ("DPAR_SEED", "9", "variable DPAR_SEED sets nothing"),
        ("DPAR_TRACKING_URI", "localhost:5000", r"runtime\.tracking_uri: .*expected an address"),
    ],
)
def test_a_wrong_variable_is_one_line_with_its_name(
    name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_an_override_wins_over_a_variable_field_by_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPAR_HOME", str(tmp_path))
    monkeypatch.setenv("DPAR_SLURM__PARTITION", "gpu")
    monkeypatch.setenv("DPAR_SLURM__HOURS", "3")
    runtime = load_settings(overrides=["runtime.slurm.hours=2"])[1]
    assert (runtime.home, runtime.slurm) == (tmp_path, SlurmConfig(partition="gpu", hours=2.0))


@pytest.mark.parametrize(
    "runtime",
    [
        RuntimeConfig(),
        RuntimeConfig(
            home=Path("/a 'b' \"c\" #?%"),
            compile=False,
            micro_batch=3,
            tracking=False,
            tracking_uri="http://there:5000",
            slurm=SlurmConfig(partition="null-ish", hours=0.5, options=("--exclusive", '--comment="a b"')),
            kubernetes=KubernetesConfig(claims={"data": Path("/data"), "a.b": Path("/x y")}),
        ),
    ],
)
def test_other_processes_get_the_same_settings(runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DPAR_")]:
        monkeypatch.delenv(name)
    for name, text in as_variables(runtime).items():
        monkeypatch.setenv(name, text)
    assert load_settings()[1] == runtime
