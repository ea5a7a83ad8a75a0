"""Models on a CUDA device against the CPU: logits, entropies, sampled tokens, patches, image tokens; and no waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from conf.section import TrainingConfig
from models.boundaries import GivenBoundaries, HeadBoundaries
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig, VQConfig
from models.dpar import DPAR
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.packed_patches import PackedPatches, pack_patches
from models.patching import PatchRule, patch_starts
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions
from models.vq import VQModel
from stages.training.data import GPTObjective, TokenBatch
from stages.training.optim import make_optimizer
from stages.training.patched import DPARObjective, PatchedBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES, TOKENS, CODES = 4, 64, 128
SHAPE = {"codebook_size": CODES, "num_tokens": TOKENS, "num_classes": 5}
RULE = PatchRule(0.5, 4, True, 8)
OPTIONS = SamplingOptions(cfg_scale=2.0)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Convolutions in float32 are not rounded to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def rough(model: nn.Module) -> nn.Module:
    """Weights far from their initial values, so that few tokens are likely and rounding changes none of them."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


@pytest.fixture
def dpar() -> DPAR:
    model = DPAR(DPARConfig(dim=128, num_heads=2, encoder_layers=1, global_layers=2, decoder_layers=1, **SHAPE))
    rough(model)
    return model


@pytest.fixture
def gpt() -> GPT:
    model = GPT(GPTConfig(dim=128, num_layers=2, num_heads=2, **SHAPE))
    rough(model)
    return model


def batch() -> tuple[Tensor, Tensor, PackedPatches, Tensor]:
    generator = torch.Generator().manual_seed(0)
    starts = patch_starts(RULE, torch.rand(IMAGES, TOKENS, generator=generator))
    tokens = torch.randint(CODES, (IMAGES, TOKENS), generator=generator)
    return tokens, torch.randint(5, (IMAGES,), generator=generator), pack_patches(starts), starts


def test_logits_are_those_of_the_cpu(dpar: DPAR, gpt: GPT) -> None:
    tokens, labels, patches, _ = batch()
    with torch.no_grad():
        expected = dpar(tokens, labels, patches), gpt(tokens, labels)
        dpar.to(CUDA), gpt.to(CUDA)
        here = tokens.to(CUDA), labels.to(CUDA)
        found = dpar(*here, patches.to(CUDA)), gpt(*here)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-4)


def test_entropies_are_those_of_the_cpu() -> None:
    model = GPT(GPTConfig(dim=128, num_layers=2, num_heads=2, **SHAPE | {"num_classes": None}))
    rough(model)
    tokens = batch()[0]
    with torch.no_grad():
        expected = model.entropy(tokens)
        found = model.to(CUDA).entropy(tokens.to(CUDA))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_sampled_tokens_are_those_of_the_cpu(dpar: DPAR, gpt: GPT) -> None:
    _, labels, _, starts = batch()
    uniforms = torch.rand(IMAGES, TOKENS, generator=torch.Generator().manual_seed(1))
    results = []
    for device in (CPU, CUDA):
        models = copy.deepcopy(dpar).to(device), copy.deepcopy(gpt).to(device)
        given = GivenBoundaries(starts.to(device))
        drawn = labels.to(device), uniforms.to(device), OPTIONS
        results.append([sample_dpar(models[0], *drawn, given)[0].cpu(), sample_gpt(models[1], *drawn).cpu()])
    for one, other in zip(*results, strict=True):
        assert (one == other).float().mean() > 0.98


@torch.inference_mode()
def test_patches_of_a_head_are_those_of_the_cpu(dpar: DPAR) -> None:
    head = EntropyHead(EntropyHeadConfig.of(dpar.config, "block"))
    rough(head)
    _, labels, _, _ = batch()
    uniforms = torch.rand(IMAGES, TOKENS, generator=torch.Generator().manual_seed(1))
    results = []
    for device in (CPU, CUDA):
        boundaries = HeadBoundaries(copy.deepcopy(head).to(device), RULE)
        model = copy.deepcopy(dpar).to(device)
        results.append(sample_dpar(model, labels.to(device), uniforms.to(device), OPTIONS, boundaries)[1].cpu())
    assert (results[0] == results[1]).float().mean() > 0.98


def test_the_threshold_is_rounded_to_float32_on_the_device_too() -> None:
    entropies = torch.full((1, 16), 7.8, device=CUDA)  # as float64 it is above 7.8
    assert patch_starts(PatchRule(7.8, None, False, 4), entropies).sum() == 2
    above = torch.nextafter(entropies, torch.tensor(100.0, device=CUDA))
    assert patch_starts(PatchRule(7.8, None, False, 4), above).all()


def test_tokens_of_images_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    config = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=CODES)
    model, pixels = VQModel(config).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model.encode(pixels)
        images = model.decode(expected)
        found = model.to(CUDA).encode(pixels.to(CUDA))
        torch.testing.assert_close(model.decode(expected.to(CUDA)).cpu(), images, atol=1e-3, rtol=1e-3)
    assert (found.cpu() == expected).float().mean() > 0.99


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("family", ["dpar", "gpt"])
def test_a_training_step_waits_for_nothing(family: str, dpar: DPAR, gpt: GPT) -> None:
    tokens, labels, patches, _ = batch()
    objective = (DPARObjective(dpar) if family == "dpar" else GPTObjective(gpt)).to(CUDA).train()
    data = PatchedBatch(tokens, labels, patches) if family == "dpar" else TokenBatch(tokens, labels)
    data = data.map(Tensor.pin_memory)
    optimizer = make_optimizer(objective, TrainingConfig(steps=10))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = objective(data)
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # tables and the optimiser's state are made in the first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
