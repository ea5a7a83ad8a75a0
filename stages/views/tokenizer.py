"""View of stage `tokenizer`: quality of its reconstructions."""

from __future__ import annotations

from pathlib import Path

from conf.runtime import RuntimeConfig
from conf.tokenizer import TokenizerConfig
from stages.runtime.artifact import write_json
from stages.runtime.job import Inputs, main
from stages.views.record import last_metrics


def tokenizer(config: TokenizerConfig, inputs: Inputs, output: Path, runtime: RuntimeConfig) -> None:
    """Write `metrics.json`: final PSNR in dB and codebook usage on held-out images."""
    metrics = last_metrics(inputs["tokenizer"], "psnr", "heldout_codebook_usage", "num_images")
    write_json(output / "metrics.json", metrics)


if __name__ == "__main__":
    main(tokenizer, TokenizerConfig)
