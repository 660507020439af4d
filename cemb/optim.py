"""Optimizers for pools and full tables too large to be visited at every step.

They take over the gradients of `cemb.ops.pair_scores` for the parameters they hold, see
`cemb.touched.TouchedGradient`, and update only the values that a step touched; at block size 1, where real
batches touch most cache lines of a pool, they go through all of it. For small pools `torch.optim` with
``fused=True`` is as fast and simpler.

`step` uses the gradient up: a second call without a backward pass in between does nothing. Gradients from
other ops, in ``parameter.grad``, are taken in too, and then all values are visited.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cemb import ops, reference
from cemb.hashing import HashSpec, PairDropout, Spec
from cemb.kernels.cpu import rules, threads, updates
from cemb.touched import TouchedGradient, advise_huge_pages

_Array = npt.NDArray[Any]
_T = TypeVar("_T")


def _flat(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().view(-1).numpy()
    return array


class Touched(torch.optim.Optimizer):
    """What these optimizers share; not to be used by itself."""

    state_names: tuple[str, ...] = ()
    # Whether a step is to visit all values; None if it makes no difference to those that have no gradient.
    visits_all: bool | None = None

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
                if parameter.grad is not None or not parameter.touched.is_empty:
                    self._step_parameter(group, parameter)
        return loss

    def _step_parameter(self, group: dict[str, Any], parameter: Any) -> None:
        touched: TouchedGradient = parameter.touched
        if parameter.grad is None and not self.visits_all:
            self._update(group, parameter, touched.update)
            return

        def visit(weight: _Array, states: list[_Array], rule: rules.Rule) -> None:
            dense = np.zeros_like(weight) if parameter.grad is None else _flat(parameter.grad)
            touched.add_to(dense, weight)
            updates.update_dense(weight, states, rule, dense)
            touched.clear()

        self._update(group, parameter, visit)

    def _update(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        update: Callable[[_Array, list[_Array], rules.Rule], _T],
    ) -> _T:
        """Call `update` with parameter and states as flat arrays, and a step's rule; then count the step.

        The first makes the states.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in self.state_names:
                state[name] = advise_huge_pages(self._empty_state(parameter)).fill_(self._initial(group))
        states = [_flat(state[name]) for name in self.state_names]
        found = update(_flat(parameter), states, self._rule(group, state["step"] + 1))
        state["step"] += 1
        # Kernels write past autograd, which would let a graph of before the step be used after it.
        torch.autograd.graph.increment_version(parameter)
        return found

    @torch.no_grad()
    def squared_error_step(
        self,
        parameter: Tensor,
        pairs: Tensor,
        targets: Tensor,
        spec: Spec,
        *,
        sample_weights: Tensor | None = None,
        context_offset: int = 0,
        dropout: float = 0.0,
    ) -> Tensor:
        """A training step on ``Σ sample_weights[i] (score[i] − targets[i])²`` of pairs, in one pass.

        It does to one parameter what `cemb.ops.pair_scores`, this loss, its backward pass, `step` and
        `zero_grad` do one after the other, without autograd; hooks on `step` are not called. No such pass is
        there for row-wise Adagrad; for block size 1 in pools larger than
        `cemb.kernels.cpu.threads.PRIVATE_POOL_LIMIT`; and for `Adam`, which visits all values, in those and
        in full tables: autograd makes these steps. Deterministic for any number of threads, in hashed pools
        up to that limit for a given one.

        Args:
            parameter: of this optimizer, a pool ``[pool_size]`` or a full table ``[rows, dim]``.
            pairs: row numbers ``[n, 2]``, int32 or int64; they and `spec`, `context_offset` and `dropout` are
                as for `cemb.ops.pair_scores`.
            targets: of the scores, ``[n]``.
            sample_weights: ``[n]``; None for 1/n each, which makes the loss the mean squared error.

        Returns:
            The loss before the step, a scalar.

        Raises:
            ValueError: `parameter` is not of this optimizer or does not require a gradient, or `targets` or
                `sample_weights` is not ``[n]``.
            RuntimeError: `parameter` has a gradient that no step has used.
            IndexError, TypeError, ValueError: as `cemb.ops.pair_scores`.
        """
        group = self._group_of(parameter)
        if not parameter.requires_grad:
            raise ValueError("the parameter does not require a gradient, so there is none to step by")
        ops.check_pairs(parameter, pairs, spec, context_offset)
        n = len(pairs)
        for name, tensor in (("targets", targets), ("sample_weights", sample_weights)):
            if tensor is not None and tensor.shape != (n,):
                raise ValueError(f"{name} must have shape [{n}], one for each pair, got {list(tensor.shape)}")
        touched: TouchedGradient = parameter.touched  # type: ignore[attr-defined]
        if parameter.grad is not None or not touched.is_empty:
            raise RuntimeError("the parameter has a gradient that no step has used: step or zero_grad first")
        if sample_weights is None:
            sample_weights = parameter.new_full((1,), 1 / max(n, 1))
        targets, sample_weights = (
            tensor.detach().to(parameter).contiguous() for tensor in (targets, sample_weights)
        )
        is_small = isinstance(spec, HashSpec) and spec.pool_size <= threads.PRIVATE_POOL_LIMIT
        if not self._is_one_pass(spec, is_small):
            with torch.enable_grad():
                scores = ops.pair_scores(
                    parameter, pairs, spec, context_offset=context_offset, dropout=dropout
                )
                loss = (sample_weights * (scores - targets).square()).sum()
            loss.backward()
            self._step_parameter(group, parameter)
            return loss.detach()
        drop = PairDropout(dropout, int(ops.draw_seed(dropout, parameter)))
        reference.check_ids(pairs, spec.num_embeddings)
        labels = targets.numpy(), sample_weights.numpy()
        batch = pairs.long().contiguous().numpy(), *labels, spec, context_offset, drop
        # With an eps of 0, Adagrad would divide 0 by 0 where no gradient came yet.
        visits_all = bool(self.visits_all) if group.get("eps") == 0 else self.visits_all
        fit: Callable[..., float] = touched.fit
        if is_small and (visits_all is not False or spec.is_single):
            fit = updates.fit_pairs_dense
        found = self._update(group, parameter, lambda *arguments: fit(*arguments, *batch))
        return parameter.new_tensor(found)

    def _is_one_pass(self, spec: Spec, is_small: bool) -> bool:
        return is_small or not (spec.is_single or self.visits_all)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(parameter is own for own in group["params"]):
                return group
        raise ValueError(
            f"expected a parameter of this optimizer, got another of shape {list(parameter.shape)}"
        )

    def _empty_state(self, parameter: Tensor) -> Tensor:
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


