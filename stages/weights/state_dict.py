"""The state dict in a weights file: which one, its names without the prefixes of wrappers, and how a model takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from conf.weights import WeightsChoice
from stages.runtime.errors import InputError
from stages.weights.own import state_dict_mismatch
from stages.weights.pickled import Strided, UnreadTensor
from stages.weights.weights_file import Entry, Named, WeightsFile, open_weights

Module = TypeVar("Module", bound=nn.Module)
# DDP, DeepSpeed and other projects wrap the tensors in a container; FSDP files are the state dict itself.
_PLACES: dict[WeightsChoice, tuple[str, ...]] = {
    "model": ("model", "module", "state_dict"),
    "ema": ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema", "module_ema"),
}
_PREFIXES = ("module.", "_orig_mod.", "model.")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # between names too, e.g. of blocks
_NO_WEIGHTS = ("n_averaged", "freqs_cis")  # the count of torch's AveragedModel; a rotary table in old files
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_INTEGERS = ("int64", "int32")
_SPARE = 4  # storages may be this many times as large as all weights: a file of float64 has twice their bytes
_LISTED = 8  # entries of a file that a message names
_LONGEST_NAME = 200


@dataclass
class StateDict:
    """Named tensors of an open weights file, not yet read.

    Attributes:
        file: The file.
        tensors: Entries by name, without prefixes.
        weights: Whether they are the model's or their moving average.
        place: Where they are in the file, e.g. `model`; empty at the top level.
        stripped: What was removed from all names, e.g. `module.`.
    """

    file: WeightsFile
    tensors: dict[str, Entry]
    weights: WeightsChoice
    place: str
    stripped: str

    @property
    def origin(self) -> dict[str, str]:
        """How the tensors were found, for logs and records."""
        return {
            "format": self.file.format,
            "weights": self.weights,
            "place": self.place,
            "stripped_prefix": self.stripped,
        }


@contextmanager
def open_state_dict(path: Path, setting: str | None, weights: WeightsChoice, missing: str) -> Iterator[StateDict]:
    """Open the state dict in a weights file.

    Args:
        path: A safetensors file, or a file of torch.save.
        setting: Address of the setting that says which weights are taken, for error messages; None without one.
        weights: Whether the model's weights or their moving average are taken.
        missing: The message if there is no such file.

    Raises:
        InputError: See `open_weights`. Or the file has no such weights.
    """
    with open_weights(path, missing) as file:
        tree, place = _chosen(file, setting, weights)
        entries = dict[str, Entry]()
        for name, value in tree.items():
            if name.rpartition(".")[2] in _NO_WEIGHTS:
                continue
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise InputError(f"{path} has a tensor named {name[:40]!r} …, expected names of at most 200 letters")
            if not isinstance(value, (Strided, Named)):
                raise InputError(f"{path} holds no weights: {name} is {_kind(value)}, expected a tensor")
            entries[name] = file.entry(value)
        names, stripped = _without_wrappers(list(entries))
        if len(set(names)) < len(names):
            raise InputError(f"{path} has two tensors of one name once {stripped} is removed from their names")
        yield StateDict(file, dict(zip(names, entries.values(), strict=True)), weights, place, stripped)


def load_state(model: Module, state: StateDict, misfit: str, *, assign: bool = False) -> Module:
    """Give the tensors to `model`, and return it. `assign` replaces its own, which may be on the meta device.

    Raises:
        InputError: See `read_state`.
    """
    model.load_state_dict(read_state(model, state, misfit), assign=assign)
    return model


def read_state(model: nn.Module, state: StateDict, misfit: str) -> dict[str, Tensor]:
    """The tensors in the types of `model`. Nothing is read unless all names, shapes and types fit.

    Args:
        model: The model.
        state: The state dict.
        misfit: The message for a state dict of another model; `{}` in it stands for the difference.

    Raises:
        InputError: Names, shapes or types differ from the model's, the file is damaged, or a number is not finite.
    """
    wanted, path = model.state_dict(), state.file.path
    if problem := state_dict_mismatch(state.tensors, wanted) or _other_types(state, wanted):
        raise InputError(f"{path} {misfit.format(problem)}")
    most = _SPARE * sum(tensor.nbytes for tensor in wanted.values()) + 2**20
    read = dict[str, Tensor]()
    for name, entry in state.tensors.items():
        if entry.read_bytes > most:
            raise InputError(
                f"{path} has {entry.read_bytes:,} bytes behind {name}, expected at most {most:,}: save copies of its "
                "tensors instead of views of larger ones"
            )
        read[name] = entry.read().to(wanted[name].dtype, copy=True).contiguous()
        finite = read[name].isfinite()
        if not finite.all():
            raise InputError(
                f"{path} has {int((~finite).sum()):,} values in {name} that are no finite {wanted[name].dtype} numbers "
                "(NaN or infinite): its training diverged, or the file is damaged"
            )
    return read


def _other_types(state: StateDict, wanted: Mapping[str, Tensor]) -> str | None:
    for name, entry in state.tensors.items():
        float_wanted = wanted[name].dtype.is_floating_point
        counts = name.endswith(("codebook_used", "num_batches_tracked"))
        known = (_FLOATS if float_wanted else ()) + (_INTEGERS if counts or not float_wanted else ())
        if entry.dtype not in known:
            hint = "; of quantised weights, give those from before" if "8" in entry.dtype else ""
            return f"{name} is of type {entry.dtype}, expected {' or '.join(known)}{hint}"
    return None


def _chosen(file: WeightsFile, setting: str | None, weights: WeightsChoice) -> tuple[dict[str, Any], str]:
    """The dictionary of the tensors asked for, and its place."""
    tree, place = _nested(file.tree), list[str]()
    if not isinstance(tree, dict):
        raise InputError(f"{file.path} holds {_kind(tree)}, expected a state dict: a dictionary of tensors by name")
    wanted = _PLACES[weights]
    while isinstance(tree, dict) and not _is_flat(tree):
        name = next((name for name in wanted if name in tree), None)
        if name is None:
            break
        tree, wanted = tree[name], _PLACES["model"]
        place.append(name)
    if (place or weights == "model") and _is_flat(tree):
        return tree, ".".join(place)
    raise InputError(f"{file.path} {_lacking(file.tree, setting, weights)}")


def _lacking(tree: dict[str, Any], setting: str | None, weights: WeightsChoice) -> str:
    """Says what a file has that lacks the weights asked for, and what to do."""
    places = " or ".join(_PLACES[weights][:3])
    what = f"holds no {'weights' if weights == 'model' else 'moving average (ema) of weights'}"
    has = f"expected {places}, it has {_contents(tree)}"
    if {"state", "param_groups"} <= tree.keys():
        return f"holds the state of an optimiser and no weights: give the file of the model ({has})"
    if setting and weights == "ema" and (_is_flat(tree) or any(name in tree for name in _PLACES["model"])):
        return f"{what}, {has}: set {setting}=model"
    if setting and weights == "model" and any(name in tree for name in _PLACES["ema"]):
        return f"{what} but a moving average, {has}: set {setting}=ema"
    return f"{what}, {has}"


def _nested(tree: Any) -> Any:
    """Names like `ema.norm.weight` as a dictionary in a dictionary, if they say which weights they are of."""
    if not isinstance(tree, dict) or not _is_flat(tree):
        return tree
    first = {name.partition(".")[0] for name in tree}
    if not first & set(_PLACES["ema"]) or not first <= {*_PLACES["ema"], *_PLACES["model"]}:
        return tree
    nested: dict[str, dict[str, Any]] = {name: {} for name in sorted(first)}
    for name, entry in tree.items():
        nested[name.partition(".")[0]][name.partition(".")[2]] = entry
    return nested


def _without_wrappers(names: list[str]) -> tuple[list[str], str]:
    """Names without what wrappers of modules have put before or into all of them, and what that was."""
    stripped = ""
    while prefix := next((prefix for prefix in _PREFIXES if names and all(n.startswith(prefix) for n in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
        stripped += prefix
    for wrapper in _WRAPPERS:
        inner = [".".join(part for part in name.split(".") if part != wrapper) for name in names]
        if inner != names:
            names, stripped = inner, f"{stripped}{wrapper}."
    return names, stripped


def _is_flat(tree: Any) -> bool:
    """Whether this is a state dict itself: it has tensors, and no dictionary."""
    if not isinstance(tree, dict):
        return False
    values = tree.values()
    return any(isinstance(value, (Strided, Named, UnreadTensor)) for value in values) and not any(
        isinstance(value, dict) for value in values
    )


def _contents(tree: dict[str, Any]) -> str:
    if _is_flat(tree):
        return f"{len(tree)} tensors at its top level"
    names = [f"{name[:40]!r}"[1:-1] + _count(entry) for name, entry in list(tree.items())[:_LISTED]]
    return (", ".join(names) or "nothing") + (" …" if len(tree) > _LISTED else "")


def _count(entry: Any) -> str:
    return f" ({len(entry)} tensors)" if _is_flat(entry) else ""


def _kind(entry: Any) -> str:
    if isinstance(entry, (Strided, Named)):
        return "one tensor"
    names = {list: "a list", tuple: "a tuple", dict: "a dictionary", str: "text", int: "a number", float: "a number"}
    return "None" if entry is None else getattr(entry, "name", names.get(type(entry), "another object"))
