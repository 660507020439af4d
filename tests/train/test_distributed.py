"""Training on torchrun's ranks, against training in one process."""

import json
import os
import re
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist
from conftest import ROOT

from cemb.model import build_compressed_model, build_model
from cemb.train import distributed
from cemb.train.batches import PairBatches
from cemb.train.loops import train_mini_batches
from cemb.train.losses import LOSSES

WORDS, DIM, BATCH = 60, 6, 128
TABLES = {
    "hashed": lambda: build_model("hashed", WORDS, DIM, pool_size=200, block_size=2, shared_table=False),
    "full": lambda: build_model("full", WORDS, DIM, shared_table=False, sparse_gradients=True),
    "biased": lambda: build_model("hashed-reference", WORDS, DIM, pool_size=200, bias="separate"),
    "clustered": lambda: build_compressed_model("clustered", WORDS, DIM, 1200),
}
RATES = {"sgd": 0.02, "adagrad": 0.1, "adam": 0.02}
EITHER = [(table, optimizer, "all-cells") for table in ("hashed", "full") for optimizer in RATES]
CASES = [*EITHER, ("hashed", "sgd", "mse"), ("full", "adam", "glove"), ("biased", "adam", "weighted-mse")]
CASES += [("clustered", "adam", "mse")]


def matrix():
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(2, WORDS, 3))
    return sp.csr_array(np.maximum(left @ right.T, 0).astype(np.float32))


def trained(table, optimizer, loss, part=(0, 1)):
    """A model and the loss of each of 200 steps or a few more."""
    torch.manual_seed(1)
    model = TABLES[table]()
    batches = PairBatches(matrix(), BATCH, weighted=loss == "all-cells", seed=4, part=part)
    num_epochs = -(-200 // len(batches))
    rate = RATES[optimizer] * (25 if (optimizer, loss) == ("sgd", "mse") else 1)
    options = {"optimizer": optimizer, "learning_rate": rate, "num_epochs": num_epochs}
    history = train_mini_batches(
        model, batches, LOSSES[loss], **options, reports_per_epoch=1 if table == "clustered" else len(batches)
    )
    return model, history


_RANK = """
import hashlib, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path.insert(0, "tests/train")
sys.path.insert(0, "tests")
from test_distributed import CASES, trained
from cemb.train import distributed

handed, all_reduce = [0], dist.all_reduce

def counted(tensor):
    if tensor.dtype == torch.float32:
        values = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        handed[0] += sum(len(value.numpy().tobytes()) for value in values)
    all_reduce(tensor)

dist.all_reduce = counted
with distributed.joined() as part:
    found = []
    for case in CASES:
        handed[0] = 0
        model, history = trained(*case, part=part)
        values = {name: value.tolist() for name, value in model.state_dict().items()}
        found.append({"history": history, "values": values, "handed": handed[0]})
    Path(sys.argv[1], f"{part[0]}.json").write_text(json.dumps(found))
    if part[0]:
        next(model.parameters()).data.view(-1)[3] += 1e-3
    try:
        distributed.check_equal(model)
    except RuntimeError as error:
        Path(sys.argv[1], f"{part[0]}.txt").write_text(str(error))
"""


def torchrun(*arguments, ranks=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen([*command, *arguments], **{"cwd": ROOT, "env": environment, **options})


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def ranks(request, tmp_path_factory):
    """What each rank has found of each case, and what it said of a model that differed in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(_RANK)
    process = torchrun(str(folder / "rank.py"), str(folder), ranks=request.param, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    numbers = range(request.param)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in numbers]
    return found, [(folder / f"{rank}.txt").read_text() for rank in numbers]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_have_the_same_bits_and_the_losses_of_one_process(case, ranks):
    found = [of_rank[CASES.index(case)] for of_rank in ranks[0]]
    assert all(other["values"] == found[0]["values"] for other in found)
    model, history = trained(*case)
    losses = [[entry["loss"] for entry in one] for one in (history, *(f["history"] for f in found))]
    assert len({*map(len, losses)}) == 1
    assert losses[1] == losses[-1]
    # Sums of float32 in another order differ by some 2^-24 each; 200 steps make at most 4e-7 of that here.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, values in model.state_dict().items():
        np.testing.assert_allclose(found[0]["values"][name], values.tolist(), rtol=1e-3, atol=1e-4)
    n = len(losses[0]) // 10 + 1
    assert np.mean(losses[0][-n:]) < 0.9 * np.mean(losses[0][:n])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_bytes_are_those_handed_to_the_collectives(case, ranks):
    found = [of_rank[CASES.index(case)] for of_rank in ranks[0]]
    steps = found[0]["history"][-1]["step"]
    mean = found[0]["history"][-1]["bytes_sent_per_step"]
    assert mean * steps * len(found) == pytest.approx(sum(one["handed"] for one in found))
    model = TABLES[case[0]]()
    dense = sum(4 * p.numel() for p in model.parameters())
    if case[0] != "full":
        assert mean == dense
        return
    rows = 0
    for rank in range(len(found)):
        batches = PairBatches(
            matrix(), BATCH, weighted=case[2] == "all-cells", seed=4, part=(rank, len(found))
        )
        rows += sum(len(side.unique()) for step in range(steps) for side in batches.batch(step)[0].T)
    assert mean == rows * (8 + 4 * DIM) / steps / len(found)


def test_ranks_that_end_with_other_values_are_told(ranks):
    others = ", ".join(map(str, range(1, len(ranks[0]))))
    assert all(
        said.startswith(f"ranks {others} ended with other values than rank 0, so") for said in ranks[1]
    )


def test_a_model_that_is_not_on_the_cpu_is_refused_by_several_ranks():
    model = TABLES["full"]().to("meta")
    batches = PairBatches(matrix(), BATCH, part=(1, 2))
    options = {"optimizer": "sgd", "learning_rate": 0.1, "num_epochs": 1}
    with pytest.raises(ValueError, match=r"several processes train on the CPU, .* the model is on meta"):
        train_mini_batches(model, batches, LOSSES["mse"], **options)


def test_a_host_that_is_unknown_is_named(monkeypatch):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host.invalid", "MASTER_PORT": "29555"}
    for name, value in {**launched, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_TIMEOUT", timedelta(seconds=1))
    # A group that fails leaves it raised, and the next in this process would have another name.
    monkeypatch.setattr(dist.distributed_c10d._world, "group_count", 0)
    message = r"rank 1 of 2 could not join the others, of which one may have ended \(.*host\.invalid"
    with pytest.raises(distributed.RankLostError, match=message), distributed.joined():
        pass


def test_the_rank_that_lost_another_is_named(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("[../gloo/tcp/pair.cc:547] Connection closed by peer [::1]:80. This may mean")

    monkeypatch.setattr(dist, "all_reduce", fail)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    message = "rank 0 of 2 lost its connection to another process, which has ended (Connection closed by "
    with pytest.raises(distributed.RankLostError, match=re.escape(message)):
        distributed.sum_numbers(1)
