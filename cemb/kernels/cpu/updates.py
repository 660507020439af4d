"""A step on a batch of pairs: the gradient of their loss, summed and applied by a rule.

`plan` says how, from the table alone:

- ``private``: each thread sums into a pool of its own, and the sum of these steps all of the pool;
- ``conflicts``: blocks that no other of the batch overlaps are stepped in the pass over the pairs, the others
  once their gradients are summed, see `cemb.kernels.cpu.conflicts`;
- ``buckets``: see `cemb.kernels.cpu.buckets`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.hashing import FullSpec, Spec
from cemb.kernels.checks import check_array
from cemb.kernels.cpu import buckets, conflicts, locate, rules, simd, threads
from cemb.kernels.cpu.conflicts import bit_length, decode, first_listed
from cemb.kernels.cpu.locate import S32, Geometry, block_length, is_single
from cemb.kernels.cpu.pairs import Batch, add_single_chunk, score, visit_chunk
from cemb.kernels.cpu.threads import jit, parallel, scratch

Plan = Literal["private", "conflicts", "buckets"]
_PAGE = 1024  # values that are summed before they are stepped
_PREFETCH_TERMS = 16  # blocks ahead whose terms are prefetched


def plan(spec: Spec, *, is_lazy: bool = False) -> Plan:
    """How steps on a table sum gradients; `is_lazy` if values that a batch does not read must not move.

    At block size 1 every value counts as read: a batch of the usual size touches most cache lines of a pool.
    """
    if isinstance(spec, FullSpec):
        return "conflicts"
    is_small = spec.pool_size <= locate.PRIVATE_POOL_LIMIT
    if spec.is_single:
        return "private" if is_small else "buckets"
    return "private" if is_small and not is_lazy else "conflicts"


@jit()
def _add_chunk(t, num_threads, private, weight, batch, table):
    """Sum the gradients of the thread's pairs into its private pool, cleared first; returns the loss."""
    if is_single(table):
        return add_single_chunk(t, num_threads, private, weight, batch, table)
    private[:] = 0
    sums, none = rules.Stepped(private, private, private), (private[:0], np.empty((0, 2, 0), np.int32))
    return visit_chunk(t, num_threads, rules.Add(), sums, weight, batch, none, table)


