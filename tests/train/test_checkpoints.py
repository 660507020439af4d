import json
import math
import re
import tracemalloc

import pytest
import torch
from conftest import zipf_text

from cemb import cli, files, processes
from cemb.model import build_compressed_model, build_model
from cemb.study.dataset import PmiConfig
from cemb.study.quality import QualityCase, Trainings
from cemb.train import checkpoints, distributed, objective
from cemb.train.batches import PairBatches
from cemb.train.loops import (
    DivergenceError,
    halve_until_stable,
    make_optimizer,
    train_full_batch,
    train_mini_batches,
)
from cemb.train.losses import all_cells_loss, mse_loss

IDENTITY = {"table": "hashed", "seed": 0}
MODELS = {
    "full": lambda: build_model("full", 40, 6, shared_table=False, sparse_gradients=True),
    "full-fused": lambda: build_model("full-fused", 40, 6, shared_table=False, dropout=0.2),
    "hashed": lambda: build_model("hashed", 40, 6, pool_size=90, shared_table=False, dropout=0.2),
    "biased": lambda: build_model("hashed-reference", 40, 6, pool_size=90, block_size=3, bias="separate"),
    "clustered": lambda: build_compressed_model("clustered", 40, 6, 900),
    "low-rank": lambda: build_compressed_model("low-rank", 40, 6, 900),
}


class Stop(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch):
    """Has training stop before the step of a number, counted from where it begins."""

    def stop_at(owner, name, number):
        calls, original = [], getattr(owner, name)

        def counted(*arguments):
            calls.append(None)
            if len(calls) > number:
                monkeypatch.setattr(owner, name, original)
                raise Stop
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    return stop_at


def mini_batches(table, optimizer, matrix, kept=None, rate=0.05):
    torch.manual_seed(3)
    model = MODELS[table]()
    batches = PairBatches(matrix, 64, weighted=True, seed=5)
    history = train_mini_batches(
        model,
        batches,
        all_cells_loss,
        optimizer=optimizer,
        learning_rate=rate,
        num_epochs=4,
        reports_per_epoch=2,
        checkpoints=kept,
    )
    return model, history


def full_batches(table, optimizer, matrix, kept=None, rate=0.05):
    torch.manual_seed(3)
    model = MODELS[table]()
    loss = objective.AllCellsLoss(matrix)
    options = {"optimizer": optimizer, "learning_rate": rate, "num_steps": 30, "evaluate_every": 4}
    return model, train_full_batch(model, loss, **options, checkpoints=kept)


def content(trained):
    """What must not depend on stops: the values of a model, and its history but for the time."""
    model, history = trained
    values = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return values, [{name: v for name, v in entry.items() if name != "seconds"} for entry in history]


@pytest.fixture
def square_matrix(random_matrix):
    random_matrix.resize(40, 40)
    return random_matrix


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("table", MODELS)
@pytest.mark.parametrize("train", [mini_batches, full_batches])
def test_training_that_stops_goes_on_with_the_same_bits(
    train, table, optimizer, every, square_matrix, tmp_path, stopping
):
    if table == "full" and train is full_batches:
        pytest.skip("full batches have dense gradients")
    expected = content(train(table, optimizer, square_matrix))
    folder = tmp_path / "model.partial"
    where = (PairBatches, "batch") if train is mini_batches else (objective.AllCellsLoss, "__call__")
    for number in (7, 3, 9):
        stopping(*where, number)
        with pytest.raises(Stop), checkpoints.opened(tmp_path / "model", IDENTITY, every) as kept:
            kept.share()
            torch.manual_seed(99)  # what is drawn meanwhile
            train(table, optimizer, square_matrix, kept)
    with checkpoints.opened(tmp_path / "model", IDENTITY, every) as kept:
        kept.share()
        trained = train(table, optimizer, square_matrix, kept)
    assert content(trained) == expected
    seconds = [entry["seconds"] for entry in trained[1]]
    assert seconds == sorted(seconds)
    assert len(list(folder.iterdir())) == 1  # the newest


def test_a_checkpoint_keeps_the_halved_rate_and_the_time(square_matrix, tmp_path, stopping):
    tried = []

    def train(kept):
        def attempt(rate):
            tried.append(rate)
            if kept and kept.resumes_below(rate):
                raise DivergenceError
            return full_batches("full-fused", "sgd", square_matrix, kept, rate)[1]

        return halve_until_stable(attempt, 64.0)

    history, rate = train(None)
    attempts = tried.copy()
    assert rate == attempts[-1] < 64
    folder = tmp_path / "model.partial"
    for number in (3 * len(attempts) + 12, 9):  # in the last attempt
        stopping(objective.AllCellsLoss, "__call__", number)
        with pytest.raises(Stop), checkpoints.opened(tmp_path / "model", IDENTITY, 2) as kept:
            kept.share()
            train(kept)
        manifest = json.loads(next(folder.glob("*/manifest.json")).read_text())
        assert manifest["learning_rate"] == rate
    tried.clear()
    with checkpoints.opened(tmp_path / "model", IDENTITY, 2) as kept:
        kept.share()
        assert kept.train_s > manifest["train_s"] > manifest["progress"]["seconds"] > 0
        again, same_rate = train(kept)
    assert (tried, same_rate) == (attempts, rate)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history]


