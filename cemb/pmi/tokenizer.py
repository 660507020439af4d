"""Numba kernels of the tokenizer: bytes of UTF-8 to ids of words, in one pass over the bytes.

A run is a maximal stretch of ASCII letters, ASCII apostrophes and bytes of other characters. All else in
ASCII separates: Unicode composes no character with a preceding white space, digit or punctuation mark that
would make it a letter, so a run can be tokenized without what stands around it. Runs of ASCII alone are
tokenized here; a run with other bytes is an entry of its own, which the caller has the reference tokenize
once.

Entries are kept in an open-addressing hash table with linear probing: `slots` holds 1 + the entry, 0 where
free, and is a power of two long and at most half full. Kernels are single-threaded, release the interpreter
and own no state, so that several threads may run them at once.

Hashes are uint64 throughout: Numba promotes mixed signed arithmetic to float64.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from cemb.kernels.cache import cached

# What a byte is. Letters come last, so that one comparison finds them.
OTHER, APOSTROPHE, HIGH, SPACE, NEWLINE, TERMINATOR, CLOSER, DOCUMENT_END, LETTER = range(9)

# Where windows may not cross: after each document; or at line ends too; or at ends of sentences too.
DOCUMENTS, LINES, SENTENCES = 1, 2, 3

_CLASS = np.zeros(256, np.uint8)
_CLASS[128:255] = HIGH
_CLASS[255] = DOCUMENT_END  # this byte is never part of UTF-8
_CLASS[list(b"'")] = APOSTROPHE
_CLASS[list(b" \t\v\f\r")] = SPACE
_CLASS[list(b"\n")] = NEWLINE
_CLASS[list(b".!?")] = TERMINATOR
_CLASS[list(b'")]}')] = CLOSER
_FOLDED = np.arange(256, dtype=np.uint8)
for _letter in range(26):
    _CLASS[[65 + _letter, 97 + _letter]] = LETTER
    _FOLDED[65 + _letter] = 97 + _letter

_BASIS = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_S32 = np.uint64(32)


@njit(inline="always")
def _mixed(h: Any, byte: Any) -> Any:
    return (h ^ np.uint64(byte)) * _PRIME


@njit(inline="always")
def _same(data: Any, start: Any, stop: Any, folds: Any, keys: Any, key_start: Any, key_stop: Any) -> bool:
    if stop - start != key_stop - key_start:
        return False
    for k in range(stop - start):
        byte = _FOLDED[data[start + k]] if folds else data[start + k]
        if byte != keys[key_start + k]:
            return False
    return True


@njit(inline="always")
def _place(h: Any, mask: Any) -> Any:
    return np.int64((h ^ (h >> _S32)) & np.uint64(mask))


@cached(nogil=True)
def rehash(hashes: npt.NDArray[np.uint64], num_entries: int, num_slots: int) -> npt.NDArray[np.int32]:
    """The slots, `num_slots` long, of the first `num_entries` entries."""
    slots = np.zeros(num_slots, np.int32)
    for entry in range(num_entries):
        slot = _place(hashes[entry], num_slots - 1)
        while slots[slot] != 0:
            slot = (slot + 1) & (num_slots - 1)
        slots[slot] = entry + 1
    return slots


@njit(inline="always")
def _is_closing(data: Any, start: Any, stop: Any) -> bool:
    """Whether a run holds nothing but the closing marks ’ ” » and apostrophes."""
    i = start
    while i < stop:
        if data[i] == 0x27:
            i += 1
        elif data[i] == 0xC2 and i + 1 < stop and data[i + 1] == 0xBB:
            i += 2
        elif (
            data[i] == 0xE2
            and i + 2 < stop
            and data[i + 1] == 0x80
            and (data[i + 2] == 0x99 or data[i + 2] == 0x9D)
        ):
            i += 3
        else:
            return False
    return True


@njit(nogil=True)
def _widened(values: Any, size: int) -> Any:
    wider = np.empty(size, values.dtype)
    for i in range(values.shape[0]):  # a slice's assignment takes seconds to compile
        wider[i] = values[i]
    return wider


@cached(nogil=True)
def scan(
    data: npt.NDArray[np.uint8], borders: int
) -> tuple[
    npt.NDArray[np.int32],
    npt.NDArray[np.uint8],
    npt.NDArray[np.int64],
    npt.NDArray[np.uint64],
    npt.NDArray[np.int64],
]:
    """Tokenize a block of UTF-8 that begins and ends between runs.

    Returns ``ids, keys, key_ends, hashes, counts``: `ids` of the block's own entries in order of first
    appearance, -1 for a border; entry i has the bytes ``keys[key_ends[i - 1] : key_ends[i]]``, folded if
    ASCII, and occurs ``counts[i]`` times. No two borders are adjacent.
    """
    n = data.shape[0]
    ids = np.empty(n + 2, np.int32)
    found = 0
    capacity = 1 << 12
    keys = np.empty(n + 1, np.uint8)
    key_ends = np.empty(capacity, np.int64)
    hashes = np.empty(capacity, np.uint64)
    counts = np.empty(capacity, np.int64)
    slots = np.zeros(2 * capacity, np.int32)
    num_entries = 0
    keys_end = 0
    # A sentence ends where white space follows a terminator and its closing marks, or at an empty line.
    is_ending = False
    is_line_blank = False
    run_end = 0  # beyond i where the present run is known to be ASCII up to there
    i = 0
    while i < n:
        kind = _CLASS[data[i]]
        if kind in (LETTER, APOSTROPHE, HIGH):
            start = i
            h = _BASIS
            while i < n and _CLASS[data[i]] == LETTER:
                h = _mixed(h, _FOLDED[data[i]])
                i += 1
            stop = i
            folds = True
            if i < n and (_CLASS[data[i]] == APOSTROPHE or _CLASS[data[i]] == HIGH):
                # Rare: an apostrophe inside or beside a word, or other characters somewhere in the run.
                if run_end <= i:
                    run_end = i
                    while run_end < n and (
                        _CLASS[data[run_end]] == LETTER
                        or _CLASS[data[run_end]] == APOSTROPHE
                        or _CLASS[data[run_end]] == HIGH
                    ):
                        folds = folds and _CLASS[data[run_end]] != HIGH
                        run_end += 1
                if folds:
                    while (
                        stop > start
                        and stop + 1 < run_end
                        and _CLASS[data[stop]] == APOSTROPHE
                        and _CLASS[data[stop + 1]] == LETTER
                    ):
                        h = _mixed(h, 0x27)
                        stop += 1
                        while stop < run_end and _CLASS[data[stop]] == LETTER:
                            h = _mixed(h, _FOLDED[data[stop]])
                            stop += 1
                    i = stop
                    while i < run_end and _CLASS[data[i]] == APOSTROPHE:
                        i += 1
                else:
                    stop = i = run_end
                    h = _BASIS
                    for k in range(start, stop):
                        h = _mixed(h, data[k])
            is_line_blank = False
            if stop == start:
                continue
            is_ending = is_ending and _is_closing(data, start, stop)
            slot = _place(h, slots.shape[0] - 1)
            while True:
                entry = slots[slot] - 1
                if entry < 0:
                    if num_entries == capacity:
                        capacity *= 2
                        key_ends = _widened(key_ends, capacity)
                        hashes = _widened(hashes, capacity)
                        counts = _widened(counts, capacity)
                        slots = rehash(hashes, num_entries, 2 * capacity)
                        slot = _place(h, slots.shape[0] - 1)
                        while slots[slot] != 0:
                            slot = (slot + 1) & (slots.shape[0] - 1)
                    entry = num_entries
                    num_entries += 1
                    slots[slot] = num_entries
                    for k in range(start, stop):
                        keys[keys_end] = _FOLDED[data[k]] if folds else data[k]
                        keys_end += 1
                    key_ends[entry] = keys_end
                    hashes[entry] = h
                    counts[entry] = 0
                    break
                if hashes[entry] == h and _same(
                    data, start, stop, folds, keys, key_ends[entry - 1] if entry else 0, key_ends[entry]
                ):
                    break
                slot = (slot + 1) & (slots.shape[0] - 1)
            counts[entry] += 1
            ids[found] = entry
            found += 1
            continue
        i += 1
        is_border = False
        if kind == SPACE:
            is_border = is_ending and borders == SENTENCES
            is_ending = False
        elif kind == NEWLINE:
            is_border = borders == LINES or (borders == SENTENCES and (is_ending or is_line_blank))
            is_ending = False
            is_line_blank = True
        elif kind == DOCUMENT_END:
            is_border = borders != 0
            is_ending = is_line_blank = False
        else:
            is_line_blank = False
            if kind == TERMINATOR:
                is_ending = True
            elif kind == OTHER:
                is_ending = False
        if is_border and (found == 0 or ids[found - 1] >= 0):
            ids[found] = -1
            found += 1
    return (
        ids[:found],
        keys[:keys_end].copy(),
        key_ends[:num_entries].copy(),
        hashes[:num_entries].copy(),
        counts[:num_entries].copy(),
    )


@cached(nogil=True)
def hash_keys(keys: npt.NDArray[np.uint8], key_ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Hashes of keys, as `scan` computes them of what it stores."""
    hashes = np.empty(key_ends.shape[0], np.uint64)
    start = 0
    for entry in range(key_ends.shape[0]):
        h = _BASIS
        for k in range(start, key_ends[entry]):
            h = _mixed(h, keys[k])
        hashes[entry] = h
        start = key_ends[entry]
    return hashes


