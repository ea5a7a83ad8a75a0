"""First tokens that are given: they stay, the rest is drawn as if the model had drawn them itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.boundaries import EntropyBoundaries
from models.config import DPARConfig, GPTConfig
from models.dpar import DPAR
from models.gpt import GPT
from models.patching import PatchRule
from models.sampling import sample_dpar, sample_gpt
from models.token_sampling import SamplingOptions

TOKENS, CODES, CLASSES = 16, 40, 5
GUIDED = SamplingOptions(cfg_scale=2.0)
SHAPE = {"num_heads": 2, "codebook_size": CODES, "num_tokens": TOKENS}
LABELS, UNIFORMS = torch.arange(4), torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(0))


def gpt(num_classes: int | None) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, num_layers=2, num_classes=num_classes, **SHAPE))
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


@torch.inference_mode()
def sample(family: str, uniforms: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
    if family == "gpt":
        tokens = sample_gpt(gpt(CLASSES), LABELS, uniforms, GUIDED, prefix)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    torch.manual_seed(0)
    model = DPAR(DPARConfig(dim=32, encoder_layers=1, global_layers=2, decoder_layers=1, num_classes=CLASSES, **SHAPE))
    torch.nn.init.normal_(model.output.weight, std=0.3)
    boundaries = EntropyBoundaries(gpt(None), PatchRule(3.2, 4, True, 4))
    return sample_dpar(model.eval(), LABELS, uniforms, GUIDED, boundaries, prefix)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "dpar"])
@pytest.mark.parametrize("kept", [0, 1, 6, TOKENS])
def test_a_models_own_tokens_as_prefix_change_nothing(family: str, kept: int) -> None:
    tokens, starts = sample(family, UNIFORMS, None)
    others = torch.cat([1 - UNIFORMS[:, :kept], UNIFORMS[:, kept:]], dim=1)  # of the prefix, read by no one
    again, starts_again = sample(family, others, tokens[:, :kept])
    assert torch.equal(again, tokens)
    assert torch.equal(starts_again, starts)


@pytest.mark.parametrize("family", ["gpt", "dpar"])
def test_what_follows_depends_on_the_prefix(family: str) -> None:
    tokens, _ = sample(family, UNIFORMS, None)
    prefix = (tokens[:, :8] + 1) % CODES
    continued, starts = sample(family, UNIFORMS, prefix)
    assert torch.equal(continued[:, :8], prefix)
    assert not torch.equal(continued[:, 8:], tokens[:, 8:])
    assert starts[:, [0, 1, 4, 8, 12]].all(), "the rule opens patches in a prefix too"


@pytest.mark.parametrize("shape", [(3, 4), (4, TOKENS + 1)])
@pytest.mark.usefixtures("without_shape_checks")
def test_a_prefix_of_other_images_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"prefix is \(\d+, \d+\), expected \(4, 0\.\.16\)"):
        sample("gpt", UNIFORMS, torch.zeros(shape, dtype=torch.int64))
