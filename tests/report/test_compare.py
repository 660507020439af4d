"""One machine's records beside another's: what matches, what does not, ratios of times."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest

from cemb.report import compare, figures, quality, select, text
from cemb.study import records

ENVIRONMENT = {**records.environment(), "device": "cpu", "device_name": "X", "threads": 2, "code_hash": "a"}


def _trained(run="quality-adam-full", **fields):
    return {
        "run": run,
        "kind": "quality",
        "table": "full",
        "optimizer": "adam",
        "seed": 0,
        "num_words": 1000,
        "gap": 0.25,
        "wordsim353_score": 50.0,
        "train_s": 10.0,
        "history": [{"step": 0, "loss": 100.0, "seconds": 1.0}, {"step": 9, "loss": 50.0, "seconds": 2.0}],
        **ENVIRONMENT,
        **fields,
    }


def _timed(milliseconds, **fields):
    return {
        "run": "speed-sgd-4",
        "kind": "speed",
        "label": "hashed, pool 4, block 1",
        "table": "hashed",
        "num_embeddings": 10,
        "repeats": 5,
        "peak_mib": milliseconds,
        **{f"{phase}_ms": milliseconds for phase in ("forward", "total")},
        **{
            f"{phase}_ms_repeats": [milliseconds + k for k in (-0.2, -0.1, 0.0, 0.1, 0.2)]
            for phase in ("forward", "total")
        },
        **ENVIRONMENT,
        **fields,
    }


def _compare(here, there):
    return compare.compare("other", here, there)


def _checks(here, there):
    return compare.checks([_compare(here, there)])


def _bad(here, there):
    checked = _checks(here, there)
    return set(checked.name[~checked.matches])


def test_the_same_but_for_the_place_and_the_times_matches():
    here = _trained(train_s=1.0, cpu_model="Y", code_hash="b", utc_time="now", threads=64)
    here["history"][1]["seconds"] = 77.0
    comparison = _compare([here, _timed(1.0, repeats=9)], [_trained(), _timed(8.0)])
    assert len(comparison.pairs) == 2
    assert comparison.only_here == comparison.only_there == []
    checked = compare.checks([comparison])
    assert checked.matches.all()
    assert set(checked.name) == {
        *("gap", "num_words", "wordsim353_score", "history[0].step", "history[1].step"),
        *("history[0].loss", "history[1].loss", "history.length"),
    }


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"gap": 0.2549}, {"gap": 0.2551}),
        ({"wordsim353_score": 49.1}, {"wordsim353_score": 48.9}),
        ({"wordsim353_score": 50.0}, {"wordsim353_score": None}),
        ({"num_words": 1000}, {"num_words": 1001}),
        ({"gap": 0.25}, {"gap": math.nan}),
    ],
)
def test_values_match_within_what_is_allowed(near, far):
    assert _bad([_trained(**near)], [_trained()]) == set()
    assert _bad([_trained(**far)], [_trained()]) == set(far)


def test_a_loss_is_allowed_a_share_of_itself():
    near, far = _trained(), _trained()
    near["history"][1]["loss"], far["history"][1]["loss"] = 50.24, 50.26
    assert _bad([near], [_trained()]) == set()
    (bad,) = _checks([far], [_trained()]).query("not matches").itertuples()
    assert bad.name == "history[1].loss"
    assert bad.difference == pytest.approx(0.26 / 50)


def test_a_learning_curve_of_another_length_does_not_match():
    longer = _trained()
    longer["history"].append({"step": 18, "loss": 40.0, "seconds": 3.0})
    assert _bad([longer], [_trained()]) == {"history.length"}


def test_the_largest_difference_is_shown_with_what_is_allowed():
    found = _checks([_trained(gap=0.26, wordsim353_score=50.5)], [_trained()])
    table = compare.checks_table(found).set_index("what")
    assert list(table.loc["gaps"]) == ["other", "1", "all but 1", "0.01", "0.005"]
    assert list(table.loc["scores"]) == ["other", "1", "all", "0.5", "1"]
    assert list(table.loc["losses"])[1:4] == ["2", "all", "0"]
    assert set(compare.tolerances_table().what) >= set(table.index)
    bad = compare.mismatches_table(found)
    assert list(bad.iloc[0]) == ["quality-adam-full", "full table: gap", "other", "0.26", "0.25"]
    unlike = compare.checks_table(_checks([_trained(num_words=None)], [_trained()]))
    assert unlike["largest difference"][0] == "another value"
    assert compare.mismatches_table(_checks([_trained()], [_trained()])).empty
    assert compare.checks_table(_checks([], [])).empty


def test_the_worst_mismatch_stands_first():
    here = _trained(gap=0.3, wordsim353_score=20.0)
    assert list(compare.mismatches_table(_checks([here], [_trained()])).what) == [
        "full table: wordsim353_score",
        "full table: gap",
    ]


def test_what_is_on_one_side_is_listed_with_why():
    here = [_trained(), _trained("growth-full"), _timed(1.0, num_embeddings=20)]
    there = [_trained(), _trained(seed=1), _timed(1.0)]
    comparison = _compare(here, there)
    assert len(comparison.pairs) == 1
    table = compare.missing_table([comparison])
    assert [tuple(row) for row in table[["run", "only", "records", "why"]].to_numpy()] == [
        ("growth-full", "here", "1", "not run on the other side"),
        ("speed-sgd-4", "here", "1", "other num_embeddings"),
        ("quality-adam-full", "there", "1", "not run on the other side"),
        ("speed-sgd-4", "there", "1", "other num_embeddings"),
    ]


def test_what_lies_beside_a_matrix_is_of_that_matrix():
    def of(corpus, value):
        pmi = {"run": "pmi", "kind": "pmi", "corpus": corpus, "corpus_fingerprint": corpus, **ENVIRONMENT}
        return [pmi, {"run": "pmi", "kind": "limits", "limits": [{"rows": value}], **ENVIRONMENT}]

    assert _bad(of("a", 0.1), of("a", 0.2)) == {"limits[0].rows"}
    assert _compare(of("a", 0.1), of("b", 0.2)).pairs == []
    (changed,) = [{**of("a", 0.1)[0], "corpus_fingerprint": "a2"}]
    assert _bad([changed], of("a", 0.1)) == {"corpus_fingerprint"}


def test_two_records_of_the_same_are_refused():
    with pytest.raises(
        ValueError, match=r"two records of run 'quality-adam-full' were asked for the same: .*adam"
    ):
        _compare([_trained(), _trained(gap=0.1)], [])


def test_ratios_are_of_medians_with_their_spread():
    found = [_compare([_timed(30.0)], [_timed(10.0, is_contended=True)])]
    ratios = compare.time_ratios(found).set_index("phase")
    assert list(ratios.index) == ["forward", "total"]
    assert ratios.value["total"] == 3.0
    assert 29.8 / 10.2 <= ratios.low["total"] < 3.0 < ratios.high["total"] <= 30.2 / 9.8
    assert ratios.is_contended["total"]
    table = compare.times_table(ratios.reset_index())
    assert list(table.iloc[0])[:4] == [
        "speed-sgd-4",
        "hashed, pool 4, block 1, 10 rows (contended)",
        "other",
        "3.00",
    ]
    assert table.total[0].startswith("3.00 (")
    tie = compare.times_table(compare.time_ratios([_compare([_timed(10.0)], [_timed(10.05)])]))
    assert tie.total[0].endswith("tie")
    assert compare.times_table(compare.time_ratios([])).empty


def test_seconds_are_put_together_by_kind():
    here = [_trained(train_s=20.0), _trained("b", train_s=5.0), _trained("c", train_s=30.0)]
    there = [_trained(), _trained("b"), _trained("c")]
    (row,) = compare.seconds_ratios([_compare(here, there)]).to_numpy()
    assert list(row) == ["quality: train", "other", "3", "2.00", "0.50–3.00"]


def test_ratios_are_drawn_on_a_logarithmic_axis():
    ratios = compare.time_ratios([_compare([_timed(30.0)], [_timed(10.0)])])
    figure = figures.times(ratios)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_legend_handles_labels()[1] == ["forward", "gradient", "step", "total"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "speed-sgd-4: hashed, pool 4, block 1, 10 rows"
    ]
    plt.close(figure)


def test_the_same_drawing_gives_the_same_bytes():
    ratios = compare.time_ratios([_compare([_timed(30.0)], [_timed(10.0)])])
    with plt.rc_context(rc=matplotlib.rcParamsDefault):  # whatever other tests have set
        figure = figures.times(ratios)
        drawings = [io.BytesIO(), io.BytesIO()]
        for drawing in drawings:
            figure.savefig(drawing, format="svg", metadata={"Date": None})
    plt.close(figure)
    assert drawings[0].getvalue() == drawings[1].getvalue()


def test_a_reference_matches_itself_and_not_its_altered_copy():
    name, there = select.references("records")[0]
    comparison = compare.compare(name, there, there)
    assert len(comparison.pairs) == len(there)
    assert compare.checks([comparison]).matches.all()
    assert compare.missing_table([comparison]).empty
    best = quality.best_quality(there)
    altered = [
        {**r, "num_words": r["num_words"] + 1} if r["run"] == best["run"] and r["seed"] == best["seed"] else r
        for r in there
    ]
    checked = compare.checks([compare.compare(name, altered, there)])
    (bad,) = checked.query("not matches").itertuples()
    assert (bad.run, bad.name, bad.here - bad.there) == (best["run"], "num_words", 1)


def test_record_names_tell_the_records_of_a_run_apart():
    for name, found in select.references("records"):
        names = [(record["run"], text.record_name(record)) for record in found]
        assert len(set(names)) == len(names), name


def test_a_reference_compares_with_itself():
    for name, found in select.references("records"):
        ratios = compare.time_ratios([compare.compare(name, found, found)])
        table = compare.times_table(ratios)
        assert len(table) == sum("total_ms_repeats" in record for record in found)
        assert set(ratios.value) == {1.0}