@cached(nogil=True)
def insert(
    slots: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint8],
    key_ends: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    num_entries: int,
    new_keys: npt.NDArray[np.uint8],
    new_ends: npt.NDArray[np.int64],
    new_hashes: npt.NDArray[np.uint64],
    wanted: npt.NDArray[np.bool],
    entries: npt.NDArray[np.int32],
) -> int:
    """Find keys in a table, and append those it lacks; returns the number of entries then.

    Only keys with ``wanted[i]`` are looked for; ``entries[i]`` becomes the entry of key i. The table's
    arrays must be large enough for all of them.
    """
    mask = slots.shape[0] - 1
    start = 0
    for i in range(new_ends.shape[0]):
        stop = new_ends[i]
        if wanted[i]:
            h = new_hashes[i]
            slot = _place(h, mask)
            while True:
                entry = slots[slot] - 1
                if entry < 0:
                    entry = num_entries
                    num_entries += 1
                    slots[slot] = num_entries
                    end = key_ends[entry - 1] if entry else 0
                    for k in range(start, stop):
                        keys[end] = new_keys[k]
                        end += 1
                    key_ends[entry] = end
                    hashes[entry] = h
                    break
                if hashes[entry] == h and _same(
                    new_keys, start, stop, False, keys, key_ends[entry - 1] if entry else 0, key_ends[entry]
                ):
                    break
                slot = (slot + 1) & mask
            entries[i] = entry
        start = stop
    return num_entries


