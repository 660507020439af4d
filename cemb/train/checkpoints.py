"""Checkpoints of a training: what it needs to go on from a step as if it had never stopped.

A checkpoint is a folder of `files.atomic_directory`: ``tensors.safetensors`` (the model's parameters and
buffers, the optimizer's state, that of torch's generator) and ``manifest.json`` (the step, the history, the
rate, and what the training is of). Nothing is pickled; https://huggingface.co/docs/safetensors has the
format.
"""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cemb import files, processes, saved
from cemb.checks import check_integers
from cemb.memory import advise_huge_pages
from cemb.train import distributed

_VERSION = 1
_TENSORS = "tensors.safetensors"
_FIELDS = {
    "identity": dict,
    "learning_rate": float,
    "train_s": float,
    "progress": dict,
    "groups": list,
    "numbers": dict,
}


@dataclass
class Progress:
    """How far a training is, beside its model and optimizer."""

    step: int = 0
    """Steps done."""
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of mini-batches since the last entry of the history."""
    first_loss: float | None = None
    seconds: float = 0.0
    """Spent so far at this rate."""
    bytes_sent: float = 0
    """By all ranks so far."""


class Checkpoints:
    """The checkpoints of one training, of which the newest is kept. Made by `opened`.

    Args:
        folder: where they are.
        identity: what the training depends on, as JSON can hold it.
        every: steps between two; None for no new ones.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], every: int | None):
        self.folder, self.identity, self.every = folder, identity, every
        self.is_first = processes.rank_and_number()[0] == 0
        self._number = 0
        self._found: tuple[dict[str, Any], str] | None = None  # the newest: its manifest and name
        self._start = time.perf_counter()

    @property
    def _remedy(self) -> str:
        return f"remove {str(self.folder)!r}, and training begins anew"

    def find(self) -> None:
        """Read the newest checkpoint, where there is one, and say so. Raises as `opened`."""
        names = sorted(path.name for path in self.folder.glob("[!.]*"))
        if others := [name for name in names if not name.startswith("checkpoint-")]:
            raise FileExistsError(
                f"{str(self.folder)!r} is for checkpoints, and holds {others[0]!r}: move it away, or name "
                "another folder to make"
            )
        if not names:
            return
        path = self.folder / names[-1]
        manifest = files.read_manifest(path, _VERSION, _FIELDS, self._remedy)
        own = json.loads(json.dumps(self.identity))
        if others := _differences(manifest["identity"], own):
            raise ValueError(
                f"{str(path)!r} is of another training, which this one cannot go on from: "
                f"{'; '.join(others)}; give the command that it is of, or {self._remedy}"
            )
        self._number = int(names[-1].rpartition("-")[2])
        self._found = manifest, path.name
        print(f"cemb: training resumes at step {manifest['progress']['step']}, from {path}", file=sys.stderr)

    def share(self) -> None:
        """Tell all ranks, which see the same folders, what rank 0 found; the clock of `train_s` goes on."""
        self._found = json.loads(distributed.from_rank_0(json.dumps(self._found).encode()))
        self._start = time.perf_counter()
        if not self.is_first:
            processes.set_remedy("the same command resumes from its newest checkpoint, if any")
        if self._found is not None:
            self._start -= self._found[0]["train_s"]
            self._promise(self._found[0]["progress"]["step"])

    @property
    def train_s(self) -> float:
        """Seconds that training has taken, before it was stopped, too."""
        return time.perf_counter() - self._start

    def resumes_below(self, learning_rate: float) -> bool:
        """Whether the checkpoint is of a lower rate, which a divergence at this one led to."""
        return self._found is not None and self._found[0]["learning_rate"] < learning_rate

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Put model, optimizer and torch's generator where the checkpoint was; at the beginning, if none.

        Raises DamagedError for a checkpoint that does not fit them.
        """
        if self._found is None:
            return Progress()
        manifest, path = self._found[0], self.folder / self._found[1] / _TENSORS
        self._found = None
        try:
            progress = Progress(**manifest["progress"])
            state: dict[int, dict[str, Any]] = {
                int(index): dict(numbers) for index, numbers in manifest["numbers"].items()
            }
            with torch.no_grad(), safe_open(path, framework="pt") as stored:
                others = {*stored.keys()} - {"generator"}
                for name, own in _tensors(model).items():
                    others.remove(f"model.{name}")
                    kept = stored.get_tensor(f"model.{name}")
                    if kept.shape != own.shape or kept.dtype != own.dtype:
                        raise ValueError(f"{name} is {kept.dtype} {list(kept.shape)}")
                    own.copy_(kept)
                torch.set_rng_state(stored.get_tensor("generator"))
                for name in others:
                    _, index, entry = name.split(".", 2)
                    kept = stored.get_tensor(name)
                    state.setdefault(int(index), {})[entry] = advise_huge_pages(torch.empty_like(kept)).copy_(
                        kept
                    )
            groups = manifest["groups"]
            if [group.keys() for group in groups] != [group.keys() for group in optimizer.param_groups]:
                raise ValueError(f"its optimizer's options are {groups}")
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise files.damaged(
                self.folder, f"its checkpoint does not fit the training: {error}", self._remedy
            ) from None
        return progress

    def step_done(
        self, progress: Progress, learning_rate: float, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep a checkpoint, by rank 0, if it is time for one; `learning_rate` is that before its decay."""
        if self.is_first and self.every is not None and progress.step % self.every == 0:
            self._keep(progress, learning_rate, model, optimizer)

    def _keep(
        self, progress: Progress, learning_rate: float, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        tensors = {f"model.{name}": tensor.detach() for name, tensor in _tensors(model).items()}
        numbers: dict[int, dict[str, Any]] = {}
        kept = optimizer.state_dict()
        for index, state in kept["state"].items():
            numbers[index] = {name: value for name, value in state.items() if not torch.is_tensor(value)}
            found = (name for name in state if name not in numbers[index])
            tensors |= {f"optimizer.{index}.{name}": state[name] for name in found}
        manifest = {
            "kind": "checkpoint",
            "version": _VERSION,
            "identity": self.identity,
            "learning_rate": learning_rate,
            "train_s": self.train_s,
            "progress": asdict(progress),
            "groups": kept["param_groups"],
            "numbers": numbers,
        }
        self._number += 1
        path = self.folder / f"checkpoint-{self._number:06d}"
        with files.disk_errors(path), files.atomic_directory(path) as work:
            saved.write_values({**tensors, "generator": torch.get_rng_state()}, work / _TENSORS)
            (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for other in self.folder.glob("checkpoint-*"):
            if other != path:
                shutil.rmtree(other)
        self._promise(progress.step)

    def _promise(self, step: int) -> None:
        if self.is_first:  # which alone knows
            processes.set_remedy(f"the same command resumes at step {step}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities say of a name, where that is not the same; the first few."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    shown = [f"{name} is {now.get(name)!r} and was {before.get(name)!r}" for name in names[:4]]
    return [*shown, f"and {len(names) - 4} more"] if len(names) > 4 else shown


def _folder(out: Path) -> Path:
    return Path(f"{out}.partial")


def _remove_useless(out: Path) -> None:
    """Remove checkpoints whose training has made its folder `out`, and their own folder if it is empty."""
    folder = _folder(out)
    if (out / "manifest.json").exists():
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    with suppress(OSError):  # it is gone, or holds something
        folder.rmdir()


def tidy(out: Path) -> None:
    """Remove checkpoints that a training left which was killed when it had made its folder `out`.

    Raises RuntimeError if another process has their folder.
    """
    folder = _folder(out)
    if processes.rank_and_number()[0] == 0 and (out / "manifest.json").exists() and folder.is_dir():
        with files.exclusive(folder, wait=False):
            _remove_useless(out)


@contextmanager
def opened(out: Path, identity: Mapping[str, Any], every: int | None = None) -> Iterator[Checkpoints]:
    """The checkpoints of a training that shall make a folder `out`, in ``OUT.partial``.

    The folder is this process's alone meanwhile, and rank 0's of several. Checkpoints are removed in the end
    if there is `out`, and the folder if it is empty.

    Raises:
        RuntimeError: another process has the folder.
        FileExistsError: it holds what is no checkpoint.
        ValueError: the newest checkpoint is of another `identity`; says what differs.
        DamagedError: it is not what was written.
    """
    check_integers(1, checkpoint_every=every)
    folder = _folder(out)
    checkpoints = Checkpoints(folder, identity, every)
    with files.exclusive(folder, wait=False) if checkpoints.is_first else nullcontext():
        try:
            if checkpoints.is_first:
                files.sweep(folder)
                checkpoints.find()
            yield checkpoints
        finally:
            processes.set_remedy("")
            if checkpoints.is_first:
                _remove_useless(out)
