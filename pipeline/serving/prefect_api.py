"""Requests to a Prefect server. Prefect itself is not imported: that takes seconds, and sets up this process's logging.

The requests are those of Prefect's documented REST API. Each has a time-out, and each can be repeated.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

_TIMEOUT_S = 5.0
_LONGEST = 10_000_000  # bytes of an answer


class PrefectApi:
    """A Prefect server's API.

    Args:
        url: Its URL, which ends with `/api`.
        auth: Its login `user:password`; None takes the one that Prefect's own client would send.

    Attributes:
        on_answer: Called when the server has accepted a request.
    """

    def __init__(self, url: str, auth: str | None = None) -> None:
        self.url = url
        self.on_answer: Callable[[], None] = lambda: None
        self._headers = {"content-type": "application/json", "accept": "application/json"} | _login(auth)

    def post(self, path: str, body: Any) -> Any:
        """Send a POST request; returns the answer's JSON, None if it is empty.

        Raises:
            OSError: The server does not answer, or refuses.
            ValueError: The answer is no JSON, or the URL is no URL.
        """
        return self._call(path, json.dumps(body).encode())

    def get(self, path: str) -> Any:
        """Send a GET request; returns the answer's JSON, None if there is nothing at this path.

        Raises:
            OSError: The server does not answer, or refuses.
            ValueError: The answer is no JSON, or the URL is no URL.
        """
        try:
            return self._call(path, None)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND:
                return None
            raise

    def _call(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read(_LONGEST)
        except urllib.error.HTTPError as error:
            with error:
                error.msg = " ".join(f"{error.msg} {error.read(200).decode(errors='replace')}".split())
                raise
        self.on_answer()
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ValueError(f"it answers {text[:60]!r}, which is no JSON: is this Prefect's API?") from error


def _login(auth: str | None) -> dict[str, str]:
    if secret := auth or os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"authorization": f"Bearer {key}"}
    return {}
