"""The guard with requests as browsers and other programs send them, around an application that answers everything."""

import asyncio
import base64
import fcntl
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from pipeline.servers.guard import (
    AUTH_VARIABLE,
    LOCK_VARIABLE,
    LOGIN,
    Guard,
    Message,
    Receive,
    Scope,
    Send,
    basic,
    encoded,
    guard,
)

AUTH = "dpar:secret"
PASSED = HTTPStatus.IM_A_TEAPOT  # of the application
HERE = "http://127.0.0.1:4200"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": int(PASSED), "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(
    *headers: tuple[str, str],
    asks: bool = False,
    method: str = "GET",
    path: str = "/api/flows",
    host: str | None = "127.0.0.1:4200",
    kind: str = "http",
    body: str = "",
) -> list[Message]:
    """What the guard sends in answer to a request."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": body.encode(), "more_body": False}

    named = [*headers, *([("Host", host)] if host is not None else [])]
    scope: Scope = {"type": kind, "path": path, "headers": [(k.lower().encode(), v.encode()) for k, v in named]}
    if kind == "http":
        scope["method"] = method
    asyncio.run(Guard(application, lock=Path("unused"), auth=AUTH, asks=asks, login_script="")(scope, receive, send))
    return sent


def status(*headers: tuple[str, str], **request: Any) -> int:
    return int(ask(*headers, **request)[0]["status"])


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200", "127.0.0.1", "localhost", "localhost:1"])
def test_this_machine_may_be_named_in_each_way(host: str) -> None:
    assert status(host=host) == PASSED


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:4200", "127.0.0.1.evil.example:4200", "localhost.evil.example", "0.0.0.0:4200"),
        *(
            "evil-127.0.0.1:4200",
            "127.0.0.1:4200:80",
            "127.0.0.1:4200@evil.example",
            "127.0.0.1:port",
            "192.168.0.7:4200",
        ),
        *("LOCALHOST.:4200", "127.0.0.1\n", " 127.0.0.1", "", "2130706433:4200"),
        None,
    ],
)
@pytest.mark.parametrize("path", ["/api/flows", "/api/health", "/health", "/", LOGIN])
def test_every_other_host_is_refused_on_every_path(host: str | None, path: str) -> None:
    assert status(host=host, path=path) == HTTPStatus.FORBIDDEN


def test_a_second_host_does_not_hide_the_first() -> None:
    assert status(("Host", "evil.example")) == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1:8000",
        "http://127.0.0.1",
        "https://127.0.0.1:4200",
        "file://",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PATCH", "PUT", "DELETE"])
def test_a_page_of_another_origin_is_refused_whatever_it_sends(origin: str, method: str) -> None:
    asked = ask(("Origin", origin), ("Authorization", basic(AUTH)), ("Content-Type", "text/plain"), method=method)
    assert asked[0]["status"] == HTTPStatus.FORBIDDEN
    assert not any(name.startswith(b"access-control") for name, _ in asked[0]["headers"])


def test_our_own_page_is_answered() -> None:
    own = [("Origin", HERE), ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Mode", "cors"), ("Sec-Fetch-Dest", "empty")]
    assert status(*own, method="POST") == PASSED
    assert status(*own[1:]) == PASSED


def fetched(site: str, mode: str, destination: str) -> list[tuple[str, str]]:
    return [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", destination)]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(
    ("mode", "destination"), [("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe"), ("cors", "empty")]
)
def test_another_page_can_neither_include_nor_frame_ours(site: str, mode: str, destination: str) -> None:
    """A browser sends no Origin with these requests, but its remembered login."""
    headers = [("Authorization", basic(AUTH)), *fetched(site, mode, destination)]
    assert status(*headers, asks=True) == HTTPStatus.FORBIDDEN


def test_a_link_on_another_page_opens_ours_but_a_form_does_not() -> None:
    link = fetched("cross-site", "navigate", "document")
    assert status(*link) == PASSED
    assert status(*link, method="POST") == HTTPStatus.FORBIDDEN
    assert status(*fetched("none", "navigate", "document")) == PASSED  # the address bar


@pytest.mark.parametrize(
    "given",
    [
        *(None, "", "Basic", "Basic !", basic("dpar:"), basic("dpar:secrets"), basic("secret"), "Bearer secret"),
        *(f"Basic {base64.b64encode(AUTH.encode()).decode()}=x", "Basic ", "Digest username=dpar", "Basic \xff"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_without_the_login_a_server_that_has_none_of_its_own_answers_nothing(given: str | None, method: str) -> None:
    for path in ("/", "/ajax-api/2.0/mlflow/experiments/search", "/get-artifact", "/health/x", "/version", "//health"):
        headers = [] if given is None else [("Authorization", given)]
        (start, _) = ask(*headers, asks=True, method=method, path=path)
        assert start["status"] == HTTPStatus.UNAUTHORIZED
        assert (b"www-authenticate", b'Basic realm="dpar"') in start["headers"]


def test_with_the_login_it_answers() -> None:
    assert status(("Authorization", basic(AUTH)), asks=True) == PASSED
    assert status(("Authorization", basic(AUTH).replace("Basic", "basic")), asks=True) == PASSED
    assert status(path="/health", asks=True) == PASSED  # tells nothing


def test_websockets_are_guarded_too() -> None:
    assert ask(kind="websocket")[0]["type"] == "websocket.accept"
    for refused in (
        ask(kind="websocket", host="evil.example"),
        ask(("Origin", "http://evil.example"), kind="websocket"),
        ask(("Origin", "null"), kind="websocket"),
        ask(kind="websocket", asks=True),
    ):
        assert refused[0]["type"] == "websocket.close"


FROM_A_FILE = [("Origin", "null"), *fetched("cross-site", "navigate", "document")]


@pytest.mark.parametrize("asks", [True, False])
def test_a_form_that_has_the_login_makes_the_browser_remember_it(asks: bool) -> None:
    form = urlencode({"login": encoded(AUTH)})
    start, page = ask(*FROM_A_FILE, method="POST", path=LOGIN, asks=asks, body=form)
    assert start["status"] == HTTPStatus.OK
    assert (b"cache-control", b"no-store") in start["headers"]
    assert encoded(AUTH).encode() in page["body"]


@pytest.mark.parametrize(
    "form", ["", "login=", f"login={encoded('dpar:other')}", "login=</script>", "x" * 2000, "login=a&login=b", "\xff"]
)
def test_a_form_that_has_another_login_learns_nothing(form: str) -> None:
    """Of another origin it could also log a person in as somebody else."""
    start, page = ask(*FROM_A_FILE, method="POST", path=LOGIN, body=form)
    assert start["status"] == HTTPStatus.FORBIDDEN
    assert encoded(AUTH).encode() not in page["body"]


def test_the_form_is_refused_through_a_foreign_host() -> None:
    assert status(method="POST", path=LOGIN, host="evil.example", body=urlencode({"login": encoded(AUTH)})) == 403


def test_without_the_form_the_path_of_the_login_is_like_any_other() -> None:
    assert status(path=LOGIN) == PASSED
    assert status(path=LOGIN, asks=True) == HTTPStatus.UNAUTHORIZED


def test_the_login_leaves_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(AUTH_VARIABLE, AUTH)
    monkeypatch.setenv(LOCK_VARIABLE, str(tmp_path / "lock"))
    guard(application, asks=True, login_script="")
    assert AUTH_VARIABLE not in os.environ


def test_of_two_applications_the_second_starts_when_the_first_has_started(tmp_path: Path) -> None:
    """Their starts would otherwise create one database at the same time."""
    events: list[str] = []

    def slow(name: str) -> Any:
        async def start(scope: Scope, receive: Receive, send: Send) -> None:
            events.append(f"{name} starts")
            await asyncio.sleep(0.1)
            events.append(f"{name} has started")
            await send({"type": "lifespan.startup.complete"})
            await asyncio.sleep(0.2)  # it serves
            await send({"type": "lifespan.shutdown.complete"})

        return start

    async def nothing(message: Message) -> None: ...

    async def both() -> None:
        lock = tmp_path / "lock"
        guards = [Guard(slow(name), lock=lock, auth=AUTH, asks=False, login_script="") for name in ("first", "second")]
        await asyncio.gather(*(each({"type": "lifespan"}, nothing, nothing) for each in guards))  # type: ignore[arg-type]

    asyncio.run(both())
    assert events == ["first starts", "first has started", "second starts", "second has started"]
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free
