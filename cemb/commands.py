"""The commands of `cemb.cli`: what each does, and which options it has.

Options are fields of the study's dataclasses and keyword-only parameters of the library's functions, with
their names, types, defaults and docstrings, which tyro reads. A function here makes a command when that is
asked for, so that no other's imports are waited for; its docstring says what the command does.
"""

import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from cemb.checks import check_integers, check_reals

if TYPE_CHECKING:
    from cemb.study.records import Record

Command = Callable[..., int | None]
Records = Annotated[
    Path | None, arg(help="file for the records, one JSON object a line; None: standard output")
]
Threads = Annotated[int | None, arg(help="of torch and the kernels; None: as many as torch takes by itself")]


def _keywords(function: Callable[..., object], *left_out: str) -> Any:
    """For `Annotated`: a dict of the keyword-only parameters of a function, but for some, as options."""

    def options(**given: Any) -> dict[str, Any]:
        return given

    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in left_out
    ]
    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    options.__doc__ = function.__doc__
    return arg(constructor=options)


def _cannot_write(path: Path, error: OSError) -> OSError:
    return type(error)(f"cannot write {str(path)!r}: {error.strerror or error}")


def _check_parent(path: Path) -> None:
    """Refuse, before any work, a place in which nothing can be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _check_new(folder: Path | None) -> None:
    """Refuse, before any work, a folder that is there already or could not be made."""
    if folder is None:
        return
    if os.path.lexists(folder):
        raise FileExistsError(f"{str(folder)!r} exists already; remove it, or name another")
    _check_parent(folder)


def _check_output(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written or would replace what is no file."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a directory")
    if path.is_symlink():
        raise ValueError(
            f"cannot write {str(path)!r}: it is a symbolic link, which would be replaced; name the file "
            f"that it is for, {str(path.resolve())!r}"
        )
    if path.exists() and not path.is_file():
        raise ValueError(
            f"cannot write {str(path)!r}: it is a device, pipe or socket, which would be replaced; name a "
            "file, or leave it out for standard output"
        )
    _check_parent(path)


def _save(model: dict[str, Any], path: Path) -> None:
    """Write a state_dict whole or not at all."""
    import torch

    from cemb import files

    try:
        with files.atomic_file(path) as work, work.open("wb") as file:
            torch.save(model, file)
    except OSError as error:
        raise _cannot_write(path, error) from None
    except RuntimeError as error:  # of torch, which closes its file when the system's was raised
        if not isinstance(error.__context__, OSError):
            raise
        raise _cannot_write(path, error.__context__) from None


def _put(found: Iterable["Record"], out: Path | None = None, *, quiet: bool = False) -> list["Record"]:
    """Records as they come, all so far into a file so that stopping loses none, or to standard output."""
    from cemb.study import records

    _check_output(out)
    kept = []
    for record in found:
        kept.append(record)
        if out is not None:
            records.write(kept, out)
        elif not quiet:
            print(records.to_json(record), flush=True)
    return kept


def _judged(
    measure: Callable[..., Iterable["Record"]],
    reach: Callable[[list["Record"]], bool],
    tests_pass: Callable[[], bool] = lambda: True,
) -> Command:
    """A benchmark as a command."""

    def command(
        turns: Annotated[dict[str, Any], _keywords(measure)],
        *,
        targets: Annotated[bool, arg(help="say which ratios are reached; status 1 if not all")] = False,
        out: Records = None,
    ) -> int:
        _check_output(out)
        if targets and not tests_pass():
            print("cemb: the ops' tests fail, so no ratio is reported", file=sys.stderr)
            return 1
        found = _put(measure(**turns), out, quiet=targets)
        return 0 if not targets or reach(found) else 1

    return command


def speed() -> Command:
    """Time a training step and print its record as JSON."""
    from cemb.files import write_atomic
    from cemb.study import speed, timing

    def command(
        case: speed.SpeedCase,
        steps: Annotated[dict[str, Any], _keywords(speed.measure_cases, "rounds")],
        *,
        grid: Annotated[
            speed.Grid | None, arg(help="measure these cases of the 2021 project, and write its CSV")
        ] = None,
        threads: Threads = None,
        out: Records = None,
    ) -> None:
        timing.set_threads(threads)
        _check_output(out)
        if grid is None:
            _put(speed.measure_cases([case], **steps, rounds=1), out)
            return
        cases, found = speed.grid_cases(grid, device=case.device), []
        # One case at a time, as the original did: its largest tables do not fit beside each other.
        for one in cases:
            found += speed.measure_cases([one], **steps, rounds=1)
            print(f"{one.optimizer}, {one.label}: {found[-1]['total_ms']:.2f} ms", file=sys.stderr)
            if out is not None:  # after each case, so that stopping loses none
                write_atomic(out, speed.original_csv(found))
        if out is None:
            print(speed.original_csv(found), end="")

    return command


def bench() -> Command:
    """Time every table and rival side by side; the ops are tested before targets are judged."""
    from cemb.study import bench, targets

    return _judged(bench.run, targets.check_targets, bench.op_tests_pass)


def bench_counting() -> Command:
    """Time counting and its rivals side by side."""
    from cemb.study import counting_bench

    return _judged(counting_bench.run, counting_bench.check_targets)


def bench_processes() -> Command:
    """Time a step on one process and on two, and count the bytes they exchange."""
    from cemb.study import processes_bench

    def command(
        turns: Annotated[dict[str, Any], _keywords(processes_bench.run)], *, out: Records = None
    ) -> None:
        _put(processes_bench.run(**turns), out)

    return command


def scaling() -> Command:
    """Count made-up corpora of growing size; seconds and peak memory."""
    from cemb.study import counting_bench

    def command(
        counting: Annotated[dict[str, Any], _keywords(counting_bench.measure_scaling)],
        *,
        tokens: Annotated[Sequence[float], arg(help="how many, of each corpus")] = (1e6, 1e7, 1e8),
        scratch: Annotated[
            Path | None, arg(help="folder to work in, 150 bytes a token; None: the system's")
        ] = None,
        out: Records = None,
    ) -> None:
        _put(counting_bench.scaling(map(int, tokens), scratch, **counting), out)

    return command


def compile_kernels() -> Command:
    """Compile the kernels for this machine beforehand; a minute or two, once."""
    from cemb.study.precompile import precompile

    return precompile


def corpora() -> Command:
    """List the corpora that have a name, with their licences."""
    from cemb.pmi.corpora import CORPORA

    def command() -> None:
        for name, corpus in CORPORA.items():
            print(f"{name}: {corpus.title}\n  licence: {corpus.licence}\n  from: {corpus.origin}")

    return command


def encode() -> Command:
    """Tokenize a corpus into a folder of ids; prints a summary as JSON."""
    from cemb.pmi.corpora import CorpusName
    from cemb.pmi.encode import encode

    def command(
        corpus: Annotated[
            Positional[tuple[CorpusName, ...]],
            arg(help="names, files, directories or quoted globs, one after another; - for standard input"),
        ],
        reading: Annotated[dict[str, Any], _keywords(encode)],
        *,
        out: Annotated[Path, arg(help="folder to make")],
    ) -> None:
        start = time.perf_counter()
        encoded = encode(corpus, out, **reading)
        seconds = time.perf_counter() - start
        record = {
            "kind": "encoded corpus",
            "folder": str(encoded.folder),
            "num_tokens": encoded.num_tokens,
            "num_tokens_in_vocabulary": int(encoded.word_counts.sum()),
            "num_words": len(encoded.words),
            "num_shards": len(encoded.shard_sizes),
            "borders": encoded.borders,
            **asdict(encoded.tally),
            "fingerprint": encoded.fingerprint,
            "encode_s": round(seconds, 3),
            "tokens_per_s": round(encoded.num_tokens / seconds),
        }
        _put([record])

    return command


def count() -> Command:
    """Count an encoded corpus into a folder; prints its manifest as JSON."""
    from cemb import executors
    from cemb.pmi import out_of_core
    from cemb.pmi.encode import EncodedCorpus

    own = ("vocab_size", "word_counts", "executor")

    def command(
        folder: Annotated[Positional[Path], arg(help="that encode made")],
        counting: Annotated[dict[str, Any], _keywords(out_of_core.count, *own)],
        *,
        out: Annotated[Path, arg(help="folder to make; what is finished waits in OUT.partial")],
        processes: Annotated[bool, arg(help="tasks run in processes, not threads")] = False,
        scheduler: Annotated[
            str | None, arg(help="of a Dask cluster that sees the same folders: tcp://HOST:PORT")
        ] = None,
    ) -> None:
        if scheduler and processes:
            raise ValueError("give --scheduler or --processes, not both")
        encoded = EncodedCorpus.open(folder)
        start, workers = time.perf_counter(), counting.pop("workers")
        where: Any = nullcontext((None, None))
        if scheduler:
            where = executors.cluster_executor(scheduler)
        elif processes:
            where = executors.process_executor(workers)
        with where as (executor, threads):
            counts = out_of_core.count(
                encoded.shards(),
                out,
                vocab_size=len(encoded.words),
                word_counts=encoded.word_counts,
                workers=threads if workers is None else workers,
                executor=executor,
                **counting,
            )
        seconds = time.perf_counter() - start
        rates = {"count_s": round(seconds, 3), "tokens_per_s": round(counts.manifest["num_tokens"] / seconds)}
        _put([{"kind": "counts", "folder": str(counts.folder), **counts.manifest, **rates}])

    return command


def pmi() -> Command:
    """Build the PMI matrix of a corpus, or of events, and print its record as JSON; says where it is kept."""
    from cemb.files import write_atomic
    from cemb.pmi.matrix import value_histogram
    from cemb.study.dataset import PmiConfig, load_pmi

    def command(
        data: PmiConfig,
        building: Annotated[dict[str, Any], _keywords(load_pmi)],
        *,
        histogram_out: Annotated[
            Path | None, arg(help="also write the histogram of the matrix's values here")
        ] = None,
        out: Records = None,
    ) -> None:
        for path in (histogram_out, out):
            _check_output(path)
        found = load_pmi(data, **building)
        _put([found.summary], out)
        print(f"the matrix is in {found.folder}", file=sys.stderr)
        if histogram_out is not None:
            write_atomic(histogram_out, json.dumps(value_histogram(found.matrix), indent=1) + "\n")

    return command


def train() -> Command:
    """Train a table on a PMI matrix and print its record as JSON; --out keeps the model.

    Mini-batches train on several processes: torchrun --standalone --nproc-per-node 2 -m cemb train ... They
    use gloo on the CPU. torchrun gives each one thread unless $OMP_NUM_THREADS or --threads says otherwise.
    """
    from cemb import processes, saved
    from cemb.study import records
    from cemb.study.dataset import load_pmi
    from cemb.study.quality import Trainings
    from cemb.train import checkpoints

    def command(
        trainings: Trainings,
        *,
        save: Annotated[Path | None, arg(help="write the model's state_dict here")] = None,
        out: Annotated[
            Path | None, arg(help="folder to make of the model and its words, for export and cemb.load")
        ] = None,
        checkpoint_every: Annotated[
            int | None,
            arg(help="keep a checkpoint in OUT.partial at every so many steps; the same command resumes"),
        ] = None,
    ) -> None:
        trainings.case.check_ranks(processes.rank_and_number()[1])
        if out is None and checkpoint_every is not None:
            raise ValueError("--checkpoint-every needs --out: checkpoints wait in OUT.partial")
        _check_output(save)
        for option, path in (("--save", save), ("--out", out)):
            if path is not None and len(trainings.seeds) > 1:
                raise ValueError(f"{option} keeps one model, and there are seeds {[*trainings.seeds]}")
        if out is not None:
            checkpoints.tidy(out)
        _check_new(out)
        with trainings.checkpoints(out, checkpoint_every) if out else nullcontext() as kept:
            data = load_pmi(trainings.data)
            for record, model in trainings.measure(data, kept):
                _put([record])
                if model is None and (save or out):
                    raise RuntimeError(f"there is no model to save: {record['failure']}")
                if model is not None and save is not None:
                    _save(model.state_dict(), save)
                if model is not None and out is not None:
                    details = {"data": data.summary, "training": json.loads(records.to_json(record))}
                    saved.save(out, model, data.words, details=details)

    return command


def export() -> Command:
    """Write the vectors of a model that train made in a format of other tools."""
    from cemb import saved, vectors

    def command(
        folder: Annotated[Positional[Path], arg(help="that train made")],
        *,
        format: vectors.Format,
        out: Annotated[Path, arg(help="file to write, or of npy and tsv the folder to make")],
        balanced: Annotated[
            bool, arg(help="vectors that do not depend on how words and contexts share their product")
        ] = False,
        contexts: Annotated[bool, arg(help="the words' vectors as contexts")] = False,
        escape: Annotated[bool, arg(help="write white space in words as _, and do not refuse it")] = False,
    ) -> None:
        _check_new(out) if format in vectors.FOLDERS else _check_output(out)
        found = saved.load(folder).vectors(balanced, contexts=contexts)
        vectors.write(out, found, format, escape=escape)
        num_words, dim = found.values.shape
        _put([{"kind": "vectors", "format": format, "num_words": num_words, "embedding_dim": dim}])

    return command


def evaluate() -> Command:
    """Score vectors on sets of similarity and analogies; prints a record for each set."""
    from cemb.study import evaluation

    def command(
        vectors: Annotated[
            Positional[tuple[Path, ...]],
            arg(help="folders of models, or files of word2vec or GloVe, one after another"),
        ],
        *,
        similarity: Annotated[
            Sequence[Path], arg(help="files of two words and a score a line; by default gensim's two")
        ] = (),
        analogies: Annotated[
            Sequence[Path], arg(help="files of four words a line; by default Google's, which gensim has")
        ] = (),
        max_questions: Annotated[
            int | None, arg(help="an even sample of each file's analogies; None: all")
        ] = None,
        balanced: Annotated[
            bool, arg(help="of models, vectors that do not depend on how words and contexts share")
        ] = False,
        out: Records = None,
    ) -> None:
        _check_output(out)
        if not vectors:
            raise ValueError("evaluate needs vectors: folders of models, or files of word2vec or GloVe")
        check_integers(1, max_questions=max_questions)
        evaluation.check_readable(vectors)
        sets = evaluation.read_sets(similarity, analogies)
        if not sets:
            raise ModuleNotFoundError("the sets for evaluation come with gensim, which is not installed")

        def measured() -> Iterable["Record"]:
            for path in vectors:
                given = evaluation.read_vectors(path, balanced=balanced)
                print(f"{path}: {len(given.words):,} words, {given.values.shape[1]} values", file=sys.stderr)
                for record in evaluation.evaluate(given, sets, max_questions=max_questions):
                    print(f"  {evaluation.line(record)}", file=sys.stderr)
                    yield {"vectors": str(path), "is_balanced": balanced, **record}

        _put(measured(), out)

    return command


def compress() -> Command:
    """Make vectors small by transform coding, as a folder that cemb.load reads; prints a record as JSON."""
    from cemb.study import evaluation

    def command(
        vectors: Annotated[
            Positional[Path],
            arg(help="a model's folder, or a file of word2vec or GloVe; rows by falling frequency"),
        ],
        *,
        out: Annotated[Path, arg(help="folder to make")],
        times: Annotated[float, arg(help="how many times smaller than in float32")] = 16,
        similarity: Annotated[
            Sequence[Path], arg(help="sets to score before and after; by default those of gensim, if any")
        ] = (),
    ) -> None:
        check_reals("[1, inf)", times=times)
        _check_new(out)
        evaluation.check_readable([vectors])
        sets = evaluation.read_sets(similarity, with_analogies=False)
        _put([evaluation.compress(vectors, out, times=times, sets=sets)])

    return command


def frontier() -> Command:
    """Measure quality against bytes of tables in fewer of them."""
    from cemb.study.frontier import Frontier

    def command(frontier: Frontier, *, out: Records = None) -> None:
        _put(frontier.measure(), out)

    return command


def rates() -> Command:
    """Search the learning rates that quality runs start with; half an hour."""
    from cemb.study import quality, timing
    from cemb.study.dataset import PmiConfig, load_pmi

    def command(data: PmiConfig, *, threads: Threads = None, out: Records = None) -> None:
        def searched() -> Iterable["Record"]:
            timing.set_threads(threads)
            matrix = load_pmi(data)
            for case in quality.learning_rate_cases():
                record = quality.search_learning_rates(case, matrix)
                gaps = ("diverges" if gap is None else f"{gap:.4f}" for gap in record["gaps"])
                tried = ", ".join(f"{rate:g}: {gap}" for rate, gap in zip(record["rates"], gaps, strict=True))
                print(f"{case.table}, {case.training}, {case.optimizer}: {tried}", file=sys.stderr)
                yield record

        _put(searched(), out)

    return command


def study() -> Command:
    """Run the notebooks that are not up to date."""
    from cemb.pmi.corpora import CorpusName
    from cemb.study import grid as study_grid
    from cemb.study import records, staleness
    from cemb.study import run as study_run

    asked_grid, asked_corpus = study_grid.asked()

    def command(
        *,
        grid: study_grid.Grid = asked_grid,
        corpus: CorpusName = asked_corpus,
        optimizer: Sequence[str] = (),
        pool_size: Sequence[int] = (),
        run: Sequence[str] = (),
        workers: int | None = None,
        scheduler: str | None = None,
        check: bool = False,
        published: bool = False,
        out: Path | None = None,
    ) -> int:
        """The study.

        Args:
            grid: the whole of a study, what fits a quarter of an hour, or each page's code on little data; by
                default as $CEMB_GRID says.
            corpus: a name, a file, a directory or a quoted glob; by default as $CORPUS says.
            optimizer: only runs of these.
            pool_size: only runs of these.
            run: only these names, or patterns such as 'growth-*'.
            workers: untimed runs side by side; None: one a core, at most 4.
            scheduler: of a Dask cluster that sees the same folders, tcp://HOST:PORT, for the untimed runs.
            check: only say what is stale and why; status 1 if any.
            published: with check: of results/reference instead.
            out: folder of results; None: $CEMB_RESULTS, or results.
        """
        if published and not check:
            raise ValueError("--published goes with --check: published records are never made anew here")
        if check and scheduler:
            raise ValueError("--check makes no run, which --scheduler would be for; leave one of them out")
        records.of_checkout("results/reference" if published else "notebooks", "the study")
        if published:
            from cemb.report.provenance import published_staleness

            stale = published_staleness()
            current = "published records are of the present code and versions"
            print(*stale, f"{len(stale)} stale" if stale else current, sep="\n")
            return 1 if stale else 0
        if out is not None:
            os.environ["CEMB_RESULTS"] = str(out)
        runs = study_grid.study_runs(grid, corpus)
        runs = study_grid.select(runs, optimizer or None, pool_size or None, run or None)
        if not check:
            study_run.run_study(runs, workers=workers, scheduler=scheduler)
            print(f"runs are in {records.results_dir() / 'local' / 'runs'}")
            return 0
        found = {run.name: why for run in runs if (why := staleness.why_stale(run))}
        for name, why in found.items():
            print(f"{name}: {why}")
        print(f"{len(runs) - len(found)} of {len(runs)} runs are up to date")
        return 1 if found else 0

    return command


COMMANDS: dict[str, Callable[[], Command]] = {
    "speed": speed,
    "bench": bench,
    "compile": compile_kernels,
    "corpora": corpora,
    "encode": encode,
    "count": count,
    "bench-counting": bench_counting,
    "bench-processes": bench_processes,
    "scaling": scaling,
    "pmi": pmi,
    "train": train,
    "export": export,
    "evaluate": evaluate,
    "compress": compress,
    "frontier": frontier,
    "rates": rates,
    "study": study,
}
