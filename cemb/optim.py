"""Optimizers with a step on pairs, for pools and full tables too large for a gradient of their size.

Each is torch's: gradients in ``parameter.grad`` are stepped by `step` as there, with the same options, state
and checkpoints. Beside that it has `pair_step`: scores, loss, gradient and update in one call, which visits
only what the pairs read. `plan` says for which tables that pays; pools that fit a core's cache train as well
by autograd.

fbgemm's embeddings for training own their optimizers for the same reason (Khudia et al., 2021,
https://arxiv.org/abs/2101.05615).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from cemb import ops, reference
from cemb.checks import check_reals
from cemb.hashing import HashSpec, PairDropout, Spec
from cemb.kernels.checks import check_array
from cemb.kernels.cpu import rules, updates
from cemb.kernels.cpu.pairs import Batch
from cemb.memory import advise_huge_pages


class Plan(NamedTuple):
    """How a table is trained."""

    way: Literal["autograd", "pair_step"]
    """`pair_step` where a gradient as large as the table would take most of a step."""
    sums: updates.Plan
    """How `pair_step` sums gradients, see `cemb.kernels.cpu.updates`."""


def plan(spec: Spec, device: torch.device | str = "cpu") -> Plan:
    """What follows from a table's size: how to train it, and how its gradients are summed."""
    sums = updates.plan(spec)
    is_small = sums == "private" or torch.device(device).type != "cpu"
    return Plan("autograd" if is_small else "pair_step", sums)


class SquaredError(NamedTuple):
    """``Σ sample_weights[i] (score[i] − targets[i])²``, which `pair_step` computes in the pass itself."""

    targets: Tensor
    """``[n]``."""
    sample_weights: Tensor | None = None
    """``[n]``; None for 1/n each, which makes it the mean squared error."""

    def __call__(self, scores: Tensor) -> Tensor:
        """The loss of scores ``[n]``, for autograd."""
        errors = (scores - self.targets).square()
        return errors.mean() if self.sample_weights is None else (self.sample_weights * errors).sum()


