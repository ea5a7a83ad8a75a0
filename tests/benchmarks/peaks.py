"""Peak memory of a stage in a process of its own, over a tar of tiny images.

The process imports what its stage needs and nothing else, so that the peak is the stage's.
"""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conf.load import load_settings
from conf.runtime import RuntimeConfig
from pipeline.graph import STAGES

CLASS_SIZE = 1300  # images of a class in ImageNet
# glibc adapts its thresholds to what was freed, and threads share arenas by chance: peaks would jump by megabytes.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}


def tiny_images(path: Path, count: int) -> None:
    """A tar of class tars with PNGs of 16 x 16 pixels, CLASS_SIZE a class as in ImageNet."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as outer:
        for first in range(0, count, CLASS_SIZE):
            name, packed = f"n{first:08d}", io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as class_tar:
                for number in range(first, min(first + CLASS_SIZE, count)):
                    data = io.BytesIO()
                    Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(data, "PNG")
                    add(class_tar, f"{name}_{number}.JPEG", data)
            add(outer, f"{name}.tar", packed)


def add(archive: tarfile.TarFile, name: str, data: io.BytesIO) -> None:
    """Put bytes into an archive under a name."""
    member = tarfile.TarInfo(name)
    member.size = len(data.getbuffer())
    data.seek(0)
    archive.addfile(member, data)


def peak(stage: str, images: Path, home: Path, settings: Sequence[str]) -> int:
    """Most bytes that a process holds that runs a stage of the preset `tiny`, changed by `settings`.

    Artifacts lie in `home` by their stage; that of this one is written there.
    """
    command = [sys.executable, __file__, stage, str(images), str(home), *settings]
    done = subprocess.run(command, env=os.environ | STEADY, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def run_stage(name: str, images: Path, home: Path, changes: Sequence[str]) -> None:
    """What `peak` asks for, in a process of its own."""
    source = ("dataset.source=imagenet_tar", f"dataset.root={images}")
    settings, _ = load_settings("tiny", None, [*source, *changes])
    module, function = STAGES[name].entry
    inputs = {stage: home / stage for stage in STAGES[name].inputs} | {"images": images}
    stage = getattr(importlib.import_module(module), function)
    stage(getattr(settings, name), inputs, home / name, RuntimeConfig(device="cpu", threads=1))
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
