import os
import stat
from pathlib import Path

import pytest

from conf.runtime import RuntimeConfig
from pipeline.processes import Service
from pipeline.servers import state
from stages.runtime.errors import InputError

AUTH = state.new_auth()


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(home=tmp_path / "home")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_may_enter_the_folder_also_one_made_before(runtime: RuntimeConfig) -> None:
    folder = state.server_folder(runtime)
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o777)
    assert state.private_folder(runtime) == folder
    assert mode(folder) == 0o700
    assert mode(state.empty_folder(runtime)) == 0o700
    assert mode(runtime.home) != 0o700  # artifacts may be shared


def test_what_the_servers_keep_is_for_the_owner_alone_whatever_the_umask(runtime: RuntimeConfig) -> None:
    before = os.umask(0)
    try:
        folder = state.private_folder(runtime)
        state.write_auth(runtime, AUTH)
        state.write_state(runtime, [Service("Prefect", 7, 1.0, "log")], None)
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in folder.iterdir()} == {"auth": 0o600, "state.json": 0o600}
    assert AUTH.partition(":")[2] not in (folder / "state.json").read_text()


def test_a_folder_of_another_user_is_refused(runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state.server_folder(runtime).mkdir(parents=True)
    state.server_folder(runtime).chmod(0o777)

    def denied(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", denied)
    with pytest.raises(InputError, match=r"belongs to another user.*DPAR_HOME"):
        state.private_folder(runtime)


def test_state_and_login_are_read_as_they_were_written(runtime: RuntimeConfig) -> None:
    state.private_folder(runtime)
    services, addresses = (Service("Prefect", 7, 1.5, "log"),), state.Addresses("http://a", "http://b")
    state.write_auth(runtime, AUTH)
    state.write_state(runtime, services, addresses)
    assert state.read_state(runtime) == state.State(services=services, addresses=addresses)
    assert state.read_auth(runtime) == AUTH
    state.remove_state(runtime)
    assert (state.read_state(runtime), state.read_auth(runtime)) == (state.State(), None)


def test_every_login_is_new() -> None:
    assert len({state.new_auth() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"", b"{", b"\xff\xfe", b"null", b"[]", b"7", b'{"services": 5}', b'{"services": [5], "addresses": null}'),
        b'{"services": [{"name": "Prefect"}], "addresses": null}',
        b'{"services": [{"name": "Prefect", "pid": "x", "created": 1, "log": "l"}], "addresses": null}',
        b'{"services": [], "addresses": {"prefect": 1}}',
    ],
)
def test_a_damaged_state_counts_as_none(runtime: RuntimeConfig, damaged: bytes) -> None:
    (state.private_folder(runtime) / "state.json").write_bytes(damaged)
    (state.private_folder(runtime) / "auth").write_bytes(damaged)
    assert state.read_state(runtime) == state.State()
    assert state.read_auth(runtime) is None


@pytest.mark.parametrize("pid", [-1, 0, 1, 2**40, -(2**70)])
def test_a_state_with_an_impossible_pid_ends_nothing(pid: int) -> None:
    service = Service("Prefect", pid, 1.0, "log")
    assert not service.alive
    service.end()
