import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).with_name("texture_crops.py")


def test_crops_do_not_overlap_and_keep_their_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(130, 200, 3), dtype=np.uint8)
    (tmp_path / "photographs").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photographs" / "bricks.png")
    Image.fromarray(pixels[:60]).save(tmp_path / "photographs" / "small.png")
    command = [sys.executable, SCRIPT, tmp_path / "photographs", tmp_path / "crops"]
    subprocess.run(command, check=True)
    assert [path.name for path in (tmp_path / "crops").iterdir()] == ["bricks"], "the small one has no crop"
    paths = list((tmp_path / "crops" / "bricks").iterdir())
    assert len(paths) == 6
    for path in paths:
        top, left = map(int, path.stem.split("-"))
        with Image.open(path) as crop:
            assert np.array_equal(np.asarray(crop), pixels[top : top + 64, left : left + 64])
