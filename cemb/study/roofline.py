"""The least time that memory allows a training step."""

from typing import Any

from cemb.study.sizes import COPIES, GPU_BLOCK, SMALL


def floor_ms(record: dict[str, Any], bandwidths: dict[str, float]) -> float | None:
    """The least time this machine's memory allows a step, by what the algorithm cannot but read and write.

    Full tables with sparse gradients or explicit steps: the rows of the batch come from memory once and go
    back once, as do the optimizer's states of them; rows' single states are left out. Dense ones: moreover
    the gradient is written and read, weights and states read and written, all in order. Hashed tables: in
    a large pool as full ones, by the cache lines of blocks, or, if that is less, lines come from memory
    once and the step goes through pool and states in order; in a small pool each line is read from cache
    twice, forward and backward, or once in a step of one pass, and added to once; what visits the pool in
    order is left out. At block size 1
    the lines of components that dropout drops are not needed. Passes that a larger cache would save, the
    hash and all arithmetic are left out. None on a GPU.
    """
    if record["device"] != "cpu":
        return None
    has_row_states = record["table"].endswith("rowwise")
    passes = 2 + 2 * (0 if has_row_states else {"sgd": 0, "adagrad": 1, "adam": 2}[record["optimizer"]])
    rows: int = 2 * record["batch_size"]
    values = record["num_embeddings"] * record["embedding_dim"]
    size: int = record["pool_size"] if record["pool_size"] is not None else values
    dense_s = (passes + 2) * size * 4 / (bandwidths["stream_gb_per_s"] * 1e9)
    row_s = 1 / bandwidths["random_rows_per_s"]
    if record["table"] == "full" and not record["sparse_gradients"]:
        return 1e3 * (rows * row_s + dense_s)
    if record["table"].startswith("full"):
        return 1e3 * passes * rows * row_s
    blocks = rows * -(-record["embedding_dim"] // record["block_size"])
    lines: float = blocks * (record["block_size"] * 4 + 60) / 64  # of 64 bytes, on average
    if record["block_size"] == 1:
        lines *= (1 - record["dropout"]) ** 2
    if size <= SMALL:
        gather_s = 1 / bandwidths["cached_gathers_per_s"]
        add_s = 1 / bandwidths.get(
            "cached_adds_per_s", bandwidths["cached_gathers_per_s"]
        )  # older records have none
        return 1e3 * lines * ((1 if record.get("one_pass") else 2) * gather_s + add_s)
    lines_s = lines * min(1 / bandwidths["random_values_per_s"], row_s * 64 / (400 + 60))
    in_order_s = passes * size * 4 / (bandwidths["stream_gb_per_s"] * 1e9)
    return 1e3 * (lines_s + min((passes - 1) * lines_s, in_order_s))


def gpu_floor_ms(record: dict[str, Any], bandwidths: dict[str, float]) -> float | None:
    """`floor_ms` on a GPU, by what `cemb.study.bandwidths_gpu` measures of its memory and caches.

    Forward and backward each read what a batch looks up, and the backward pass adds to as much; components
    that dropout drops need neither at block size 1, where each is an access of its own. Sparse steps read the
    rows once and update them, and each state of the optimizer, in place; all others write the gradient in
    order, read it, and go through weights and states. None for block sizes of which no rate was measured.
    """
    rows: int = 2 * record["batch_size"]
    size: int = record["pool_size"] or record["num_embeddings"] * record["embedding_dim"]
    copies = COPIES[record["optimizer"]]
    row_s, row_add_s = 1 / bandwidths["random_rows_per_s"], 1 / bandwidths["random_row_adds_per_s"]
    if record["sparse_gradients"]:
        return 1e3 * rows * (row_s + copies * row_add_s)
    in_order_s = (2 * copies + 2) * size * 4 / (bandwidths["stream_gb_per_s"] * 1e9)
    if record["table"].startswith("full"):
        return 1e3 * (rows * (2 * row_s + row_add_s) + in_order_s)
    values = rows * record["embedding_dim"]
    if record["block_size"] == 1:
        accesses: float = values * (1 - record["dropout"]) ** 2
        place = "cached_value" if size <= SMALL else "random_value"
        read_s, add_s = 1 / bandwidths[f"{place}s_per_s"], 1 / bandwidths[f"{place}_adds_per_s"]
    elif record["block_size"] == GPU_BLOCK:
        accesses = values / GPU_BLOCK
        if size <= SMALL:
            read_s, add_s = 1 / bandwidths["cached_blocks_per_s"], 1 / bandwidths["cached_block_adds_per_s"]
        else:
            read_s, add_s = row_s * GPU_BLOCK / 100, row_add_s * GPU_BLOCK / 100  # by their bytes
    else:
        return None
    return 1e3 * (accesses * (2 * read_s + add_s) + in_order_s)
