"""The command line: ``jtrunc train | compare | plan | audit | reproduce | demo | list``."""

from __future__ import annotations

import difflib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

EXTRA = ("matplotlib", "orbax", "pooch", "tqdm", "tyro")
"""Top-level packages of the extra `experiments`, which the core does without."""

COMMANDS = ("train", "compare", "plan", "audit", "reproduce", "demo", "list")

DESCRIPTION = """Gradient estimators for recurrent systems: see before you choose, train, repeat a paper.

First steps:

  jtrunc reproduce influence-balancing
  jtrunc train --cell lstm:width=128 --estimator online-artbp:mean-length=50,alpha=4
  jtrunc compare --estimators truncated-bptt:length=20 online-artbp:mean-length=20
  jtrunc plan --cell lstm:width=512 --streams 16 --memory 2G
  jtrunc audit --cell tanh:width=32
  jtrunc list"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return _fail(f"unknown command {given[0]!r}: {hint}Known: {', '.join(COMMANDS)}.", 2)
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        return _fail(f"{', '.join(missing)} not installed; run: pip install 'jtrunc[experiments]'", 1)
    command = None
    try:
        command = _parse(given)
        paths = command.run()
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        from jtrunc.training import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _interrupted(given, command)
    for path in paths:
        print(path)
    return 0


def _parse(arguments: list[str]) -> Any:
    """The command, a frozen dataclass; tyro prints help and errors and exits by itself."""
    import tyro

    from jtrunc.experiments.commands import Audit, Compare, Demo, List, Plan, Reproduce, Train

    def named(name: str) -> Any:
        return tyro.conf.subcommand(name, prefix_name=False)

    command = (
        Annotated[Train, named("train")]
        | Annotated[Compare, named("compare")]
        | Annotated[Plan, named("plan")]
        | Annotated[Audit, named("audit")]
        | Annotated[Reproduce, named("reproduce")]
        | Annotated[Demo, named("demo")]
        | Annotated[List, named("list")]
    )
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(command, prog="jtrunc", description=DESCRIPTION, args=arguments, config=config)  # type: ignore[call-overload]


def _fail(message: str, status: int) -> int:
    print(f"jtrunc: error: {message}", file=sys.stderr)
    return status


def _interrupted(arguments: list[str], command: Any) -> int:
    """Says how to go on with an interrupted run, if it can be resumed and has begun to save."""
    print("\njtrunc: interrupted.", file=sys.stderr)
    job = getattr(command, "experiment", command)
    if hasattr(job, "resume") and any(job.output.glob("**/config.json")):
        again = [*arguments, *([] if job.resume else ["--resume"])]
        print(f"Go on with:\n  jtrunc {shlex.join(again)}", file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
