"""Training a pair model: on mini-batches of pairs, or exactly on all cells at once."""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cemb import optim
from cemb.checks import check_integers, check_reals
from cemb.model import PairModel
from cemb.train import distributed
from cemb.train.batches import PairBatches
from cemb.train.checkpoints import Checkpoints, Progress
from cemb.train.objective import AllCellsLoss, WeightedLoss

OPTIMIZERS = ("sgd", "adagrad", "adam")
FULL_BATCH_OPTIMIZERS = (*OPTIMIZERS, "lbfgs")
LBFGS_HISTORY = 8

# Adam's moments decay faster than its defaults, since runs here last tens to hundreds of steps.
ADAM_BETAS = (0.8, 0.85)
# Those of mini-batches must average the noise of their negative samples.
MINI_BATCH_ADAM_BETAS = (0.9, 0.99)


def make_optimizer(
    name: str,
    parameters: Iterable[Tensor],
    learning_rate: float,
    *,
    sparse_gradients: bool = False,
    pair_steps: bool = False,
    lazy: bool = False,
    betas: tuple[float, float] = ADAM_BETAS,
) -> torch.optim.Optimizer:
    """SGD, Adagrad or Adam: torch's, fused or over sparse gradients, or `cemb.optim`'s for `pair_steps`.

    Over `sparse_gradients` (of torch's full tables) Adam is lazy, and for pair steps if `lazy`: values that a
    batch does not read keep their moments and do not move. `betas` are Adam's.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    check_reals("[0, inf)", learning_rate=learning_rate)
    parameters = list(parameters)
    if pair_steps:
        if name == "adam":
            return (optim.LazyAdam if lazy else optim.Adam)(parameters, learning_rate, betas)
        return (optim.SGD if name == "sgd" else optim.Adagrad)(parameters, learning_rate)
    if sparse_gradients:
        # torch's default; unless it is set, some optimizers warn of it at their first step.
        torch.sparse.check_sparse_tensor_invariants.disable()
    fused = {} if sparse_gradients else {"fused": True}
    # On a GPU torch's kernels for many parameters at once give one processor 65,536 values, which leaves most
    # of them idle for a pool; Adam's alternative is ten kernels.
    one_by_one = {"foreach": False} if not sparse_gradients and any(p.is_cuda for p in parameters) else fused
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, **one_by_one)
    if name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=learning_rate, **one_by_one)
    if sparse_gradients:
        return torch.optim.SparseAdam(parameters, lr=learning_rate, betas=betas)
    return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, **fused)


def optimizer_bytes(model: PairModel, optimizer: str) -> int:
    """Bytes of an optimizer's state for a model, measured on a step of zero gradients at rate 0.

    L-BFGS keeps its last moves and changes of gradient, a direction and a gradient, and makes no step where
    there is no gradient: its bytes are counted, not measured.
    """
    if optimizer == "lbfgs":
        return 2 * (LBFGS_HISTORY + 1) * sum(p.numel() * p.element_size() for p in model.parameters())
    parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in model.parameters()]
    step_of = make_optimizer(optimizer, parameters, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step_of.step()
    state = [value for entry in step_of.state.values() for value in entry.values()]
    return sum(value.numel() * value.element_size() for value in state if torch.is_tensor(value))


def _decay(optimizer: torch.optim.Optimizer, learning_rate: float, progress: float) -> None:
    """Linear decay to zero, as word2vec does."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (1 - progress)


class DivergenceError(RuntimeError):
    """The loss became infinite, NaN or ten times what it was."""


def _check(loss: float, first_loss: float, step: int, learning_rate: float) -> None:
    if not loss <= 10 * first_loss:
        raise DivergenceError(
            f"training diverged at step {step}: loss {loss:.4g} from {first_loss:.4g} "
            f"with learning_rate={learning_rate:g}"
        )


def _reclustering(model: PairModel) -> list[Any]:
    return [t for t in (model.word_table, model.context_table) if hasattr(t, "recluster")]


