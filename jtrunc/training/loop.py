"""Train: chunks of updates on the device, everything that a long run needs around them on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_count, check_size
from jtrunc.probe import static_num_steps
from jtrunc.training import checkpoint, configuration
from jtrunc.training.chunk import Program, init_chunk
from jtrunc.training.metrics import MetricsFile
from jtrunc.training.placement import Placement, place
from jtrunc.training.processes import from_first, is_first, largest, put
from jtrunc.training.progress import Progress
from jtrunc.training.runner import Options, Output, Runner, TrainingInterrupted, TrainResult
from jtrunc.training.seeds import (
    Hyperparameters,
    SeedAxis,
    check_hyperparameters,
    check_seeds,
    seed_key,
)
from jtrunc.training.signals import StopRequest, deferred_interrupt
from jtrunc.training.step import TrainState
from jtrunc.training.stream import circular, lead_in_ends, num_rows, window_at

MAX_COUNT = np.iinfo(np.int32).max
_LINES_AT_ONCE = 4096


def train(
    system: System,
    params: Params | Callable[[jax.Array], Params],
    hidden: PyTree,
    estimator: GradientEstimator | Callable[[Any], GradientEstimator],
    optimizer: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation],
    data: PyTree,
    *,
    window: int,
    num_updates: int,
    key: jax.Array | None = None,
    seeds: int | Sequence[int] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    log_every: int = 1,
    lead_in: bool = True,
    max_non_finite: int = 0,
    eval_data: Mapping[str, PyTree] | None = None,
    eval_every: int | None = None,
    eval_hidden: PyTree = None,
    out_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 3,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a recurrent system on one long stream of data.

    Update u gets the `window` steps of `data` from the cursor on, read in a circle; the cursor moves on by
    the steps that the estimator consumed, and the hidden state is carried along. Updates run on the device in
    chunks of about a quarter of a second; where a chunk ends changes no bit of the run.

    Online learning is ``window=1``: one parameter update a time step. With ``log_every=1000`` the compiled
    loop sums up a thousand updates by itself, so that 10⁶ of them return 10³ rows, in memory that does not
    depend on their number; the loop adds about a microsecond to an update.

    With a `mesh` the run is spread over devices. An axis "seeds" splits the seeds; where they do not divide
    evenly, the devices are filled up with copies of the first, of which nothing is reported or saved. An axis
    "data" splits the streams: axis 1 of `data`, axis 0 of `hidden`; a system whose loss is a mean over its
    batch then averages over all devices. Both may be given. Results equal those of one device but for
    rounding, and a checkpoint is resumed on any number of devices. In a run of several processes (see
    `jtrunc.training.start_processes`) each calls `train` with its own streams and the same of all else;
    process 0 reads and writes the files, for which the others send it what they have, and gives them what it
    read: the folder need not be shared. Every process gets the whole result. Such a run, if its streams are
    split, is resumed by as many processes.

    Args:
      system: the system that the estimator was made for; it is what the evaluations run.
      params: the first parameters, or a function ``key -> Params`` such as a model's `init`.
      hidden: the initial hidden state.
      estimator: a gradient estimator of `system`, or a function of `hyperparameters` that makes it.
      optimizer: any optax optimiser, or such a function; it gets `timestep` as an extra argument (see
        `jtrunc.optimizers.scale_by_timestep_schedule`), and the `truncation_length` of estimators that
        report it (see `jtrunc.optimizers.scale_by_truncation_length`).
      data: leaves (T, ...), time in front; copied to the device once.
      window: steps per update: the window of `windowed_bptt` (backward_steps + 1), the look-ahead of
        `online_artbp` and `adaptive_bptt`, the steps of one update for all others.
      num_updates: updates of the whole run; a resumed run goes on up to it.
      key: a typed key, ``jax.random.key(0)`` by default.
      seeds: a count or a sequence of integers: many runs in one program, results with a leading axis of
        seeds. Seed i equals, to float tolerance, the solo run with ``key=seed_key(key, i)``.
      hyperparameters: arrays (seeds,) by name. The functions given for `estimator` and `optimizer` are called
        with the numbers of one run by name, traced, so that rates, mean lengths or penalties of their own
        cost no compilation. A seed may then occur twice.
      mesh: the devices of the run; by default one.
      log_every: updates per line of metrics, which are summed on the device (to about twice the digits of
        float32). Loss: mean per scored step (nats) over the line's updates; gradient norm and diagnostics:
        mean over its updates (infinite if one is). Chunks are whole lines: after Ctrl-C the line is finished
        first. Whatever it is, every update is checked for NaN and infinities.
      lead_in: begin with shorter windows where the estimator scores only the end of each (`windowed_bptt`),
        so that no loss goes unscored; one compilation for each of them.
      max_non_finite: how many updates of the run (of each seed) may be skipped because they are not finite:
        parameters and optimiser stay as they are, the run goes on behind the data of that update (see
        `train_step`), the metrics leave it out and count it as ``num_skipped``. The next one stops the run.
      eval_data: splits by name; each is evaluated from `eval_hidden` every `eval_every` updates, and at
        the end.
      eval_every: a multiple of `log_every`; None: at the end only.
      eval_hidden: the hidden state that evaluations begin with; `hidden` by default.
      out_dir: folder for config.json, metrics.jsonl and checkpoints; nothing is written without it.
      checkpoint_every: updates between checkpoints, a multiple of `log_every`; by default a tenth of the run.
      keep: how many checkpoints stay.
      resume: go on with the run in `out_dir`; the result equals the uninterrupted run bit for bit.
      config: a JSON object of your own that belongs to the run's configuration.
      progress: a bar on stderr for runs longer than two seconds: True, False, or None for terminals only.

    Returns:
      A `TrainResult`.

    Raises:
      ValueError, TypeError: for arguments that do not fit, by name.
      NonFiniteError: at the first update that is not finite and may not be skipped, also in the middle of a
        line; the state before it is in the exception's `result` and, with `out_dir`, in a checkpoint, and the
        metrics end with it (the last line is then a shorter one). At most one chunk is computed twice.
      TrainingInterrupted: a KeyboardInterrupt after Ctrl-C or SIGTERM, once the chunk is done and saved.
      CheckpointError, ConfigurationError, OSError: if the run cannot be saved or resumed.

    Example: a decay rate that learns to keep what it saw (hₜ = θ hₜ₋₁ + xₜ, target 2).

      >>> import jtrunc, optax
      >>> system = jtrunc.System(
      ...     lambda theta, hidden, x: theta * hidden + x,
      ...     lambda params, hidden, x: (0.5 * (hidden - 2.0) ** 2, ()),
      ... )
      >>> result = train(system, jtrunc.Params(jnp.float32(0.0)), jnp.float32(0.0),
      ...     jtrunc.truncated_bptt(system, 10), optax.sgd(0.003), jnp.ones(100, jnp.float32),
      ...     window=10, num_updates=500)
      >>> round(float(result.params.recurrent), 2)
      0.5

    Three learning rates in one program: after 30 updates the largest is nearest to 0.5.

      >>> result = train(system, jtrunc.Params(jnp.float32(0.0)), jnp.float32(0.0),
      ...     jtrunc.truncated_bptt(system, 10), lambda h: optax.sgd(h["rate"]), jnp.ones(100, jnp.float32),
      ...     window=10, num_updates=30, seeds=[0, 0, 0], hyperparameters={"rate": [0.0003, 0.001, 0.003]})
      >>> [round(theta, 2) for theta in result.params.recurrent.tolist()]
      [0.09, 0.33, 0.5]
    """
    options = _check_options(
        num_updates, log_every, window, eval_data, eval_every, out_dir, checkpoint_every, keep, resume
    )
    check_count("train", "max_non_finite", max_non_finite)
    key, seed_numbers = _check_key(key), check_seeds(seeds, distinct=hyperparameters is None)
    tried = check_hyperparameters(hyperparameters, seed_numbers, (estimator, optimizer))
    placement = place(mesh, None if seed_numbers is None else len(seed_numbers), data)
    stream = circular(data, window)
    stream = stream._replace(rows=placement.data(stream.rows))
    first_hidden = placement.hidden(hidden)
    inputs = jax.eval_shape(lambda rows: window_at(rows, jnp.int32(0), window), stream.rows)
    first_tried = jax.tree.map(lambda leaf: leaf[0], tried)
    shapes = _shapes_of(params, key, placement)
    num_steps = static_num_steps(estimator, shapes, first_hidden, inputs, hyperparameters=first_tried)
    axis = SeedAxis.NONE if seed_numbers is None else SeedAxis.VMAP if num_steps else SeedAxis.MAP
    program = Program(estimator, optimizer, window, _LINES_AT_ONCE, log_every, axis, placement.mesh)
    state, shardings = _first_state(
        program, placement, params, first_hidden, key, seed_numbers, tried, max_non_finite
    )
    splits = {name: jax.tree.map(jnp.asarray, split) for name, split in (eval_data or {}).items()}
    runner = Runner(
        program=program,
        placement=placement,
        shardings=shardings,
        hyperparameters=placement.by_seed(tried),
        stream=stream,
        lead_in=lead_in_ends(window, num_steps) if lead_in and num_steps else [],
        system=system,
        eval_data={name: placement.data(split) for name, split in splits.items()},
        eval_hidden=first_hidden if eval_hidden is None else placement.hidden(eval_hidden),
        options=options,
        seeds=seed_numbers,
        state=state,
    )
    if out_dir is not None:
        given = {"seeds": seed_numbers, "key": jax.random.key_data(key).tolist(), "log_every": log_every,
                 "lead_in": bool(lead_in), "given": dict(config or {})}  # fmt: skip
        given |= {"max_non_finite": max_non_finite} if max_non_finite else {}
        if splits:
            given["evaluation data"] = {
                name: configuration.hash_of_all(split) for name, split in splits.items()
            }
        template = runner.whole_state()
        described = configuration.configuration(program, template, inputs, data, given, tried)
        _open(runner, Path(out_dir), template, described, resume)
    with deferred_interrupt() as stop:
        return _drive(runner, stop, progress)


