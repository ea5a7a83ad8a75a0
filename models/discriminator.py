"""Patch discriminator for the training of the tokenizer (PatchGAN), and its hinge losses.

It classifies overlapping patches of 70 x 70 pixels as real or reconstructed: texture, not content.

Source: Pix2pix (arXiv 1611.07004) for the network; Taming Transformers (arXiv 2012.09841) for its use with a VQ
tokenizer; LlamaGen (arXiv 2406.06525), section 2.1, for the settings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from models.config import SMALLEST_JUDGED_IMAGE

_BLOCKS = ((64, 128, 2), (128, 256, 2), (256, 512, 1))  # width in, width out, stride


class PatchDiscriminator(nn.Module):
    """Logits that a patch is real. 2,765,633 parameters.

    BatchNorm uses the statistics of the current batch. Pass real and reconstructed images in separate batches, and
    never use the module in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _BLOCKS[0][0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width_in, width, stride in _BLOCKS:
            layers += [
                nn.Conv2d(width_in, width, 4, stride=stride, padding=1, bias=False),  # BatchNorm adds its own
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(_BLOCKS[-1][1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B 1 h w"]:
        """Logits of each patch of images in [-1, 1], float32 even under autocast. 256 pixels give 30 x 30 logits.

        Raises:
            ValueError: The images are too small for a single logit.
        """
        if min(images.shape[-2:]) < SMALLEST_JUDGED_IMAGE:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels, expected at least {SMALLEST_JUDGED_IMAGE} per side"
            )
        return self.layers(images).float()


def judge_frozen(
    discriminator: PatchDiscriminator, images: Float[Tensor, "B 3 height width"]
) -> Float[Tensor, "B 1 h w"]:
    """Logits for the generator's loss: the gradient reaches the images, not the discriminator's weights."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Tensor = functional_call(discriminator, frozen, (images,))
    return logits


def generator_loss(fake: Float[Tensor, "B 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss of the generator: minus the mean logit of reconstructions."""
    return -fake.mean()


def discriminator_loss(real: Float[Tensor, "B 1 h w"], fake: Float[Tensor, "B 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss: half the sum over real and reconstructed images; zero if logits are above 1 and below -1."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.normal_(0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.normal_(1.0, 0.02)
