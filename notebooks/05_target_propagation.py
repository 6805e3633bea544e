# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Target propagation
#
# Backpropagation through time goes through a sequence twice, one step after the other. Target propagation
# makes the hidden states variables of their own and *asks* them to follow the recurrence. Cut $T$ steps into
# $N = T/B$ blocks of $B$. The state $h_b$ at the end of block $b$ is free; $\hat h_b$ is where the block
# arrives if it begins at $h_{b-1}$; what lies inside a block is computed as ever:
#
# $$L(H, \theta, y) = \sum_t \ell_t + \sum_b \langle y_b, r_b\rangle + \lambda \sum_b C(\hat h_b, h_b), \qquad
# r_b = h_b - \hat h_b, \quad \hat h_b = F(\dots F(h_{b-1})\dots),$$
#
# with $C = \tfrac12\|h - \hat h\|^2$ and multipliers $y$. Given all $h_b$, the blocks know nothing of each
# other: they run side by side, in $B$ sequential steps instead of $T$. (Wiseman et al., "Training language
# models using target-propagation", 2017; its equation numbers are used below. The paper's own result is
# negative: it found no gain over truncated BPTT. We shall see what is left.)

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jtrunc
from jtrunc import cells, targets, training
from jtrunc.tasks import counting

SMALL = bool(os.environ.get("JTRUNC_SMALL"))  # the tests run every cell, on fewer updates
jax.config.update("jax_enable_x64", True)  # for the exact comparisons below
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## A problem
#
# Characters `aaa⏎bbb⏎a⏎b⏎…`, as many b's as a's, 1 to 8. A GRU of 16 units reads 480 of them, in 120 blocks
# of 4: most counts end in another block than they began. After 25 updates of BPTT it has learned something,
# and a gradient that is cut between blocks has little to do with the whole one.

# %%
T, B, UNITS, LONGEST = 480, 4, 16, 8
N = T // B
stream = [lane[:, 0] for lane in counting.sequences(jax.random.key(0), T + 2_000, longest=LONGEST)]
data, new_data = tuple(lane[:T] for lane in stream), tuple(lane[T:] for lane in stream)
model = cells.model(cells.gru(3, UNITS), 3, cells.softmax_cross_entropy)
system, hidden = model.system, model.initial_hidden(dtype=jnp.float64)
params = training.train(
    system, model.init(jax.random.key(1), jnp.float64), hidden, jtrunc.bptt(system), optax.adam(0.01), data,
    window=T, num_updates=25,
).params  # fmt: skip


def flat(grads):
    """The gradient of the recurrent parameters, as a vector: the readout's is never truncated."""
    return np.asarray(ravel_pytree(grads.recurrent)[0])


def gradient(estimator, params=params):
    """Of a first update."""
    return flat(jax.jit(estimator.update)(params, estimator.init(params, hidden), data)[0].grads)


