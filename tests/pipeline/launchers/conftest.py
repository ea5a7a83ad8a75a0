"""One Slurm of two nodes for all tests, and the small project with stages that run as its jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from slurm_cluster import Cluster

from pipeline.launchers import slurm


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster; tests are skipped where none can be started."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster without a job, which a launcher of this process and of its children finds and often asks."""
    for name, value in {
        "SLURM_CONF": str(running_cluster.configuration),
        "DPAR_LAUNCHER": "slurm",
        "DPAR_THREADS": "1",
        "DPAR_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "POLL_S", 0.1)
    monkeypatch.setattr(slurm, "ASK_S", 0.5)
    yield running_cluster
    running_cluster.cancel_all()


@pytest.fixture
def jobs(make_tiny: Callable[[Path], Any], tmp_path: Path, cluster: Cluster) -> Any:
    """The small project, whose stages may run as several processes."""
    tiny = make_tiny(tmp_path)
    project = tmp_path / "project.py"
    project.write_text(re.sub("spmd=False", "spmd=True", project.read_text()))
    tiny.module.GRAPH.update({name: replace(stage, spmd=True) for name, stage in tiny.module.GRAPH.items()})
    return tiny
