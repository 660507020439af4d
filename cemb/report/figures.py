"""The study's figures: matplotlib, colours safe for colour-blind readers, legible at column width."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats

from cemb.report import labels
from cemb.study import sizes
from cemb.study.records import Record

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, BLACK = "#CC79A7", "#56B4E9", "#777777", "#000000"
OPTIMIZER_STYLES = {
    "sgd": (BLUE, "o", "SGD"),
    "adagrad": (ORANGE, "s", "Adagrad"),
    "adam": (GREEN, "^", "Adam"),
}
PHASE_COLOURS = {"forward": SKY, "gradient": ORANGE, "step": PURPLE}

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "cemb",  # the same drawing gives the same bytes
}


if get_ipython() is not None:
    # In notebooks and pages figures are drawings, sharp at any size; without a date they are the same bytes.
    # No cropping, for which each figure would be drawn twice; the layout keeps everything inside.
    set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches=None)


def _figure(*shape: int, size: tuple[float, float] = (7, 3), **options: Any) -> tuple[Figure, Any]:
    mpl.rcParams.update(STYLE)
    return plt.subplots(*shape, figsize=size, **options)


def _style(colour: str, marker: str, line: str = "none", **more: Any) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "linestyle": line or "none", **more}


def _label_axis(axis: Axis, form: str = "{:g}", ticks: Sequence[float] | None = None) -> None:
    """Numbers at a logarithmic axis's larger ticks, or at those given, and none between."""
    if ticks is not None:
        axis.set_ticks(ticks)
    axis.set_major_formatter(lambda value, _: form.format(value))
    axis.set_minor_formatter(lambda value, _: "")


