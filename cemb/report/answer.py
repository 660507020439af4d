"""The README's answer, and where the study is found and cited."""

from typing import Any
from urllib.parse import urlsplit

import yaml

from cemb.report.frontier import best_point
from cemb.report.quality import best_quality
from cemb.report.speed import best_full, original_ratio, speed_record
from cemb.report.stats import time_ratio
from cemb.report.text import closed_share, machine, score_text
from cemb.study import records, sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


def readme_answer(found: list[Record]) -> str:
    """The README's answer in three numbers, as Markdown."""
    small, large = sizes.POOL_SIZES
    verdicts: dict[int, list[str]] = {}
    for pool_size in sizes.POOL_SIZES:
        for name in sizes.OPTIMIZERS:
            hashed = speed_record(found, "hashed", name, pool_size)
            verdict = time_ratio(hashed, best_full(found, name, pool_size)).verdict
            verdicts.setdefault(pool_size, []).append(f"{verdict} with {OPTIMIZER_NAMES[name]}")
    rows, dim = hashed["num_embeddings"], hashed["embedding_dim"]
    then_sgd, then_adagrad = (original_ratio(name, small) for name in ("sgd", "adagrad"))
    full = best_quality(found)
    lines = [
        f"- **Speed.** A training step over a table of {rows:,} × {dim} values, hashed one by one into a "
        f"pool {rows * dim / small:,.0f} times smaller, is {', '.join(verdicts[small])}, against the "
        f"faster of PyTorch's full tables. In 2021, in TensorFlow, it was {then_sgd:.1f} times slower with "
        f"SGD and {then_adagrad:.1f} with Adagrad. A pool of {large:,}, too large for cache, is "
        f"{', '.join(verdicts[large])}.",
        f"- **Quality.** A full table goes {closed_share(full)} of the way from predicting zero to the best "
        f"possible factorization, and scores {score_text(full, 'wordsim353')} on WordSim-353.",
    ]
    prices = []
    for ratio, words in ((1, "as many values as the table"), (16, "16 times fewer")):
        record = best_quality(found, compression_ratio=ratio)
        prices.append(f"with {words} {closed_share(record)} of it and {score_text(record, 'wordsim353')}")
    lines.append(f"- **The price.** A hashed pool goes {', '.join(prices)}.")
    ships, trains = best_point(found, "inference", 16), best_point(found, "training", 12)
    trainer = trains["method"].replace("alternating, ", "alternating least squares stored by ")
    lines.append(
        f"- **What a byte is worth.** In 16 times fewer bytes than the full table, {ships['method']} goes "
        f"{closed_share(ships)} of it, and scores {score_text(ships, 'wordsim353')}; trained in 12 times "
        f"fewer bytes than a full table with Adam takes, {trainer} goes {closed_share(trains)}."
    )
    return "\n".join(
        [*lines, "", f"Measured on {machine(found)}, PyTorch's memory settings left as they come."]
    )


def launch(repository: str | None) -> str:
    """Where the tour opens without an installation, as Markdown, for a repository on GitHub."""
    if repository is None:
        return (
            "A copy on GitHub opens on Binder without an installation: its `.binder` says what is needed, "
            "and `repository-code` in its `CITATION.cff` puts the links here."
        )
    path = urlsplit(repository).path.strip("/").removesuffix(".git")
    tour = "notebooks/tour.ipynb"
    binder = f"https://mybinder.org/v2/gh/{path}/HEAD?urlpath=lab/tree/{tour}"
    colab = f"https://colab.research.google.com/github/{path}/blob/HEAD/{tour}"
    return (
        f"The tour opens without an installation [on Binder]({binder}) and, after "
        f"`!pip install git+{repository}`, [on Colab]({colab})."
    )


def citation() -> dict[str, Any]:
    """The fields of CITATION.cff."""
    cited: dict[str, Any] = yaml.safe_load((records.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return cited


def bibtex() -> str:
    """The BibTeX entry of the study, by its CITATION.cff."""
    cited = citation()
    said = {
        "author": " and ".join(f"{{{author['name']}}}" for author in cited["authors"]),
        "title": f"{{{cited['title']}}}",  # braces keep capitals
        "version": cited["version"],
        "note": f"{cited['license']} licence",
    }
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in said.items())
    return f"@software{{cemb,\n{lines}}}"