def train_full_batch(
    model: PairModel,
    objective: AllCellsLoss | WeightedLoss,
    *,
    optimizer: str,
    learning_rate: float,
    num_steps: int,
    evaluate_every: int = 10,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Minimize the all-cells squared error by `num_steps` exact gradient steps.

    The gradient is that of the error per word, so that rates carry over between vocabulary sizes. Dropout
    and biases play no part. A step is one evaluation of loss and gradient; L-BFGS, which has no rate to
    decay and searches along lines, takes about one to a move. Tables that recluster do so as often as the
    loss is noted, if not under L-BFGS, whose memory is of one function.

    With `checkpoints` training goes on from the newest, with the same bits on the CPU as if it had not been
    stopped, for the same number of threads. L-BFGS, which is one search over all steps, has none.

    Returns:
        ``{"step", "loss", "seconds"}`` at every `evaluate_every`-th step and after the last: the all-cells
        error before that step, and the time since the start.

    Raises:
        DivergenceError: the loss grew tenfold (not for L-BFGS, which may try such points) or is not finite.
        ValueError: a rate that is negative or not finite, or fewer than one step.
    """
    check_integers(1, num_steps=num_steps, evaluate_every=evaluate_every)
    check_reals("[0, inf)", learning_rate=learning_rate)
    num_words = model.num_words
    tables = _reclustering(model)
    # Before the clock starts: torch's first optimizer in a process imports for seconds.
    step_of: torch.optim.Optimizer
    if optimizer == "lbfgs":
        step_of = _lbfgs(model, learning_rate, num_steps)
    else:
        step_of = make_optimizer(optimizer, model.parameters(), learning_rate)
    done = checkpoints.resume(model, step_of) if checkpoints else Progress()
    history = done.history
    start = time.perf_counter() - done.seconds

    def note(step: int, loss: float) -> None:
        history.append({"step": step, "loss": loss, "seconds": time.perf_counter() - start})

    with tqdm(total=num_steps, initial=done.step, desc=f"full batch, {optimizer}", unit="step") as progress:

        def evaluate(step: int) -> Tensor:
            loss = objective(*model.factors())
            if step % evaluate_every == 0:
                note(step, loss.item())
            # A line search tries points that are worse, and leaves them.
            if optimizer != "lbfgs" or not math.isfinite(loss.item()):
                _check(loss.item(), history[0]["loss"], step, learning_rate)
            (loss / num_words).backward()
            progress.update()
            return loss

        if optimizer == "lbfgs":
            steps = iter(itertools.count())

            def closure() -> float:
                step_of.zero_grad()
                return evaluate(next(steps)).item()

            step_of.step(closure)
        else:
            for step in range(done.step, num_steps):
                if step and step % evaluate_every == 0:
                    for table in tables:
                        table.recluster()
                _decay(step_of, learning_rate, step / num_steps)
                evaluate(step)
                step_of.step()
                step_of.zero_grad()
                if checkpoints:
                    done.step, done.seconds = step + 1, time.perf_counter() - start
                    checkpoints.step_done(done, learning_rate, model, step_of)
    with torch.no_grad():
        last_loss = objective(*model.factors()).item()
    if not math.isfinite(last_loss):
        _check(last_loss, history[0]["loss"], num_steps, learning_rate)
    note(num_steps, last_loss)
    return history


def _lbfgs(model: PairModel, learning_rate: float, num_steps: int) -> torch.optim.LBFGS:
    """L-BFGS (Liu and Nocedal, 1989), its line searches for Wolfe's conditions, of `num_steps` evaluations.

    It may be one fewer, and fewer where the gradient vanishes.
    """
    return torch.optim.LBFGS(
        model.parameters(),
        learning_rate,
        max_iter=num_steps - 1,
        max_eval=num_steps - 1,  # torch's line search may make one more
        tolerance_grad=0,
        tolerance_change=0,
        history_size=LBFGS_HISTORY,
        line_search_fn="strong_wolfe",
    )


def train_mini_batches(
    model: PairModel,
    batches: PairBatches,
    loss_function: Callable[..., optim.SquaredError],
    *,
    optimizer: str,
    learning_rate: float,
    num_epochs: int,
    reports_per_epoch: int = 4,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Train on batches of pairs, by explicit steps of `cemb.optim` where the model has them.

    Where `batches` are a part of several, all ranks take part, of `cemb.train.distributed`, which sums losses
    and gradients: by autograd, for such steps have none. They end with the same bits. Losses are those of one
    process up to the order of float32 sums. Full tables should have sparse gradients then.

    Args:
        loss_function: of `cemb.train.losses`, from what batches hold beside the pairs.
        reports_per_epoch: entries of the history an epoch.
        checkpoints: training goes on from the newest, with the same bits on the CPU as if it had not been
            stopped, for the same numbers of threads and ranks.

    Returns:
        ``{"step", "epoch", "loss", "seconds"}`` for each report: steps and epochs done, the latter in
        fractions, the mean loss of the batches since the last report, each taken before its own step, and
        the time since the start. Of several ranks also ``"bytes_sent_per_step"``: bytes of gradients that a
        rank has handed over in a step, the mean of all so far; the loss is 16 more.

    Raises:
        DivergenceError: a batch's loss is ten times the first batch's or not finite.
        ValueError: a rate that is negative or not finite, or fewer than one epoch; of several ranks a model
            that is not on the CPU, or Adam on a pool of which it moves only what a batch reads.
        RankLostError: another rank has ended. RuntimeError: one ended with other values.

    Tables that recluster do so after each report but the last.
    """
    check_integers(1, num_epochs=num_epochs, reports_per_epoch=reports_per_epoch)
    num_ranks = batches.part[1]
    device = next(model.parameters()).device
    has_pair_steps = model.has_pair_step and device.type == "cpu"
    is_lazy = has_pair_steps and optim.plan(model.word_table.spec).way == "pair_step"
    if num_ranks > 1 and device.type != "cpu":
        raise ValueError(
            f"several processes train on the CPU, and the model is on {device}: NCCL sums no sparse gradients"
        )
    if num_ranks > 1 and is_lazy and optimizer == "adam":
        raise ValueError(
            f"Adam on {model.num_parameters:,} values moves only those that a batch reads, which several "
            "processes cannot: use a smaller pool, sgd, adagrad, or one process"
        )
    pair_steps = has_pair_steps and num_ranks == 1
    step_of = make_optimizer(
        optimizer,
        model.parameters(),
        learning_rate,
        sparse_gradients=any(getattr(module, "sparse", False) for module in model.modules()),
        pair_steps=pair_steps,
        lazy=pair_steps and is_lazy,
        betas=MINI_BATCH_ADAM_BETAS,
    )
    done = checkpoints.resume(model, step_of) if checkpoints else Progress()
    start = time.perf_counter() - done.seconds
    total = num_epochs * len(batches)
    report_every = max(1, len(batches) // reports_per_epoch)
    tables = _reclustering(model)
    model.train()
    with tqdm(total=total, initial=done.step, desc=f"mini-batches, {optimizer}", unit="step") as progress:
        for step in range(done.step, total):
            pairs, *labels = batches.batch(step)
            _decay(step_of, learning_rate, step / total)
            wanted = batches.scaled_to_whole(loss_function(*labels), step)
            if isinstance(step_of, optim.PairStepOptimizer):
                loss = model.pair_step(step_of, pairs, wanted).item()
            else:
                part = wanted(model(pairs))
                part.backward()
                loss = part.item()
            if num_ranks > 1:
                own_bytes = distributed.sum_gradients(model.parameters())
                loss, sent_bytes = distributed.sum_numbers(loss, own_bytes)
                done.bytes_sent += sent_bytes
            done.first_loss = loss if done.first_loss is None else done.first_loss
            _check(loss, done.first_loss, step, learning_rate)
            if not isinstance(step_of, optim.PairStepOptimizer):
                step_of.step()
                step_of.zero_grad()
            done.losses.append(loss)
            done.step, done.seconds = step + 1, time.perf_counter() - start
            if done.step % report_every == 0 or done.step == total:
                _report(done, len(batches), num_ranks)
                if done.step < total:
                    for table in tables:
                        table.recluster()
            if checkpoints:
                checkpoints.step_done(done, learning_rate, model, step_of)
            progress.update()
    model.eval()
    if num_ranks > 1:
        distributed.check_equal(model)
    return done.history


def _report(done: Progress, steps_per_epoch: int, num_ranks: int) -> None:
    """Add an entry to the history of mini-batches."""
    entry = {
        "step": done.step,
        "epoch": done.step / steps_per_epoch,
        "loss": sum(done.losses) / len(done.losses),
        "seconds": done.seconds,
    }
    if num_ranks > 1:
        entry["bytes_sent_per_step"] = done.bytes_sent / done.step / num_ranks
    done.history.append(entry)
    done.losses.clear()


def halve_until_stable(
    train: Callable[[float], list[dict[str, float]]], learning_rate: float, *, max_halvings: int = 12
) -> tuple[list[dict[str, float]], float]:
    """Call ``train(learning_rate)``, which must start afresh, at half the rate after each divergence.

    Returns the history and the rate that served. Raises the last DivergenceError after `max_halvings`.
    """
    check_reals("[0, inf)", learning_rate=learning_rate)
    check_integers(0, max_halvings=max_halvings)
    lowest = learning_rate / 2**max_halvings
    while True:
        try:
            return train(learning_rate), learning_rate
        except DivergenceError:
            if learning_rate <= lowest:
                raise
            learning_rate /= 2
