import base64
import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from conf.runtime import RuntimeConfig
from pipeline.servers import login, state

ADDRESSES = state.Addresses("http://127.0.0.1:4200", "http://127.0.0.1:5000")


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    runtime = RuntimeConfig(home=tmp_path / "home")
    state.private_folder(runtime)
    return runtime


def test_the_browser_is_given_files_that_only_the_owner_can_read(runtime: RuntimeConfig) -> None:
    auth, opened = state.new_auth(), list[str]()
    state.write_auth(runtime, auth)

    def browser(url: str) -> bool:
        opened.append(url)
        return True

    assert login.open_pages(runtime, ADDRESSES, browser)
    assert len(opened) == 2
    for url, address in zip(opened, ("http://127.0.0.1:4200", "http://127.0.0.1:5000"), strict=True):
        path = Path(unquote(urlparse(url).path))
        assert auth.partition(":")[2] not in url  # it is in the command line of the browser
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found = re.search(r'action="(.*?)".* name="login" value="(.*?)"', path.read_text())
        assert found is not None
        assert found[1] == f"{address}/dpar-login"
        assert base64.b64decode(found[2]).decode() == auth
    login.remove_login_pages(runtime)
    assert not any(Path(unquote(urlparse(url).path)).exists() for url in opened)


def test_the_login_is_not_given_to_an_mlflow_of_others(runtime: RuntimeConfig) -> None:
    elsewhere, opened = runtime.model_copy(update={"tracking_uri": "http://mlflow.example"}), list[str]()
    login.open_pages(elsewhere, ADDRESSES, lambda url: bool(opened.append(url)))  # type: ignore[func-returns-value]
    assert [Path(url).name for url in opened] == ["login-prefect.html"]


def test_without_a_browser_it_says_so(runtime: RuntimeConfig) -> None:
    assert not login.open_pages(runtime, ADDRESSES, lambda url: False)
