"""Command line: ``python -m cemb COMMAND``; ``--help`` lists the commands, and the options of each."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cemb.study.dataset import PmiConfig
    from cemb.study.records import Record


def _print_record(record: "Record") -> None:
    from cemb.study.records import to_json

    print(to_json(record), flush=True)


def _output(path: str | None) -> Path | None:
    """The path of an output file, refused before any work if it could not be written."""
    if path is None:
        return None
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"cannot write {path!r}: there is no directory {str(Path(path).parent)!r}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"cannot write {path!r}: it is a directory")
    return Path(path)


def _speed(arguments: argparse.Namespace) -> None:
    import torch

    from cemb.files import write_atomic
    from cemb.study import speed as study_speed

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = {"repeats": arguments.repeats, "warmup": arguments.warmup}
    if arguments.grid:
        # One case at a time, as the original did: its largest tables do not fit beside each other.
        out = _output(arguments.out)
        found: list[Record] = []
        for case in study_speed.grid_cases(arguments.grid, device=arguments.device):
            found += study_speed.measure_cases([case], **options, rounds=1)
            print(f"{case.optimizer}, {case.label}: {found[-1]['total_ms']:.2f} ms", file=sys.stderr)
            if out:  # after each case, so that stopping loses none
                write_atomic(out, study_speed.original_csv(found))
        if not out:
            print(study_speed.original_csv(found), end="")
        return
    case = study_speed.SpeedCase(
        arguments.model,
        arguments.optimizer,
        None if arguments.model.startswith("full") else arguments.pool_size,
        block_size=arguments.block_size,
        sparse_gradients=arguments.sparse_gradients,
        one_pass=arguments.one_pass,
        num_embeddings=arguments.num_embeddings,
        embedding_dim=arguments.embedding_dim,
        batch_size=arguments.batch_size,
        dropout=arguments.dropout,
        ids=arguments.ids,
        device=arguments.device,
    )
    for record in study_speed.measure_cases([case], **options, rounds=1):
        _print_record(record)


def _bench(arguments: argparse.Namespace) -> int:
    from cemb.study import bench as study_bench
    from cemb.study import records
    from cemb.study.sizes import OPTIMIZERS
    from cemb.study.targets import check_targets

    out = _output(arguments.out)
    if arguments.targets and not study_bench.op_tests_pass():
        print("cemb: the ops' tests fail, so no ratio is reported", file=sys.stderr)
        return 1
    found = study_bench.run(
        arguments.optimizer or OPTIMIZERS,
        ids=arguments.ids,
        device=arguments.device,
        repeats=arguments.repeats,
        rounds=arguments.rounds,
        threads=arguments.threads,
    )
    if out:
        records.write(found, out)
    elif not arguments.targets:
        for record in found:
            _print_record(record)
    return 0 if not arguments.targets or check_targets(found) else 1


def _compile(arguments: argparse.Namespace) -> None:
    from cemb.study.precompile import precompile

    precompile()


def _corpora(arguments: argparse.Namespace) -> None:
    from cemb.pmi.corpora import CORPORA

    for name, corpus in CORPORA.items():
        print(f"{name}: {corpus.title}\n  licence: {corpus.licence}\n  from: {corpus.origin}")


def _encode(arguments: argparse.Namespace) -> None:
    import time

    from cemb.pmi.encode import encode

    names = ("min_count", "max_vocab", "borders", "text_field", "shard_tokens", "threads")
    start = time.perf_counter()
    encoded = encode(arguments.corpus, arguments.out, **{name: getattr(arguments, name) for name in names})
    seconds = time.perf_counter() - start
    _print_record(
        {
            "kind": "encoded corpus",
            "folder": str(encoded.folder),
            "num_tokens": encoded.num_tokens,
            "num_tokens_in_vocabulary": int(encoded.word_counts.sum()),
            "num_words": len(encoded.words),
            "num_shards": len(encoded.shard_sizes),
            "borders": encoded.borders,
            "fingerprint": encoded.fingerprint,
            "encode_s": round(seconds, 3),
            "tokens_per_s": round(encoded.num_tokens / seconds),
        }
    )


def _count(arguments: argparse.Namespace) -> None:
    import time
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager, nullcontext

    from cemb.pmi.encode import EncodedCorpus
    from cemb.pmi.out_of_core import cluster_executor, count, parse_memory, process_executor

    encoded, memory = EncodedCorpus.open(arguments.corpus), parse_memory(arguments.memory)
    start = time.perf_counter()
    if arguments.scheduler and arguments.processes:
        raise ValueError("give --scheduler or --processes, not both")
    where: AbstractContextManager[tuple[Executor | None, int | None]]
    if arguments.scheduler:
        where = cluster_executor(arguments.scheduler)
    elif arguments.processes:
        where = process_executor(arguments.workers)
    else:
        where = nullcontext((None, None))
    with where as (executor, threads):
        counts = count(
            encoded.shards(),
            arguments.out,
            vocab_size=len(encoded.words),
            word_counts=encoded.word_counts,
            memory=memory,
            workers=threads if arguments.workers is None else arguments.workers,
            executor=executor,
            window_size=arguments.window_size,
            distance_weighting=arguments.distance_weighting,
            symmetric=not arguments.following,
            subsample_threshold=arguments.subsample_threshold,
            seed=arguments.seed,
        )
    seconds = time.perf_counter() - start
    _print_record(
        {
            "kind": "counts",
            "folder": str(counts.folder),
            **counts.manifest,
            "count_s": round(seconds, 3),
            "tokens_per_s": round(counts.manifest["num_tokens"] / seconds),
        }
    )


def _bench_counting(arguments: argparse.Namespace) -> int:
    from cemb.study import counting_bench, records

    out = _output(arguments.out)
    found = counting_bench.run(repeats=arguments.repeats)
    if out:
        records.write(found, out)
    elif not arguments.targets:
        for record in found:
            _print_record(record)
    return 0 if not arguments.targets or counting_bench.check_targets(found) else 1


def _scaling(arguments: argparse.Namespace) -> None:
    from cemb.pmi.out_of_core import parse_memory
    from cemb.study import counting_bench, records

    out = _output(arguments.out)
    found = []
    options = {"memory": parse_memory(arguments.memory), "workers": arguments.workers}
    for record in counting_bench.scaling(map(int, arguments.tokens), arguments.scratch, **options):
        found.append(record)
        if out:  # after each size, so that stopping loses none
            records.write(found, out)
        else:
            _print_record(record)


def _pmi_config(arguments: argparse.Namespace) -> "PmiConfig":
    from cemb.study.dataset import PmiConfig

    options: dict[str, Any] = {f.name: getattr(arguments, f.name, f.default) for f in fields(PmiConfig)}
    first, *others = arguments.corpus
    return PmiConfig(**{**options, "corpus": (first, *others) if others else first})


def _pmi(arguments: argparse.Namespace) -> None:
    from cemb.files import write_atomic
    from cemb.pmi.matrix import value_histogram
    from cemb.pmi.out_of_core import parse_memory
    from cemb.study.dataset import load_pmi

    out = _output(arguments.histogram_out)
    data = load_pmi(_pmi_config(arguments), memory=parse_memory(arguments.memory))
    _print_record(data.summary)
    if out:
        write_atomic(out, json.dumps(value_histogram(data.matrix), indent=1) + "\n")


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from cemb.study import quality
    from cemb.study.dataset import load_pmi

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    save = _output(arguments.save)
    names = {f.name for f in fields(quality.QualityCase)}
    case = quality.QualityCase(**{k: v for k, v in vars(arguments).items() if k in names})
    record, model = quality.measure_quality(case, load_pmi(_pmi_config(arguments)))
    _print_record(record)
    if save:
        if model is None:
            raise RuntimeError(f"there is no model to save: {record['failure']}")
        torch.save(model.state_dict(), save)


def _frontier(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from cemb.study import frontier as study_frontier
    from cemb.study import records
    from cemb.study.dataset import load_pmi
    from cemb.train.objective import AllCellsLoss

    methods = arguments.method or study_frontier.METHODS
    if unknown := sorted(set(methods) - set(study_frontier.METHODS)):
        raise ValueError(f"method must be one of {', '.join(study_frontier.METHODS)}, got {unknown[0]!r}")
    out = _output(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = load_pmi(_pmi_config(arguments))
    objective, found = AllCellsLoss(data.matrix), []
    cases = study_frontier.cases(methods, arguments.ratio, arguments.seed)
    for method, ratio, seed in tqdm(cases, desc="tables", unit="table"):
        options = {"compression_ratio": ratio, "seed": seed, "num_steps": arguments.num_steps}
        found.append(study_frontier.measure(method, data, objective, **options))
        if out:  # after each, so that stopping loses none
            records.write(found, out)
        else:
            _print_record(found[-1])


def _rates(arguments: argparse.Namespace) -> None:
    import torch

    from cemb.study import quality, records
    from cemb.study.dataset import load_pmi

    out = _output(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = load_pmi(_pmi_config(arguments))
    found = []
    for case in quality.learning_rate_cases():
        found.append(quality.search_learning_rates(case, data))
        tried = ", ".join(
            f"{rate:g}: {'diverges' if gap is None else f'{gap:.4f}'}"
            for rate, gap in zip(found[-1]["rates"], found[-1]["gaps"], strict=True)
        )
        print(f"{case.table}, {case.training}, {case.optimizer}: {tried}", file=sys.stderr)
        if out:  # after each case, so that stopping loses none
            records.write(found, out)
    if not out:
        for record in found:
            _print_record(record)


def _study(arguments: argparse.Namespace) -> int:
    from cemb.study import grid
    from cemb.study import run as study_run

    if arguments.published:
        if not arguments.check:
            raise ValueError("--published goes with --check: published records are never made anew here")
        from cemb.report.provenance import published_staleness

        found = published_staleness()
        for line in found:
            print(line)
        print(
            "published records are of the present code and versions" if not found else f"{len(found)} stale"
        )
        return 1 if found else 0
    runs = grid.select(
        grid.study_runs(arguments.grid, arguments.corpus),
        arguments.optimizer,
        arguments.pool_size,
        arguments.run,
    )
    if not arguments.check:
        study_run.run_study(runs, workers=arguments.workers)
        return 0
    stale = {run.name: why for run in runs if (why := study_run.staleness(run))}
    for name, why in stale.items():
        print(f"{name}: {why}")
    print(f"{len(runs) - len(stale)} of {len(runs)} runs are up to date")
    return 1 if stale else 0


def _parser() -> argparse.ArgumentParser:
    from cemb.pmi.corpora import CORPORA, DEFAULT_CORPUS

    parser = argparse.ArgumentParser(prog="python -m cemb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    def command(
        name: str, function: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, formatter_class=defaults)
        added.set_defaults(function=function)
        return added

    def window_options(added: argparse.ArgumentParser) -> None:
        added.add_argument("--window-size", type=int, default=5, help="tokens to each side")
        added.add_argument("--distance-weighting", default="flat", help="flat or harmonic")
        added.add_argument(
            "--subsample-threshold", type=float, default=None, help="as word2vec's; None: all tokens count"
        )

    def memory_option(added: argparse.ArgumentParser, default: str = "2GiB") -> None:
        added.add_argument("--memory", default=default, help="that counting may take, as 512MiB or 2GiB")

    corpus_help = (
        f"a name ({', '.join(CORPORA)}), a file, a directory or a quoted glob: UTF-8 text, JSON lines or "
        "Parquet, plain or compressed"
    )

    def text_options(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--text-field", default=None, help="field of JSON lines or column of Parquet; None: text"
        )
        added.add_argument(
            "--borders",
            default=None,
            help="windows stay inside a document, line or sentence; None: one stream",
        )
        added.add_argument("--min-count", type=int, default=5, help="occurrences a word needs")
        added.add_argument("--max-vocab", type=int, default=None, help="keep so many frequent words")

    def corpus_options(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--corpus",
            nargs="+",
            default=[DEFAULT_CORPUS],
            help=f"{corpus_help}; or several, one after another",
        )
        text_options(added)
        window_options(added)
        added.add_argument("--context-smoothing", type=float, default=0.75)
        added.add_argument("--num-negative", type=int, default=1, help="PMI is shifted by its logarithm")
        added.add_argument("--top-k", type=int, default=None, help="largest cells kept of a row; None: all")
        added.add_argument("--rank", "--embedding-dim", type=int, default=100, help="dimension of vectors")

    study_speed = command("speed", _speed, "time a training step and print its record as JSON")
    study_speed.add_argument(
        "--model", default="hashed", help="full, full-fused, hashed, hashed-reference, or a rival"
    )
    study_speed.add_argument("--optimizer", default="sgd", help="sgd, adagrad or adam")
    study_speed.add_argument("--pool-size", type=int, default=262_144, help="values in the pool")
    study_speed.add_argument("--block-size", type=int, default=1)
    study_speed.add_argument("--sparse-gradients", action="store_true", help="of a full table")
    study_speed.add_argument(
        "--one-pass", action="store_true", help="scores to update in one call, of our tables"
    )
    study_speed.add_argument("--num-embeddings", type=int, default=1_000_000)
    study_speed.add_argument("--embedding-dim", type=int, default=100)
    study_speed.add_argument("--batch-size", type=int, default=32_768, help="pairs a step")
    study_speed.add_argument("--dropout", type=float, default=0.1)
    study_speed.add_argument("--ids", default="uniform", help="how rows are drawn: uniform or zipf")
    study_speed.add_argument("--device", default="cpu")
    study_speed.add_argument("--threads", type=int, default=None, help="of torch and the kernels")
    study_speed.add_argument("--repeats", type=int, default=15)
    study_speed.add_argument("--warmup", type=int, default=2)
    study_speed.add_argument(
        "--grid", help="original or original-full: measure it and write the original's CSV"
    )
    study_speed.add_argument("--out", help="file for the grid's CSV, instead of standard output")

    study_bench = command("bench", _bench, "time every table and rival side by side")
    study_bench.add_argument(
        "--targets",
        action="store_true",
        help="test the ops, then say which ratios are reached; status 1 if not all",
    )
    study_bench.add_argument("--out", help="file for the records, one JSON object a line")
    study_bench.add_argument("--optimizer", nargs="+", help="only these")
    study_bench.add_argument("--ids", nargs="+", default=["uniform", "zipf"], help="how rows are drawn")
    study_bench.add_argument("--device", default="cpu")
    study_bench.add_argument("--threads", type=int, default=None, help="of torch and the kernels")
    study_bench.add_argument("--repeats", type=int, default=2, help="timed steps a turn")
    study_bench.add_argument("--rounds", type=int, default=8, help="turns")

    command("compile", _compile, "compile the kernels for this machine beforehand; a minute or two, once")

    command("corpora", _corpora, "list the corpora that have a name, with their licences")

    encode = command("encode", _encode, "tokenize a corpus into a folder of ids; prints a summary as JSON")
    encode.add_argument("corpus", nargs="+", metavar="CORPUS", help=f"{corpus_help}; - for standard input")
    encode.add_argument("--out", required=True, help="folder to make")
    text_options(encode)
    encode.add_argument("--shard-tokens", type=int, default=2**24, help="ids in a file")
    encode.add_argument("--threads", type=int, default=None, help="None: one a core")

    count = command("count", _count, "count an encoded corpus into a folder; prints its manifest as JSON")
    count.add_argument("corpus", metavar="FOLDER", help="that encode made")
    count.add_argument("--out", required=True, help="folder to make; what is finished waits in OUT.partial")
    window_options(count)
    count.add_argument("--following", action="store_true", help="only contexts that follow the word")
    count.add_argument("--seed", type=int, default=0, help="of subsampling")
    memory_option(count)
    count.add_argument("--workers", type=int, default=None, help="tasks at once; None: one a core")
    count.add_argument("--processes", action="store_true", help="tasks run in processes, not threads")
    count.add_argument("--scheduler", help="of a Dask cluster that sees the same folders: tcp://HOST:PORT")

    bench_counting = command("bench-counting", _bench_counting, "time counting and its rivals side by side")
    bench_counting.add_argument(
        "--targets", action="store_true", help="say which are reached; status 1 if not all"
    )
    bench_counting.add_argument("--out", help="file for the records, one JSON object a line")
    bench_counting.add_argument("--repeats", type=int, default=5)

    scaling = command("scaling", _scaling, "count made-up corpora of growing size; seconds and peak memory")
    scaling.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    memory_option(scaling, "512MiB")
    scaling.add_argument("--workers", type=int, default=None, help="tasks at once; None: one a core")
    scaling.add_argument("--scratch", help="folder to work in, 150 bytes a token; by default the system's")
    scaling.add_argument("--out", help="file for the records, one JSON object a line")

    pmi = command("pmi", _pmi, "build the PMI matrix of a corpus, or of events, and print its record as JSON")
    corpus_options(pmi)
    pmi.add_argument(
        "--events",
        metavar="USER,ITEM",
        default=None,
        help="the corpus is CSV, TSV or Parquet with one event a row, and these are its columns of users and "
        "items; options of text go not with it. None: text",
    )
    memory_option(pmi)
    pmi.add_argument("--histogram-out", help="also write the histogram of the matrix's values here")

    train = command("train", _train, "train a table on a PMI matrix and print its record as JSON")
    corpus_options(train)
    train.add_argument("--table", default="hashed", help="full, hashed or hashed-reference")
    train.add_argument("--optimizer", default="adam", help="sgd, adagrad or adam")
    train.add_argument("--training", default="full-batch", help="full-batch or mini-batch")
    train.add_argument("--pool-size", type=int, default=None)
    train.add_argument("--compression-ratio", type=float, default=None, help="sets the pool's size")
    train.add_argument("--block-size", type=int, default=1)
    train.add_argument("--signed", action="store_true")
    train.add_argument("--learning-rate", type=float, default=None, help="None: by training and optimizer")
    train.add_argument("--num-steps", type=int, default=50, help="of full batches")
    train.add_argument("--num-epochs", type=int, default=1, help="of mini-batches")
    train.add_argument("--batch-size", type=int, default=32_768)
    train.add_argument("--negative-share", type=float, default=0.5)
    train.add_argument("--loss", default="mse", help="mse, weighted-mse or glove")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=None)
    train.add_argument("--save", help="write the model's state_dict here")

    study_frontier = command(
        "frontier", _frontier, "measure quality against bytes of tables in fewer of them"
    )
    corpus_options(study_frontier)
    study_frontier.add_argument(
        "--method", nargs="+", help="of cemb.study.frontier.METHODS; all unless given"
    )
    study_frontier.add_argument(
        "--ratio", type=float, nargs="+", default=[4, 8, 16, 32], help="of inference bytes"
    )
    study_frontier.add_argument("--seed", type=int, nargs="+", default=[0])
    study_frontier.add_argument("--num-steps", type=int, default=50, help="of full batches")
    study_frontier.add_argument("--threads", type=int, default=None)
    study_frontier.add_argument("--out", help="file for the records, one JSON object a line")

    rates = command("rates", _rates, "search the learning rates that quality runs start with; half an hour")
    corpus_options(rates)
    rates.add_argument("--threads", type=int, default=None)
    rates.add_argument("--out", help="file for the records, one JSON object a line")

    study_run = command("study", _study, "run the notebooks that are not up to date")
    study_run.add_argument("--grid", default="default", help="default, full or smoke")
    study_run.add_argument("--corpus", default=DEFAULT_CORPUS, help=corpus_help)
    study_run.add_argument("--optimizer", nargs="+", help="only these")
    study_run.add_argument("--pool-size", type=int, nargs="+", help="only these")
    study_run.add_argument("--run", nargs="+", help="only these names, or patterns such as 'growth-*'")
    study_run.add_argument("--workers", type=int, help="untimed runs side by side")
    study_run.add_argument(
        "--check", action="store_true", help="only say what is stale and why; status 1 if any"
    )
    study_run.add_argument(
        "--published", action="store_true", help="with --check: of results/reference instead"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors of the user's input are one line on standard error and status 2."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int | None = parsed.function(parsed)
        return status or 0
    except (ValueError, OSError, RuntimeError, OverflowError) as error:
        print(f"cemb: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
