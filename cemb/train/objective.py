"""The exact loss over all cells, its gradient, and the optimum that the gap is measured to."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import scipy.sparse.linalg
import scipy.special
import torch
from torch import Tensor
from tqdm import tqdm

from cemb.checks import check_integers, check_reals
from cemb.kernels.cpu import sparse_product
from cemb.kernels.cpu.simd import LANES
from cemb.pmi.matrix import canonical


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
        """Word vectors U·S^p and context vectors V·S^(1−p), which are zero where a singular value is."""
        check_reals("[0, inf)", singular_value_power=singular_value_power)
        scale = self.singular_values**singular_value_power
        rest = np.divide(self.singular_values, scale, out=np.zeros_like(scale), where=scale > 0)
        return self.left * scale, self.right * rest


def optimum(matrix: sp.csr_array, rank: int) -> Optimum:
    """Truncated SVD by ARPACK from a fixed start, so the same on each run; tolerance 1e-4.

    Raises ValueError unless ``1 <= rank < min(matrix.shape)``, and for a matrix that is zero or not finite.
    """
    check_integers(1, rank=rank)
    if not 1 <= rank < min(matrix.shape):
        raise ValueError(f"rank must lie in [1, {min(matrix.shape)}) for a matrix {matrix.shape}, got {rank}")
    matrix = canonical(matrix)
    if matrix.nnz == 0:
        raise ValueError(f"the best factorization of a matrix of zeros, {matrix.shape}, is not determined")
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
    """A sparse matrix for products with tall dense ones: `cemb.kernels.cpu.sparse_product`, on a GPU torch.

    On CPUs a product is the same for any number of threads. ValueError for a matrix whose indices lie outside
    it, or that is not of float32 or float64.
    """

    BLOCK_COLUMNS = 4096

    def __init__(self, matrix: sp.csr_array | sp.csc_array, device: torch.device | str | None = None):
        matrix.check_format(full_check=True)
        if matrix.dtype not in (np.float32, np.float64):
            raise ValueError(f"a matrix must be of float32 or float64, got {matrix.dtype}")
        self.shape = matrix.shape
        self._blocks: sparse_product.Blocks | None = None
        self._workspace: sparse_product.Workspace | None = None
        if torch.device(device or "cpu").type == "cpu":
            self._blocks = sparse_product.Blocks.of(matrix, self.BLOCK_COLUMNS)
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
        panels = sparse_product.num_panels(factor.shape[1])
        if self._workspace is None or len(self._workspace.sums) != panels:
            self._workspace = sparse_product.Workspace(
                *(torch.empty(panels, n * LANES, dtype=dense.dtype).numpy() for n in self.shape[::-1])
            )
        out = dense.new_empty(num_rows, factor.shape[1])
        sparse_product.product(self._blocks, factor, self._workspace, out.numpy())
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
    call. The scalars are summed in float64. M is what `cemb.pmi.matrix.canonical` makes of a matrix, and must
    be finite, else ValueError.
    """

    def __init__(self, matrix: sp.csr_array, device: torch.device | str | None = None):
        matrix = canonical(matrix)
        self.matrix = SparseMatrix(matrix, device)
        self.transposed = SparseMatrix(matrix.T, device)
        self.squared_norm = float(np.square(matrix.data, dtype=np.float64).sum())

    def __call__(self, words: Tensor, contexts: Tensor) -> Tensor:
        """The error as a float64 scalar, for factors ``[words, dim]`` and ``[contexts, dim]``."""
        arguments = (words, contexts, self.matrix, self.transposed, self.squared_norm)
        loss: Tensor = _AllCells.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss


def frequency_weights(word_counts: npt.NDArray[Any], power: float) -> npt.NDArray[np.float64]:
    """Weights ``[words]`` in proportion to `word_counts` ``[words]`` to a `power`, of mean 1."""
    check_reals("(-inf, inf)", power=power)
    weights: npt.NDArray[np.float64] = np.asarray(word_counts, dtype=np.float64) ** power
    weights /= weights.mean()
    return weights


class WeightedLoss:
    """Squared error over every cell, cell (i, j) weighted by ``word_weights[i] * context_weights[j]``.

    It is the `AllCellsLoss` of ``diag(√a) M diag(√b)`` at ``diag(√a) U`` and ``diag(√b) C``. So weights of
    rank one, unlike GloVe's (Pennington et al., 2014), leave the optimum a truncated SVD (Srebro and
    Jaakkola, 2003). Raises ValueError unless weights are positive, ``[words]`` and ``[contexts]``.
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
        matrix = canonical(matrix)
        self.matrix = sp.csr_array(sp.diags_array(scales[0]) @ matrix @ sp.diags_array(scales[1]))
        self.scales = [torch.from_numpy(scale[:, None]).to(device) for scale in scales]
        self._all_cells = AllCellsLoss(self.matrix, device)

    def __call__(self, words: Tensor, contexts: Tensor) -> Tensor:
        """The error as a float64 scalar, for factors ``[words, dim]`` and ``[contexts, dim]``."""
        return self._all_cells(self.scales[0] * words, self.scales[1] * contexts)

    def optimum(self, rank: int) -> Optimum:
        """The best factorization of the weighted matrix: its `loss` and `gap` are in this loss's terms."""
        return optimum(self.matrix, rank)