def _first_state(
    program: Program,
    placement: Placement,
    params: Any,
    hidden: PyTree,
    key: jax.Array,
    seeds: tuple[int, ...] | None,
    hyperparameters: Hyperparameters,
    max_non_finite: int,
) -> tuple[TrainState, TrainState | None]:
    """The state before the first update, and where its leaves lie."""
    run_key = key
    if seeds is not None:
        run_key = placement.by_seed(jnp.stack([seed_key(key, seed) for seed in seeds]))
    init_params, given = (params, None) if callable(params) else (None, placement.params(params))
    state = init_chunk(program, init_params, given, hidden, run_key, placement.by_seed(hyperparameters))
    if max_non_finite:
        most = min(max_non_finite, MAX_COUNT)  # no run has more updates
        state = state._replace(skips_left=jnp.full(run_key.shape, most, jnp.int32))
    shardings = placement.shardings(state, given, program.seed_axis)
    return state if shardings is None else put(state, shardings), shardings


def _drive(runner: Runner, stop: StopRequest, show: bool | None) -> TrainResult:
    bar = Progress(runner.options.num_updates, runner.update, show if is_first() else False)
    try:
        while not runner.finished:
            runner.advance()
            bar.advance_to(runner.update, float(np.mean(runner.timesteps)), runner.last_loss)
            if largest(stop.requested) and not runner.finished:
                runner.save()
                raise TrainingInterrupted(runner.interrupted_message(), runner.result())
    finally:
        bar.close()
    return runner.result()