class PairStepOptimizer(torch.optim.Optimizer):
    """An optimizer with a `pair_step`; not to be used by itself."""

    state_names: tuple[str, ...] = ()
    is_lazy = False
    """Whether what a batch does not read must not move."""

    @torch.no_grad()
    def pair_step(
        self,
        parameter: Tensor,
        pairs: Tensor,
        loss: SquaredError | Callable[[Tensor], Tensor],
        spec: Spec,
        *,
        context_offset: int = 0,
        dropout: float = 0.0,
    ) -> Tensor:
        """Score pairs, and step one parameter by the gradient of a loss of their scores.

        It does to `parameter` what `cemb.ops.pair_scores`, the loss, its backward pass and `step` do one
        after the other, without a gradient as large as the parameter. Nothing is left between calls:
        ``parameter.grad`` is not written. Hooks on `step`, gradient scalers and clipping see nothing of it,
        and under DDP or FSDP each process steps for itself.

        Args:
            parameter: of this optimizer, float32 or float64 on the CPU: a pool ``[pool_size]`` or a full
                table ``[rows, dim]``.
            pairs: row numbers ``[n, 2]``, int32 or int64; they and `spec`, `context_offset` and `dropout` are
                as for `cemb.ops.pair_scores`.
            loss: a `SquaredError`; or a function from the scores ``[n]`` to a scalar, which autograd
                differentiates: other parameters that it depends on get their gradients, for a step of their
                own.

        Returns:
            The loss before the step, a scalar. Deterministic for any number of threads, in hashed pools of
            which the `plan` is ``private`` for a given one.

        Raises:
            ValueError: `parameter` is not of this optimizer or cannot be stepped so; its state is not of its
                size, as one that was loaded, or of before its data were replaced; its group has an option
                that such a step does not have, such as weight decay, or one out of range; `SquaredError` is
                not of ``[n]``; the loss is no scalar, or depends on `parameter` beside the scores.
            RuntimeError: `parameter` has a gradient that no step has used.
            IndexError, TypeError, ValueError: as `cemb.ops.pair_scores`.
        """
        group = self._check_parameter(parameter, spec)
        ops.check_pairs(parameter, pairs, spec, context_offset)
        reference.check_ids(pairs, spec.num_embeddings)
        drop = PairDropout(dropout, int(ops.draw_seed(dropout, parameter)))
        dtype, labels = ops.array(parameter).dtype, {}
        found: list[Tensor] = []
        if isinstance(loss, SquaredError):
            labels = _labels(loss, parameter, len(pairs))

        def differentiate(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
            leaf = torch.from_numpy(scores).requires_grad_()
            with torch.enable_grad():
                value = loss(leaf)
                if value.numel() != 1:
                    raise ValueError(f"the loss must be a scalar, got shape {list(value.shape)}")
                value.backward()
            if parameter.grad is not None:
                parameter.grad = None
                raise ValueError("the loss depends on the parameter beside the scores: use autograd and step")
            if leaf.grad is None:
                raise ValueError("the loss does not depend on the scores")
            found.append(value.detach())
            return ops.array(leaf.grad)

        batch = Batch.of(ops.array(pairs.long()), drop, dtype, **labels)
        state = self._state_of(parameter, group)
        stepped = [
            ops.array(tensor.view(-1)) for tensor in (parameter, *(state[n] for n in self.state_names))
        ]
        rule = self._rule(group, int(state.get("step", 0)) + 1)
        how = updates.plan(spec, is_lazy=self.is_lazy)
        callback = None if labels else differentiate
        total = updates.step(stepped, rule, stepped[0], batch, spec, context_offset, how, callback)
        if "step" in state:
            state["step"] += 1
        # Kernels write past autograd, which would let a graph of before the step be used after it.
        torch.autograd.graph.increment_version(parameter)
        self._opt_called = True  # schedulers warn unless a step came before them
        return found[0] if found else parameter.new_tensor(total)

    def _check_parameter(self, parameter: Tensor, spec: Spec) -> dict[str, Any]:
        """The group of a parameter that may be stepped."""
        groups = (g for g in self.param_groups if any(parameter is own for own in g["params"]))
        group = next(groups, None)
        if group is None:
            raise ValueError(
                f"expected a parameter of this optimizer, got another of shape {list(parameter.shape)}"
            )
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "pair_step is for float32 and float64 parameters on the CPU, got "
                f"{parameter.dtype} on {parameter.device}; use autograd and step"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"the parameter must be contiguous, got strides {parameter.stride()}")
        if not parameter.requires_grad:
            raise ValueError("the parameter does not require a gradient, so there is none to step by")
        if parameter.grad is not None:
            raise RuntimeError("the parameter has a gradient that no step has used: step or zero_grad first")
        unknown = [f"{name}={group[name]!r}" for name in _OTHER_OPTIONS if group.get(name)]
        if unknown:
            raise ValueError(f"pair_step has no {', '.join(unknown)}; use autograd and step")
        _check_options(group)
        return group

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, made where there is none."""
        state: dict[str, Any] = self.state[parameter]
        if self.state_names and not state:
            state.update(self._new_state(parameter, group))
        for name in self.state_names:
            if name not in state:
                raise ValueError(f"the parameter's state has no {name!r}, but {[*state]}: {_FOREIGN}")
            _check_state(name, state[name], parameter, self._state_shape(parameter))
        return state

    def _state_shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A state as torch makes it, large tensors on huge pages."""
        zeros = {name: advise_huge_pages(torch.empty_like(parameter)).zero_() for name in self.state_names}
        return {"step": torch.tensor(0.0), **zeros}

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        raise NotImplementedError


# Options of torch's optimizers that a rule of the kernels does not have.
_OTHER_OPTIONS = (
    "weight_decay",
    "momentum",
    "dampening",
    "nesterov",
    "maximize",
    "lr_decay",
    "amsgrad",
    "capturable",
    "differentiable",
)


def _check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for a rate or another number that no step can be made with.

    torch checks those that an optimizer is made with, and neither NaN nor a group's own.
    """
    names = ("lr", "eps", "initial_accumulator_value")
    check_reals("[0, inf)", **{name: float(group[name]) for name in names if name in group})
    if "betas" in group:
        beta1, beta2 = map(float, group["betas"])
        check_reals("[0, 1)", beta1=beta1, beta2=beta2)


_FOREIGN = "it is of another optimizer or parameter; without it in optimizer.state, a new one is made"


def _check_state(name: str, state: Tensor, parameter: Tensor, shape: torch.Size) -> None:
    if state.device != parameter.device:
        raise ValueError(f"{name!r} must be on {parameter.device}, got {state.device}: {_FOREIGN}")
    try:
        check_array(f"{name!r} of a parameter {list(parameter.shape)}", state, shape, parameter.dtype)
    except ValueError as error:
        raise ValueError(f"{error}: {_FOREIGN}") from None


def _labels(loss: SquaredError, parameter: Tensor, n: int) -> dict[str, npt.NDArray[Any]]:
    """Targets and sample weights as a `Batch` has them."""
    weights = parameter.new_full((1,), 1 / max(n, 1)) if loss.sample_weights is None else loss.sample_weights
    for name, tensor in zip(SquaredError._fields, loss, strict=True):
        if tensor is not None and tensor.shape != (n,):
            raise ValueError(f"{name} must have shape [{n}], one for each pair, got {list(tensor.shape)}")
    found = {"targets": loss.targets, "sample_weights": weights}
    return {name: ops.array(tensor.detach().to(parameter)) for name, tensor in found.items()}


class SGD(PairStepOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` with a `pair_step`: ``w -= lr · g``."""

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.SGD(float(group["lr"]))


