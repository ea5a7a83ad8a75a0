"""Checks of how processes meet: host name, Slurm, proxies, ports."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from urllib.request import getproxies_environment, proxy_bypass

from conf.runtime import RuntimeConfig
from pipeline.doctor.finding import Finding, blocker, ok, warning
from pipeline.processes import HOST, listener
from pipeline.servers import running

_PATIENCE_S = 3.0
_LOOPBACK = (HOST, "localhost")


def check_host_name(
    name: str, runtime: RuntimeConfig, resolve: Callable[[str], object] = socket.gethostbyname
) -> Finding:
    """Whether the machine's own name resolves, and fast. Processes of several machines meet under such names."""
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(resolve, name).result(_PATIENCE_S)
    except (OSError, Late):
        if runtime.launcher == "local" and runtime.nodes == 1:
            return ok("host name", f"{name} does not resolve, which only several machines need")
        return warning(
            "host name",
            f"{name} does not resolve: torchrun on several machines may wait for ever",
            f"add {name} with its address to /etc/hosts",
        )
    finally:
        pool.shutdown(wait=False)
    return ok("host name", f"{name} resolves")


def check_slurm(runtime: RuntimeConfig, which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """The commands of Slurm, if stages run as its jobs."""
    if runtime.launcher != "slurm":
        return
    missing = [name for name in ("sbatch", "squeue", "scancel") if which(name) is None]
    if missing:
        yield blocker("slurm", f"no command {', '.join(missing)}", "run on a login node, or set DPAR_LAUNCHER=local")
    else:
        yield ok("slurm", "sbatch, squeue and scancel; checks of devices are of this machine, not of the nodes")


def check_proxies() -> Finding:
    """Whether a proxy would catch requests to servers of this machine."""
    proxies = {name: value for name, value in getproxies_environment().items() if name in ("http", "all")}
    caught = [host for host in _LOOPBACK if proxies and not proxy_bypass(host)]
    if caught:
        return warning(
            "proxies",
            f"the proxy of {', '.join(f'{name}_proxy' for name in proxies)} catches {' and '.join(caught)}",
            f"set NO_PROXY={','.join(_LOOPBACK)}",
        )
    return ok("proxies", "none for this machine's servers")


def check_ports(
    runtime: RuntimeConfig, owner: Callable[[int], str | None] = listener, *, ours: bool | None = None
) -> Iterator[Finding]:
    """Whether the ports of `dpar up` are free, or in use by its servers."""
    up = running(runtime) is not None if ours is None else ours
    for name, port in (("prefect", runtime.prefect_port), ("mlflow", runtime.mlflow_port)):
        used_by = owner(port)
        if used_by is None:
            yield ok(f"port {port}", f"free for {name}")
        elif up:
            yield ok(f"port {port}", f"{name} of `dpar up`")
        else:
            yield warning(
                f"port {port}", f"in use by {used_by}", f"for `dpar up`, set DPAR_{name.upper()}_PORT={port + 100}"
            )
