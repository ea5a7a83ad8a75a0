"""runtime.attention chooses the backend of packed attention when a process joins its group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conf.runtime import RuntimeConfig
from models import attention
from stages.runtime.distributed import process_group
from stages.runtime.errors import InputError


@pytest.fixture(autouse=True)
def _automatic_choice() -> Iterator[None]:
    yield
    attention.use_backend("auto", torch.device("cpu"))


def test_the_setting_reaches_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "backend_refusal", lambda *_: None)
    with process_group(RuntimeConfig(device="cpu", attention="varlen")) as world:
        assert attention.packed_backend(world.device, torch.bfloat16, 64) == "varlen"
    with process_group(RuntimeConfig(device="cpu")) as world:
        assert attention.packed_backend(world.device, torch.bfloat16, 64) == "xformers"


def test_a_backend_without_operators_is_a_user_error() -> None:
    with (
        pytest.raises(InputError, match=r"^runtime.attention is xformers, but .* use attention=auto$"),
        process_group(RuntimeConfig(device="cpu", attention="xformers")),
    ):
        pass
