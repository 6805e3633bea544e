"""Many runs below one folder: which options they share, processes of a core each, results written whole."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jtrunc.experiments.report import fresh_folder, no_run
from jtrunc.training.metrics import to_json

Item = TypeVar("Item")


def claim(config: Any, free: Collection[str]) -> None:
    """A fresh folder `config.output`, or with `config.resume` one that was made with the same options.

    Args:
      config: a frozen dataclass of options.
      free: names of those that may differ when a run is resumed.

    Raises:
      ValueError: the folder holds something, or runs that were made with other options.
    """
    path = config.output / "config.json"
    if not config.resume:
        fresh_folder(config.output)
        path.write_text(json.dumps(shared_options(config, free), indent=1) + "\n")
        return
    found = json.loads(path.read_text())
    for name, value in shared_options(config, free).items():
        if found.get(name) != value:
            raise ValueError(
                f"the runs in {str(config.output)!r} were made with --{name.replace('_', '-')}"
                f" {found.get(name)}, not {value}: give the same, or another --output"
            )


def check_resume(config: Any) -> None:
    """A ValueError where --resume finds no runs."""
    if config.resume and not (config.output / "config.json").exists():
        raise no_run(config.output)


def shared_options(config: Any, free: Collection[str]) -> dict[str, Any]:
    """The options that every run of a folder shares, as JSON has them."""
    options = {name: value for name, value in asdict(config).items() if name not in free}
    return json.loads(json.dumps(options, default=str))


def run_all(
    work: Callable[[Item], Any], items: Sequence[Item], jobs: int, advance: Callable[[Item], None]
) -> Iterator[tuple[Item, Any]]:
    """``work(item)`` for all items, here or in processes of a core each; results as they come.

    Args:
      work: picklable where there are processes.
      items: likewise.
      jobs: how many processes; 1: none.
      advance: called after an item that another process has finished, which cannot tell of its progress.
    """
    if jobs == 1:
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, context, _take_core, (counter,)) as pool:
        try:
            futures = {pool.submit(_work_in_process, work, item): item for item in items}
            for future in as_completed(futures):
                advance(futures[future])
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C too: the pool would wait for all runs; what they saved stays
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _work_in_process(work: Callable[[Item], Any], item: Item) -> Any:
    """``work(item)``; after an interrupt the process ends, for a pool would give it the next item."""
    try:
        return work(item)
    except KeyboardInterrupt:
        os._exit(130)


def _take_core(counter: Any) -> None:
    """A core to each process: small products are no faster on two, and two processes would share both."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    os.sched_setaffinity(0, {cores[index % len(cores)]})


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, content: dict[str, Any]) -> None:
    """``result.json`` of a finished run, whole or not at all."""
    path = folder / "result.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json(content) + "\n")
    temporary.replace(path)


def finite(content: Any) -> Any:
    """The same content with None for numbers that JSON has no word for: infinities and NaN."""

    def read(number: str) -> float | None:
        value = float(number)
        return value if math.isfinite(value) else None

    return json.loads(to_json(content), parse_float=read)