@pytest.fixture
def stopped(square_matrix, tmp_path, stopping):
    """The folder of a training that has stopped, with a checkpoint at step 6."""
    folder = tmp_path / "model.partial"
    stopping(PairBatches, "batch", 7)
    with pytest.raises(Stop), checkpoints.opened(tmp_path / "model", IDENTITY, 3) as kept:
        mini_batches("hashed", "adam", square_matrix, kept)
    return folder


def go_on(folder, identity=IDENTITY, *, table="hashed", optimizer="adam", matrix=None):
    with checkpoints.opened(folder.with_suffix(""), identity) as kept:
        kept.share()
        if matrix is not None:
            mini_batches(table, optimizer, matrix, kept)


def test_the_remedy_names_the_step(stopped):
    with checkpoints.opened(stopped.with_suffix(""), IDENTITY):
        pass
    assert processes.with_remedy("stopped") == "stopped"
    with checkpoints.opened(stopped.with_suffix(""), IDENTITY) as kept:
        kept.share()
        assert processes.with_remedy("stopped") == "stopped; the same command resumes at step 6"


def test_a_checkpoint_of_another_training_is_refused_by_name(stopped):
    other = {**IDENTITY, "seed": 1, "code of _decay": "1a", "kind": None, "a": 1, "b": 2}
    message = (
        r"checkpoint-000002' is of another training, .*: seed is 1 and was 0; code of _decay is '1a' and was "
        r"None; a is 1 and was None; b is 2 and was None; give the command .* remove '.*model\.partial', and"
    )
    with pytest.raises(ValueError, match=message):
        go_on(stopped, other)
    with pytest.raises(ValueError, match=r"seed is None and was 0; give"):
        go_on(stopped, {"table": "hashed"})
    assert list(stopped.glob("checkpoint-000002"))


def test_two_at_once_are_refused(stopped):
    message = rf"another process is at work in '{re.escape(str(stopped))}'"
    with checkpoints.opened(stopped.with_suffix(""), IDENTITY), pytest.raises(RuntimeError, match=message):
        go_on(stopped)


def test_every_damaged_byte_is_told(stopped):
    (path,) = stopped.glob("checkpoint-*")
    for name in ("tensors.safetensors", "manifest.json", files.SUMS):
        good = (path / name).read_bytes()
        for place in range(0, len(good), max(1, len(good) // 20)):
            (path / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(ValueError, match=r"(is damaged|has version).*remove '.*model\.partial', and"):
                go_on(stopped)
        (path / name).write_bytes(good)
    (path / "tensors.safetensors").unlink()
    with pytest.raises(files.DamagedError, match=r"tensors\.safetensors is missing"):
        go_on(stopped)


@pytest.mark.parametrize(
    ("table", "optimizer"),
    [("full-fused", "adam"), ("biased", "adam"), ("hashed", "sgd"), ("hashed", "adagrad")],
)
def test_what_does_not_fit_is_damage(table, optimizer, stopped, square_matrix):
    with pytest.raises(files.DamagedError, match=r"its checkpoint does not fit .*; remove"):
        go_on(stopped, table=table, optimizer=optimizer, matrix=square_matrix)


@pytest.mark.parametrize(
    "lie",
    [
        {"progress": {"step": 6, "stage": 1}},
        {"groups": []},
        {"numbers": {"x": {}}},
        {"learning_rate": "0.05"},
        {"identity": None},
    ],
)
def test_a_manifest_that_lies_is_damage(lie, stopped, square_matrix):
    (path,) = stopped.glob("checkpoint-*")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **lie}))
    files._write_sums(path)
    with pytest.raises(files.DamagedError, match=r"is damaged: .*; remove '.*', and"):
        go_on(stopped, matrix=square_matrix)


def test_nothing_is_left_where_no_checkpoint_was_made(tmp_path):
    folder = tmp_path / "model.partial"
    with checkpoints.opened(tmp_path / "model", IDENTITY, 3):
        assert folder.is_dir()
    assert not folder.exists()


def test_what_is_no_checkpoint_is_refused_and_left(stopped):
    kept = stopped / "bucket-00001.npy"
    kept.write_bytes(b"1")
    with pytest.raises(FileExistsError, match=r"model\.partial' is for checkpoints, and holds 'bucket-00001"):
        go_on(stopped)
    (stopped.with_suffix("") / "manifest.json").parent.mkdir()
    (stopped.with_suffix("") / "manifest.json").touch()
    checkpoints.tidy(stopped.with_suffix(""))
    assert list(stopped.iterdir()) == [kept]


