"""The stages that read images: does decoding keep up with the encoder, and does memory stay flat?

Throughput: the inner loop of `tokenize`, from files to tokens, against the encoder on tensors that are ready; the same
batches, in turns, in one process. One view an image, so that there is most to decode. VQ-16 at 256 px sees JPEGs of
ImageNet's usual size, the demo's tokenizer at 64 px its emoji. Memory: the peaks of whole stages over N and 10 N tiny
images of a tar, each in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from peaks import peak, tiny_images
from PIL import Image
from report import report
from timing import interleaved

from conf.dataset import DatasetConfig
from conf.load import load_settings
from conf.runtime import RuntimeConfig
from conf.tokenize import TokenizeConfig
from models.config import VQConfig
from models.vq import VQModel
from pipeline.bench.gates import Figures, Gate, gate
from stages.dataset import dataset
from stages.images.sources import image_root
from stages.images.tensors import pixels_to_float
from stages.runtime.distributed import World
from stages.runtime.progress import Progress
from stages.stores.image_index import ImageIndex
from stages.tokenize import Encoder, ViewReader, batches
from stages.weights.own import save_vq

THROUGHPUT_BOUND = 0.9
BYTES_BOUND = 200.0
FACTOR = 10
TINY = VQConfig(channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64)
STAGES = ("dataset", "tokenize")
SETTINGS = (
    *("tokenize.image_size=16", "tokenize.views=center"),
    *("tokenize.batch_size=64", "tokenize.chunk_rows=1024"),
)
Rows = dict[str, float]


def throughput(model: VQModel, index: ImageIndex, root: Path, config: TokenizeConfig, rounds: int) -> Rows:
    """Images a second of tokenize and of its encoder alone."""
    cuda = torch.cuda.is_available()
    world = World(rank=0, size=1, device=torch.device("cuda" if cuda else "cpu"))
    model = model.to(world.device).eval()
    reader, encoder = ViewReader(index, root, config), Encoder(model, config, 1, world)
    count = len(index)
    with tempfile.TemporaryDirectory() as folder:
        progress = Progress(Path(folder), "images", count, enabled=False)

        def from_files() -> None:
            with reader.ahead(range(count)) as pictures:
                encoder.tokens(pictures, progress)

        ready = [
            pixels_to_float(batch, world.device)
            for batch in batches(map(reader.views, range(count)), config.batch_size)
        ]

        @torch.inference_mode()
        def from_tensors() -> None:
            for pixels in ready:
                model.encode(pixels).cpu()

        seconds = interleaved({"encoder": from_tensors, "tokenize": from_files}, rounds)
        decoding = interleaved({"decode": lambda: [reader.views(image) for image in range(count)]}, rounds)["decode"]
    return {
        "images": count,
        "bytes an image": float(index.sizes.mean()),
        "image/s, encoder alone": count / seconds["encoder"],
        "image/s, tokenize": count / seconds["tokenize"],
        "image/s, decoding on one thread": count / decoding,
        "tokenize / encoder": seconds["encoder"] / seconds["tokenize"],
    }


def vq16(folder: Path, rounds: int, images: int, batch_size: int, pixels: int) -> Rows:
    """VQ-16 on JPEGs of 500 x 375."""
    (folder / "jpegs" / "class").mkdir(parents=True)
    for number in range(images):
        picture(number).save(folder / "jpegs" / "class" / f"{number:04d}.JPEG", quality=92)
    config = DatasetConfig(root=folder / "jpegs")
    dataset(config, {"images": image_root(config)}, folder / "jpeg_index", RuntimeConfig())
    torch.manual_seed(0)
    settings = TokenizeConfig(image_size=pixels, views="center", batch_size=batch_size)
    index = ImageIndex.open(folder / "jpeg_index")
    return throughput(VQModel(VQConfig()), index, folder / "jpegs", settings, rounds)


def demo(folder: Path, rounds: int, images: int) -> Rows:
    """The demo's tokenizer at 64 px on its emoji."""
    settings, _ = load_settings("demo")
    source = image_root(settings.dataset)
    (folder / "emoji" / "class").mkdir(parents=True)
    for path in sorted(source.glob("*.png"))[:images]:
        (folder / "emoji" / "class" / path.name).write_bytes(path.read_bytes())
    config = DatasetConfig(root=folder / "emoji")
    dataset(config, {"images": image_root(config)}, folder / "emoji_index", RuntimeConfig())
    index = ImageIndex.open(folder / "emoji_index")
    return throughput(VQModel(settings.tokenizer.model), index, folder / "emoji", settings.tokenize, rounds)


def picture(seed: int) -> Image.Image:
    """500 x 375 pixels of structure at all scales, about 100 kB as JPEG: what a photograph takes."""
    generator = np.random.default_rng(seed)
    pixels = np.full((375, 500, 3), 127.0)
    for cells, strength in ((3, 60), (12, 35), (48, 20), (160, 12)):
        coarse = Image.fromarray(generator.integers(0, 256, (cells * 3, cells * 4, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) - 127.5) * strength / 127.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def memory(folder: Path, few: int) -> dict[str, Rows]:
    """How much the peak memory of each stage grows from `few` to FACTOR * few images."""
    counts = (few, FACTOR * few)
    torch.manual_seed(0)
    model = VQModel(TINY)
    for count in counts:
        tiny_images(folder / f"{count}.tar", count)
        save_vq(folder / str(count) / "tokenizer", model)
    found = {}
    for stage in STAGES:
        first, last = (peak(stage, folder / f"{count}.tar", folder / str(count), SETTINGS) for count in counts)
        found[stage] = {
            f"peak memory at {few} images, MB": first / 1e6,
            f"peak memory at {FACTOR * few} images, MB": last / 1e6,
            "bytes an added image": (last - first) / ((FACTOR - 1) * few),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Throughput and memory of the stages that read images.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=12, help="images that VQ-16 sees; more on a GPU")
    parser.add_argument("--batch-size", type=int, default=4, help="of VQ-16; larger on a GPU")
    parser.add_argument("--pixels", type=int, default=256, help="side of the images that VQ-16 sees")
    parser.add_argument("--demo-images", type=int, default=192, help="images that the demo's tokenizer sees")
    # The default is more than what any block of work holds.
    parser.add_argument("--few", type=int, default=5000, help="images of the smaller data set of the two for memory")
    parser.add_argument("--only", choices=["vq16", "demo", "memory"])
    options = parser.parse_args()
    figures: Figures = {}
    gates: list[Gate] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only in (None, "demo"):
            figures["demo, 64 px"] = demo(folder, options.rounds, options.demo_images)
        if options.only in (None, "vq16"):
            pixels = options.pixels
            found = vq16(folder, options.rounds, options.images, options.batch_size, pixels)
            figures[f"VQ-16, {pixels} px"], ratio = found, found["tokenize / encoder"]
            gates.append(gate(f"VQ-16 at {pixels} px: tokenize / encoder", ratio, ">", THROUGHPUT_BOUND))
        if options.only in (None, "memory"):
            for stage, found in memory(folder, options.few).items():
                figures[stage] = found
                gates.append(gate(f"{stage}: bytes an added image", found["bytes an added image"], "<", BYTES_BOUND))
    report(gates, figures)


if __name__ == "__main__":
    main()
