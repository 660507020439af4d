"""How good a factorization is: distance to the optimum, word similarity, analogies."""

import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scipy.sparse.linalg
import scipy.special
import torch
from torch import Tensor
from tqdm import tqdm

from cemb.kernels import sparse


@dataclass(frozen=True)
class Optimum:
    """The best rank-`rank` factorization of a matrix in all-cells squared error (Eckart and Young, 1936)."""

    left: npt.NDArray[np.float32]  # float32 [words, rank], orthonormal columns
    singular_values: npt.NDArray[np.float32]  # float32 [rank], falling
    right: npt.NDArray[np.float32]  # float32 [contexts, rank], orthonormal columns
    squared_norm: float  # of the matrix

    @property
    def loss(self) -> float:
        """All-cells squared error of the optimum."""
        return self.squared_norm - float(np.square(self.singular_values, dtype=np.float64).sum())

    def gap(self, loss: float) -> float:
        """``(loss − L*) / (‖M‖² − L*)``: 0 at the optimum, 1 for predicting zero everywhere."""
        return (loss - self.loss) / (self.squared_norm - self.loss)

    def factors(
        self, singular_value_power: float = 0.5
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Word vectors U·S^p and context vectors V·S^(1−p)."""
        scale = self.singular_values**singular_value_power
        return self.left * scale, self.right * (self.singular_values / scale)


def optimum(matrix: sp.csr_array, rank: int) -> Optimum:
    """Truncated SVD by ARPACK from a fixed start, so the same on each run; tolerance 1e-4.

    Raises ValueError unless ``1 <= rank < min(matrix.shape)``.
    """
    if not 1 <= rank < min(matrix.shape):
        raise ValueError(f"rank must lie in [1, {min(matrix.shape)}) for a matrix {matrix.shape}, got {rank}")
    start = np.ones(min(matrix.shape), dtype=np.float32)
    transposed = sp.csr_array(matrix.T)
    # ARPACK decides itself how many products it needs, so there is a count and no time left.
    with tqdm(desc="truncated SVD", unit=" products") as progress:

        def counted(factor: sp.csr_array) -> Callable[[npt.NDArray[Any]], Any]:
            def product(vector: npt.NDArray[Any]) -> Any:
                progress.update()
                return factor @ vector

            return product

        operator = scipy.sparse.linalg.LinearOperator(
            matrix.shape, matvec=counted(matrix), rmatvec=counted(transposed), dtype=matrix.dtype
        )
        left, values, right = scipy.sparse.linalg.svds(operator, k=rank, tol=1e-4, v0=start)
    order = np.argsort(-values)
    squared_norm = float(np.square(matrix.data, dtype=np.float64).sum())
    return Optimum(
        np.ascontiguousarray(left[:, order]),
        values[order],
        np.ascontiguousarray(right[order].T),
        squared_norm,
    )


class SparseMatrix:
    """A sparse matrix for products with tall dense ones, by `cemb.kernels.sparse`; on a GPU by torch.

    On CPUs a product is the same for any number of threads.
    """

    BLOCK_COLUMNS = 4096

    def __init__(self, matrix: sp.csr_array | sp.csc_array, device: torch.device | str | None = None):
        self.shape = matrix.shape
        self._blocks: sparse.Blocks | None = None
        self._room: sparse.Room | None = None
        if torch.device(device or "cpu").type == "cpu":
            self._blocks = sparse.Blocks.of(matrix, self.BLOCK_COLUMNS)
            return
        by_row = sp.csr_array(matrix)
        with warnings.catch_warnings():
            # torch calls CSR tensors a beta feature; what is used here is tested against dense products.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
            self._on_gpu = torch.sparse_csr_tensor(
                torch.from_numpy(by_row.indptr),
                torch.from_numpy(by_row.indices),
                torch.from_numpy(by_row.data),
                size=self.shape,
                device=device,
                check_invariants=False,
            )

    def __matmul__(self, dense: Tensor) -> Tensor:
        """The product ``[rows, dim]`` with ``[columns, dim]`` of the matrix's type, else ValueError."""
        if self._blocks is None:
            product: Tensor = self._on_gpu @ dense
            return product
        num_rows, num_columns = self.shape
        factor = dense.detach().contiguous().numpy()
        dtype = self._blocks.values.dtype
        if factor.ndim != 2 or len(factor) != num_columns or factor.dtype != dtype:
            raise ValueError(
                f"a matrix of {num_rows} by {num_columns} multiplies {dtype} [{num_columns}, dim], "
                f"got {factor.dtype} {list(factor.shape)}"
            )
        panels = sparse.num_panels(factor.shape[1])
        if self._room is None or len(self._room.sums) != panels:
            self._room = sparse.Room(
                *(torch.empty(panels, n * sparse.LANES, dtype=dense.dtype).numpy() for n in self.shape[::-1])
            )
        out = dense.new_empty(num_rows, factor.shape[1])
        sparse.product(self._blocks, factor, self._room, out.numpy())
        return out


class _AllCells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        contexts: Tensor,
        matrix: SparseMatrix,
        transposed: SparseMatrix,
        squared_norm: float,
    ) -> Tensor:
        word_gram, context_gram = words.T @ words, contexts.T @ contexts
        fitted = matrix @ contexts
        loss: Tensor = squared_norm - 2 * torch.linalg.vecdot(words, fitted).sum(dtype=torch.float64)
        loss += torch.sum(word_gram.double() * context_gram.double())
        if not any(ctx.needs_input_grad):
            return loss
        word_grad = fitted.addmm_(words, context_gram, beta=-2, alpha=2)
        context_grad = (transposed @ words).addmm_(contexts, word_gram, beta=-2, alpha=2)
        ctx.save_for_backward(word_grad, context_grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        word_grad, context_grad = ctx.saved_tensors
        scale = grad.to(word_grad.dtype)
        return word_grad * scale, context_grad * scale, None, None, None


class AllCellsLoss:
    """Squared error of ``U Cᵀ`` over every cell of a sparse matrix M, without a dense matrix.

    ``‖M − UCᵀ‖² = ‖M‖² − 2⟨U, MC⟩ + tr(UᵀU·CᵀC)``, exact, as is its gradient. Costs two sparse products a
    call. The scalars are summed in float64.
    """

    def __init__(self, matrix: sp.csr_array, device: torch.device | str | None = None):
        self.matrix = SparseMatrix(matrix, device)
        self.transposed = SparseMatrix(matrix.T, device)
        self.squared_norm = float(np.square(matrix.data, dtype=np.float64).sum())

    def __call__(self, words: Tensor, contexts: Tensor) -> Tensor:
        """The error as a float64 scalar, for factors ``[words, dim]`` and ``[contexts, dim]``."""
        arguments = (words, contexts, self.matrix, self.transposed, self.squared_norm)
        loss: Tensor = _AllCells.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss


def frequency_weights(word_counts: npt.NDArray[Any], power: float) -> npt.NDArray[np.float64]:
    """Weights ``[words]`` that grow as the counts' `power`, of mean 1."""
    weights = np.asarray(word_counts, dtype=np.float64) ** power
    shares: npt.NDArray[np.float64] = weights / weights.mean()
    return shares


class WeightedLoss:
    """Squared error over every cell, cell (i, j) weighted by ``word_weights[i] * context_weights[j]``.

    It is the `AllCellsLoss` of ``diag(√a) M diag(√b)`` at ``diag(√a) U`` and ``diag(√b) C``. So weights of
    rank one, unlike GloVe's (Pennington et al., 2014), leave the optimum a truncated SVD (Srebro and
    Jaakkola, 2003). Raises ValueError unless there is one positive weight for each row and each column.
    """

    def __init__(
        self,
        matrix: sp.csr_array,
        word_weights: npt.NDArray[Any],
        context_weights: npt.NDArray[Any],
        device: torch.device | str | None = None,
    ):
        scales = []
        for name, weights, length in zip(
            ("word_weights", "context_weights"), (word_weights, context_weights), matrix.shape, strict=True
        ):
            if np.shape(weights) != (length,) or not np.all((weights > 0) & np.isfinite(weights)):
                raise ValueError(
                    f"{name} must be {length:,} positive numbers, got shape {np.shape(weights)}"
                    + (f", {np.min(weights)} to {np.max(weights)}" if np.size(weights) else "")
                )
            scales.append(np.sqrt(weights).astype(matrix.dtype))
        self.matrix = sp.csr_array(sp.diags_array(scales[0]) @ matrix @ sp.diags_array(scales[1]))
        self.scales = [torch.from_numpy(scale[:, None]).to(device) for scale in scales]
        self._all_cells = AllCellsLoss(self.matrix, device)

    def __call__(self, words: Tensor, contexts: Tensor) -> Tensor:
        """The error as a float64 scalar, for factors ``[words, dim]`` and ``[contexts, dim]``."""
        return self._all_cells(self.scales[0] * words, self.scales[1] * contexts)

    def optimum(self, rank: int) -> Optimum:
        """The best factorization of the weighted matrix: its `loss` and `gap` are in this loss's terms."""
        return optimum(self.matrix, rank)


def balanced(words: npt.NDArray[Any], contexts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Word vectors ``U(CᵀC)^½`` ``[words, dim]``, whose dot products are those of the rows of ``UCᵀ``.

    They depend on ``UCᵀ`` alone, up to a rotation, and not on how U and C share it: UA and CA⁻ᵀ give the
    same cosines. Those of a truncated SVD are U·S. Computed in float64, returned in the type of `words`.
    """
    contexts = contexts.astype(np.float64)
    values, basis = np.linalg.eigh(contexts.T @ contexts)
    root = basis * np.sqrt(values.clip(min=0)) @ basis.T
    turned: npt.NDArray[Any] = words @ root
    return turned.astype(words.dtype)


def normalized(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows scaled to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _centred_ranks(values: npt.NDArray[Any], samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Ranks in each row of ``values[samples]``, those of equal values averaged, less their mean.

    Counting serves where rows are drawn from the same few values, and needs none of `scipy.stats`, which
    takes a second to import.
    """
    distinct, places = np.unique(values, return_inverse=True)
    places = places[samples]
    counts = np.stack([np.bincount(row, minlength=len(distinct)) for row in places])
    by_value: npt.NDArray[np.float64] = counts.cumsum(axis=1) - (counts - 1) / 2 - (samples.shape[1] + 1) / 2
    return np.take_along_axis(by_value, places, axis=1)


def _correlations(
    left: npt.NDArray[Any], right: npt.NDArray[Any], samples: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Spearman's rank correlation in each row of resampled pairs; NaN where one side does not vary."""
    ranks, others = (_centred_ranks(values, samples) for values in (left, right))
    spread = np.sqrt(np.square(ranks).sum(axis=1) * np.square(others).sum(axis=1))
    found: npt.NDArray[np.float64] = (ranks * others).sum(axis=1) / np.where(spread > 0, spread, np.nan)
    return found


SIMILARITY_SETS = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}


def _test_data(name: str) -> list[str]:
    """Lines of an evaluation set that ships in gensim's wheel; none if gensim is not installed."""
    try:
        path = Path(str(distribution("gensim").locate_file(f"gensim/test/test_data/{name}")))
    except PackageNotFoundError:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def similarity(
    vectors: npt.NDArray[Any], words: list[str], name: str, *, num_bootstrap: int = 500
) -> dict[str, float]:
    """Spearman correlation of cosines with human judgements, in per cent, with a bootstrap interval.

    Args:
        vectors: ``[words, dim]``.
        name: ``"wordsim353"`` (Finkelstein et al., 2002) or ``"simlex999"`` (Hill et al., 2015).

    Returns:
        ``score``, the 95% interval ``low`` and ``high`` over pairs resampled with a fixed seed, ``pairs``
        evaluated and ``pairs_total``. Scores are NaN where fewer than 3 pairs are in the vocabulary.
    """
    index = {word: i for i, word in enumerate(words)}
    pairs = [line.casefold().split("\t") for line in _test_data(SIMILARITY_SETS[name])]
    known = [(index[a], index[b], float(s)) for a, b, s in pairs if a in index and b in index]
    result = {"pairs": len(known), "pairs_total": len(pairs)}
    if len(known) < 3:
        return {"score": math.nan, "low": math.nan, "high": math.nan, **result}
    left, right, human = (np.array(column) for column in zip(*known, strict=True))
    unit = normalized(vectors)
    cosines = np.einsum("ij,ij->i", unit[left], unit[right])
    if np.ptp(cosines) == 0:  # there is no correlation with what does not vary
        return {"score": math.nan, "low": math.nan, "high": math.nan, **result}
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    samples = rng.integers(len(known), size=(num_bootstrap, len(known)))
    low, high = np.nanpercentile(_correlations(human, cosines, samples), [2.5, 97.5])
    (score,) = _correlations(human, cosines, np.arange(len(known))[None])
    return {"score": 100 * float(score), "low": 100 * float(low), "high": 100 * float(high), **result}


def analogies(
    vectors: npt.NDArray[Any],
    words: list[str],
    *,
    batch_size: int = 512,
    max_questions: int | None = None,
) -> dict[str, float]:
    """Google's analogy questions (Mikolov et al., 2013), answered over the whole vocabulary.

    3CosAdd and 3CosMul answer them (Levy and Goldberg, 2014), the latter on cosines shifted to [0, 1] and
    with 0.001 added to the divisor.

    Returns:
        The shares answered rightly in per cent, by 3CosAdd as ``score`` and by 3CosMul as ``mul_score``;
        the bootstrap 95% interval ``low`` and ``high`` of the former over resampled questions;
        ``questions`` evaluated of ``questions_total``. Shares are NaN if no question is covered.
        `max_questions` takes an even sample.
    """
    index = {word: i for i, word in enumerate(words)}
    questions = [line.casefold().split() for line in _test_data("questions-words.txt") if line[0] != ":"]
    known = np.array([[index[w] for w in q] for q in questions if all(w in index for w in q)])
    if max_questions is not None and len(known) > max_questions:
        known = known[np.linspace(0, len(known) - 1, max_questions).astype(int)]
    result: dict[str, float] = {"questions": len(known), "questions_total": len(questions)}
    if len(known) == 0:
        return dict.fromkeys(("score", "mul_score", "low", "high"), math.nan) | result
    unit = normalized(vectors).astype(np.float32)
    added = multiplied = 0
    for first in range(0, len(known), batch_size):
        batch = known[first : first + batch_size]
        # Questions share their words, so a batch has far fewer rows of cosines than it asks for.
        given, rows = np.unique(batch[:, :3], return_inverse=True)
        cosines = (unit[given] @ unit.T + 1) / 2
        for (*asked, answer), (i, j, k) in zip(batch, rows.reshape(-1, 3), strict=True):
            a, b, c = cosines[i], cosines[j], cosines[k]
            sums, products = b - a + c, b * c / (a + 1e-3)
            sums[asked] = products[asked] = -np.inf
            added += sums.argmax() == answer
            multiplied += products.argmax() == answer
    # The quantiles of resampling the questions without end, which is a binomial distribution's.
    at_most = scipy.special.bdtr(np.arange(len(known) + 1), len(known), added / len(known))
    low, high = np.searchsorted(at_most, [0.025, 0.975])
    counts = {"score": added, "mul_score": multiplied, "low": low, "high": high}
    return {name: 100 * float(count) / len(known) for name, count in counts.items()} | result


def neighbours(
    vectors: npt.NDArray[Any], words: list[str], word: str, count: int = 10
) -> list[tuple[str, float]]:
    """The `count` words of highest cosine with `word`; KeyError if it is not in the vocabulary."""
    if word not in words:
        raise KeyError(f"{word!r} is not among the {len(words):,} words of the vocabulary")
    unit = normalized(vectors)
    cosines = unit @ unit[words.index(word)]
    best = [i for i in np.argsort(-cosines) if words[i] != word][:count]
    return [(words[i], float(cosines[i])) for i in best]
