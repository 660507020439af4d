"""The first page's and the README's answer, and where the study is found and cited."""

from typing import Any
from urllib.parse import urlsplit

import yaml

from cemb.report import frontier, labels, quality, speed, text
from cemb.report.provenance import Numbers, of
from cemb.study import records, sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


def numbers(found: list[Record]) -> Numbers:
    """What the first page's text says, by name: what the chapters' do, and how much smaller the pool is."""
    first = speed.speed_record(found, "hashed", "sgd", speed.SMALL)
    ship = frontier.best_point(found, "inference", 16)
    return {
        **frontier.numbers(found),
        **quality.numbers(found),
        **speed.numbers(found),
        **of(None, smaller=first["num_embeddings"] * first["embedding_dim"] / speed.SMALL),
        **of(ship, ship_gap=text.gap_text(ship, 2)),
    }


def readme_answer(found: list[Record]) -> str:
    """The README's answer in three numbers, as Markdown."""
    small, large = (
        ", ".join(
            f"{speed.over_full(found, name, pool_size).verdict} with {OPTIMIZER_NAMES[name]}"
            for name in sizes.OPTIMIZERS
        )
        for pool_size in sizes.POOL_SIZES
    )
    first = speed.speed_record(found, "hashed", "sgd", speed.SMALL)
    rows, dim = first["num_embeddings"], first["embedding_dim"]
    then_sgd, then_adagrad = (speed.original_ratio(name, speed.SMALL) for name in ("sgd", "adagrad"))
    full = quality.best_quality(found)
    prices = []
    for ratio, words in ((1, "as many values as the table"), (16, "16 times fewer")):
        record = quality.best_quality(found, compression_ratio=ratio)
        score = text.score_text(record, "wordsim353")
        prices.append(f"with {words} {text.closed_share(record)} of it and {score}")
    ships, trains = (frontier.best_point(found, *budget) for budget in (("inference", 16), ("training", 12)))
    trainer = labels.trained(trains["method"]).replace(
        "alternating, ", "alternating least squares stored by "
    )
    return f"""\
- **Speed.** A training step over a table of {rows:,} × {dim} values, hashed one by one into a \
pool {rows * dim / speed.SMALL:,.0f} times smaller, is {small}, against the \
faster of PyTorch's full tables. In 2021, in TensorFlow, it was {then_sgd:.1f} times slower with \
SGD and {then_adagrad:.1f} with Adagrad. A pool of {speed.LARGE:,}, too large for cache, is {large}.
- **Quality.** A full table goes {text.closed_share(full)} of the way from predicting zero to the best \
possible factorization, and scores {text.score_text(full, "wordsim353")} on WordSim-353.
- **The price.** A hashed pool goes {", ".join(prices)}.
- **What a byte is worth.** In 16 times fewer bytes than the full table, \
{labels.trained(ships["method"])} goes \
{text.closed_share(ships)} of it, and scores {text.score_text(ships, "wordsim353")}; trained in 12 times \
fewer bytes than a full table with Adam takes, {trainer} goes {text.closed_share(trains)}.

Measured on {text.machine(found)}, PyTorch's memory settings left as they come."""


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
