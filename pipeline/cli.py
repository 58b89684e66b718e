"""The command line of both packages: verbs, `--section.key VALUE` overrides, errors without tracebacks."""

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from softshard.pipeline.recipes.yaml_file import Override
from softshard.pipeline.runtime.errors import RecipeError, SoftshardError

ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
Verb = Callable[[argparse.Namespace], int]
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse, call the chosen verb's `run` function, return the exit status; user errors are printed as plain text."""
    # Decoding threads and torch's threads share the cores. An OpenMP thread that spins while it waits for one that has
    # no core makes a training step many times slower; one that sleeps costs next to nothing. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        known, rest = parser.parse_known_args(arguments)
        known.overrides = overrides(rest)
        if known.overrides and getattr(known, "config", None) is None:
            raise RecipeError(
                f"--{known.overrides[0][0]}: expected an option of `{known.verb}`, found none of that name"
            )
        return known.run(known)
    except SoftshardError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"{error.filename or 'output'}: expected free disk, found none; make room and run the same again"
            )
        return _fail(f"{error.filename or 'file'}: expected to read or write it, found: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return INTERRUPTED_STATUS


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import what a verb needs without collecting garbage.

    The imports make a million objects that stay. To look for garbage among them takes a fifth of the start, and would
    take its time in training, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def make_parser(
    program: str, description: str | None, groups: Sequence[Callable[[Verbs], None]]
) -> argparse.ArgumentParser:
    """The parser of a command with the verbs of some groups; its help lists them with one line each."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add_verbs in groups:
        add_verbs(verbs)
    return parser


def add_verb(verbs: Verbs, name: str, help: str, function: Verb, config: bool = True) -> argparse.ArgumentParser:
    """A sub-command; with `config` it takes `--config F` and overrides."""
    parser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=function)
    if config:
        parser.add_argument("--config", type=Path, required=True, help="recipe; --section.key VALUE overrides a key")
    return parser


def overrides(words: Sequence[str]) -> list[Override]:
    """['--views.seed', '1', '--top_k=3'] -> [('views.seed', '1'), ('top_k', '3')]. Raises RecipeError."""
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"command line: expected --section.key VALUE, found {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise RecipeError(f"{word}: expected a value after it, found the end of the line")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    print(
        "\n".join(f"error{'' if rank == '0' else f' (rank {rank})'}: {line}" for line in message.splitlines()),
        file=sys.stderr,
    )
    return ERROR_STATUS
