"""Is the CUDA code correct on this device, and how fast is it? At most six minutes, one JSON line a finding.

It needs the source tree, torch 2.10 or newer, numpy and jaxtyping, and runs on a machine without the other packages:

    export PYTHONPATH=$PWD; python3 tests/benchmarks/gpu_check.py --seconds 360

The last line has gates and figures as `dpar bench gpu` reads them. A part that fails does not stop the others.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
from gpu_correctness import attention, logits, samplers
from gpu_setup import TINY, Bench, Sizes, options
from gpu_speed import device_rates, sampling, tokenizer, training
from report import report

PARTS: dict[str, Callable[[Bench], None]] = {
    "device": device_rates,
    "attention": attention,
    "logits": logits,
    "samplers": samplers,
    "training": training,
    "tokenizer": tokenizer,
    "sampling": sampling,
    "compiled": partial(training, compiled=True),
}
"""In the order of their importance: time may run out."""


class OutOfTime(BaseException):  # like KeyboardInterrupt, it passes through what handles errors
    """The time is over."""


def run(bench: Bench, names: list[str], seconds: float) -> list[str]:
    """Run parts until the time is over; returns those that did not finish."""

    def over(*_: object) -> None:
        raise OutOfTime

    unfinished = list(names)
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for name in names:
            if attempt(bench, name):
                unfinished.remove(name)
    except OutOfTime:
        bench.say("time", over=seconds, unfinished=unfinished)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return unfinished


def attempt(bench: Bench, name: str) -> bool:
    """Run a part; whether it finished."""
    try:
        PARTS[name](bench)
    except Exception as error:  # any fault of one part is a finding
        bench.say(name, failed=f"{type(error).__name__}: {error}"[:400], where=traceback.format_exc()[-800:])
        return False
    finally:
        bench.release()
    return True


def main() -> None:
    """Run the parts that are asked for and report what was found."""
    asked = options()
    if not asked.tiny and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: rehearse on a CPU with --tiny")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, TINY if asked.tiny else Sizes())
    unfinished = run(bench, asked.parts or list(PARTS), asked.seconds)
    bench.hold("parts of the check that failed or found no time", len(unfinished), "<", 1)
    report(bench.gates, bench.figures)


if __name__ == "__main__":
    main()
