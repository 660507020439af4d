"""The hash-compressed table: every row reads its values from one shared memory pool."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from cemb import ops, reference
from cemb.checks import check_reals
from cemb.hashing import HASH_VERSION, HashSpec
from cemb.memory import advise_huge_pages
from cemb.ops import lookup

torch.fx.wrap("lookup")  # symbolic tracing takes it as one operation

_REASONS = {
    "max_norm": "rows share values, so that scaling one changes others",
    "scale_grad_by_freq": "a gradient is of the pool, whose values many rows read",
    "sparse": "a step reads most cache lines of a pool; large ones have cemb.optim's pair_step",
}


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"a hashed table has no {name}={value!r}: {_REASONS[name]}")


def _describe(state: Sequence[int]) -> str:
    """An extra state in words."""
    version, _, *numbers = state
    names = ("embedding_dim", "pool_size", "block_size", "hash_seed", "signed", "table_offset")
    return f"hash version {version}, " + ", ".join(f"{n}={v}" for n, v in zip(names, numbers, strict=True))


def _without(rows: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    """The rows, with zeros for the padding."""
    return rows.masked_fill((ids == padding_idx).unsqueeze(-1), 0)


class HashedEmbedding(nn.Module):
    """A drop-in for `nn.Embedding` whose ``[num_embeddings, embedding_dim]`` values live in a pool.

    Positional arguments are those of `nn.Embedding`. Give one of `pool_size`, `compression_ratio` and
    `weight`.

    Args:
        num_embeddings: rows of the table; any number up to 2^63 / embedding_dim costs the same memory.
        embedding_dim: columns of the table.
        padding_idx: a row that is always zeros and gives no gradient.
        max_norm, norm_type, scale_grad_by_freq, sparse: as `nn.Embedding` has them; refused, see below.
        pool_size: number of scalars in the pool (not bytes), below 2^32.
        compression_ratio: values of the table per value of the pool, in place of `pool_size`.
        block_size: consecutive columns that read consecutive pool values: 1 is HashedNets, more is ROBE-Z
            (faster, since one cache line serves several columns).
        hash_seed: picks the hash function, in [0, 2^63).
        signed: multiply each block by a hashed sign, which makes collisions cancel in expectation
            (Weinberger et al., ICML 2009).
        table_offset: added to ids before hashing, to keep tables apart that share a pool.
        init_std: standard deviation of the initial values, drawn from torch's default generator.
        weight: an existing pool to share, a Parameter ``[pool_size]``; it is left as it is.
        device, dtype: of a new pool.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    A state_dict carries hash and sizes: one of another hash, or of another shape but for its rows, is
    refused.

    Raises ValueError for impossible sizes and for options that a hashed table cannot have, and IndexError for
    ids out of range. See `cemb.ops.hashed_lookup` for determinism and `cemb.hashing` for the hash.

    >>> import torch
    >>> from cemb import HashedEmbedding
    >>> table = HashedEmbedding(1_000_000_000, 100, pool_size=262_144, block_size=25)
    >>> table(torch.tensor([[0, 999_999_999]])).shape
    torch.Size([1, 2, 100])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        pool_size: int | None = None,
        compression_ratio: float | None = None,
        block_size: int = 1,
        hash_seed: int = 0,
        signed: bool = False,
        table_offset: int = 0,
        init_std: float = 0.1,
        weight: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _refuse(max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        given = {"pool_size": pool_size, "compression_ratio": compression_ratio, "weight": weight}
        sources = [name for name, value in given.items() if value is not None]
        if sources not in (["pool_size"], ["compression_ratio"], ["weight"], ["pool_size", "weight"]):
            raise ValueError(
                "give one of pool_size, compression_ratio, and an existing pool as weight, got "
                f"{' and '.join(sources) or 'none'}"
            )
        if weight is not None:
            if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
                raise ValueError(
                    f"weight must be a 1-dimensional Parameter, got {type(weight).__name__} of shape "
                    f"{list(weight.shape)}"
                )
            if pool_size not in (None, weight.numel()):
                raise ValueError(f"pool_size={pool_size} contradicts the {weight.numel()} values of weight")
            if device is not None or dtype is not None:
                raise ValueError("device and dtype are those of the given weight; leave them out")
            pool_size = weight.numel()
        if compression_ratio is not None:
            check_reals("(0, inf)", compression_ratio=compression_ratio)
            pool_size = max(round(num_embeddings * embedding_dim / compression_ratio), block_size)
        assert pool_size is not None
        self.spec = HashSpec(
            num_embeddings, embedding_dim, pool_size, block_size, hash_seed, signed, table_offset
        )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be one of the {num_embeddings} rows, got {padding_idx}")
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.init_std = init_std
        self._table = ops.encode(self.spec)  # not a buffer: it stays on the CPU and out of the state
        if weight is None:
            self.weight = nn.Parameter(advise_huge_pages(torch.empty(pool_size, device=device, dtype=dtype)))
            self.reset_parameters()
        else:
            self.weight = weight

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **options: Any
    ) -> "HashedEmbedding":
        """A table whose rows are as close to given ones as its hash allows, or one over a given pool.

        Args:
            embeddings: rows ``[num_embeddings, embedding_dim]``; each value of the pool becomes the mean of
            those
                that read it, times their signs, which are the least squares. Or a pool ``[pool_size]``; then
                `num_embeddings` and `embedding_dim` must be among the options.
            freeze: the pool requires no gradient.
            padding_idx: as for the class; the row does not count in the means.
            options: other arguments of the class.
        """
        if embeddings.dim() == 1:
            table = cls(padding_idx=padding_idx, weight=nn.Parameter(embeddings), **options)
        elif embeddings.dim() == 2:
            rows, dim = embeddings.shape
            table = cls(rows, dim, padding_idx, device=embeddings.device, dtype=embeddings.dtype, **options)
            table.fit(embeddings)
        else:
            raise ValueError(f"embeddings must be rows or a pool, got shape {list(embeddings.shape)}")
        table.weight.requires_grad_(not freeze)
        return table

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> None:
        """Set the pool so that the rows are the closest to `embeddings` ``[num_embeddings, embedding_dim]``.

        Values that no row reads become 0.
        """
        if embeddings.shape != (self.num_embeddings, self.embedding_dim):
            raise ValueError(
                f"embeddings must have shape [{self.num_embeddings}, {self.embedding_dim}], got "
                f"{list(embeddings.shape)}"
            )
        ids = torch.arange(self.num_embeddings, device=embeddings.device)
        if self.padding_idx is not None:
            ids, embeddings = (
                x[torch.arange(len(x), device=x.device) != self.padding_idx] for x in (ids, embeddings)
            )
        signs = ops.lookup(torch.ones_like(self.weight), ids, self._table)
        sums, counts = (ops.scatter(values, ids, self._table) for values in (embeddings.to(signs), signs))
        self.weight.copy_(sums / counts.clamp(min=1))

    def reset_parameters(self) -> None:
        """Draw the pool anew from torch's default generator."""
        nn.init.normal_(self.weight, std=self.init_std)

    def get_extra_state(self) -> Tensor:
        """Version of the hash and what the table hashes by, int64 ``[8]``, as `cemb.ops.encode` has it."""
        return torch.cat((torch.tensor([HASH_VERSION]), self._table[:7]))

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: `load_state_dict` has compared it."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *lists: Any,
    ) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:
            found, own = state_dict[key].tolist(), self.get_extra_state().tolist()
            if found[:1] + found[2:] != own[:1] + own[2:]:  # a table may have other rows: they hash alike
                *_, errors = lists
                errors.append(f"{prefix}weight is of {_describe(found)}, and the module of {_describe(own)}")
                return
        elif f"{prefix}weight" in state_dict:
            warnings.warn(
                f"{prefix}weight comes from a version that did not save the hash: that it was made by "
                f"{_describe(self.get_extra_state().tolist())} cannot be checked",
                stacklevel=4,
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        if key in missing:
            missing.remove(key)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("TorchScript cannot compile the hash's kernels: use torch.export")

    @property
    def arguments(self) -> dict[str, Any]:
        return {**asdict(self.spec), "padding_idx": self.padding_idx, "init_std": self.init_std}

    @property
    def num_embeddings(self) -> int:
        return self.spec.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.spec.embedding_dim

    @property
    def pool_size(self) -> int:
        return self.spec.pool_size

    @property
    def compression_ratio(self) -> float:
        """Values of the table per value of the pool."""
        return self.num_embeddings * self.embedding_dim / self.pool_size

    def forward(self, ids: Tensor) -> Tensor:
        rows = lookup(self.weight, ids, self._table)
        return rows if self.padding_idx is None else _without(rows, ids, self.padding_idx)

    def pair_scores(self, pairs: Tensor, context_table: "HashedEmbedding", dropout: float) -> Tensor:
        """Scores ``[n]`` of the pairs ``[n, 2]``, contexts from a table over the same pool.

        The two tables may differ in `table_offset` alone.
        """
        if self.padding_idx is not None:
            raise ValueError(
                "pairs of a table with a padding_idx are not scored from its pool: multiply its rows"
            )
        offset = context_table.spec.table_offset
        return ops.pair_scores(self.weight, pairs, self.spec, context_offset=offset, dropout=dropout)

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, pool_size={self.pool_size}"]
        defaults = {"block_size": 1, "hash_seed": 0, "signed": False, "table_offset": 0}
        parts += [
            f"{name}={getattr(self.spec, name)}"
            for name, default in defaults.items()
            if getattr(self.spec, name) != default
        ]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        return ", ".join(parts)


class ReferenceHashedEmbedding(HashedEmbedding):
    """`HashedEmbedding` computed by `cemb.reference`: what eager PyTorch makes of the same table."""

    pair_scores: Any = None

    def forward(self, ids: Tensor) -> Tensor:
        rows = reference.hashed_lookup(self.weight, ids, self.spec)
        return rows if self.padding_idx is None else _without(rows, ids, self.padding_idx)


class HashedEmbeddingBag(HashedEmbedding):
    """A drop-in for `nn.EmbeddingBag` over a pool: sums, means or maxima of the rows of bags of ids.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: offsets end with the number of ids, as in `nn.EmbeddingBag`.
        options: other arguments of `HashedEmbedding`, by name. Rows of `padding_idx` do not count.

    Raises ValueError as that does, and for another mode.
    """

    pair_scores: Any = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ):
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be sum, mean or max, got {mode!r}")
        super().__init__(num_embeddings, embedding_dim, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags ``[bags, embedding_dim]``, as `torch.nn.functional.embedding_bag` makes them.

        Args:
            ids: bags of one length ``[bags, length]``, or ``[n]`` with `offsets`.
            offsets: where bags start ``[bags]``.
            per_sample_weights: like `ids`, for sums only.
        """
        vectors = lookup(self.weight, ids, self._table).reshape(-1, self.embedding_dim)
        which, padding = torch.arange(ids.numel(), device=ids.device), None
        if self.padding_idx is not None:
            vectors = torch.cat((vectors, vectors.new_zeros(1, self.embedding_dim)))
            padding = ids.numel()
            which = which.masked_fill(ids.reshape(-1) == self.padding_idx, padding)
        return nn.functional.embedding_bag(
            which.view(ids.shape),
            vectors,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
