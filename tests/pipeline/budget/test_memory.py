"""Closed forms of memory against the bytes that the real modules save for the backward pass.

The modules run on fake CUDA tensors, which have shapes and types only, so that autocast and dropout are those of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor, nn

from conf.load import load_settings
from conf.section import TrainingConfig
from models.config import DPAR_SIZES, GPT_SIZES, DPARConfig, DPARSize, GPTConfig, GPTSize, VQConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.packed_patches import pack_patches
from models.vq import VQModel
from pipeline.budget import memory
from pipeline.budget.images import IMAGENET
from pipeline.budget.memory import forwards, host_memory, rows, trainings, transformer_training, vq_training
from pipeline.budget.shape import Shape, TokenShape, shape_of

SMALL = TokenShape(codebook_size=1024, num_tokens=64, num_classes=10)


def shape(tokens: TokenShape = SMALL, mean_length: float = 1.8) -> Shape:
    return Shape(images=1000, origin="", heldout=0, views=1, tokens=tokens, mean_length=mean_length, length_origin="")


Loss = Callable[[Any, int], Tensor]
"""Loss of a model on a batch of some size."""


@pytest.fixture
def saved_per_image(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module], Loss, str], int]:
    """A function that counts the bytes saved for each image of a batch; what does not depend on the batch drops out."""

    def saved(make: Callable[[], nn.Module], loss: Loss, batch: int, precision: str) -> int:
        with monkeypatch.context() as patch, fake_cuda(patch), CUDA:
            model = make()
            own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
            kept: dict[int, Any] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                kept[id(storage)] = storage
                return tensor

            autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16")
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                loss(model, batch)
            return sum(storage.nbytes() for name, storage in kept.items() if name not in own)

    def per_image(make: Callable[[], nn.Module], loss: Loss, precision: str) -> int:
        return saved(make, loss, 2, precision) - saved(make, loss, 1, precision)

    return per_image


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [replace(GPT_SIZES["B"], num_layers=2), GPTSize(dim=256, num_layers=3, num_heads=4)])
def test_training_of_a_transformer(size: GPTSize, precision: str, saved_per_image: Callable[..., int]) -> None:
    def loss(model: GPT, batch: int) -> Tensor:
        tokens = torch.zeros(batch, SMALL.num_tokens, dtype=torch.int64)
        return model.loss(tokens, tokens[:, 0])

    counted = saved_per_image(lambda: GPT(GPTConfig(**asdict(size), **asdict(SMALL))), loss, precision)
    planned = transformer_training(
        size, shape(), TrainingConfig(steps=1, precision=precision), conditional=True, devices=1
    )
    assert planned.image == pytest.approx(counted, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_of_dpar(precision: str, saved_per_image: Callable[..., int]) -> None:
    size = DPARSize(dim=256, num_heads=4, encoder_layers=1, global_layers=4, decoder_layers=2)
    starts = torch.zeros(1, SMALL.num_tokens, dtype=torch.bool)
    starts[0, torch.arange(32) * 2] = True  # patches of two tokens
    packed = {batch: pack_patches(starts.repeat(batch, 1)) for batch in (1, 2)}

    def loss(model: DPAR, batch: int) -> Tensor:
        patches = packed[batch].map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        tokens = torch.zeros(batch, SMALL.num_tokens, dtype=torch.int64)
        return model.loss(tokens, tokens[:, 0], patches)

    counted = saved_per_image(lambda: DPAR(DPARConfig(**asdict(size), **asdict(SMALL))), loss, precision)
    training = TrainingConfig(steps=1, precision=precision)
    planned = transformer_training(size, shape(mean_length=2.0), training, conditional=True, devices=1)
    assert planned.image == pytest.approx(counted, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_of_a_tokenizer(precision: str, saved_per_image: Callable[..., int]) -> None:
    def loss(model: VQModel, batch: int) -> Tensor:
        pixels = torch.zeros(batch, 3, 64, 64)
        reconstruction, quantized = model(pixels)
        return (reconstruction.float() - pixels).square().mean() + quantized.commitment_loss

    counted = saved_per_image(lambda: VQModel(VQConfig()).eval(), loss, precision)
    planned = vq_training(VQConfig(), 64, TrainingConfig(steps=1, precision=precision), 1)
    assert planned.image == pytest.approx(counted, rel=0.2)


def test_patches_save_rows_of_the_global_stack() -> None:
    size, tokens = DPAR_SIZES["L"], TokenShape(codebook_size=16384, num_tokens=256, num_classes=1000)
    assert rows(size.as_gpt(), shape(tokens)) == 24 * 256
    assert rows(size, shape(tokens, 1.8)) == pytest.approx(1 * 255 + 19 * (255 / 1.8 + 1) + 4 * 256)


@pytest.mark.parametrize(("change", "added"), [({}, 0), ({"ema_decay": 0.999}, 4), ({"precision": "bfloat16"}, 2)])
def test_the_state_of_a_training(change: dict[str, Any], added: int) -> None:
    size = GPT_SIZES["T"]
    training = TrainingConfig(steps=1, **{"precision": "float32"} | change)
    alone, both = (
        transformer_training(size, shape(), training, conditional=True, devices=devices) for devices in (1, 2)
    )
    parameters = sum(
        parameter.numel() for parameter in _meta(lambda: GPT(GPTConfig(**asdict(size), **asdict(SMALL)))).parameters()
    )
    assert alone.state == parameters * (16 + added)
    assert both.state == parameters * (20 + added), "DistributedDataParallel keeps the reduced gradients"
    assert (alone.share, both.share) == (256, 128)


def _meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_the_largest_micro_batch_that_fits() -> None:
    training = transformer_training(
        GPT_SIZES["B"], shape(), TrainingConfig(steps=1, global_batch_size=24), conditional=True, devices=1
    )
    assert training.micro_batches == [1, 2, 4, 8, 16, 24]
    assert training.largest(training.at(24)) == 24
    assert training.largest(training.at(24) - 1) == 16
    assert training.largest(training.at(1) - 1) == 0


def test_imported_models_are_not_trained() -> None:
    trained, _ = load_settings("demo", None, ["tokenizer.source=train"])
    imported, _ = load_settings(
        "demo", None, ["train.family=llamagen", "train.source=checkpoint", "train.checkpoint=x"]
    )
    found = [trainings(settings, shape_of(settings, *IMAGENET, ""), 1) for settings in (trained, imported)]
    assert [set(names) for names in found] == [{"tokenizer", "entropy_model", "train"}, {"entropy_model"}]
    foreign, _ = load_settings("demo", None, ["entropy_model.source=checkpoint", "entropy_model.checkpoint=x"])
    assert set(trainings(foreign, shape_of(foreign, *IMAGENET, ""), 1)) == {"train"}


def test_samples_are_decoded_in_parts() -> None:
    needed = [
        forwards(load_settings("imagenet256-b", None, [f"evaluate.batch_size={size}"])[0], shape())["evaluate"]
        for size in (8, 16, 64)
    ]
    assert needed[0] < needed[1] == needed[2]


def test_guidance_doubles_the_caches_and_processes_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_VQ_PASS", 0)  # decoding needs more than the caches of a small batch
    needed: dict[float, float] = {}
    for scale in (1.0, 2.0):
        settings, _ = load_settings("imagenet256-l", None, [f"sample.cfg_scale={scale}"])
        sizes = shape_of(settings, *IMAGENET, "")
        needed[scale] = forwards(settings, sizes)["sample"]
    keys_and_values = 2 * rows(settings.train.model, sizes) * 1024 * 2
    assert needed[2.0] - needed[1.0] == pytest.approx(settings.sample.batch_size * keys_and_values)
    one, four = (host_memory(settings, sizes, processes, cuda=True) for processes in (1, 4))
    assert four["train"] == pytest.approx(4 * one["train"])
    assert one["train"] > one["entropy_model"], "the patch index is in memory"


def test_images_are_decoded_in_parts_of_a_bounded_size() -> None:
    settings, _ = load_settings("imagenet256-l")
    many, _ = load_settings("imagenet256-l", None, ["evaluate.batch_size=512", "tokenize.batch_size=512"])
    few, more = (forwards(each, shape_of(each, *IMAGENET, "")) for each in (settings, many))
    assert few["evaluate"] == more["evaluate"]
    assert few["tokenize"] < more["tokenize"], "encoding takes whole batches"