class SGD(Touched):
    """``w -= lr · g``: what `torch.optim.SGD` does, at the cost of what was touched."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.SGD(group["lr"])


class Adagrad(Touched):
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

    def _empty_state(self, parameter: Tensor) -> Tensor:
        return parameter.new_empty(len(parameter))

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.RowwiseAdagrad(group["lr"], group["eps"])

    def _is_one_pass(self, spec: Spec, is_small: bool) -> bool:
        return False


class Adam(Touched):
    """What `torch.optim.Adam` does (Kingma and Ba, ICLR 2015). Every step visits all values.

    It is for small pools, which every batch touches everywhere; see `LazyAdam` for others.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    visits_all = True

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    def _rule(self, group: dict[str, Any], step: int) -> rules.Adam:
        beta1, beta2 = group["betas"]
        root = (1 - beta2**step) ** 0.5
        return rules.Adam(group["lr"] * root / (1 - beta1**step), group["eps"] * root, beta1, beta2)


class LazyAdam(Adam):
    """`Adam` whose moments rest where a step touches nothing.

    `torch.optim.SparseAdam` does the same for sparse gradients, and as there `eps` is added before the
    correction of the square's bias. Dense Adam goes on moving a value by its decaying mean, and lets the
    square decay, in steps that do not touch it; the two agree only where every step touches everything. A
    pool of block size 1 counts as touched everywhere.
    """

    visits_all = False

    def _rule(self, group: dict[str, Any], step: int) -> rules.Adam:
        return super()._rule(group, step)._replace(eps=group["eps"])
