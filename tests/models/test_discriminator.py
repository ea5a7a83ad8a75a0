"""The patch discriminator against its definition, and the hinge losses it plays with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import PatchDiscriminator, discriminator_loss, generator_loss, judge_frozen


def plain(discriminator: PatchDiscriminator, images: Tensor) -> Tensor:
    """The network spelt out: 64-128-256-512-1, halving three times, normalised by the batch's own statistics."""
    convs = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in discriminator.layers if isinstance(layer, nn.BatchNorm2d)]
    hidden = F.leaky_relu(F.conv2d(images, convs[0].weight, convs[0].bias, stride=2, padding=1), 0.2)
    for conv, norm, stride in zip(convs[1:4], norms, (2, 2, 1), strict=True):
        hidden = F.conv2d(hidden, conv.weight, stride=stride, padding=1)
        mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
        variance = hidden.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
        hidden = (hidden - mean) / (variance + 1e-5).sqrt()
        hidden = F.leaky_relu(hidden * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1), 0.2)
    return F.conv2d(hidden, convs[4].weight, convs[4].bias, padding=1)


def test_equals_its_definition() -> None:
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(), torch.rand(3, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(discriminator(images), plain(discriminator, images), atol=1e-5, rtol=1e-4)


def test_has_the_parameters_of_pix2pix() -> None:
    # Pix2pix prints 2,768,705 for its own, which sees two RGB images: 3 * 64 * 4 * 4 weights more.
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_768_705 - 3 * 64 * 16


def test_256_pixels_are_judged_in_30_by_30_overlapping_patches_of_70() -> None:
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    torch.manual_seed(0)
    discriminator = PatchDiscriminator().eval()  # batch statistics would let every pixel see every other
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(image)[0, 0, 15, 15], image)
    seen = gradient[0].abs().sum(dim=0) > 0
    assert int(seen.any(dim=0).sum()) == int(seen.any(dim=1).sum()) == 70


def test_weights_start_small_and_gains_near_one() -> None:
    torch.manual_seed(0)
    for layer in PatchDiscriminator().layers:
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        elif isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
            assert not layer.bias.any()


def test_frozen_judgement_is_the_same_and_teaches_the_images_alone() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    logits = judge_frozen(discriminator, images)
    torch.testing.assert_close(logits, discriminator(images), atol=0, rtol=0)
    generator_loss(logits).backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]).view(2, 1, 1, 1), torch.tensor([-3.0, 0.5]).view(2, 1, 1, 1)
    assert float(discriminator_loss(real, fake)) == 0.5 * (0.25 + 0.75)
    assert float(discriminator_loss(torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1))) == 0.0
    assert float(generator_loss(fake)) == 1.25


def test_logits_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert PatchDiscriminator()(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_images_too_small_for_a_patch_are_refused() -> None:
    assert PatchDiscriminator()(torch.rand(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(32, 23\) pixels, expected at least 24"):
        PatchDiscriminator()(torch.rand(1, 3, 32, 23))
