"""What is no Prefect server is said to be none, within seconds."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.processes import HOST
from pipeline.serving import prefect_api
from pipeline.serving.prefect_api import PrefectApi
from pipeline.serving.prefect_view import PrefectView
from pipeline.tracking.view import first_line


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    """URL of a server that gives the same answer to every request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/api"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (200, b"<html>a router's page</html>", 'it answers b"<html>a router\'s page</html>", which is no JSON'),
        (200, b"", "it answers None, expected Prefect's version"),
        (200, b'{"a": 1}', "it answers {'a': 1}, expected Prefect's version"),
        (200, b"\xff\xfe", "which is no JSON"),
        (302, b"", "HTTP Error 302"),
        (401, b'{"detail": "Unauthorized"}', 'HTTP Error 401: Unauthorized {"detail": "Unauthorized"}'),
        (404, b"", "it answers None, expected Prefect's version"),
        (500, b"<h1>oops</h1>", "HTTP Error 500: Internal Server Error <h1>oops</h1>"),
        (503, b"", "HTTP Error 503: Service Unavailable"),
    ],
)
def test_nonsense_is_named(code: int, body: bytes, said: str) -> None:
    with answering(code, body) as url, pytest.raises((OSError, ValueError)) as failed:
        PrefectView(url, "home").ping()
    assert said in first_line(failed.value)


@pytest.mark.parametrize("url", ["", "no address", "http://", "http://127.0.0.1:99999/api", "ftp://127.0.0.1/api"])
def test_what_is_no_url_is_an_error_that_the_sender_expects(url: str) -> None:
    with pytest.raises((OSError, ValueError)):
        PrefectView(url, "home").ping()


def test_a_server_that_never_answers_is_left_after_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_api, "_TIMEOUT_S", 0.2)
    with socket.create_server((HOST, 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            PrefectView(f"http://{HOST}:{silent.getsockname()[1]}/api", "home").ping()
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("variable", "secret", "header"),
    [("PREFECT_API_AUTH_STRING", "dpar:x", "Basic ZHBhcjp4"), ("PREFECT_API_KEY", "pnu_1", "Bearer pnu_1")],
)
def test_the_login_is_that_of_prefects_client(
    variable: str, secret: str, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, secret)
    with socket.create_server((HOST, 0)) as server:
        heard: list[bytes] = []

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(10_000))
                body = json.dumps("3.8.8").encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        assert PrefectApi(f"http://{HOST}:{server.getsockname()[1]}/api").get("/admin/version") == "3.8.8"
        thread.join()
    assert f"authorization: {header}".lower() in heard[0].decode().lower()
