"""Anyone's vectors in fewer bytes, by transform coding against their own Gram matrix.

Vectors V ``[n, dim]`` that came without the matrix they were trained on are for dot products and cosines. So
V̂ is to keep ``VVᵀ``, the dot products of all pairs of rows. With errors ``E = V̂ − V``, to first order

    ‖V̂V̂ᵀ − VVᵀ‖² = ‖VEᵀ + EVᵀ‖² = 2 tr(E VᵀV Eᵀ) + 2 tr(EᵀV EᵀV),

whose second term is smaller, where a column's errors are small and those of different columns are not
correlated. In principal axes the Gram matrix ``VᵀV`` is a diagonal λ, and the first term is
``2 Σ_k λ_k ‖E_k‖²``: a unit of squared error costs λ_k in column k, as that of a factor beside another does
which has these lengths. So bits are allotted by λ. Rows' scales are their plain lengths: λ is for the choice
of what to keep, and a scale that hardly saw the lesser columns would fit them ill.

Measured, that serves dot products better than bits by plain squared error of the values, λ⁰, or by λ², and
than scales that are lengths weighted by λ, as long as errors are small. A value has 8 bits at most: where
fewer than about 5 times are asked for, int8 with a scale for each row serves dot products better.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from cemb.checks import check_reals
from cemb.tables import TransformCodedEmbedding
from cemb.tables.transform_coded import allocate_bits, overhead_bytes

_BLOCK_ROWS = 2**14


def budget_bytes(num_rows: int, dim: int, times: float) -> int:
    """Bytes of vectors in float32 over `times`.

    ValueError, with the largest number of times possible, unless they hold scales, levels and a bit a row.
    """
    check_reals("[1, inf)", times=times)
    full = 4 * num_rows * dim
    least = overhead_bytes(num_rows, dim) + 1 + -(-num_rows // 8)
    if int(full / times) < least:
        largest = int(100 * full / least) / 100
        what = f"at most {largest:g} times smaller" if largest > 1 else "no smaller"
        raise ValueError(
            f"{num_rows:,} vectors of {dim:,} values become {what} by transform coding, which needs "
            f"{least:,} bytes for scales, levels and a bit each; times={times:g} leaves {int(full / times):,}"
        )
    return int(full / times)


def _products(left: Tensor, right: Tensor, what: str) -> Tensor:
    """``leftᵀ right`` in float64."""
    found = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    blocks = zip(left.split(_BLOCK_ROWS), right.split(_BLOCK_ROWS), strict=True)
    for one, other in tqdm(blocks, desc=what, total=-(-len(left) // _BLOCK_ROWS), unit="block", delay=2):
        found += one.double().T @ other.double()
    return found


def principal_axes(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``[n, dim]`` turned into their principal axes, and the columns' squared lengths ``[dim]``.

    The latter fall. Dot products and cosines of the rows stay as they were.
    """
    squares, axes = torch.linalg.eigh(_products(vectors, vectors, "Gram matrix"))
    turned = torch.empty_like(vectors)
    axes = axes.flip(1).to(vectors.dtype)
    for block, out in zip(vectors.split(_BLOCK_ROWS), turned.split(_BLOCK_ROWS), strict=True):
        torch.mm(block, axes, out=out)
    return turned, squares.flip(0).clamp(min=0).to(vectors.dtype)


def compress(vectors: Tensor, max_bytes: int) -> TransformCodedEmbedding:
    """Vectors ``[n, dim]``, float32 and in principal axes, as a table of at most `max_bytes`.

    Rows should come by falling frequency, as they do in word2vec's and GloVe's files: bits are the same for
    all rows of a tier, and tiers are ranges of rows, the first of them short. In another order the table is
    as large and its errors are larger. Deterministic for the same number of threads.

    Contexts, and the data set that a model was trained on, are not used: with them, factors could be fitted
    to each other again, see `cemb.train.alternating.transform_code`.

    Raises ValueError for vectors that are not finite, or of no length or one that float32's squares do not
    hold.
    """
    least, most = vectors.aminmax()
    largest = max(-least.item(), most.item())
    if not 1e-12 < largest < 1e12:
        raise ValueError(f"the largest of the values must lie between 1e-12 and 1e12, got {largest:g}")
    importance = vectors.square().sum(dim=0)
    importance = (importance / importance.max()).clamp(min=1e-9)
    (bits,) = allocate_bits([(vectors, importance)], max_bytes)
    return TransformCodedEmbedding.from_vectors(vectors, torch.ones_like(importance), bits)


def relative_errors(vectors: Tensor, decoded: Tensor) -> tuple[float, float]:
    """``‖V̂ − V‖ / ‖V‖`` and ``‖V̂V̂ᵀ − VVᵀ‖ / ‖VVᵀ‖``, of all pairs of rows, for both ``[n, dim]``.

    From the products ``[dim, dim]`` of the two, in float64, so that n² dot products are not made.
    """
    own, mixed, other = (
        _products(one, two, "errors")
        for one, two in ((vectors, vectors), (vectors, decoded), (decoded, decoded))
    )
    values = (own.trace() - 2 * mixed.trace() + other.trace()).clamp(min=0) / own.trace()
    squares = own.square().sum()
    products = (squares - 2 * mixed.square().sum() + other.square().sum()).clamp(min=0) / squares
    return values.sqrt().item(), products.sqrt().item()
