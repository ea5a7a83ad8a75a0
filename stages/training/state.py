"""All that a training step changes: weights, their optimisers, and the running average of weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from conf.section import TrainingConfig
from stages.training.ema import WeightAverage
from stages.training.optim import make_optimizer


class Learner:
    """Weights with an optimiser of their own."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        self._module, self._grad_clip = module, config.grad_clip
        self._optimizer = make_optimizer(module, config)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float) -> Tensor:
        """Clip the gradients and take a step of learning rate `rate`. The norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = clip_grad_norm_(self._module.parameters(), self._grad_clip)
        self._optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and optimiser."""
        return {"weights": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._module.load_state_dict(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])


class TrainingState:
    """The model, its companions by name, and the model's average where the settings ask for it."""

    def __init__(self, model: nn.Module, companions: Mapping[str, nn.Module], config: TrainingConfig) -> None:
        self._model = Learner(model, config)
        self._companions = {name: Learner(companion, config) for name, companion in companions.items()}
        self._average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)

    def step(self, loss: Tensor, rate: float) -> dict[str, Tensor]:
        """Go down the gradient of `loss` with learning rate `rate`. The gradient norms, by name."""
        learners = {"grad_norm": self._model}
        learners |= {f"{name}_grad_norm": companion for name, companion in self._companions.items()}
        for learner in learners.values():
            learner.zero_grad()
        loss.backward()
        norms = {name: learner.step(rate) for name, learner in learners.items()}
        if self._average is not None:
            self._average.update()
        return norms

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds its average inside, where there is one."""
        return nullcontext() if self._average is None else self._average.in_model()

    def keep_average(self) -> None:
        """Leave the average in the model, where there is one. Nothing is trained afterwards."""
        if self._average is not None:
            self._average.exchange()

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Learner | WeightAverage]:
        parts: dict[str, Learner | WeightAverage] = {"model": self._model, **self._companions}
        return parts if self._average is None else parts | {"average": self._average}