def _quartiles(repeats: Iterable[Sequence[float]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Medians, and how far the quartiles lie below and above, a column for each of several repeats."""
    low, middle, high = np.array([np.percentile(own, [25, 50, 75]) for own in repeats]).T
    return middle, np.array([middle - low, high - middle])


def data_overview(word_counts: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> Figure:
    """Count against rank of words (log-log), and the histogram of a matrix's stored values."""
    figure, (left, right) = _figure(1, 2)
    ranks = np.unique(np.geomspace(1, len(word_counts), 400).astype(int))
    left.loglog(ranks, word_counts[ranks - 1], color=BLUE)
    left.set(xlabel="rank of the word", ylabel="occurrences")
    right.hist(values, bins=64, color=BLUE)
    right.set(xlabel="positive PMI (nats)", ylabel="stored cells")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    return figure


def sparsity_by_band(word_counts: npt.NDArray[np.int64], indptr: npt.NDArray[np.integer]) -> Figure:
    """Share of a row's cells that are stored, against how often its word occurs (log-log): median, quartiles.

    Words are in bands, each twice as frequent as the one before; `indptr` is that of the matrix.
    """
    shares = np.diff(indptr) / len(word_counts)
    bands = np.floor(np.log2(word_counts)).astype(int)
    figure, axes = _figure()
    for band in np.unique(bands):
        middle, spread = _quartiles([shares[bands == band]])
        axes.errorbar(2.0 ** (band + 0.5), middle, yerr=spread, color=BLUE, marker="o")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="occurrences of the word (bands of a factor of two)",
        ylabel="stored share of its row",
    )
    return figure


def scaling(rows: pd.DataFrame) -> Figure:
    """Seconds and peak memory against tokens (log-log) of a frame of records of kind ``"scaling"``."""
    rows = rows.sort_values("num_tokens")
    figure, (left, right) = _figure(1, 2)
    for stage, label, colour, marker in (("count", "counting", BLUE, "o"), ("pmi", "PMI", ORANGE, "s")):
        left.loglog(rows.num_tokens, rows[f"{stage}_s"], color=colour, marker=marker, label=label)
        right.loglog(rows.num_tokens, rows[f"{stage}_peak_mib"], color=colour, marker=marker, label=label)
    right.loglog(rows.num_tokens, rows.memory_mib, color=GREY, linestyle="--", label="allowed")
    left.set(xlabel="tokens", ylabel="seconds")
    right.set(xlabel="tokens", ylabel="peak memory (MiB)", ylim=(10, None))
    left.legend()
    right.legend(loc="lower right")
    return figure


def speed_phases(speed: pd.DataFrame) -> Figure:
    """Stacked phases of a step for each row of a frame of speed records, first row on top."""
    names = [labels.timed(record) for record in speed.to_dict("records")]
    figure, axes = _figure(size=(7, 0.9 + 0.42 * len(speed)))
    left = np.zeros(len(speed))
    for phase, colour in PHASE_COLOURS.items():
        width = speed[f"{phase}_ms"].fillna(0).to_numpy()  # steps in one call have one phase
        axes.barh(names, width, left=left, color=colour, label=phase, height=0.65)
        left += width
    for y, total in enumerate(left):
        axes.annotate(f" {total:,.0f}", (total, y), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="milliseconds a step (median)")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
    axes.grid(axis="y", visible=False)
    return figure


SPEED_SERIES = (
    # table, sparse gradients, block size, name, colour, marker
    ("full", False, 1, f"{labels.TIMED['full']}, dense gradients", GREY, "s"),
    ("full", True, 1, f"{labels.TIMED['full']}, sparse gradients", BLACK, "D"),
    ("full-fused", False, 1, labels.TIMED["full-fused"], PURPLE, "v"),
    ("hashed-reference", False, 1, labels.TIMED["hashed-reference"], RED, "x"),
    ("hashed", False, 1, "hashed, block 1", BLUE, "o"),
    ("hashed", False, 25, "hashed, block 25", GREEN, "^"),
)


def speed_overview(runs: Mapping[tuple[str, int], pd.DataFrame]) -> Figure:
    """Total times (log axis, quartiles as bars) of `speed.run_frames`, for each optimizer and pool size."""
    pools = sorted({pool for _, pool in runs})
    figure, panels = _figure(1, len(pools), size=(7.4, 3.6), sharey=True, squeeze=False)
    for panel, pool in zip(panels[0], pools, strict=True):
        for x, optimizer in enumerate(OPTIMIZER_STYLES):
            run = runs[optimizer, pool]
            for k, (table, sparse, block, label, colour, marker) in enumerate(SPEED_SERIES):
                row = run[(run.table == table) & (run.sparse_gradients == sparse) & (run.block_size == block)]
                if row.empty:
                    continue
                middle, spread = _quartiles(row.total_ms_repeats)
                style = _style(colour, marker, markersize=7, label=label if x == 0 else None)
                panel.errorbar(x + (k - 2.5) * 0.12, middle, yerr=spread, **style)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set_xticks(range(3), [style[2] for style in OPTIMIZER_STYLES.values()])
        panel.set_title(f"pool of {pool:,} values", fontsize=10)
        panel.grid(axis="x", visible=False)
    panels[0, 0].set_ylabel("milliseconds a step (log)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# Columns of a benchmark's frame, on a CPU and on a GPU, that are drawn where they are there.
BENCHMARK_SERIES = (
    ("uniform_default", BLUE, "o", "default pages"),
    ("uniform_huge", ORANGE, "D", "huge pages"),
    ("zipf_default", GREEN, "^", "Zipf ids, default pages"),
    ("uniform_device_ms", BLUE, "o", "the GPU's own"),
    ("uniform_graph_ms", GREEN, "^", "replayed as a graph"),
    ("uniform_total_ms", ORANGE, "D", "from Python"),
)


def benchmark(rows: pd.DataFrame) -> Figure:
    """Step times (log axis, quartiles as bars where there are repeats) by optimizer, a line for each floor.

    `rows` is `rivals.bench_frame` or `gpu.gpu_frame`.
    """
    optimizers = [name for name in OPTIMIZER_STYLES if name in set(rows.optimizer)]
    counts = [int((rows.optimizer == name).sum()) for name in optimizers]
    figure, panels = _figure(
        len(optimizers),
        1,
        size=(7.4, 1.2 + 0.26 * sum(counts)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": counts},
    )
    series = [style for style in BENCHMARK_SERIES if style[0] in rows]
    for panel, optimizer in zip(panels[:, 0], optimizers, strict=True):
        own = rows[rows.optimizer == optimizer].reset_index(drop=True)
        y = np.arange(len(own))
        for k, (name, colour, marker, label) in enumerate(series):
            spread = _quartiles(own[f"{name}_repeats"])[1] if f"{name}_repeats" in own else None
            values, places = own[name].astype(float), y + (k - 1) * 0.2
            panel.errorbar(values, places, xerr=spread, **_style(colour, marker, markersize=5, label=label))
        panel.vlines(own.floor.astype(float), y - 0.42, y + 0.42, color=BLACK, label="floor")
        panel.set_yticks(y, own.table, fontsize=8)
        for tick, is_ours in zip(panel.get_yticklabels(), own.is_ours, strict=True):
            tick.set_fontweight("bold" if is_ours else "normal")
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(OPTIMIZER_STYLES[optimizer][2], fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("milliseconds a step (log)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def quality_overview(quality: pd.DataFrame, svd: Record) -> Figure:
    """Gap and WordSim-353 against compression (log axis) for each optimizer, full-batch training.

    `quality` is `quality.quality_frame`, `svd` the record of the optimum.
    """
    trained = quality[(quality.training == "full-batch") & (quality.weight_power == 0)]
    figure, (left, right) = _figure(1, 2, size=(7.4, 3.3))
    for optimizer, (colour, marker, name) in OPTIMIZER_STYLES.items():
        rows = trained[trained.optimizer == optimizer]
        hashed = rows[rows.table == "hashed"].sort_values("compression_ratio")
        full = rows[rows.table == "full"]
        left.plot(hashed.compression_ratio, hashed.gap, color=colour, marker=marker, label=f"hashed, {name}")
        hollow = _style(colour, marker, markerfacecolor="white")
        left.plot(1, full.gap, **hollow)
        score = hashed.wordsim353_score
        error = [score - hashed.wordsim353_low, hashed.wordsim353_high - score]
        right.errorbar(hashed.compression_ratio, score, yerr=error, color=colour, marker=marker, capsize=2)
        right.plot(1, full.wordsim353_score, **hollow)
    left.axhline(0, color=GREY, linestyle="--", label="SVD, the optimum")
    left.axhline(1, color=GREY, linestyle=":", label="predicting zero")
    left.plot([], [], **_style("k", "o", markerfacecolor="white", label="full tables"))
    right.axhline(svd["wordsim353_score"], color=GREY, linestyle="--")
    right.axhspan(svd["wordsim353_low"], svd["wordsim353_high"], color=GREY, alpha=0.12)
    left.set(ylabel="gap to the optimum")
    right.set(ylabel="WordSim-353 (Spearman × 100)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        _label_axis(axes.xaxis)
        axes.set_xlabel("table values per pool value (log)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


FRONTIER_STYLES = {
    # colour, marker, line
    "full": (BLACK, "s", ""),
    "hashed": (BLUE, "o", "-"),
    "hashed, blocks of 25": (SKY, "^", ":"),
    "hashed, blocks of 100": (SKY, "v", ":"),
    "hashed, signed": (BLUE, "x", "--"),
    "hybrid": (ORANGE, "o", "-"),
    "mixed-dimension": (ORANGE, "^", ":"),
    "quotient-remainder": (ORANGE, "v", "--"),
    "multi-hash": (ORANGE, "x", "-."),
    "clustered": (ORANGE, "D", ":"),
    "low-rank": (GREY, "o", "-"),
    "lower rank": (GREY, "x", "--"),
    "lower rank, then int8": (GREY, "^", ":"),
    "int8": (GREEN, "s", ""),
    "int4": (GREEN, "D", ""),
    "product quantization": (GREEN, "^", ":"),
    "product quantization, random axes": (GREEN, "v", "--"),
    "product quantization, balanced axes": (GREEN, "x", "-."),
    "transform coding": (GREEN, "o", "-"),
    "alternating, float32": (PURPLE, "s", ""),
    "alternating, bfloat16": (PURPLE, "^", ""),
    "alternating, int8": (PURPLE, "v", ""),
    "alternating, int4": (PURPLE, "D", ""),
    "alternating, transform coding": (PURPLE, "o", "-"),
}


def frontier(points: pd.DataFrame, limits: list[Record] | None = None) -> Figure:
    """Gap (log) against how much smaller than the full table (log), at inference and in training.

    `points` are frontier records, or `frontier.median_points`; bars are the range over seeds where that has
    several. `limits` are those of `cemb.study.frontier.limits`.
    """
    points = points[points.failure.isna()]
    figure, panels = _figure(2, 1, size=(7.4, 8.6))
    for panel, budget in zip(panels, ("inference", "training"), strict=True):
        for method, (colour, marker, line) in FRONTIER_STYLES.items():
            rows = points[points.method == method].sort_values(f"{budget}_ratio")
            if rows.empty:
                continue
            # The optimum itself has no place on a log axis.
            gaps = rows.gap.clip(lower=1e-4)
            spread = None
            if "gap_low" in rows:
                spread = [gaps - rows.gap_low.clip(lower=1e-4), rows.gap_high.clip(lower=1e-4) - gaps]
            style = _style(colour, marker, line, markersize=5, linewidth=1.2, label=labels.trained(method))
            panel.errorbar(rows[f"{budget}_ratio"], gaps, yerr=spread, **style)
        if limits is not None and budget == "inference":
            lines = pd.DataFrame(limits)
            lines = lines[lines.rows >= 1e-4]
            panel.plot(lines.ratio, lines.components, color=RED, linestyle="--", label="limit, by component")
            panel.plot(lines.ratio, lines.rows, color=RED, label="limit, by component and row")
        panel.set(xscale="log", yscale="log", ylabel="gap to the optimum (log)")
        _label_axis(panel.xaxis, "{:g}×", [1, 2, 4, 8, 16, 32, 64])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_xlabel("fewer bytes at inference than a full float32 table (log)")
    panels[1].set_xlabel("fewer bytes in training than a full table with Adam (log)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def frontier_similarity(points: pd.DataFrame, full: Record) -> Figure:
    """WordSim-353 score, with its bootstrap interval, against fewer bytes at inference (log).

    The band is the interval of `full`, a record of the full table's scores.
    """
    points = points[points.failure.isna() & points.wordsim353_score.notna()]
    figure, axes = _figure(size=(7.4, 4.2))
    chosen = ("hashed", "hybrid", "low-rank", "product quantization", "transform coding")
    for k, method in enumerate(name for name in chosen if name in set(points.method)):
        rows = points[points.method == method].sort_values("inference_ratio")
        score = rows.wordsim353_score
        spread = [score - rows.wordsim353_low, rows.wordsim353_high - score]
        style = _style(*FRONTIER_STYLES[method], capsize=2, label=labels.trained(method))
        axes.errorbar(rows.inference_ratio * 1.02 ** (k - 2), score, yerr=spread, **style)
    axes.axhspan(full["wordsim353_low"], full["wordsim353_high"], color=GREY, alpha=0.15, label="full table")
    axes.set_xscale("log")
    _label_axis(axes.xaxis, "{:g}×", [2, 4, 8, 16, 32, 64])
    axes.set(
        xlabel="fewer bytes at inference than a full float32 table (log)",
        ylabel="WordSim-353 (Spearman × 100)",
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def learning_curve(record: Record) -> Figure:
    """A quality record's history: gap, or batch loss, against steps."""
    history = pd.DataFrame(record["history"])
    figure, axes = _figure(size=(6, 2.6))
    measured, label = ("gap", "gap to the optimum") if "gap" in history else ("loss", "mean batch loss")
    axes.plot(history.step, history[measured], color=BLUE, marker="o", markersize=4)
    axes.set(xlabel="optimizer steps", ylabel=label)
    if measured == "gap":
        axes.set_yscale("log")
    return figure


def learning_curves(quality: pd.DataFrame, training: str) -> Figure:
    """Learning curves side by side, a panel for each optimizer, a line for each table.

    Against steps above, against seconds below.
    """
    rows = quality[(quality.training == training) & (quality.weight_power == 0)]
    is_exact = training == "full-batch"
    figure, panels = _figure(2, 3, size=(7.4, 5.6), sharey=True)
    tables = sorted(rows[rows.table == "hashed"].compression_ratio.round(2).unique())
    colours = dict(zip(tables, (SKY, BLUE, PURPLE, RED) if len(tables) > 1 else (RED,), strict=False))
    for column, (optimizer, (_, _, name)) in zip(panels.T, OPTIMIZER_STYLES.items(), strict=True):
        for row in rows[rows.optimizer == optimizer].to_dict("records"):
            history = pd.DataFrame(row["history"])
            if history.empty:  # of a run that diverged at every rate
                continue
            is_full = row["table"] != "hashed"
            for panel, against in zip(column, ("step", "seconds"), strict=True):
                panel.plot(
                    history[against],
                    history["gap" if is_exact else "loss"],
                    color=BLACK if is_full else colours[round(row["compression_ratio"], 2)],
                    linestyle="--" if is_full else "-",
                    marker="" if is_exact else "o",
                    label="full table" if is_full else f"hashed, {row['compression_ratio']:.3g}×",
                )
        column[0].set_title(name, fontsize=10)
        for panel, label in zip(column, ("steps", "seconds"), strict=True):
            panel.set_xlabel(label)
            if is_exact:
                panel.set_yscale("log")
    for panel in panels[:, 0]:
        panel.set_ylabel("gap to the optimum (log)" if is_exact else "mean batch loss")
    if is_exact:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _quality_by_words(panel: Axes, quality: pd.DataFrame) -> None:
    for table, colour, marker in (("full", GREY, "s"), ("hashed", BLUE, "o")):
        rows = quality[quality.table == table].sort_values("num_words")
        spread = [rows.gap - rows.gap_low, rows.gap_high - rows.gap]
        style = _style(colour, marker, "-", label=f"{labels.trained(table)}, gap")
        panel.errorbar(rows.num_words, rows.gap, yerr=spread, **style)
    panel.set(xscale="log", xlabel="words (log)", ylabel="gap to the optimum", ylim=(-0.05, 1.05))
    panel.set_xticks(sorted(set(quality.num_words)))
    panel.minorticks_off()
    panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.3g}k")
    panel.tick_params(axis="x", labelsize=8)


def _speed_by_rows(times: Axes, memory: Axes, speed: pd.DataFrame) -> None:
    series = [(speed.table == "full-fused", GREY, "s", labels.TIMED["full-fused"])]
    series += [
        ((speed.table == "hashed") & (speed.block_size == block), colour, marker, f"hashed, block {block}")
        for block, colour, marker in ((1, BLUE, "o"), (25, GREEN, "^"))
    ]
    for chosen, colour, marker, label in series:
        rows = speed[chosen].sort_values("num_embeddings")
        if rows.empty:
            continue
        style = _style(colour, marker, "-", label=label)
        middle, spread = _quartiles(rows.total_ms_repeats)
        times.errorbar(rows.num_embeddings, middle, yerr=spread, **style)
        mib = rows.parameters_mib * rows.optimizer.map(sizes.COPIES) + rows.peak_mib.fillna(0)
        memory.errorbar(rows.num_embeddings, mib, **style)
    row = speed.iloc[0]
    mib_per_row = 4 * sizes.COPIES[row.optimizer] * row.embedding_dim / 2**20
    ends = np.array([speed.num_embeddings.min(), speed.num_embeddings.max()])
    memory.plot(ends, mib_per_row * ends, color=GREY, linestyle=":", label="full table, counted")
    times.set_ylim(bottom=0)
    times.set(xscale="log", xlabel="rows (log)", ylabel="milliseconds a step")
    memory.set(xscale="log", yscale="log", xlabel="rows (log)", ylabel="MiB in training (log)")


def growth(quality: pd.DataFrame, speed: pd.DataFrame) -> Figure:
    """What a pool of one size does as rows become more: quality, time of a step, memory in training.

    `quality` is `quality.growth_frame`; it or the speed records `speed` may be empty. Memory is that of
    the values, the optimizer's state and a step; the line is what full tables' values and state would be.
    """
    figure, axes = _figure(1, (not quality.empty) + 2 * (not speed.empty), size=(7.4, 3.2), squeeze=False)
    panels = list(axes[0])
    if not quality.empty:
        _quality_by_words(panels.pop(0), quality)
    if not speed.empty:
        times, memory = panels
        _speed_by_rows(times, memory, speed)
    for panel in figure.axes:
        panel.legend(fontsize=8)
    return figure


def composition(points: pd.DataFrame) -> Figure:
    """For each trained table its gap (log) by fewer bytes (log), as trained and with its values in int8.

    `points` are `frontier.median_points`. Behind each are the tables made after training, the same in all.
    """
    points = points[points.failure.isna()]
    behind = {
        "lower rank": "--",
        "lower rank, then int8": "-.",
        "product quantization": ":",
        "transform coding": "-",
    }
    names = [name for name in FRONTIER_STYLES if f"{name}, then int8" in set(points.method)]
    columns = min(4, max(1, len(names)))
    lines = -(-max(1, len(names)) // columns)
    figure, panels = _figure(
        lines, columns, size=(7.4, 0.9 + 2.1 * lines), sharex=True, sharey=True, squeeze=False
    )
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.flat, names, strict=False):
        for method, line in behind.items():
            rows = points[points.method == method].sort_values("inference_ratio")
            style = {"color": GREY, "linestyle": line, "linewidth": 1, "label": labels.trained(method)}
            panel.plot(rows.inference_ratio, rows.gap, **style)
        for method, colour, marker, label in (
            (name, BLUE, "o", "trained, float32"),
            (f"{name}, then int8", RED, "D", "trained, then int8"),
        ):
            rows = points[points.method == method].sort_values("inference_ratio")
            panel.plot(rows.inference_ratio, rows.gap, color=colour, marker=marker, markersize=4, label=label)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks([4, 16, 64])
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(labels.trained(name), fontsize=9)
    figure.supylabel("gap to the optimum (log)", fontsize=10)
    figure.supxlabel("fewer bytes at inference (log)", fontsize=10)
    legend = panels[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def answer(ratios: pd.DataFrame) -> Figure:
    """Hashed over full step time, then and now (log axis).

    `ratios` has the columns name, then, now, and the interval low, high.
    """
    figure, axes = _figure(size=(7, 3))
    y = np.arange(len(ratios))
    axes.axvline(1, color=GREY)
    axes.hlines(y, ratios.now, ratios.then, color=GREY, alpha=0.5)
    axes.plot(ratios.then, y, "s", color=RED, markersize=8, label="2021, TensorFlow")
    error = [ratios.now - ratios.low, ratios.high - ratios.now]
    axes.errorbar(ratios.now, y, xerr=error, fmt="o", color=BLUE, markersize=8, label="cemb, measured here")
    axes.set_xscale("log")
    _label_axis(axes.xaxis, "{:g}×")
    axes.set_yticks(y, ratios.name)
    axes.invert_yaxis()
    axes.set_xlabel("step time, hashed ÷ full table (log): left of 1× hashing is faster")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    return figure


def times(ratios: pd.DataFrame) -> Figure:
    """Total time here over there with its interval, and each phase's ratio, on logarithmic axes.

    A panel for each machine of a frame that `compare.time_ratios` made, and a row for each record; 1, the
    same time, is a line.
    """
    rows = list(dict.fromkeys(zip(ratios.run, ratios.record, strict=True)))
    machines = list(dict.fromkeys(ratios.machine))
    figure, panels = _figure(1, len(machines), size=(9, 1.2 + 0.2 * len(rows)), sharey=True, squeeze=False)
    for machine, axes in zip(machines, panels[0], strict=True):
        for phase, colour in {**PHASE_COLOURS, "total": BLACK}.items():
            own = ratios[(ratios.phase == phase) & (ratios.machine == machine)]
            places = [rows.index(key) for key in zip(own.run, own.record, strict=True)]
            # The ratio of medians may lie outside of what the bootstrap draws.
            error = np.maximum([own.value - own.low, own.high - own.value], 0)
            style = _style(colour, "o" if phase == "total" else "|", markersize=5, label=phase)
            axes.errorbar(own.value, places, xerr=error if phase == "total" else None, **style)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = axes.get_xlim()
        labelled = "25" if high < 100 * low else ""  # beyond two decades there is no room for more
        axes.xaxis.set_minor_formatter(
            lambda value, _, labelled=labelled: f"{value:g}" if f"{value:e}"[0] in labelled else ""
        )
        axes.set(xlabel=f"time here ÷ time of\n{machine}")
    panels[0, 0].set_yticks(range(len(rows)), [f"{run}: {record}" for run, record in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper right")
    return figure
