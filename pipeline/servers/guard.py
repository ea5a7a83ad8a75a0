"""Refuses requests to a server that do not come from its owner: a middleware around the applications of both servers.

A server on loopback is reached by more than its owner: by every page in the owner's browser, by a page whose host name
was pointed at 127.0.0.1 (DNS rebinding), and by other users of the machine. A request must therefore name this machine
as its host, and must not come from a page of another origin. Where the application has no login of its own, the guard
asks for one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import fcntl
import hmac
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from pipeline.processes import open_private

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOGIN, LOGIN_FIELD, HEALTH = "/dpar-login", "login", "/health"
LOCK_VARIABLE, AUTH_VARIABLE = "DPAR_SERVER_LOCK", "DPAR_SERVER_AUTH"
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
_LOCK_POLL_S = 0.05
_POLICY_VIOLATION = 1008  # code of a refused websocket
_MOST_LOGIN_BYTES = 1000
_LOGIN_PAGE = """<!doctype html><meta charset="utf-8"><title>dpar</title><script>
const login = "{login}";
{script}
location.replace("/");
</script>
"""


class Refusal(NamedTuple):
    """Why a request is refused."""

    status: HTTPStatus
    reason: str


class Guard:
    """An ASGI application that passes on the requests of its owner only.

    Args:
        app: The application.
        lock: File that is locked while the application starts: two that create one database break it.
        auth: The login `user:password`.
        asks: Whether to ask for it by HTTP Basic authentication; else the application itself asks.
        login_script: JavaScript that makes a browser remember the login, whose base64 is in `login`.
    """

    def __init__(self, app: App, *, lock: Path, auth: str, asks: bool, login_script: str) -> None:
        self._app, self._lock, self._auth, self._asks = app, lock, auth, asks
        self._login_script = login_script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request or refuse it."""
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await _refuse(scope, send, refusal)
        elif _is_login(scope):
            await self._log_in(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the start and the end of the server, and hold the lock from before the start to its answer."""
        with open(self._lock, "ab", opener=open_private) as lock:
            while not _try_lock(lock.fileno()):
                await asyncio.sleep(_LOCK_POLL_S)  # signals must still end this process

            async def unlock_and_send(message: Message) -> None:
                fcntl.flock(lock, fcntl.LOCK_UN)
                await send(message)

            await self._app(scope, receive, unlock_and_send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Why a request is refused; None if it is not."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host = headers.get("host", [])
        if len(host) != 1 or not _HOST.fullmatch(host[0]):
            return Refusal(HTTPStatus.FORBIDDEN, "the host is not this machine: use http://127.0.0.1")
        if _is_login(scope):
            return None  # it has the login itself, and may come from a file
        if _comes_from_elsewhere(headers, host[0], scope):
            return Refusal(HTTPStatus.FORBIDDEN, "the request comes from a page of another origin")
        if self._asks and scope["path"] != HEALTH and not _has_login(headers, self._auth):
            return Refusal(HTTPStatus.UNAUTHORIZED, "log in with what `dpar up` printed")
        return None

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a form that has the login with a page that makes the browser remember it.

        The login is neither in the URL, which browsers keep, nor in the page for whoever does not know it.
        """
        form = parse_qs((await _body(receive)).decode("latin-1"))
        expected = encoded(self._auth)
        if not hmac.compare_digest("".join(form.get(LOGIN_FIELD, [])).encode(), expected.encode()):
            await _refuse(scope, send, Refusal(HTTPStatus.FORBIDDEN, "this login is an old one: run `dpar up --open`"))
            return
        page = _LOGIN_PAGE.replace("{login}", expected).replace("{script}", self._login_script)
        await _answer(send, HTTPStatus.OK, page.encode(), (b"content-type", b"text/html; charset=utf-8"))


def guard(app: App, *, asks: bool, login_script: str) -> Guard:
    """A guard with the lock and the login that this process was started with.

    The login is removed from the environment, so that no child inherits it.
    """
    lock, auth = Path(os.environ[LOCK_VARIABLE]), os.environ.pop(AUTH_VARIABLE)
    return Guard(app, lock=lock, auth=auth, asks=asks, login_script=login_script)


def encoded(auth: str) -> str:
    """Base64 of a login `user:password`."""
    return base64.b64encode(auth.encode()).decode()


def basic(auth: str) -> str:
    """Value of the header `Authorization` for a login `user:password`."""
    return f"Basic {encoded(auth)}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file. The kernel releases it when this process dies."""
    with open(path, "ab", opener=open_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_login(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] == LOGIN and scope["method"] == "POST"


async def _body(receive: Receive) -> bytes:
    """The body of a request, as far as a login may reach."""
    body, more = b"", True
    while more and len(body) <= _MOST_LOGIN_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body[:_MOST_LOGIN_BYTES]


def _comes_from_elsewhere(headers: dict[str, list[str]], host: str, scope: Scope) -> bool:
    """Whether a page of another origin made a browser send the request, to which it adds a remembered login.

    Such a page may lead a person here: a link that opens a whole page is no danger.
    """
    if any(origin != f"http://{host}" for origin in headers.get("origin", [])):
        return True
    site = headers.get("sec-fetch-site", ["none"])  # only browsers send it; "none" is the address bar
    is_link = (
        scope.get("method") == "GET"
        and headers.get("sec-fetch-mode") == ["navigate"]
        and headers.get("sec-fetch-dest") == ["document"]
    )
    return site not in (["none"], ["same-origin"]) and not is_link


def _has_login(headers: dict[str, list[str]], auth: str) -> bool:
    given = headers.get("authorization", [])
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    try:
        decoded = base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(decoded, auth.encode())


async def _refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.reason})
        return
    challenge = [(b"www-authenticate", b'Basic realm="dpar"')] if refusal.status == HTTPStatus.UNAUTHORIZED else []
    text = f"dpar: {refusal.reason}\n".encode()
    await _answer(send, refusal.status, text, (b"content-type", b"text/plain; charset=utf-8"), *challenge)


async def _answer(send: Send, status: HTTPStatus, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    known = [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": int(status), "headers": [*known, *headers]})
    await send({"type": "http.response.body", "body": body})
