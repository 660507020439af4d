"""Optimizers for pools and full tables too large to be visited at every step.

They take over the gradients of `cemb.ops.pair_scores` for the parameters they hold, see
`cemb.touched.TouchedGradient`, and update only the values that a step touched; at block size 1, where real
batches touch most cache lines of a pool, they go through all of it. For small pools `torch.optim` with
``fused=True`` is as fast and simpler.

`step` uses the gradient up: a second call without a backward pass in between does nothing. Gradients from
other ops, in ``parameter.grad``, are taken in too, and then all values are visited.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from cemb.kernels import rules, updates
from cemb.touched import TouchedGradient, advise_huge_pages


class _Touched(torch.optim.Optimizer):
    """What they share: finding the gradient, and its state on huge pages."""

    state_names: tuple[str, ...] = ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; takes over the gradients of the group's parameters."""
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        try:
            for parameter in parameters:
                self._check(parameter)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in parameters:
            parameter.touched = TouchedGradient()

    def _check(self, parameter: Tensor) -> None:
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "cemb.optim updates float32 and float64 parameters on the CPU, got "
                f"{parameter.dtype} on {parameter.device}; use torch.optim"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"parameters must be contiguous, got strides {parameter.stride()}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update what was touched since the last step, and forget the gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                touched = parameter.touched
                if touched.is_empty and parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    for name in self.state_names:
                        room = advise_huge_pages(self._room_for_state(parameter))
                        state[name] = room.fill_(self._initial(group))
                state["step"] += 1
                arrays = [state[name].view(-1).numpy() for name in self.state_names]
                weight, rule = parameter.view(-1).numpy(), self._rule(group, state["step"])
                if parameter.grad is None:
                    touched.update(weight, arrays, rule)
                else:
                    dense = parameter.grad.view(-1).numpy()
                    touched.add_to(dense, weight)
                    updates.update_dense(weight, arrays, rule, dense)
                    touched.clear()
                # Kernels write past autograd, which would let a graph of before the step be used after it.
                torch.autograd.graph.increment_version(parameter)
        return loss

    def _room_for_state(self, parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter)

    def _initial(self, group: dict[str, Any]) -> float:
        return 0.0

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.touched.clear()
        if any(parameter.grad is not None for parameter in parameters):
            super().zero_grad(set_to_none)


class SGD(_Touched):
    """``w -= lr · g``: what `torch.optim.SGD` does, at the cost of what was touched."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.SGD(group["lr"])


class Adagrad(_Touched):
    """``s += g²; w -= lr · g / (√s + eps)``: what `torch.optim.Adagrad` does (Duchi et al., JMLR 2011)."""

    state_names = ("sum",)

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-2,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(parameters, defaults)

    def _initial(self, group: dict[str, Any]) -> float:
        initial: float = group["initial_accumulator_value"]
        return initial

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.Adagrad(group["lr"], group["eps"])


class RowwiseAdagrad(Adagrad):
    """Adagrad with one state for each row of a full table: ``s += mean(g²)`` over the row.

    What fbgemm has as ``EXACT_ROWWISE_ADAGRAD``. It is another algorithm than Adagrad: the values of a row
    share a rate, and the state is no larger than a column. ValueError for parameters that are not
    tables of rows, such as pools.
    """

    def _check(self, parameter: Tensor) -> None:
        super()._check(parameter)
        if parameter.dim() != 2:
            raise ValueError(
                f"row-wise Adagrad is for tables [rows, columns], got shape {list(parameter.shape)}; "
                "a pool has no rows: use Adagrad"
            )

    def _room_for_state(self, parameter: Tensor) -> Tensor:
        return parameter.new_empty(len(parameter))

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.RowwiseAdagrad(group["lr"], group["eps"])


class LazyAdam(_Touched):
    """Adam (Kingma and Ba, ICLR 2015) whose moments rest where a step touches nothing.

    `torch.optim.SparseAdam` does the same for sparse gradients. Dense Adam goes on moving a value by its
    decaying mean, and lets the square decay, in steps that do not touch it; the two agree only where every
    step touches everything. A pool of block size 1 counts as touched everywhere.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        beta1, beta2 = group["betas"]
        step_size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return rules.Adam(step_size, group["eps"], beta1, beta2)
