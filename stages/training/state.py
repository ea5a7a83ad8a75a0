"""The state that a training step changes: weights, optimisers, and the running average of weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from conf.section import TrainingConfig
from stages.training.ema import WeightAverage
from stages.training.optim import make_optimizer


class ModuleOptimizer:
    """A module with its optimiser."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        self._module, self._grad_clip = module, config.grad_clip
        self._optimizer = make_optimizer(module, config)

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float) -> Tensor:
        """Clip the gradients and take a step with learning rate `rate`. Returns the norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = clip_grad_norm_(self._module.parameters(), self._grad_clip)
        self._optimizer.step()
        return norm

    @property
    def unmade_bytes(self) -> int:
        """Bytes that the optimiser's first step will allocate: two moments of each trained weight."""
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        return sum(2 * weight.nbytes for weight in weights if weight not in self._optimizer.state)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and the optimiser's state."""
        return {"weights": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self._module.load_state_dict(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])


class TrainingState:
    """The model, the auxiliary modules by name, and the model's weight average if `ema_decay` is set."""

    def __init__(self, model: nn.Module, auxiliary: Mapping[str, nn.Module], config: TrainingConfig) -> None:
        self._model = ModuleOptimizer(model, config)
        self._auxiliary = {name: ModuleOptimizer(module, config) for name, module in auxiliary.items()}
        self._average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)

    def zero_grad(self) -> None:
        """Drop the gradients of the step before."""
        for optimizer in (self._model, *self._auxiliary.values()):
            optimizer.zero_grad()

    def step(self, rate: float) -> dict[str, Tensor]:
        """Take one step of every optimiser with learning rate `rate`. Returns the gradient norms by name."""
        optimizers = {"grad_norm": self._model}
        optimizers |= {f"{name}_grad_norm": optimizer for name, optimizer in self._auxiliary.items()}
        norms = {name: optimizer.step(rate) for name, optimizer in optimizers.items()}
        if self._average is not None:
            self._average.update()
        return norms

    @property
    def unmade_bytes(self) -> int:
        """Bytes that the first step will allocate for the optimisers."""
        return sum(optimizer.unmade_bytes for optimizer in (self._model, *self._auxiliary.values()))

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the model holds its weight average, if there is one."""
        return nullcontext() if self._average is None else self._average.in_model()

    def keep_average(self) -> None:
        """Put the weight average into the model, if there is one. Call it after the last step."""
        if self._average is not None:
            self._average.exchange()

    def state_dict(self) -> dict[str, Any]:
        """State of all parts by name, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, ModuleOptimizer | WeightAverage]:
        parts: dict[str, ModuleOptimizer | WeightAverage] = {"model": self._model, **self._auxiliary}
        return parts if self._average is None else parts | {"average": self._average}
