"""Sampling of tokens in a CUDA graph: captured with every option, and equal to the CPU's."""

from __future__ import annotations

import pytest
import torch

from models.token_sampling import SamplingOptions, sample_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, CODES, REPLAYS = 64, 16384, 4


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.9, top_k=2000),
        SamplingOptions(top_p=0.9),
        SamplingOptions(top_k=2000, top_p=0.9),
    ],
    ids=["plain", "top_k", "top_p", "top_k and top_p"],
)
@torch.inference_mode()
def test_a_captured_graph_draws_the_tokens_of_the_cpu(options: SamplingOptions) -> None:
    logits, uniforms = torch.randn(ROWS, CODES, device="cuda"), torch.rand(ROWS, device="cuda")
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        sample_token(logits, uniforms, options)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_token(logits, uniforms, options)
    equal = 0
    for replay in range(REPLAYS):
        generator = torch.Generator().manual_seed(replay)
        here = 3 * torch.randn(ROWS, CODES, generator=generator), torch.rand(ROWS, generator=generator)
        logits.copy_(here[0])
        uniforms.copy_(here[1])
        graph.replay()
        equal += int((tokens.cpu() == sample_token(*here, options)).sum())
    assert equal >= 0.98 * ROWS * REPLAYS