def deviation(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


bptt, cut_at_blocks = gradient(jtrunc.bptt(system)), gradient(jtrunc.truncated_bptt(system, B))
forward = targets.forward_states(system, params, hidden, data, B)


@jax.jit
def objective(free):
    return targets.objective(system, params, hidden, free, data, block_length=B, penalty=1.0)


value, terms = objective(forward)
print(f"H = the true states:  L = {value:.3f}, Σℓ = {terms.loss:.3f} nats, ΣC = {terms.constraint:.1e}")
value, terms = objective(jnp.zeros_like(forward))
print(f"H = 0:                L = {value:.3f}, Σℓ = {terms.loss:.3f} nats, ΣC = {terms.constraint:.3f}")
print(f"truncated_bptt({B}): relative deviation from BPTT's gradient {deviation(cut_at_blocks, bptt):.2f}")

# %% [markdown]
# ## Multipliers become costates
#
# At fixed $\theta$ there is one $H$ without residuals, the true states. What must be found is $y$. Where $L$
# is stationary in $H$ and $r = 0$,
#
# $$y_b = \Bigl(\frac{\partial\hat h_{b+1}}{\partial h_b}\Bigr)^{\!\top} y_{b+1}
# - \frac{\partial}{\partial h_b}\!\!\sum_{t \in \text{block } b+1}\!\!\ell_t:$$
#
# BPTT's own recursion for its costates, with the sign turned, and $\nabla_\theta L$ is then BPTT's gradient.
# BPTT solves it from the right to the left. ADMM does a few steps on $H$, then $y \leftarrow y + \lambda r$,
# and again, all blocks at once: news travels by one block a step. The steps must be small: about
# $1/\lambda(1+\|J\|)^2$, where $J$ is the Jacobian of a block.

# %%
PENALTY, NUM_SETTLING = 10.0, 60 if SMALL else 400
blocks = jax.tree.map(lambda leaf: leaf.reshape(N, B), data)
starts = jnp.concatenate([hidden[None], forward[:-1]])


def end_of_block(start, inputs):
    return jtrunc.unroll(system, params, start, inputs)[0]


jacobian = jax.jit(jax.vmap(jax.jacobian(end_of_block)))(starts, blocks)
largest = np.linalg.norm(np.asarray(jacobian), 2, axis=(1, 2)).max()
HIDDEN_RATE = 1 / (PENALTY * (1 + largest) ** 2)
print(f"largest ‖J‖ = {largest:.2f}, step size on H {HIDDEN_RATE:.4f}")


@jax.jit
@jax.grad
def costates(pushes):
    """∂(losses after block b)/∂h_b: what the losses make of a push at the end of each block."""

    def block(h, xs):
        push, inputs = xs
        h, (losses, _) = jtrunc.unroll(system, params, h, inputs)
        return h + push, jnp.sum(losses)

    return jnp.sum(jax.lax.scan(block, hidden, (pushes, blocks))[1])


exact_multipliers = -np.asarray(costates(jnp.zeros((N, UNITS))))


def propagation(method="admm", hidden_steps=1, penalty=PENALTY, rate=HIDDEN_RATE, initial="persistent"):
    steps = {"hidden_steps": hidden_steps, "hidden_optimizer": optax.sgd(rate)}
    return jtrunc.target_propagation(system, B, penalty, method, **steps, initial=initial, num_blocks=N)


def settle(estimator):
    """Updates at fixed θ: the gradients, multipliers and residuals of each."""

    def update(state, _):
        estimate, state = estimator.update(params, state, data)
        residuals = estimate.aux.diagnostics
        return state, (ravel_pytree(estimate.grads.recurrent)[0], state.multipliers, residuals)

    run = jax.jit(lambda state: jax.lax.scan(update, state, length=NUM_SETTLING)[1])
    return jax.tree.map(np.asarray, run(estimator.init(params, hidden)))


settled = {
    "ADMM, 1 step on H": settle(propagation()),
    "ADMM, 5 steps": settle(propagation(hidden_steps=5)),
    "penalty only, 5 steps": settle(propagation("penalty", hidden_steps=5)),
}
print("relative deviation of the θ-gradient from BPTT's, after updates")
marks = [mark for mark in (1, 10, 60, 400) if mark <= NUM_SETTLING]
print(f"{'':<24}" + "".join(f"{mark:>10}" for mark in marks))
for name, (grads, _, _) in settled.items():
    print(f"{name:<24}" + "".join(f"{deviation(grads[mark - 1], bptt):>10.1e}" for mark in marks))

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
shown = slice(0, 40)
number = np.arange(1, N + 1)
_, multipliers, _ = settled["ADMM, 5 steps"]
for shade, mark in zip(("0.8", "0.6", "C0"), (1, 5, 60), strict=True):
    sizes = np.linalg.norm(multipliers[mark - 1], axis=1)
    left.plot(number[shown], sizes[shown], ".-", color=shade, linewidth=1.5, label=f"‖y‖ after {mark}")
left.plot(number[shown], np.linalg.norm(exact_multipliers, axis=1)[shown], "k--", linewidth=1, label="BPTT")
left.set(xlabel="block", ylabel="size of the costate", title="ADMM, 5 steps on H", ylim=(0, 2.7))
left.legend(fontsize="small", ncols=2, loc="upper left")
updates = np.arange(1, NUM_SETTLING + 1)
colors = dict(zip(settled, ("C1", "C0", "C3"), strict=True))
for name, (grads, _, residuals) in settled.items():
    error = [deviation(found, bptt) for found in grads]
    middle.semilogy(updates, error, color=colors[name], label=name)
    right.semilogy(updates, residuals["primal_residual"], color=colors[name])
    right.semilogy(updates, residuals["dual_residual"], ":", color=colors[name])
middle.axhline(deviation(cut_at_blocks, bptt), color="k", linewidth=1, linestyle="--", label=f"cut every {B}")
middle.set(xlabel="updates at fixed θ", title="deviation of the θ-gradient", ylim=(1e-14, 30))
middle.legend(fontsize="small", loc="lower left")
right.plot([], [], "k", label="primal ‖r‖")
right.plot([], [], "k:", label="dual ‖∇ L‖ wrt H")
right.set(xlabel="updates at fixed θ", title="residuals", ylim=(1e-14, 30))
right.legend(fontsize="small", loc="lower left")
plt.show()

# %% [markdown]
# With multipliers the gradient from beyond the block comes back, to the last digits. But it takes hundreds of
# passes for what BPTT has in one: who can wait so long can run BPTT. The penalty alone settles at another
# gradient, that of its own function of $\theta$. The hope is that $\theta$ may move all the while.
#
# ## One step on H, from the true states
#
# The paper's appendix says (eq. 9) that one step $\tilde h_t = h_t - \eta\,q_t$, $q_t =
# \partial\ell_t/\partial h_t$, from the true states makes a gradient that is $\eta\lambda$ times BPTT's. It
# looks at one step at a time ($B = 1$, losses on the free states, eq. 8), and what it gets is BPTT *truncated
# after every step*; even that only while $g$ reads the old $h_{t-1}$. When all states move at once, as they
# do in the algorithm, the step before has moved as well (errata 24):
#
# $$\nabla_\theta L = \eta\lambda \sum_t (q_t - J_t\,q_{t-1})\,
# \frac{\partial F}{\partial\theta} + O(\eta^2).$$

# %%
states = targets.forward_states(system, params, hidden, data, 1)
before = jnp.concatenate([hidden[None], states[:-1]])


@jax.jit
def by_formulas():
    """q, and Σ (q_t − J_t q_{t−1}) ∂F/∂θ, the leading term of errata 24."""
    q = jax.vmap(jax.grad(lambda h, x: system.loss(params, h, x)[0]))(states, data)

    def carry(h, x, q):
        return jax.jvp(lambda h: system.transition(params.recurrent, h, x), (h,), (q,))[1]

    carried = jax.vmap(carry)(before, data, jnp.concatenate([jnp.zeros((1, UNITS)), q[:-1]]))
    _, pull = jax.vjp(
        lambda theta: jax.vmap(system.transition, (None, 0, 0))(theta, before, data), params.recurrent
    )
    return q, ravel_pytree(pull(q - carried)[0])[0]


@jax.jit
def with_old_states(moved):
    """∇θ of the penalty where only the end of each block has moved, not the state it began with."""

    def one_block(params, start, free, inputs):
        row = jax.tree.map(lambda leaf: leaf[None], (free, inputs))
        options = {"block_length": 1, "penalty": 1.0, "loss_on": "free"}
        return targets.objective(system, params, start, *row, **options)[0]

    def total(params):
        return jnp.sum(jax.vmap(one_block, (None, 0, 0, 0))(params, before, moved, data))

    return ravel_pytree(jax.grad(total)(params).recurrent)[0]


@jax.jit
def all_at_once(rate):
    """What the estimator returns: one step on H, then ∇θ; λ = 1."""
    estimator = jtrunc.target_propagation(
        system, 1, 1.0, "penalty", hidden_optimizer=optax.sgd(rate), loss_on="free"
    )
    return ravel_pytree(estimator.update(params, estimator.init(params, hidden), data)[0].grads.recurrent)[0]


q, leading = map(np.asarray, by_formulas())
cut_at_steps = gradient(jtrunc.truncated_bptt(system, 1))
print(f"∇θ L / ηλ, relative deviation from\n{'':<8}{'truncated_bptt(1)':>36}{'errata 24':>16}")
print(f"{'η':<8}{'old states in F':>18}{'all at once':>18}{'all at once':>16}")
for rate in (1e-1, 1e-2, 1e-3):
    old, new = np.asarray(with_old_states(states - rate * q)) / rate, np.asarray(all_at_once(rate)) / rate
    errors = deviation(old, cut_at_steps), deviation(new, cut_at_steps), deviation(new, leading)
    print(f"{rate:<8}{errors[0]:>18.1e}{errors[1]:>18.2f}{errors[2]:>16.1e}")
print(f"truncated_bptt(1) itself, from BPTT: {deviation(cut_at_steps, bptt):.2f}")

# %% [markdown]
# The first column is the identity, exact; the second stays wrong however small the step; the last falls with
# $\eta$. So a single step on $H$ is *not* "essentially equivalent to BPTT", and the scale $\eta\lambda$ of
# its gradient matters to every optimiser that is not invariant to it.
#
# ## A penalty without steps
#
# Table 2 of the paper compares no steps on $H$ at $\lambda > 0$ and at $\lambda = 0$: perplexities 2.76
# apart. From the true states of the present $\theta$ that cannot be: $r = 0$, and the penalty has no gradient
# (errata 26). It makes a difference only where $H$ was left behind by a $\theta$ that moved on. `initial=`
# says where $H$ begins: "forward", "persistent" (where the last visit left it) or "predicted" (the $\hat h$
# of the last visit). The last of five updates while $\theta$ moves along BPTT's gradient:

# %%
NUM_MOVES, MOVE = 5, 4e-4


@jax.jit
def moves(params):
    """θ of each update, in rows."""
    estimator = jtrunc.bptt(system)
    grads = estimator.update(params, estimator.init(params, hidden), data)[0].grads
    return jax.vmap(lambda distance: jax.tree.map(lambda leaf, grad: leaf - distance * grad, params, grads))(
        MOVE * jnp.arange(NUM_MOVES)
    )


path = moves(params)


@jax.jit(static_argnames="initial")
def last_of_five(penalty, initial):
    estimator = propagation("penalty", 0, penalty, initial=initial)

    def update(state, params):
        estimate, state = estimator.update(params, state, data)
        return state, (ravel_pytree(estimate.grads.recurrent)[0], estimate.aux.diagnostics["primal_residual"])

    results = jax.lax.scan(update, estimator.init(params, hidden), path)[1]
    return jax.tree.map(lambda leaf: leaf[-1], results)


here = jax.tree.map(lambda leaf: np.asarray(leaf)[-1], path)
cut_here = gradient(jtrunc.truncated_bptt(system, B), here)
print(f"{'H begins':<14}{'‖r‖':>10}{'λ = 0':>14}{'λ = 1':>10}   deviation from truncated_bptt({B})")
for initial in ("forward", "persistent", "predicted"):
    (without, residual), (with_penalty, _) = (last_of_five(penalty, initial) for penalty in (0.0, 1.0))
    errors = [deviation(np.asarray(found), cut_here) for found in (without, with_penalty)]
    print(f"{initial:<14}{residual:>10.1e}{errors[0]:>14.1e}{errors[1]:>10.1e}")

# %% [markdown]
# "forward" is truncated BPTT, whatever λ. States that are left where they were fall behind. "predicted" ones
# follow at one block an update, and are nearer to the truth; there is still something for λ to act on.
#
# ## Does it learn?
#
# The whole text in every update (the paper's batch mode), Adam on θ at 0.01 for all, 3 seeds. Truncated BPTT
# at 4 steps does not see what there is to count. Does target propagation, through its free states?

# %%
NUM_UPDATES, EVERY, NUM_SEEDS = (40, 20, 2) if SMALL else (600, 20, 3)
RATE = 0.02  # on H
contestants = {
    "BPTT": jtrunc.bptt(system),
    f"cut every {B}": jtrunc.truncated_bptt(system, B),
    "ADMM, 5 steps on H": propagation("admm", 5, rate=RATE, initial="predicted"),
    "penalty, 5 steps on H": propagation("penalty", 5, rate=RATE),
}
runs = {
    name: training.train(
        system, lambda key: model.init(key, jnp.float64), hidden, estimator, optax.adam(0.01), data, window=T,
        num_updates=NUM_UPDATES, log_every=EVERY, eval_every=EVERY, key=jax.random.key(1), seeds=NUM_SEEDS,
        eval_data={"data": data, "new": new_data},
    )
    for name, estimator in contestants.items()
}  # fmt: skip

# %%
entropy = counting.entropy_rate_bits(1, LONGEST)
print(f"bits a character, by seed; entropy rate {entropy:.3f}, without counting")
print(f"{counting.independent_entropy_rate_bits(1, LONGEST):.3f}. Own: Σℓ on the free states")
print(f"{'':<30}{'own, last line':<22}{'training text':<22}new text")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for color, (name, run) in zip(("k", "C7", "C0", "C3"), runs.items(), strict=True):
    own = run.history["loss"] / np.log(2)
    true, new = (run.evaluations[split]["bits"] for split in ("data", "new"))
    columns = (", ".join(f"{bits:.2f}" for bits in found[-1]) for found in (own, true, new))
    print(f"{name:<30}" + "".join(f"{column:<22}" for column in columns).rstrip())
    left.semilogy(run.history["update"], np.median(own, axis=1), color=color, label=name)
    right.semilogy(run.evaluations["data"]["update"], true, color=color, linewidth=0.7, alpha=0.5)
    right.semilogy(run.evaluations["data"]["update"], np.median(true, axis=1), color=color, linewidth=1.8)
left.set(xlabel="updates", ylabel="bits a character", title="what it minimises: free states")
right.set(xlabel="updates", title="the network alone, training text")
left.legend(fontsize="small")
plt.show()

# %% [markdown]
# On its own terms ADMM does as well as BPTT, and the multipliers do carry something across the blocks: for a
# while the network itself is well below what cutting at the blocks can reach. But it does not stay there. A
# step on $\theta$ moves all states, while $H$ and $y$ are those of an earlier $\theta$, and errors add up
# when the network runs alone: one seed of three ends near the entropy rate, on new text too, the other two
# worse than truncated BPTT. The penalty alone shows why: its free states simply tell each block what comes (a
# hundredth of a bit a character), and the network alone is worse than one that does not count. This is the
# paper's own explanation: states that are too free (section 4.3).
#
# ## What it is good for: time
#
# One stream, $T = 960$ steps, a tanh network. An update of the augmented Lagrangian (one pass: gradient, a
# step on $H$, a step on $y$) against `jax.grad` through a plain `jax.lax.scan`, with $T/B$ blocks side by
# side. A product of a weight with one row reads the whole weight for two operations an entry; with $N$ rows
# it does $N$ times as much for the same reading.

# %%
NUM_STEPS, FEATURES, CLASSES = 960, 16, 16
WIDTHS, COUNTS = ((20,), (1, 20)) if SMALL else ((20, 256), (1, 2, 4, 8, 20, 64))


def milliseconds(run, *arguments):
    """The fastest of some calls."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(3 if SMALL else 30):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def through_scan(system):
    def total_loss(params, hidden, inputs):
        def step(hidden, x):
            hidden = system.transition(params.recurrent, hidden, x)
            return hidden, system.loss(params, hidden, x)[0]

        return jnp.sum(jax.lax.scan(step, hidden, inputs)[1])

    return jax.jit(jax.value_and_grad(total_loss))


def first_update(estimator, weights, hidden, inputs):
    """The compiled update, and the state after a first one: blocks are then visited."""
    update = jax.jit(estimator.update)
    return update, update(weights, estimator.init(weights, hidden), inputs)[1]


figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for color, width in zip(("C0", "C1"), WIDTHS, strict=False):
    tanh = cells.model(cells.tanh(FEATURES, width), CLASSES, cells.softmax_cross_entropy)
    weights, at_rest = tanh.init(jax.random.key(0)), tanh.initial_hidden((1,))
    x = jax.random.normal(jax.random.key(1), (NUM_STEPS, 1, FEATURES), jnp.float32)
    inputs = (x, jax.random.randint(jax.random.key(2), (NUM_STEPS, 1), 0, CLASSES))
    plain = milliseconds(through_scan(tanh.system), weights, at_rest, inputs)
    update, state = first_update(jtrunc.bptt(tanh.system), weights, at_rest, inputs)
    sequential = milliseconds(update, weights, state, inputs)
    measured = []
    for count in COUNTS:
        estimator = jtrunc.target_propagation(
            tanh.system, NUM_STEPS // count, 1.0, "augmented_lagrangian",
            initial="persistent", num_blocks=count,
        )  # fmt: skip
        update, state = first_update(estimator, weights, at_rest, inputs)
        measured.append(milliseconds(update, weights, state, inputs))
    axis.plot(COUNTS, np.array(measured) / plain, "o-", color=color, label=f"n = {width}")
    axis.axhline(sequential / plain, color=color, linewidth=1, linestyle=":", label="jtrunc.bptt")
    listed = ", ".join(f"{count}: {found:.2f}" for count, found in zip(COUNTS, measured, strict=True))
    print(
        f"n = {width}: plain scan {plain:.2f} ms, bptt {sequential:.2f} ms; by number of blocks {listed} ms"
    )
axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
axis.set(xlabel="blocks T/B", ylabel="time / plain scan", xscale="log", ylim=(0, 1.4))
axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
axis.minorticks_off()
axis.legend(ncols=2, loc="upper center")
plt.show()

# %% [markdown]
# Part of it is not the blocks' merit: `jtrunc.bptt` (dotted), as sequential as the plain scan, is faster too,
# because it leaves the gradients of the weights to one product at the end. And both need few streams:
# `benchmarks/speed/target_blocks.py`, on one core, shows where the gain ends, where the streams alone fill
# the products. At n = 256 and 20 blocks an update takes 0.36 of the plain scan's time with one stream,
# 0.48 with 4, 0.88 with 16, and more than the plain scan's with 64. ADMM needs a pass more. Fewer
# steps in sequence are what one buys: that pays on machines with room for more rows, or with blocks on
# several devices.
#
# ## What held
#
# * The mathematics: the multipliers are BPTT's costates in the limit, and the gradient is then exact.
# * Blocks in parallel: two to five times as fast as the plain scan on one core, with one stream.
# * Not the equivalence with BPTT after one step (errata 24), nor a penalty that acts without one (errata 26).
# * Not the learning: erratic, now nearly as good as BPTT, now worse than truncated BPTT; the paper found no
#   gain either. Where the sequence fits take `bptt`, where it does not `truncated_bptt` or `artbp`. From
#   "forward" states without steps `target_propagation` *is* truncated BPTT: a safe point to start from.
