"""`dpar` as it is installed, in a folder full of files that it would run if the current folder counted as code.

It also runs behind a proxy at which nobody answers: traffic of this machine must not go there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *("prefect", "mlflow", "torch", "numpy", "json", "asyncio", "uvicorn", "psutil", "sitecustomize", "usercustomize"),
    *("gunicorn.conf", "conf/__init__", "pipeline/__init__", "stages/__init__", "models/__init__", "conf/runtime"),
)
_MODULE = "open({ran!r}, 'a').write(__file__ + '\\n')\n"
_NOWHERE = "http://127.0.0.1:9"
# Prefect reads `.env` and `prefect.toml`; a logging configuration calls what it names.
_LOGGING = "version: 1\nhandlers:\n  evil:\n    (): subprocess.Popen\n    args: [touch, {ran!r}]\n"
_DPAR = "import sys\nfrom pipeline.cli.main import main\nsys.exit(main())\n"


def make(folder: Path, ran: Path) -> Path:
    """Fill a folder; a file that is run appends its name to `ran`."""
    for name in MODULES:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_MODULE.format(ran=str(ran)))
    (folder / "logging.yml").write_text(_LOGGING.format(ran=str(ran)))
    (folder / ".env").write_text(f"PREFECT_LOGGING_SETTINGS_PATH={folder / 'logging.yml'}\n")
    (folder / "prefect.toml").write_text(f'[logging]\nconfig_path = "{folder / "logging.yml"}"\n')
    return folder


def start_dpar(*arguments: str, folder: Path, bin_folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start `dpar` as the installed script runs: modules come from the script's folder, not from the current one."""
    script = bin_folder / "dpar"
    script.write_text(_DPAR)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment |= dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), _NOWHERE)
    environment |= {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def dpar(*arguments: str, folder: Path, bin_folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `dpar` to its end."""
    with start_dpar(*arguments, folder=folder, bin_folder=bin_folder, **variables) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
