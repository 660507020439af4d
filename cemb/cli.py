"""Command line: ``python -m cemb COMMAND``; ``--help`` lists the commands, and the options of each.

`cemb.commands` has the commands; tyro makes options of what they take.
"""

import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro

from cemb import processes
from cemb.commands import COMMANDS

# Names that options had, which commands on published pages have.
_FORMER = {
    "speed": {"--model": "--table"},
    "bench": {"--optimizer": "--optimizers"},
    "frontier": {"--method": "--methods", "--ratio": "--compression-ratios", "--seed": "--seeds"},
}


def _split(word: str) -> tuple[str, str]:
    """``--name=value`` as ``--name`` and ``=value``."""
    name, equals, value = word.partition("=")
    return name, equals + value


def _one_line(error: str) -> str:
    """The first paragraph of what tyro says in a box, or below a rule, without its colours and title."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", error).splitlines()[1:]]

    def is_border(line: str) -> bool:
        return re.fullmatch("[─╰╯-]*", line) is not None

    text = " ".join(
        itertools.takewhile(lambda line: not is_border(line), itertools.dropwhile(is_border, lines))
    )
    # "Error parsing trainings.case: " names parameters of ours that the user never sees.
    return re.sub(r"^Error parsing [a-z_.]+: ", "", " ".join(text.split()))


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The command that arguments ask for, ready to be called.

    ValueError, in one line, for what is no command or none of its options; SystemExit after a text of help.
    """
    name, *others = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: python -m cemb COMMAND [OPTIONS]\n\n{__doc__.splitlines()[0]}\n")
        for known, make in COMMANDS.items():
            print(f"  {known:16}{inspect.getdoc(make)}")
        raise SystemExit(0)
    if name not in COMMANDS:
        raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}; --help says more")
    make, former = COMMANDS[name], _FORMER.get(name, {})
    command = make()
    options = [former.get(option, option) + rest for option, rest in (_split(word) for word in others)]

    @functools.wraps(command)
    def ready(*args: Any, **keywords: Any) -> Callable[[], int | None]:
        return functools.partial(command, *args, **keywords)

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                ready,
                prog=f"python -m cemb {name}",
                description=inspect.getdoc(make),
                args=options,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as ended:
        if ended.code:
            raise ValueError(_one_line(said.getvalue()) or said.getvalue()) from None
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. What goes wrong is one line on standard error, and status 2.

    Signals and a closed output end it as `cemb.processes.supervised` says.
    """
    return processes.supervised(functools.partial(_run, sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    processes.join_launcher()
    try:
        status = parse(arguments)() or 0
        processes.flush_output()
        return status
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        said = f"{error}; the study's packages come with pip install 'cemb[study]'"
    except MemoryError as error:
        said = f"there is not enough memory{f': {error}' if str(error) else ''}"
    except (ValueError, OSError, RuntimeError, OverflowError) as error:
        said = str(error)
    print(processes.last_words(said), end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
