"""Hash-compressed embedding tables for PyTorch, and the study of them on PMI factorization."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cemb import optim
    from cemb.hashing import HashSpec
    from cemb.model import PairModel
    from cemb.saved import load, save
    from cemb.tables import FullEmbedding, HashedEmbedding, HashedEmbeddingBag

__version__ = "0.1.0"
__all__ = [
    "FullEmbedding",
    "HashSpec",
    "HashedEmbedding",
    "HashedEmbeddingBag",
    "PairModel",
    "load",
    "optim",
    "save",
]

_HOME = {
    "FullEmbedding": "cemb.tables",
    "HashSpec": "cemb.hashing",
    "HashedEmbedding": "cemb.tables",
    "HashedEmbeddingBag": "cemb.tables",
    "PairModel": "cemb.model",
    "load": "cemb.saved",
    "save": "cemb.saved",
}


def __getattr__(name: str) -> object:
    # Loaded on first use: the book's pages and `study --check` need no torch and should not wait for it.
    if name == "optim":
        return import_module("cemb.optim")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cemb' has no attribute {name!r}")


def __dir__() -> list[str]:
    # For completion: what a user imports, loaded or not.
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
