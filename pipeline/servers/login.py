"""Open the pages of the servers in a browser, logged in.

A browser is started with the path of a file that only its owner may read. The file is a form with the login that sends
itself to a server (`guard.py`), so that the login is neither in a command line, nor in a URL, which browsers and logs
keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from conf.runtime import RuntimeConfig
from pipeline.servers.commands import tracks_elsewhere
from pipeline.servers.guard import LOGIN, LOGIN_FIELD, encoded
from pipeline.servers.state import Addresses, private_folder, read_auth, server_folder, write_private

_FILES = "login-*.html"
_PAGE = """<!doctype html><meta charset="utf-8"><title>dpar</title>
<form method="post" action="{url}"><input type="hidden" name="{name}" value="{login}"></form>
<script>document.forms[0].submit()</script>
"""


def open_pages(runtime: RuntimeConfig, addresses: Addresses, open_file: Callable[[str], bool] | None = None) -> bool:
    """Open the pages of running servers in a browser, logged in; returns whether there is a browser.

    Args:
        runtime: Runtime settings.
        addresses: URLs of the servers.
        open_file: Opens a `file://` URL in a browser; None is Python's `webbrowser.open`.
    """
    import webbrowser

    own = {name: url for name, url in asdict(addresses).items() if name != "mlflow" or not tracks_elsewhere(runtime)}
    opened = [(open_file or webbrowser.open)(_login_page(runtime, name, url).as_uri()) for name, url in own.items()]
    return all(opened)


def remove_login_pages(runtime: RuntimeConfig) -> None:
    """Remove the files that hold the login."""
    for path in server_folder(runtime).glob(_FILES):
        path.unlink(missing_ok=True)


def _login_page(runtime: RuntimeConfig, name: str, url: str) -> Path:
    path = private_folder(runtime) / _FILES.replace("*", name)
    write_private(path, _PAGE.format(url=url + LOGIN, name=LOGIN_FIELD, login=encoded(read_auth(runtime) or "")))
    return path