@jit()
def _update_chunk(t, rule, stepped, private, table):
    """Step the thread's slice of all values by the sums of `private` ``[threads, pool_size]``.

    At block size 1 the gradients are every second value of ``[threads, 2 * pool_size]``.
    """
    num_threads, size = private.shape[0], stepped.weight.shape[0]
    end = size * (t + 1) // num_threads
    sums = np.empty(_PAGE, private.dtype)
    for low in range(size * t // num_threads, end, _PAGE):
        length = min(_PAGE, end - low)
        sums[:] = 0
        for other in range(num_threads):
            if is_single(table):
                source = private[other, 2 * low : 2 * (low + length)]
                for p in range(length):
                    sums[p] += source[2 * p + 1]
            else:
                source = private[other, low : low + length]
                for p in range(length):
                    sums[p] += source[p]
        rules.update(rule, stepped, low, sums, 0, length)


@parallel
def _step_private(rule, stepped, weight, batch, private, table):
    """Step all of `stepped`; returns the loss."""
    num_threads = private.shape[0]
    losses = np.zeros(num_threads)
    for phase in range(2):
        for t in prange(num_threads):
            if phase == 0:
                losses[t] = _add_chunk(np.int64(t), num_threads, private[t], weight, batch, table)
            else:
                _update_chunk(np.int64(t), rule, stepped, private, table)
    return losses.sum()


# Without fast math, which contracts multiply and add in whole vectors and not at ends: results would depend
# on where slices end, and with it on the number of threads.
@jit()
def _update_conflicting_chunk(t, rule, stepped, workspace, table):
    """Sum the terms of the conflicting blocks in the thread's slice, and step the weights under them."""
    terms, ranks, keys, _, cuts, counts = workspace
    blocks, size, dim = table.num_blocks, table.block_size, table.dim
    block_bits = bit_length(blocks)
    last_length = block_length(table, blocks - 1)
    unit = np.int64(dim if table.num_starts == 0 else 1)
    low_end, high_end = cuts[t] * unit, cuts[t + 1] * unit
    lowest = first_listed(cuts[t], table)
    # Sums of segments, each of blocks that overlap: where they start in the pool, and where among the sums.
    sums = np.empty(_PAGE + 2 * size, terms.dtype)
    starts, offsets = np.empty(_PAGE, np.int64), np.empty(_PAGE + 1, np.int64)
    segment, used, end, base = 0, np.int64(0), np.int64(-1), np.int64(0)
    for x in range(counts[t]):
        i, side, b = decode(keys[t, 0, min(x + 2 * _PREFETCH_TERMS, counts[t] - 1)], block_bits)
        simd.prefetch(ranks[i, side], b)
        ahead = min(x + _PREFETCH_TERMS, counts[t] - 1)
        i, side, b = decode(keys[t, 0, ahead], block_bits)
        simd.prefetch_segment(terms, size * np.int64(ranks[i, side, b]), size)
        place = (np.int64(keys[t, 0, ahead] >> S32) + lowest) * unit
        rules.prefetch(rule, stepped, place, size, dim)
        i, side, b = decode(keys[t, 0, x], block_bits)
        place = (np.int64(keys[t, 0, x] >> S32) + lowest) * unit
        length = last_length if b == blocks - 1 else size
        begin = max(0, low_end - place)
        length = min(length, high_end - place) - begin
        place, term = place + begin, size * np.int64(ranks[i, side, b]) + begin
        if length <= 0:
            continue
        is_new = place > end
        if used >= _PAGE:
            # What lies before `place` is complete.
            final = used if is_new else base + place
            offsets[segment] = final
            _step_segments(rule, stepped, sums, starts, offsets[: segment + 1], dim)
            for k in range(final, used):
                sums[k - final] = sums[k]
            segment, used, base = 0, used - final, -place
            if not is_new:
                segment, starts[0], offsets[0] = 1, place, 0
        if is_new:
            base = used - place
            starts[segment], offsets[segment] = place, used
            segment += 1
        overlap = 0 if is_new else end - place
        simd.add_scaled(sums, base + place, terms, term, terms.dtype.type(1), length, overlap)
        end = max(end, place + length)
        used = base + end
    offsets[segment] = used
    _step_segments(rule, stepped, sums, starts, offsets[: segment + 1], dim)


@jit()
def _step_segments(rule, stepped, sums, starts, offsets, dim):
    """Step each segment r, from ``starts[r]`` on, by ``sums[offsets[r] : offsets[r + 1]]``."""
    for r in range(offsets.shape[0] - 1):
        rules.update_segment(rule, stepped, starts[r], sums, offsets[r], offsets[r + 1] - offsets[r], dim)


# One launch for a whole step: Python between launches would run on cold caches.
@parallel
def _step_conflicts(rule, stepped, weight, batch, workspace, table):
    """Step what a batch reads; returns the loss."""
    num_threads = workspace.counts.shape[0]
    losses = np.zeros(num_threads)
    found = workspace.terms, workspace.ranks
    for phase in range(4):  # of one loop, since Numba compiles the body of each
        if phase == 1:
            conflicts.cut(workspace, weight.shape[0] // (table.dim if table.num_starts == 0 else 1))
        for t in prange(num_threads):
            if phase == 0:
                conflicts.list_chunk(np.int64(t), num_threads, batch.pairs, workspace, table)
            elif phase == 1:
                conflicts.sort_chunk(np.int64(t), workspace, table)
            elif phase == 2:
                losses[t] = visit_chunk(np.int64(t), num_threads, rule, stepped, weight, batch, found, table)
            else:
                _update_conflicting_chunk(np.int64(t), rule, stepped, workspace, table)
    return losses.sum()


def _check(
    stepped: Sequence[npt.NDArray[Any]], rule: rules.Rule, weight: npt.NDArray[Any], spec: Spec
) -> None:
    """Raise ValueError unless arrays are those that `step` takes."""
    own, *states = stepped
    check_array("what is stepped", own, (spec.pool_size,), np.float32, np.float64)
    locate.check_pool("weight", weight, spec, own.dtype)
    kind: Any = type(rule)
    if len(states) != rules.num_states(kind):
        raise ValueError(f"{kind.__name__} has {rules.num_states(kind)} states, got {len(states)} arrays")
    by_row = kind is rules.RowwiseAdagrad
    for state in states:
        check_array("state", state, (spec.num_embeddings if by_row else spec.pool_size,), own.dtype)


def step(
    stepped: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    weight: npt.NDArray[Any],
    batch: Batch,
    spec: Spec,
    context_offset: int,
    how: Plan,
    differentiate: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None,
) -> float:
    """Step by the gradient of a loss of the scores of a batch's pairs.

    Args:
        stepped: what the rule steps, its weights and states, each ``[pool_size]``, or the values of a full
            table, float32 or float64; states of row-wise Adagrad ``[rows]``. To sum a gradient, `rules.Add`
            and a zeroed array.
        weight: of which scores are, like ``stepped[0]``: the same array, if weights are stepped.
        batch: see `Batch`; its slopes are of the dtype of `stepped`.
        spec, context_offset: of the table, as for `cemb.ops.pair_scores`.
        how: a `plan` for this table.
        differentiate: from the scores ``[n]`` to the derivatives of the loss, ``[n]``; None if the batch has
            them, or targets.

    Returns:
        The sum of squared errors before the step, where the batch has targets. Deterministic for a given
        number of threads, and by the plans ``conflicts`` and ``buckets`` for any.

    Raises:
        ValueError: more pairs and blocks than can be numbered; arrays of other shapes or dtypes.
    """
    _check(stepped, rule, weight, spec)
    if differentiate is None:
        batch.check(stepped[0].dtype)
    first, second = [*stepped[1:], stepped[0], stepped[0]][:2]  # rules read no state that they do not have
    wanted, table = rules.Stepped(stepped[0], first, second), Geometry.of(spec, context_offset)
    dtype, n = stepped[0].dtype, len(batch.pairs)
    rule = type(rule)(*map(dtype.type, rule))
    if how == "buckets":
        return _step_buckets(rule, wanted, weight, batch, table, spec, differentiate)
    if differentiate is not None:
        scores = np.empty(n, dtype)
        score(weight, batch, spec, context_offset, scores)
        batch = batch._replace(slopes=differentiate(scores))
        batch.check(dtype)
    with threads.launch() as num_threads:
        if how == "conflicts":
            workspace = conflicts.Workspace.of(n, spec, dtype, num_threads)
            return float(_step_conflicts(rule, wanted, weight, batch, workspace, table))
        size = (2 if spec.is_single else 1) * spec.pool_size
        private = scratch("private pools", (num_threads, size), dtype)
        return float(_step_private(rule, wanted, weight, batch, private, table))


def _step_buckets(
    rule: rules.Rule,
    stepped: rules.Stepped,
    weight: npt.NDArray[Any],
    batch: Batch,
    table: Geometry,
    spec: Spec,
    differentiate: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None,
) -> float:
    n, dtype, loss = len(batch.pairs), stepped.weight.dtype, 0.0
    check_array("pairs", batch.pairs, (n, 2), np.int64)
    scores = np.empty(n, dtype)
    with threads.launch() as num_threads:
        kept = buckets.Buckets.of(n, spec, dtype, num_threads)
        buckets.score(num_threads, weight, batch, scores, kept, table)
    if differentiate is not None:
        batch = batch._replace(slopes=differentiate(scores))
        batch.check(dtype)
    elif len(batch.targets):
        errors = scores - batch.targets
        batch = batch._replace(slopes=2 * batch.sample_weights * errors)
        loss = float(np.sum(batch.sample_weights * np.square(errors, dtype=np.float64)))
    with threads.launch():
        buckets.step(rule, stepped, batch, kept, table)
    return loss
