"""The chapter on taking models elsewhere: what is exchanged, of records made up."""

import json
import os
from pathlib import Path

import pytest

from cemb.report import take

PLACE = {
    "kind": "processes",
    "device_name": "A Processor",
    "git_commit": "c" * 40,
    "optimizer": "adagrad",
    "num_embeddings": 1000,
    "embedding_dim": 10,
    "batch_size": 64,
}


def _measured(sent, times, **case):
    case = {"table": "full", "sparse_gradients": False, "pool_size": None, "block_size": None, **case}
    for num_processes, ms in enumerate(times, 1):
        together = num_processes > 1
        yield {
            **PLACE,
            **case,
            "num_processes": num_processes,
            "bytes_sent_per_step": sent if together else 0,
            "expected_bytes_per_step": sent if together else 0,
            "total_ms": ms,
            "total_ms_repeats": [ms] * 5,
        }


@pytest.fixture
def found():
    pool = {"table": "hashed", "pool_size": 500}
    return [
        *_measured(2e6, (10, 15), **pool, block_size=1),
        *_measured(2e6, (4, 5), **pool, block_size=25),
        *_measured(5e6, (20, 10), sparse_gradients=True),
        *_measured(4e8, (100, 300)),
    ]


def test_bytes_and_times_are_those_of_the_records(found):
    shown = {name: value for name, (value, _) in take.numbers("mine", found).items()}
    assert (shown["pool_mb"], shown["sparse_mb"], shown["dense_mb"]) == (2, 5, 400)
    assert (shown["machine"], shown["repeats"], shown["optimizer"]) == ("A Processor", 5, "Adagrad")
    table = take.table(found)
    assert [*table["MB a step"]] == ["2.00", "2.00", "5.00", "400.00"]
    assert [text.split()[0] for text in table["two over one"]] == ["1.50", "1.25", "0.50", "3.00"]


def test_a_network_takes_what_bytes_over_bandwidth_take(found):
    table = take.model_table(found)
    assert len(table) == 3 * len(take.GB_PER_S)
    row = {name: float(text.replace(",", "")) for name, text in table.iloc[0].items() if "machines" in name}
    # 2 MB on a ring at 1.25 GB/s: 2 (n - 1) / n times 1.6 ms.
    assert row == {"2 machines": 1.6, "8 machines": 2.8, "64 machines": 3.1, "1,024 machines": 3.2}
    sparse = table[table["table"] == "full table, sparse gradient"].iloc[1]
    # 5 MB to each of the others at 12.5 GB/s: 0.4 ms times n - 1.
    assert [sparse[f"{n} machines"] for n in ("2", "8", "1,024")] == ["0.4", "2.8", "409.2"]


def test_commands_are_run_and_fields_of_their_records_shown(capsys, monkeypatch, tmp_path):
    before, seen = Path.cwd(), []

    def parse(words):
        def command():
            seen.append((Path.cwd(), os.environ["CEMB_RESULTS"]))
            for number in (2.0, None):
                print(json.dumps({"words": words, "value": number, "other": 1}))

        return command

    monkeypatch.setenv("CEMB_RESULTS", "before")
    take.show_command(parse, tmp_path, "encode 'my text.txt' --out x", "value", "words")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "$ cemb encode 'my text.txt' --out x"
    assert lines[1:] == [
        f"  {value}words: ['encode', 'my text.txt', '--out', 'x']" for value in ("value: 2, ", "")
    ]
    assert seen == [(tmp_path, str(tmp_path / "results"))]
    assert (Path.cwd(), os.environ["CEMB_RESULTS"]) == (before, "before")


def test_a_text_is_there_to_work_on():
    with take.place() as folder:
        text = (Path(folder) / "text.txt").read_text(encoding="utf-8")
    assert text.count("America") > 100