@cached(nogil=True)
def expand(
    ids: npt.NDArray[np.int32],
    first: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    words: npt.NDArray[np.int32],
    out: npt.NDArray[np.int32],
) -> int:
    """Replace each id i by ``words[first[i] : last[i]]``; -1 stays, not twice in a row. Returns how many."""
    found = 0
    for i in range(ids.shape[0]):
        if ids[i] >= 0:
            for k in range(first[ids[i]], last[ids[i]]):
                if words[k] >= 0 or found == 0 or out[found - 1] >= 0:
                    out[found] = words[k]
                    found += 1
        elif found == 0 or out[found - 1] >= 0:
            out[found] = -1
            found += 1
    return found


@cached(nogil=True)
def add_counts(
    counts: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    words: npt.NDArray[np.int32],
    totals: npt.NDArray[np.int64],
) -> int:
    """Add ``counts[i]`` to the totals of ``words[first[i] : last[i]]``; returns how many tokens that were."""
    added = 0
    for i in range(counts.shape[0]):
        for k in range(first[i], last[i]):
            if words[k] >= 0:
                totals[words[k]] += counts[i]
                added += counts[i]
    return added


@cached(nogil=True)
def renumber(
    ids: npt.NDArray[np.int32],
    final: npt.NDArray[np.int32],
    is_border: int,
    out: npt.NDArray[np.int32],
    filled: int,
) -> tuple[int, int, int]:
    """Append the final ids of words in the vocabulary to `out`, of which `filled` are there.

    Borders come only between two of those. Returns how many ids were taken, how many are in `out` then, and
    whether a border is due before the next (0 no, 1 yes, 2 nothing came yet). Stops where `out` may not hold
    the next.
    """
    for i in range(ids.shape[0]):
        if ids[i] < 0:
            if is_border == 0:
                is_border = 1
        elif final[ids[i]] >= 0:
            if filled + 1 + (is_border == 1) > out.shape[0]:
                return i, filled, is_border
            if is_border == 1:
                out[filled] = -1
                filled += 1
            out[filled] = final[ids[i]]
            filled += 1
            is_border = 0
    return ids.shape[0], filled, is_border
