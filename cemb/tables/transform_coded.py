"""A trained table in a given number of bits, spent where they lower the loss most.

Transform coding (Huang and Schultheiss, "Block quantization of correlated Gaussian random variables", IEEE
Trans. Commun. Syst. 1963; Goyal, "Theoretical foundations of transform coding", 2001) of a factorization
in its principal axes: rows are divided by scales of their own, and each value is rounded to one of 2^b
levels, those of Lloyd ("Least squares quantization in PCM", 1982). b depends on the column and on the tier
of the row: rows come by falling frequency, and tiers are ranges of rows. Bits go, one by one, to where they
lower the loss most.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.reference import check_ids
from cemb.tables.checks import check_budget
from cemb.tables.kmeans import nearest_level

MAX_BITS = 8
NUM_TIERS = 24
_SCALE_STEPS = 255
_BLOCK_ROWS = 2**13  # coded at once


def tier_borders(num_rows: int) -> npt.NDArray[np.int64]:
    """First rows of at most `NUM_TIERS` tiers, which grow geometrically, and the number of rows."""
    return np.unique(np.r_[0, np.geomspace(min(16, num_rows), num_rows, NUM_TIERS).astype(np.int64)])


def lloyd_levels(values: Tensor, bits: int, iterations: int = 30) -> Tensor:
    """The levels ``[2^bits]`` to which `values` ``[n]``, sorted, are rounded with the least squared error.

    They start as dense as the cube root of the values' density, which is best for many levels (Panter and
    Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels", Proc. IRE
    1951); from the values' own quantiles, 256 levels take thousands of iterations.
    """
    count = 2**bits
    knots = values[torch.linspace(0, len(values) - 1, min(len(values), 16 * count)).long()]
    reach = nn.functional.pad(knots.diff().double().pow(2 / 3).cumsum(0), (1, 0))
    levels = knots[torch.searchsorted(reach, (torch.arange(count) + 0.5) / count * reach[-1])]
    sums = nn.functional.pad(values.cumsum(0, dtype=torch.float64), (1, 0))
    ends = torch.tensor([0, len(values)])
    for _ in range(iterations):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        borders = torch.cat((ends[:1], inner, ends[1:]))
        sizes = borders.diff()
        means = (sums[borders[1:]] - sums[borders[:-1]]) / sizes.clamp(min=1)
        levels = torch.where(sizes > 0, means.to(values.dtype), levels)
    return levels


@dataclass
class NormalizedVectors:
    """Vectors over their rows' scales and their tiers' deviations, and what it takes to undo that."""

    values: Tensor  # [n, dim], of variance about 1 in each tier and column
    scales: Tensor  # uint8 [n], of the logarithm
    scale_range: Tensor  # float32 [2]
    deviations: Tensor  # float16 [tiers, dim]

    @classmethod
    def of(cls, vectors: Tensor, importance: Tensor) -> "NormalizedVectors":
        # Over their mean, so that what float16 holds does not depend on their unit.
        weights = (importance / importance.mean()).sqrt()
        squares = [(rows * weights).square().mean(dim=1) for rows in vectors.split(_BLOCK_ROWS)]
        logs = torch.cat(squares).clamp(min=1e-30).log2() / 2
        scale_range = torch.stack((logs.min(), logs.max()))
        width = (scale_range[1] - scale_range[0]).clamp(min=1e-6)
        scales = ((logs - scale_range[0]) / width * _SCALE_STEPS).round().to(torch.uint8)
        values = vectors / _unscaled(scales, scale_range)[:, None]
        borders = tier_borders(len(vectors))
        tiers = values.split(np.diff(borders).tolist())
        deviations = torch.stack([tier.square().mean(dim=0).sqrt() for tier in tiers])
        deviations = deviations.clamp(min=torch.finfo(torch.float16).tiny).half()
        for tier, deviation in zip(tiers, deviations.float(), strict=True):
            tier /= deviation
        return cls(values, scales, scale_range, deviations)


def _unscaled(scales: Tensor, scale_range: Tensor) -> Tensor:
    return torch.lerp(scale_range[0], scale_range[1], scales.float() / _SCALE_STEPS).exp2()


class TransformCodedEmbedding(nn.Module):
    """A table of codes of 0 to 8 bits, their number depending on tier and column. Holds no Parameter.

    Made by `from_vectors`; a new table has zeros for all that it stores, and is to be loaded. Row i of a tier
    is the i-th segment of ``bits[tier].sum()`` bits in the tier's part of `codes`, the columns in order, low
    bits first.
    """

    bits: Tensor
    scales: Tensor
    scale_range: Tensor
    deviations: Tensor
    levels: Tensor
    codes: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, num_code_bytes: int):
        super().__init__()
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_integers(0, num_code_bytes=num_code_bytes)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._borders = torch.from_numpy(tier_borders(num_embeddings))
        by_tier = len(self._borders) - 1, embedding_dim
        self.register_buffer("bits", torch.zeros(by_tier, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(num_embeddings, dtype=torch.uint8))
        self.register_buffer("scale_range", torch.zeros(2))
        self.register_buffer("deviations", torch.zeros(by_tier, dtype=torch.float16))
        self.register_buffer("levels", torch.zeros(2 ** (MAX_BITS + 1) - 1, dtype=torch.float16))
        self.register_buffer("codes", torch.zeros(num_code_bytes, dtype=torch.uint8))

    @property
    def arguments(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "num_code_bytes": len(self.codes)}

    @classmethod
    def from_vectors(cls, vectors: Tensor, importance: Tensor, bits: Tensor) -> "TransformCodedEmbedding":
        """Code `vectors` ``[n, dim]`` with `bits` ``[tiers, dim]``, uint8, as `allocate_bits` gives them.

        `importance` ``[dim]`` is what a unit of squared error costs in each column. Deterministic.
        """
        normalized = NormalizedVectors.of(vectors, importance)
        levels, codes = _encode(normalized.values, bits)
        num_rows, dim = vectors.shape
        table = cls(num_rows, dim, len(codes))
        table.bits, table.levels, table.codes = bits, levels, codes
        table.scales, table.scale_range = normalized.scales, normalized.scale_range
        table.deviations = normalized.deviations
        return table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        *_, errors = others
        num_bits = int((self._borders.diff().to(self.bits.device) * self.bits.sum(dim=1)).sum())
        if self.bits.max() > MAX_BITS or -(-num_bits // 8) != len(self.codes):
            errors.append(
                f"{prefix}codes are {len(self.codes)} bytes, and {prefix}bits tell of {num_bits} bits"
            )

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        flat = ids.reshape(-1).long().contiguous()
        borders = self._borders.to(flat.device)
        tier_of = torch.bucketize(flat, borders[1:], right=True)
        out = torch.empty(flat.numel(), self.embedding_dim, device=flat.device)
        tier_bits = borders.diff() * self.bits.sum(dim=1)
        first_bits = tier_bits.cumsum(0) - tier_bits
        for tier in tier_of.unique().tolist():
            for chosen in (tier_of == tier).nonzero().squeeze(1).split(_BLOCK_ROWS):
                out[chosen] = self._decode(tier, flat[chosen] - borders[tier], first_bits[tier])
        out *= _unscaled(self.scales[flat], self.scale_range)[:, None]
        return out.view(*ids.shape, self.embedding_dim)

    def _decode(self, tier: int, rows: Tensor, first_bit: Tensor) -> Tensor:
        bits = self.bits[tier].long()
        if not bits.any():
            return torch.zeros(len(rows), self.embedding_dim, device=rows.device)
        first_bits = first_bit + rows[:, None] * bits.sum() + (bits.cumsum(0) - bits)
        # A code of at most 8 bits ends in the next byte at the latest. After the last there is none.
        first = (first_bits >> 3).clamp(max=len(self.codes) - 1)
        second = (first + 1).clamp(max=len(self.codes) - 1)
        pairs = self.codes[first].int() | self.codes[second].int() << 8
        codes = (pairs >> (first_bits & 7).int()) & (2**bits - 1)
        return self.levels.float()[codes + (2**bits - 1)] * self.deviations[tier].float()


def _encode(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of all numbers of bits in a row, 0 bits first, and the rows' codes packed into bytes.

    The levels for b bits start at 2^b − 1.
    """
    tiers = values.split(np.diff(tier_borders(len(values))).tolist())
    levels = torch.zeros(2 ** (MAX_BITS + 1) - 1)
    for b in range(1, MAX_BITS + 1):
        chosen = [(tier, own_bits == b) for tier, own_bits in zip(tiers, bits, strict=True)]
        count = sum(len(tier) * int(columns.sum()) for tier, columns in chosen)
        if count:
            step = -(-count // 2**20)  # a sample places 256 levels well enough
            parts, place = [], 0
            for tier, columns in chosen:
                own = tier[:, columns].flatten()
                parts.append(own[-place % step :: step].clone())
                place += len(own)
            levels[2**b - 1 : 2 ** (b + 1) - 1] = lloyd_levels(torch.cat(parts).sort().values, b)
    levels = levels.half()
    packed, waiting = [], np.empty(0, np.uint8)
    with tqdm(total=len(values), desc="coding", unit="row", unit_scale=True, delay=2) as progress:
        for tier, own_bits in zip(tiers, bits.long(), strict=True):
            for rows in tier.split(_BLOCK_ROWS):
                found = np.concatenate((waiting, _codes(rows, own_bits, levels)))
                whole = len(found) // 8 * 8
                packed.append(np.packbits(found[:whole], bitorder="little"))
                waiting = found[whole:]
                progress.update(len(rows))
    packed.append(np.packbits(waiting, bitorder="little"))
    return levels, torch.from_numpy(np.concatenate(packed))


def _codes(values: Tensor, bits: Tensor, levels: Tensor) -> npt.NDArray[np.uint8]:
    """Bits of the codes of rows of one tier, in order, each as a byte."""
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    for b in bits.unique().tolist():
        if b:
            columns = bits == b
            own_levels = levels[2**b - 1 : 2 ** (b + 1) - 1].float()
            codes[:, columns] = nearest_level(values[:, columns], own_levels).to(torch.uint8)
    columns = torch.arange(len(bits)).repeat_interleave(bits)
    places = torch.arange(len(columns)) - (bits.cumsum(0) - bits)[columns]
    found: npt.NDArray[np.uint8] = ((codes[:, columns] >> places.to(torch.uint8)) & 1).flatten().numpy()
    return found


def overhead_bytes(num_rows: int, dim: int) -> int:
    """Bytes of a table apart from its codes."""
    tiers = len(tier_borders(num_rows)) - 1
    num_levels: int = 2 ** (MAX_BITS + 1) - 1
    return num_rows + 2 * 4 + tiers * dim * 3 + num_levels * 2


def allocate_bits(sides: list[tuple[Tensor, Tensor]], max_bytes: int) -> list[Tensor]:
    """Bits ``[tiers, dim]`` for each of several tables of vectors, together at most `max_bytes`.

    Args:
        sides: vectors ``[n, dim]`` and their `importance` ``[dim]``.

    Takes bit after bit where it saves most expected loss for its size. Raises ValueError where not even
    the scales fit.
    """
    overhead = sum(overhead_bytes(*vectors.shape) + 1 for vectors, _ in sides)
    check_budget(max_bytes, overhead)
    gains, sizes, shapes = [], [], []
    for vectors, importance in sides:
        sample = NormalizedVectors.of(vectors, importance).values.flatten()
        sample = sample[:: -(-sample.numel() // 2**18)].sort().values
        # Expected squared error of a normalized value by the number of bits.
        errors = [sample.square().mean()]
        for b in range(1, MAX_BITS + 1):
            levels = lloyd_levels(sample, b)
            errors.append((sample - levels[nearest_level(sample, levels)]).square().mean())
        # Each further bit must save less than the one before, or the greedy order would not exist.
        saved = (torch.stack(errors[:-1]) - torch.stack(errors[1:])).cummin(dim=0).values
        rows = np.diff(tier_borders(len(vectors))).tolist()
        energy = torch.stack([t.square().mul_(importance).sum(dim=0) for t in vectors.split(rows)])
        rows = torch.tensor(rows)[:, None, None].expand(*energy.shape, MAX_BITS)
        gains.append((energy[..., None] * saved / rows).flatten())
        sizes.append(rows.flatten())
        shapes.append((*energy.shape, MAX_BITS))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    spent = torch.cat(sizes)[order].cumsum(0)
    taken = torch.zeros(len(order), dtype=torch.uint8)
    taken[order[spent <= 8 * (max_bytes - overhead)]] = 1
    parts = taken.split([len(part) for part in sizes])
    return [part.view(shape).sum(dim=2).to(torch.uint8) for part, shape in zip(parts, shapes, strict=True)]