class Adagrad(PairStepOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with a `pair_step`: ``s += g²; w -= lr · g / (√s + eps)``."""

    state_names = ("sum",)

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **options)
        for state in self.state.values():  # torch has made them already
            state["sum"] = advise_huge_pages(torch.empty_like(state["sum"])).copy_(state["sum"])

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = super()._new_state(parameter, group)  # of a group that was added later: torch gives it none
        state["sum"].fill_(group["initial_accumulator_value"])
        return state

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.Adagrad(float(group["lr"]), group["eps"])


class Adam(PairStepOptimizer, torch.optim.Adam):
    """`torch.optim.Adam` with a `pair_step`, for hashed pools, of which every step visits all values.

    ValueError for full tables, and for large pools in blocks: see `LazyAdam`.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def _check_parameter(self, parameter: Tensor, spec: Spec) -> dict[str, Any]:
        group = super()._check_parameter(parameter, spec)
        if updates.plan(spec) == "conflicts":
            raise ValueError(
                f"Adam visits all {parameter.numel():,} values at each step: use LazyAdam, which moves those "
                "that a batch reads, or autograd and step"
            )
        return group

    def _rule(self, group: dict[str, Any], step: int) -> rules.Adam:
        beta1, beta2 = map(float, group["betas"])
        root = (1 - beta2**step) ** 0.5
        return rules.Adam(float(group["lr"]) * root / (1 - beta1**step), group["eps"] * root, beta1, beta2)


class LazyAdam(PairStepOptimizer, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam` with a `pair_step`: Adam whose moments rest where a step reads nothing.

    Dense Adam goes on moving a value by its decaying mean, and lets the square decay, in steps that do not
    read it; the two agree only where every step reads everything. As in torch, `eps` is added before the
    correction of the square's bias. Values of a pool of block size 1 count as read by every step. `step` is
    for sparse gradients.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    is_lazy = True

    def _rule(self, group: dict[str, Any], step: int) -> rules.Adam:
        beta1, beta2 = map(float, group["betas"])
        rate = float(group["lr"]) * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return rules.Adam(rate, group["eps"], beta1, beta2)


class RowwiseAdagrad(PairStepOptimizer):
    """Adagrad with one state for each row of a full table: ``s += mean(g²)`` over the row.

    What fbgemm has as ``EXACT_ROWWISE_ADAGRAD``. It is another algorithm than Adagrad: the values of a row
    share a rate, and the state is no larger than a column. ValueError for parameters that are not tables of
    rows, such as pools.
    """

    state_names = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; refuses what is not a table."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"row-wise Adagrad is for tables [rows, columns], got shape {list(parameter.shape)}; "
                    "a pool has no rows: use Adagrad"
                )

    def _check_parameter(self, parameter: Tensor, spec: Spec) -> dict[str, Any]:
        if isinstance(spec, HashSpec) or parameter.shape != (spec.num_embeddings, spec.embedding_dim):
            raise ValueError(
                f"row-wise Adagrad needs a parameter of the table's shape, one state for each row: got "
                f"{list(parameter.shape)} for {spec}"
            )
        return super()._check_parameter(parameter, spec)

    def _state_shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape[:1]

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        sums = parameter.new_full(self._state_shape(parameter), group["initial_accumulator_value"])
        return {"sum": sums}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step by the gradients in ``parameter.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    total = self._state_of(parameter, group)["sum"]
                    total += parameter.grad.square().mean(1)
                    rates = -group["lr"] / (total.sqrt() + group["eps"])
                    parameter.addcmul_(parameter.grad, rates[:, None])
        return loss

    def _rule(self, group: dict[str, Any], step: int) -> rules.Rule:
        return rules.RowwiseAdagrad(float(group["lr"]), group["eps"])