def test_checkpoints_wait_for_the_folder_of_their_training(stopped):
    model = stopped.with_suffix("")
    model.mkdir()  # by somebody else
    checkpoints.tidy(model)
    assert list(stopped.glob("checkpoint-*"))
    (model / "manifest.json").touch()
    message = "another process is at work"
    with files.exclusive(stopped, wait=False), pytest.raises(RuntimeError, match=message):
        checkpoints.tidy(model)
    assert list(stopped.glob("checkpoint-*"))
    checkpoints.tidy(model)
    assert not stopped.exists()


def test_a_folder_that_is_no_training_s_is_left_by_the_command(tmp_path, capsys):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing.partial").mkdir()
    (tmp_path / "thing.partial" / "file").touch()
    assert cli.main(["train", "--table", "full", "--corpus", "/none", "--out", str(tmp_path / "thing")]) == 2
    assert "thing' exists already" in capsys.readouterr().err
    assert (tmp_path / "thing.partial" / "file").exists()


def test_seeds_are_of_the_identity(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(zipf_text(4000, 60))
    command = ["train", "--corpus", str(tmp_path / "text.txt"), "--min-count", "2", "--rank", "3", "--table"]
    command += ["full", "--num-steps", "4", "--out", str(tmp_path / "model"), "--checkpoint-every", "1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cemb.saved.save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped")))
        assert cli.main([*command, "--seeds", "5"]) == 2
    capsys.readouterr()
    assert cli.main([*command, "--seeds", "6"]) == 2
    assert "seed is 6 and was 5; give" in capsys.readouterr().err
    assert cli.main([*command, "--seed", "5"]) == 0
    assert "training resumes at step 4" in capsys.readouterr().err
    assert not (tmp_path / "model.partial").exists()


def test_lbfgs_has_no_checkpoints(tmp_path):
    trainings = Trainings(QualityCase("full", "lbfgs"), PmiConfig(("/none",)))
    with pytest.raises(ValueError, match="L-BFGS is one search over all steps, which has no checkpoints"):
        trainings.checkpoints(tmp_path / "model", 3).__enter__()
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        checkpoints.opened(tmp_path / "model", IDENTITY, 0).__enter__()


def test_checkpoints_are_not_held_in_memory(tmp_path):
    model = build_model("full-fused", 100_000, 10, shared_table=False)
    optimizer = make_optimizer("adam", model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    value_bytes = 3 * 4 * model.num_parameters
    tracemalloc.start()
    try:
        with checkpoints.opened(tmp_path / "model", IDENTITY, 1) as kept:
            kept.step_done(checkpoints.Progress(1), 0.1, model, optimizer)
        written_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with checkpoints.opened(tmp_path / "model", IDENTITY, 1) as kept:
            kept.share()
            assert kept.resume(model, optimizer).step == 1
        assert max(written_bytes, tracemalloc.get_traced_memory()[1]) < value_bytes / 4
    finally:
        tracemalloc.stop()


def test_other_ranks_promise_no_step(stopped, monkeypatch):
    manifest = json.loads(next(stopped.glob("*/manifest.json")).read_text())
    found = json.dumps([manifest, "checkpoint-000002"]).encode()
    monkeypatch.setattr(processes, "rank_and_number", lambda: (1, 2))
    monkeypatch.setattr(distributed, "from_rank_0", lambda content: found)
    with checkpoints.opened(stopped.with_suffix(""), IDENTITY, 3) as kept:
        kept.share()
        for step in (7, 9, 10):
            said = "stopped; the same command resumes from its newest checkpoint, if any"
            assert processes.with_remedy("stopped") == said
            kept.step_done(checkpoints.Progress(step), 0.1, None, None)


@pytest.mark.parametrize("loss", [mse_loss, all_cells_loss])
@pytest.mark.parametrize("num_ranks", [2, 3, 7, 64])
def test_parts_of_a_batch_add_up_to_it(num_ranks, loss, random_matrix):
    options = {"weighted": loss is all_cells_loss, "negative_share": 0.4, "seed": 2}
    whole = PairBatches(random_matrix, 33, **options)
    parts = [PairBatches(random_matrix, 33, **options, part=(r, num_ranks)) for r in range(num_ranks)]
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for step in range(2 * len(whole)):
        pairs, *labels = whole.batch(step)
        found = [part.batch(step) for part in parts]
        together = torch.full_like(pairs, -1)
        for rank, (own, *_) in enumerate(found):
            together[rank::num_ranks] = own
        assert torch.equal(together, pairs)
        total = sum(
            part.scaled_to_whole(loss(*own), step)(scores[tuple(of.T)]).item()
            for part, (of, *own) in zip(parts, found, strict=True)
        )
        assert total == pytest.approx(loss(*labels)(scores[tuple(pairs.T)]).item(), rel=1e-5)
        assert math.isfinite(total)


def test_a_rank_beyond_their_number_is_refused(random_matrix):
    with pytest.raises(ValueError, match=r"rank must .*got 2"):
        PairBatches(random_matrix, 33, part=(2, 2))
