"""Cut texture photographs into an image folder: a second set of packaged images, see `make textures`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

SIDE = 64


def cut(photograph: Path, folder: Path) -> None:
    """Write the crops of a photograph that do not overlap; smaller photographs have none."""
    with Image.open(photograph) as opened:
        picture = opened.convert("RGB")
    for top in range(0, picture.height - SIDE + 1, SIDE):
        for left in range(0, picture.width - SIDE + 1, SIDE):
            folder.mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, left + SIDE, top + SIDE)).save(folder / f"{top:04d}-{left:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut photographs into 64 px crops, one class a photograph.")
    parser.add_argument("photographs", type=Path, help="folder of PNG files")
    parser.add_argument("output", type=Path, help="image folder to write")
    arguments = parser.parse_args()
    for path in sorted(arguments.photographs.glob("*.png")):
        cut(path, arguments.output / path.stem)


if __name__ == "__main__":
    main()
