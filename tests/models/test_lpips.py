"""LPIPS against its definition, with random weights; the released ones are checked where they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch_fidelity import sample_similarity_lpips

from models.lpips import LPIPS


@pytest.fixture
def lpips() -> LPIPS:
    torch.manual_seed(0)
    model = LPIPS()
    for head in model.heads:
        head.data.uniform_()
    return model


def test_the_network_is_vgg16s_thirteen_convolutions(lpips: LPIPS) -> None:
    assert sum(p.numel() for p in lpips.convs.parameters()) == 14_714_688
    assert [len(head) for head in lpips.heads] == [64, 128, 256, 512, 512]


def test_equals_the_definition(lpips: LPIPS) -> None:
    images, others = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    expected = torch.zeros(2)
    a, b = ((x - lpips.shift) / lpips.scale for x in (images, others))
    taps, tap = {1, 3, 6, 9, 12}, 0
    for index, conv in enumerate(lpips.convs):
        a, b = F.relu(conv(a)), F.relu(conv(b))
        if index in taps:
            difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)) ** 2
            expected += F.conv2d(difference, lpips.heads[tap].view(1, -1, 1, 1)).mean(dim=(1, 2, 3))
            a, b, tap = F.max_pool2d(a, 2), F.max_pool2d(b, 2), tap + 1
    torch.testing.assert_close(lpips(images, others), expected, atol=1e-5, rtol=1e-4)


def test_equals_torch_fidelitys(lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    convs = [layer for layer in backbone if isinstance(layer, torch.nn.Conv2d)]
    for theirs, ours in zip(convs, lpips.convs, strict=True):
        theirs.load_state_dict(ours.state_dict())
    heads = {f"lin{i}.model.1.weight": head.view(1, -1, 1, 1) for i, head in enumerate(lpips.heads)}
    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: heads)
    monkeypatch.setattr(
        sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=backbone)
    )
    oracle = sample_similarity_lpips.SampleSimilarityLPIPS("oracle")
    images, others = (torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    found = lpips(images / 127.5 - 1, others / 127.5 - 1)
    torch.testing.assert_close(found, oracle(images, others).flatten(), atol=1e-5, rtol=1e-4)


def test_is_zero_of_equal_images_and_gradient_flows_to_the_first(lpips: LPIPS) -> None:
    images = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    others = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    assert lpips(images, images.detach()).item() == 0.0
    lpips(images, others).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert others.grad is None
