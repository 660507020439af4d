"""The chapter on the data: the PMI matrix, and what counting takes."""

import pandas as pd

from cemb.report.provenance import Numbers, label, of
from cemb.report.quality import optimum
from cemb.report.select import pick, reference
from cemb.report.stats import time_ratio
from cemb.report.text import machine
from cemb.study.records import Record

STAGES = {
    "read and number the tokens": "encode_s",
    "count co-occurrences": "count_s",
    "PMI": "pmi_s",
    "truncated SVD": "optimum_s",
}


def numbers(found: list[Record]) -> Numbers:
    """What the page's text says, by name, of this machine's matrix and of two measurements of references."""
    pmi, svd = pick(found, kind="pmi"), optimum(found)
    (scaling_name, scaling), (counting_name, counting) = reference("scaling"), reference("counting")
    first = pick(counting, case="cemb")
    names = ("num_tokens", "num_words", "num_counted_cells", "num_stored_cells")
    pairs = ("wordsim353_pairs", "simlex999_pairs")
    of_counting = {"counting_tokens": first["num_tokens"], "counting_words": first["vocab_size"]}
    return {
        **of(pmi, **{name: pmi[name] for name in (*names, "window_size", "min_count", "rank")}),
        **of(pmi, corpus=pmi["corpus_fingerprint"], density=100 * pmi["density"]),
        **of(pmi, mean_value=pmi["mean_stored_value"], explained=100 * pmi["optimum_explained_share"]),
        **of(None, smoothing=pmi["context_smoothing"]),
        **of(svd, **{name: svd[name] for name in pairs}),
        **of(None, **{f"{name}_total": svd[f"{name}_total"] for name in pairs}),
        **of(None, questions=svd["analogies_questions"], questions_total=svd["analogies_questions_total"]),
        **of(label(scaling_name, "scaling"), scaling_name=scaling_name),
        **of(None, scaling_machine=machine(scaling), scaling_words=scaling[0]["vocab_size"]),
        **of(label(counting_name, "counting"), counting_name=counting_name),
        **of(None, counting_machine=machine(counting), **of_counting),
    }


def stages_table(found: list[Record]) -> pd.DataFrame:
    """Seconds of each stage from text to the best factorization."""
    pmi = pick(found, kind="pmi")
    return pd.DataFrame({"what": list(STAGES), "seconds": [f"{pmi[name]:.1f}" for name in STAGES.values()]})


def counting_table(found: list[Record]) -> pd.DataFrame:
    """Ways to count the same tokens, fastest first, with their times over the time of counting in memory."""
    ours = pick(found, case="cemb")
    rows = sorted((r for r in found if r["num_tokens"] == ours["num_tokens"]), key=lambda r: r["count_s"])
    return pd.DataFrame(
        {
            "what": [r["case"] for r in rows],
            "seconds": [f"{r['count_s']:.2f}" for r in rows],
            "million tokens/s": [f"{r['tokens_per_s'] / 1e6:.1f}" for r in rows],
            "times ours": ["1" if r is ours else str(time_ratio(r, ours, field="count_s")) for r in rows],
        }
    )
