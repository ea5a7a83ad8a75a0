"""Which state dict of a file is taken, under which names, and which types of numbers a model takes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.weights import WeightsChoice
from stages.runtime.errors import InputError
from stages.weights.state_dict import StateDict, load_state, open_state_dict

STATE = {"norm.weight": torch.arange(4.0), "layers.0.weight": torch.ones(2, 2), "layers.1.weight": torch.zeros(2, 2)}
EMA = {name: tensor + 0.5 for name, tensor in STATE.items()}


def opened(path: Path, value: dict[str, Any], weights: WeightsChoice = "model") -> StateDict:
    torch.save(value, path)
    with open_state_dict(path, "train.weights", weights, "missing") as state:
        return state


def taken(path: Path, value: dict[str, Any], weights: WeightsChoice = "model") -> dict[str, Tensor]:
    torch.save(value, path)
    with open_state_dict(path, "train.weights", weights, "missing") as state:
        return {name: entry.read() for name, entry in state.tensors.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


PREFIXES = [
    "".join(chosen)
    for count in (1, 2, 3)
    for chosen in itertools.permutations(("module.", "_orig_mod.", "model."), count)
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_that_all_names_share_are_removed_and_told(tmp_path: Path, prefix: str) -> None:
    found = opened(tmp_path / "a.pt", {"model": {prefix + name: tensor for name, tensor in STATE.items()}})
    assert found.tensors.keys() == STATE.keys()
    assert found.origin == {
        "format": "torch zip",
        "weights": "model",
        "place": "model",
        "stripped_prefix": prefix,
    }


def test_prefixes_are_removed_from_safetensors_and_bare_state_dicts(tmp_path: Path) -> None:
    named = {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()}
    assert opened(tmp_path / "a.pt", named).stripped == "_orig_mod.module."
    save_file(named, tmp_path / "a.safetensors")
    with open_state_dict(tmp_path / "a.safetensors", None, "model", "missing") as state:
        assert (state.tensors.keys(), state.stripped, state.place) == (STATE.keys(), "_orig_mod.module.", "")


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    value = STATE | {"module.extra": torch.zeros(1)}
    assert opened(tmp_path / "a.pt", value).tensors.keys() == value.keys()
    ours = {"module.weight": torch.zeros(1), "model.weight": torch.zeros(1)}
    assert opened(tmp_path / "a.pt", {"model": ours}).tensors.keys() == ours.keys()


def test_wrappers_of_single_blocks_are_removed_too(tmp_path: Path) -> None:
    wrapped = {name.replace("layers.0", "layers.0._orig_mod"): tensor for name, tensor in STATE.items()}
    found = opened(tmp_path / "a.pt", wrapped)
    assert (found.tensors.keys(), found.stripped) == (STATE.keys(), "_orig_mod.")
    both = {"a._orig_mod.weight": torch.zeros(1), "a.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"two tensors of one name once _orig_mod\. is removed"):
        opened(tmp_path / "a.pt", both)


def test_torchs_averaged_model_is_a_moving_average_with_a_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    assert same(taken(tmp_path / "a.pt", {"ema": average.state_dict()}, "ema"), dict(model.state_dict()))


@pytest.mark.parametrize("place", ["ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema"])
def test_the_setting_says_which_of_two_state_dicts_is_taken(tmp_path: Path, place: str) -> None:
    both = {"model": STATE, place: EMA, "optimizer": {"state": {}, "param_groups": []}, "steps": 7}
    assert same(taken(tmp_path / "a.pt", both), STATE)
    assert same(taken(tmp_path / "a.pt", both, "ema"), EMA)
    assert opened(tmp_path / "a.pt", both, "ema").origin["place"] == place


def test_containers_in_containers_are_opened(tmp_path: Path) -> None:
    assert same(taken(tmp_path / "a.pt", {"ema": {"module": EMA, "decay": 0.999}}, "ema"), EMA)
    assert opened(tmp_path / "a.pt", {"state_dict": {"model": STATE}}).place == "state_dict.model"


def test_names_that_say_which_weights_they_are_of_count_as_containers(tmp_path: Path) -> None:
    flat = {f"model.{name}": tensor for name, tensor in STATE.items()}
    flat |= {f"ema.{name}": tensor for name, tensor in EMA.items()}
    save_file(flat, tmp_path / "a.safetensors")
    for weights, wanted in (("model", STATE), ("ema", EMA)):
        with open_state_dict(tmp_path / "a.safetensors", None, weights, "missing") as state:
            assert same({name: entry.read() for name, entry in state.tensors.items()}, wanted)


@pytest.mark.parametrize(
    ("value", "weights", "words"),
    [
        (
            {"model": STATE, "optimizer": {}, "steps": 7},
            "ema",
            r"holds no moving average \(ema\) of weights, .* it has model \(3 tensors\), optimizer, steps: set "
            "train.weights=model$",
        ),
        (STATE, "ema", "it has 3 tensors at its top level: set train.weights=model$"),
        (
            {"ema": EMA, "steps": 7},
            "model",
            r"but a moving average, .* it has ema \(3 tensors\), steps: set train.weights=ema$",
        ),
        (
            {"net": STATE},
            "model",
            r"holds no weights, expected model or module or state_dict, it has net \(3 tensors\)$",
        ),
        ({"net": STATE}, "ema", r"expected ema or model_ema or ema_model, it has net \(3 tensors\)$"),
        ({f"part{n}": {} for n in range(20)}, "model", "it has part0, part1, .*part7 …$"),
        ({"ema": {"decay": 0.9, "shadow_params": [torch.zeros(1)]}}, "ema", r"holds no moving average .* it has ema$"),
    ],
)
def test_weights_that_a_file_lacks_are_told_with_what_it_has(
    tmp_path: Path, value: dict[str, Any], weights: WeightsChoice, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "a.pt", value, weights)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def loaded(path: Path, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.save(state, path)
    with open_state_dict(path, None, "model", "missing") as found:
        return dict(load_state(model, found, "does not fit: {}").state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_float_type_is_taken_as_the_models(tmp_path: Path, model: nn.Module, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    found = loaded(tmp_path / "a.pt", model, state)
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in state.items())
    assert found["0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"0.weight": torch.zeros(3, 3, dtype=torch.int8)},
            "0.weight is of type int8, expected float32 or .*quantised",
        ),
        ({"0.weight": torch.zeros(3, 3, dtype=torch.complex64)}, "0.weight is of type complex64, expected float32"),
        ({"0.weight": torch.zeros(3, 3, dtype=torch.bool)}, "0.weight is of type bool"),
        ({"0.weight": torch.zeros(3, 3, dtype=torch.int64)}, "0.weight is of type int64"),
        ({"1.num_batches_tracked": torch.tensor(1.5)}, "1.num_batches_tracked is of type float32, expected int64"),
        ({"0.bias": torch.tensor([1.0, float("nan"), float("inf")])}, "has 2 values in 0.bias that are no finite"),
        ({"0.bias": torch.tensor([1.0, 2.0, 1e300], dtype=torch.float64)}, "has 1 values in 0.bias that are no finite"),
        ({"0.bias": torch.zeros(4)}, r"0.bias has shape \(4,\), expected \(3,\)"),
        ({"0.bias": torch.zeros(3, 1)}, r"0.bias has shape \(3, 1\), expected \(3,\)"),
        ({f"extra{n}": torch.zeros(1) for n in range(3000)}, r"extra0 is not part of it \(and 2999 more\)"),
    ],
)
def test_tensors_that_a_model_cannot_take_are_named(
    tmp_path: Path, model: nn.Module, change: dict[str, Tensor], words: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=words):
        loaded(tmp_path / "a.pt", model, dict(model.state_dict()) | change)
    assert same(dict(model.state_dict()), before), "a refused file changes nothing"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.complex64])
def test_types_of_safetensors_that_are_no_weights_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(8, 1, bias=False)
    save_file({"weight": torch.zeros(1, 8).to(dtype)}, tmp_path / "a.safetensors")
    with (
        open_state_dict(tmp_path / "a.safetensors", None, "model", "missing") as state,
        pytest.raises(InputError, match=r"weight is of type \w+, expected float32 or float16 or bfloat16 or float64"),
    ):
        load_state(model, state, "does not fit: {}")


def test_a_view_of_a_terabyte_is_refused_by_its_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weight has shape \(1048576, 1048576\), expected \(2, 2\)"):
        loaded(tmp_path / "a.pt", nn.Linear(2, 2, bias=False), {"weight": torch.zeros(1).expand(2**20, 2**20)})


def test_loaded_tensors_do_not_share_memory(tmp_path: Path) -> None:
    base = torch.arange(9.0).reshape(3, 3)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    torch.save({"0.weight": base, "1.weight": base}, tmp_path / "a.pt")
    with open_state_dict(tmp_path / "a.pt", None, "model", "missing") as state:
        load_state(model, state, "does not fit: {}", assign=True)
    one, two = model.state_dict().values()
    assert torch.equal(one, two)
    assert one.data_ptr() != two.data_ptr()