def _open(
    runner: Runner, folder: Path, template: TrainState, described: dict[str, Any], resume: bool
) -> None:
    """Claim the folder for a new run, or put the runner where the newest intact checkpoint was."""
    metrics, steps = MetricsFile(folder / "metrics.jsonl"), folder / "checkpoints"
    if not resume:
        from_first(lambda: configuration.begin(folder, described))
        runner.output = Output(metrics, steps, configuration.hash_configuration(described))
        return
    config_hash = from_first(lambda: configuration.check_same(folder, described))
    runner.output = Output(metrics, steps, config_hash)
    if not from_first(lambda: checkpoint.list_steps(steps)):  # killed before the first checkpoint
        from_first(lambda: metrics.truncate_to(metrics.sha256))
        return
    runner.go_on(from_first(lambda: checkpoint.restore(steps, template, config_hash=config_hash)))


def _check_options(
    num_updates: int,
    log_every: int,
    window: int,
    eval_data: Any,
    eval_every: int | None,
    out_dir: Any,
    checkpoint_every: int | None,
    keep: int,
    resume: bool,
) -> Options:
    counts = {"num_updates": num_updates, "log_every": log_every, "keep": keep, "window": window}
    for name, value in counts.items():
        check_size("train", name, value)
    if num_updates > MAX_COUNT:
        raise ValueError(f"train: `num_updates` must be below 2³¹, not {num_updates}; use longer windows")
    if log_every * window > MAX_COUNT:
        raise ValueError(
            f"train: `log_every` · `window` = {log_every} · {window} steps a line are more than an int32 can "
            "count; use a smaller `log_every`"
        )
    for name, value in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if value is not None and check_size("train", name, value) % log_every:
            raise ValueError(f"train: `{name}` must be a multiple of `log_every` ({log_every}), not {value}")
    if eval_data is not None and not isinstance(eval_data, Mapping):
        raise TypeError(
            f"train: `eval_data` must map names of splits to data, such as {{'valid': data}}, "
            f"not {type(eval_data).__name__}"
        )
    if eval_every is not None and not eval_data:
        raise ValueError(f"train: `eval_every` is {eval_every}, but there is no `eval_data` to evaluate")
    if out_dir is None and (resume or checkpoint_every is not None):
        name = "resume" if resume else "checkpoint_every"
        raise ValueError(f"train: `{name}` needs `out_dir`, the folder of the run")
    for name, split in (eval_data or {}).items():
        num_rows(split, f"eval_data[{name!r}]")
    tenth = -(-num_updates // (10 * log_every)) * log_every
    return Options(num_updates, log_every, eval_every, checkpoint_every or tenth, keep)


def _shapes_of(params: Any, key: jax.Array, placement: Placement) -> Params:
    if callable(params):
        return jax.eval_shape(params, key)
    if not isinstance(params, Params):
        raise TypeError(
            f"train: `params` must be jtrunc.Params or a function key -> Params, not {type(params)}"
        )
    return placement.params(params)


def _check_key(key: Any) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise ValueError(f"train: `key` must be one typed key, such as jax.random.key(0), not {key!r}")
    return key
