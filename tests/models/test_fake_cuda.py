"""Training and sampling steps of every model on a CUDA device that is simulated: no mixed devices, no host waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import jaxtyping
import pytest
import torch
from fake_cuda import CUDA, HostWaits, backward, fake_cuda
from torch import Tensor, nn

from conf.section import TrainingConfig
from conf.tokenizer import TokenizerConfig
from models import attention
from models.boundaries import Boundaries, EntropyBoundaries, GivenBoundaries, HeadBoundaries, OwnEntropyBoundaries
from models.canvas import Canvas
from models.config import DPARConfig, EntropyHeadConfig, GPTConfig, VQConfig
from models.discriminator import PatchDiscriminator
from models.dpar import DPAR
from models.dpar_steps import DPARSteps
from models.entropy_head import EntropyHead
from models.gpt import GPT
from models.gpt_steps import GPTSteps
from models.lpips import LPIPS
from models.packed_patches import PackedPatches, pack_patches
from models.patching import PatchRule
from models.sampling import Sampling
from models.token_sampling import SamplingOptions, sample_token
from models.vq import VQModel
from stages.training.data import GPTObjective, TokenBatch
from stages.training.ema import WeightAverage
from stages.training.entropies import EntropyBatch, HeadObjective, JointObjective
from stages.training.images import ImageBatch, VQObjective
from stages.training.next_patch import NextPatchBatch, NextPatchObjective
from stages.training.optim import make_optimizer
from stages.training.patched import DPARObjective, PatchedBatch

BFLOAT16 = torch.bfloat16
IMAGES, TOKENS, CODES = 3, 16, 64
SHAPE = {"codebook_size": CODES, "num_tokens": TOKENS, "num_classes": 5}
RULE = PatchRule(2.0, 4, True, 4)
TINY_VQ = VQConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=CODES)


@pytest.fixture(autouse=True)
def _without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of array types do not know fake tensors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def starts() -> Tensor:
    """Where patches start, real: the loader packs them on the CPU."""
    return torch.tensor([[True, True, *[False, True] * 7], [True] * 16, [True, True, *[True, False] * 7]])


@pytest.fixture
def packed(starts: Tensor) -> PackedPatches:
    """Real patches; each test makes them fake."""
    return pack_patches(starts)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, packed: PackedPatches) -> Iterator[HostWaits]:
    """The simulated device. Patches are packed before it is there."""
    with fake_cuda(monkeypatch) as found:
        yield found


def made(kind: Callable[..., nn.Module], *arguments: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A module with fake weights. They cannot be cast afterwards."""
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            return kind(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


def dpar(dtype: torch.dtype = torch.float32) -> DPAR:
    config = DPARConfig(dim=64, num_heads=4, encoder_layers=1, global_layers=1, decoder_layers=1, **SHAPE)
    return made(DPAR, config, dtype=dtype)


def gpt(num_classes: int | None = 5, dtype: torch.dtype = torch.float32) -> GPT:
    config = GPTConfig(dim=32, num_layers=1, num_heads=2, **SHAPE | {"num_classes": num_classes})
    return made(GPT, config, dtype=dtype)


def head(model: DPAR, dtype: torch.dtype = torch.float32) -> EntropyHead:
    return made(EntropyHead, EntropyHeadConfig.of(model.config, "block"), dtype=dtype)


def tokens() -> Tensor:
    return torch.randint(CODES, (IMAGES, TOKENS))


def labels() -> Tensor:
    return torch.randint(5, (IMAGES,))


def fake(packed: PackedPatches) -> PackedPatches:
    """The patches of the loader as fake CPU tensors."""
    return packed.map(lambda real: torch.empty(real.shape, dtype=real.dtype))


def step(objective: nn.Module, batch: Any, *trained: nn.Module) -> None:
    """A training step: autocast, backward pass, clipping, fused AdamW, weight average; twice, the first is special."""
    config = TrainingConfig(steps=10)
    optimizers = [make_optimizer(module, config) for module in trained]
    average = WeightAverage(trained[0], 0.999)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss, scalars = objective.train()(batch)
        assert all(scalar.device.type in ("cuda", "cpu") for scalar in scalars.values())
        backward(loss)
        for module, optimizer in zip(trained, optimizers, strict=True):
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            assert all(parameter.grad is not None and parameter.grad.device == CUDA for parameter in parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()


def test_the_watch_sees_waits_and_mixed_devices(waits: HostWaits) -> None:
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    for wait in (there.sum().item, there.tolist, there.nonzero, there.cpu, lambda: here.to(CUDA), lambda: there[0] > 0):
        wait()
    torch.tensor(0.5, device=CUDA)
    there.copy_(here)
    assert waits.found == ["item", *["item"] * 3, "nonzero", "copy", "copy", "copy", "copy"]
    waits.found.clear()
    here.to(CUDA, non_blocking=True)
    assert not waits.found
    with pytest.raises(RuntimeError, match=r"two different devices|same device"):
        here + there


def test_the_backward_pass_of_fake_tensors_visits_what_autograd_does(waits: HostWaits) -> None:
    first, second = nn.Linear(4, 4, device=CUDA), nn.Linear(4, 4, device=CUDA)
    hidden = first(torch.ones(2, 4, device=CUDA))
    backward((second(hidden) + hidden.detach()).sum())
    assert all(parameter.grad is not None for module in (first, second) for parameter in module.parameters())


@pytest.mark.parametrize("num_classes", [5, None])
def test_a_step_of_a_gpt_waits_for_nothing(num_classes: int | None, waits: HostWaits) -> None:
    model = gpt(num_classes)
    step(GPTObjective(model), TokenBatch(tokens(), labels()), model)
    assert not waits.found


def test_a_step_of_next_patch_prediction_waits_for_nothing(waits: HostWaits) -> None:
    model = gpt()
    step(NextPatchObjective(model), NextPatchBatch(tokens(), labels(), side=2), model)
    assert not waits.found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xformers", "varlen", "padded"])
def test_a_step_of_dpar_waits_for_nothing(
    backend: str, waits: HostWaits, packed: PackedPatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "packed_backend", lambda *_, **__: backend)
    model = dpar()
    step(DPARObjective(model), PatchedBatch(tokens(), labels(), fake(packed)), model)
    assert not waits.found


@pytest.mark.slow
def test_a_step_of_dpar_and_its_head_waits_for_nothing(waits: HostWaits, packed: PackedPatches) -> None:
    model = dpar()
    beside = head(model)
    waits.found.clear()
    objective = JointObjective(model, beside, 0.1, stop_gradient=True)
    batch = EntropyBatch(tokens(), labels(), fake(packed), torch.rand(IMAGES, TOKENS))
    step(objective, batch, model, beside)
    assert not waits.found


def test_a_step_of_a_head_alone_waits_for_nothing(waits: HostWaits, packed: PackedPatches) -> None:
    model = dpar()
    alone = head(model)
    waits.found.clear()
    batch = EntropyBatch(tokens(), labels(), fake(packed), torch.rand(IMAGES, TOKENS))
    step(HeadObjective(model, alone), batch, alone)
    assert not waits.found


@pytest.mark.slow
@pytest.mark.parametrize("adversarial", [False, True])
def test_a_step_of_the_tokenizer_mixes_no_devices(adversarial: bool, waits: HostWaits) -> None:
    model, discriminator = made(VQModel, TINY_VQ), made(PatchDiscriminator)
    config = TokenizerConfig(source="train", model=TINY_VQ, image_size=32)
    objective = VQObjective(model, made(LPIPS), discriminator, config)
    step(objective, ImageBatch(torch.rand(2, 3, 32, 32), adversarial), model, discriminator)


def test_the_tokenizer_encodes_and_decodes_without_waiting(waits: HostWaits) -> None:
    for dtype in (torch.float32, BFLOAT16):
        model = made(VQModel, TINY_VQ, dtype=dtype)
        found = model.encode(torch.rand(2, 3, 32, 32, device=CUDA))
        assert model.decode(found).device == CUDA
    assert not waits.found


def options() -> SamplingOptions:
    return SamplingOptions(cfg_scale=2.0, cfg_schedule="linear", top_k=10, top_p=0.9)


def ticks(steps: Any, model: Any, boundaries: Boundaries | None, kinds: list[int], waits: HostWaits) -> Sampling:
    """Some ticks of a sampler in which more images than slots wait."""
    labels, uniforms = torch.zeros(5, dtype=torch.int64, device=CUDA), torch.rand(5, TOKENS, device=CUDA)
    prefix = torch.zeros(5, 2, dtype=torch.int64, device=CUDA)
    found = Sampling(Canvas(labels, uniforms, options(), 5, prefix), steps, model, boundaries, batch=2)
    waits.found.clear()
    for kind in kinds:
        images, done = found._tick(kind)
        assert images.device == done.device == CUDA
        assert images.shape == (2,), "batches are full"
    return found


@pytest.mark.parametrize("vocabulary", [1000, 1024])  # one of them is no multiple of a block
def test_sampling_a_token_waits_for_nothing(vocabulary: int, waits: HostWaits) -> None:
    logits, uniforms = torch.randn(IMAGES, vocabulary, device=CUDA), torch.rand(IMAGES, device=CUDA)
    for temperature, top_k, top_p in product((1.0, 0.5), (0, 7), (1.0, 0.9)):
        chosen = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
        found = sample_token(logits, uniforms, chosen)
        assert (found.shape, found.dtype, found.device) == ((IMAGES,), torch.int64, CUDA)
    assert not waits.found


def test_ticks_of_llamagen_wait_for_nothing(waits: HostWaits) -> None:
    ticks(GPTSteps, gpt(dtype=BFLOAT16).eval(), None, [0, 0, 0], waits)
    assert not waits.found


@pytest.mark.slow
@pytest.mark.parametrize("source", ["given", "head", "entropy model", "own entropy"])
def test_ticks_of_dpar_wait_for_nothing(source: str, waits: HostWaits) -> None:
    model = dpar(BFLOAT16).eval()
    boundaries: dict[str, Callable[[], Boundaries]] = {
        "given": lambda: GivenBoundaries(torch.ones(5, TOKENS, dtype=torch.bool, device=CUDA)),
        "head": lambda: HeadBoundaries(head(model, BFLOAT16).eval(), RULE),
        "entropy model": lambda: EntropyBoundaries(gpt(None, BFLOAT16).eval(), RULE),
        "own entropy": lambda: OwnEntropyBoundaries(RULE),
    }
    found = ticks(DPARSteps, model, boundaries[source](), [1, 0, 0, 1, 1, 0], waits)
    assert found.starts.device == CUDA
    assert not waits.found
