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

# %% [markdown]
# # 01 · What truncation does to a gradient
#
# A parameter acts at every step, and each action is felt by all later losses. Sorted by the number of steps
# between an action and the loss that feels it, the **lag** $i$, the gradient is
#
# $$\frac{\partial\mathcal L}{\partial\theta} = \sum_{i \ge 0} G_i, \qquad
# G_i = \sum_t \frac{\partial\ell_t}{\partial h_t}\,
# \underbrace{\frac{\partial h_t}{\partial h_{t-1}} \cdots \frac{\partial h_{t-i+1}}{\partial h_{t-i}}}_{i
# \text{ factors}}\, \frac{\partial F}{\partial\theta}(x_{t-i}, h_{t-i-1}).$$
#
# Truncation drops or thins out the long lags. What remains is not a noisy version of the gradient but another
# vector: it is *biased*, and its bias does not average out. This notebook looks at which lags survive, at a
# system where the bias turns the gradient round, and at random networks.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jtrunc
from jtrunc import cells, optimizers, training, truncation
from jtrunc.tasks import influence_balancing as balancing

plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Who gets the gradient
#
# A system that makes the flow visible: it adds up $\theta_s$, a parameter of its own for each step $s$, and
# its loss at step $t$ is the sum so far, or 0. So $\partial\ell_t/\partial\theta_s = 1$ for all $s \le t$,
# and whatever an estimator returns instead is the weight with which it lets the loss at $t$ reach the
# action at $s$. `windowed_bptt(K₁, K₂)` is the variant whose windows overlap: every $K_2$ steps it looks
# $K_1$ steps back from the last of its $K_2$ losses.

# %%
STEPS, LENGTH, LOOK_BACK, LOSSES = 96, 8, 11, 4
adder = jtrunc.System(
    transition=lambda theta, hidden, inputs: hidden + theta[inputs[0]],
    loss=lambda params, hidden, inputs: (inputs[1] * hidden, ()),
)
zeros = jtrunc.Params(jnp.zeros(STEPS))
window_ends = range(LOSSES, STEPS + 1, LOSSES)


def reach(estimator, windows):
    """Row t, column s: the weight of step s in the gradient of the loss at t."""

    def row(t):
        scored, total = jnp.arange(STEPS) == t, jnp.zeros(STEPS)
        for first, stop in windows:
            inputs = jnp.arange(first, stop), scored[first:stop].astype(float)
            estimate, _ = estimator.update(zeros, estimator.init(zeros, jnp.float32(0.0)), inputs)
            total += estimate.grads.recurrent
        return total

    return np.asarray(jax.lax.map(row, jnp.arange(STEPS)))


flows = {
    "BPTT": reach(jtrunc.bptt(adder), [(0, STEPS)]),
    f"truncated, L = {LENGTH}": reach(jtrunc.truncated_bptt(adder, LENGTH), [(0, STEPS)]),
    f"windowed, K₁ = {LOOK_BACK}, K₂ = {LOSSES}": reach(
        jtrunc.windowed_bptt(adder, LOOK_BACK, LOSSES, average=False),
        [(max(0, stop - LOOK_BACK - 1), stop) for stop in window_ends],
    ),
}

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained", width_ratios=[1, 1, 1, 1.3])
for axis, (name, weights) in zip(axes, flows.items(), strict=False):
    axis.imshow(weights[:24, :24], cmap="Blues", vmin=0, vmax=1.2)
    axis.set(title=name, xlabel="step s of the action")
    axis.grid(False)
    lags = np.arange(31)
    settled = np.arange(48, STEPS)  # far enough from the start
    share = [weights[settled, settled - lag].mean() for lag in lags]
    axes[-1].plot(lags, share, marker="o", markersize=3, label=name)
axes[0].set_ylabel("step t of the loss")
axes[-1].set(xlabel="lag i = t − s (steps)", ylabel="share of the lag that survives")
axes[-1].legend(fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 1.0))
plt.show()

# %% [markdown]
# Truncated BPTT keeps lag $i$ for the losses at positions $j > i$ of a window only, a share $(1 - i/L)_+$:
# even lags far below $L$ are thinned out. Overlapping windows keep all lags up to $K_1 - K_2 + 1$ in full,
# at the cost of running each step $(K_1 + 1)/K_2$ times.
#
# ## A gradient of the wrong sign: influence balancing
#
# The ARTBP paper's example (section 6.1): a row of $p + n$ agents, each passing on half of its state to its
# left neighbour. The $p$ leftmost receive $+\theta$ at every step, the $n$ rightmost $-\theta$; the first
# must come to 1. A drug that helps at once and harms later.
#
# $$s_{t+1} = A\,s_t + \theta\,v, \qquad A_{kk} = A_{k,k+1} = \tfrac12, \qquad
# v = (\underbrace{+1 \dots}_{p = 10}\,\underbrace{-1 \dots}_{n = 13}), \qquad
# \ell_t = \tfrac12 (s^1_t - 1)^2.$$
#
# In the stationary state $s^1 = 2(p-n)\theta$, so $\theta^* = 1/(2(p-n))$. The influence of $\theta$ on
# $s^1$ at lag $i$ is $(A^i v)_1$.

# %%
num_lags = 300
by_lag, total = balancing.influence_by_lag(num_lags), balancing.total_influence()
lengths = np.arange(1, num_lags + 1)
truncated = np.array([balancing.truncated_influence(length) for length in lengths])
turns_truncated = lengths[np.argmax(truncated < 0)]
turns_windowed = int(np.argmax(np.cumsum(by_lag) < 0))
print(f"total influence ∂s¹/∂θ = {total:.0f}, optimum θ* = {balancing.optimum():.4f}")
print(
    f"positive lags 0 to {np.argmax(by_lag <= 0) - 1} sum to {by_lag[by_lag > 0].sum():+.2f}, the rest to "
    f"{by_lag[by_lag < 0].sum():+.2f}"
)
for length in (10, 100, turns_truncated - 1, turns_truncated, 200):
    print(f"Ḡ({length}) = {balancing.truncated_influence(length):+.3f}")

# %% [markdown]
# $\bar G(L) = \sum_{i<L} (1 - i/L)\,(A^i v)_1$ is what windows of $L$ steps believe the total influence to
# be. Its *sign* decides: the stationary truncated gradient is $(s^1 - 1)\,\bar G(L)$, so as long as $\bar
# G(L) > 0$ gradient descent walks away from the optimum, from wherever it starts and however small its
# steps are. The dots are what the library's estimators return, started in the stationary state.

# %%
THETA = -0.5
task = balancing.build(theta=THETA)
stationary = jnp.asarray(balancing.stationary_state(THETA), jnp.float32)
slope = float(stationary[0]) - 1.0  # ∂ℓ/∂s¹


def believed_influence(estimator, num_steps, num_losses):
    state = estimator.init(task.params, stationary)
    estimate, _ = jax.jit(estimator.update)(task.params, state, balancing.inputs(num_steps))
    return float(estimate.grads.recurrent) / (num_losses * slope)


measured_lengths = (10, 50, 100, 150, 200, 300)
measured = [believed_influence(jtrunc.truncated_bptt(task.system, n), n, n) for n in measured_lengths]
measured_windowed = [
    believed_influence(jtrunc.windowed_bptt(task.system, n, 1), n + 1, 1) for n in measured_lengths[:-1]
]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
left.bar(np.arange(60), by_lag[:60], color=np.where(by_lag[:60] > 0, "C0", "C3"))
left.set(xlabel="lag i (steps)", ylabel="influence on s¹ at this lag", title="help first, harm later")
right.plot(lengths, truncated, label="truncated, windows of L steps: Ḡ(L)")
right.plot(measured_lengths, measured, "o", color="C0", markersize=4)
right.plot(lengths - 1, np.cumsum(by_lag), color="C1", label="windowed, look-back of L steps, one loss")
right.plot(measured_lengths[:-1], measured_windowed, "o", color="C1", markersize=4)
right.axhline(0, color="0.4", linewidth=1)
right.axhline(total, color="0.4", linewidth=1, linestyle="--", label="exact")
for crossing, color in ((turns_truncated, "C0"), (turns_windowed, "C1")):
    right.axvline(crossing, color=color, linewidth=1, linestyle=":")
    right.annotate(f"L = {crossing}", (crossing + 4, 1.0), color=color)
right.set(xlabel="L (steps)", ylabel="believed ∂s¹/∂θ", title="right sign only beyond the dotted lines")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# All signals have passed through the row after some 60 steps, yet windows of 100 still get the sign wrong:
# most losses of a window stand too near its beginning. The look-back that overlapping windows need for the
# right sign is several times shorter.
#
# ## Descent with the wrong sign
#
# Online descent on the *sum* over each window, $\eta_t = \eta_0/\sqrt{1+t}$ with $t$ the last step of the
# window. `training.train_step` is one update; any number of them fits in a `lax.scan`.

# %%
num_steps = 1_000_000
schedule = optimizers.inverse_square_root(3e-4)
optimizer = optax.chain(optimizers.scale_by_timestep_schedule(schedule), optax.scale(-1.0))


def descend(length):
    estimator = jtrunc.truncated_bptt(task.system, length)
    window = balancing.inputs(length)

    def update(state, _):
        state, metrics = training.train_step(estimator, optimizer, state, window)
        return state, (state.timestep, metrics.loss, state.params.recurrent)

    state = training.init_state(estimator, optimizer, task.params, task.hidden, jax.random.key(0))
    run = jax.jit(lambda state: jax.lax.scan(update, state, length=num_steps // length)[1])
    return [np.asarray(column, np.float64) for column in run(state)]


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for length in (10, 100, 200):
    time, losses, theta = descend(length)
    thin = np.unique(np.geomspace(1, len(time), 400).astype(int)) - 1
    average = np.cumsum(losses) / time
    left.loglog(time[thin], average[thin], label=f"L = {length}")
    right.semilogx(time[thin], theta[thin], label=f"L = {length}")
    print(
        f"L = {length:>3}: θ from {THETA} to {theta[-1]:.3g} in {time[-1]:,.0f} steps;"
        f" average loss lowest at t = {time[np.argmin(average)]:,.0f}"
    )
left.set(xlabel="time step t", ylabel="average loss over steps 1 … t", ylim=(1e-3, 1e3))
right.axhline(balancing.optimum(), color="0.4", linestyle="--", linewidth=1, label="θ*")
right.set(xlabel="time step t", ylabel="θ", ylim=(-2.0, 0.2))
right.legend(loc="lower left")
plt.show()

# %% [markdown]
# With L = 10 and 100 θ moves away from θ\*, with L = 200 it arrives: as the sign of Ḡ(L) says. That a loss
# falls for a while proves nothing: with L = 100 the average forgets its bad beginning for thousands of
# steps before the drift of θ shows in it.
#
# ## Networks
#
# How fast do the lags fade in a network? Give each step its own copy of θ: one backward pass from one loss
# then yields ∥G_i∥ for all lags at once. Random cells, random inputs, a random linear loss at the last
# step.

# %%
inputs_size, width, look_back, num_streams = 4, 32, 150, 32
networks = {
    "tanh, orthogonal": cells.tanh(inputs_size, width),
    "leaky tanh, rate 0.1": cells.leaky(inputs_size, width, 0.1),
    "LSTM, forget bias 1": cells.lstm(inputs_size, width, 1.0),
    "LSTM, forget bias 2": cells.lstm(inputs_size, width, 2.0),
}


def norms_by_lag(cell, theta, key):
    input_key, loss_key = jax.random.split(key)
    inputs = 0.5 * jax.random.normal(input_key, (look_back, inputs_size))
    direction = jax.random.normal(loss_key, (width,)) / np.sqrt(width)

    def last_loss(copies):
        def step(hidden, xs):
            return cell.transition(xs[0], hidden, xs[1]), ()

        hidden, _ = jax.lax.scan(step, cell.initial_hidden(), (copies, inputs))
        return direction @ cell.output(hidden)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (look_back, *leaf.shape)), theta)
    squares = [jnp.sum(leaf**2, range(1, leaf.ndim)) for leaf in jax.tree.leaves(jax.grad(last_loss)(copies))]
    return jnp.sqrt(sum(squares))[::-1]


keys = jax.random.split(jax.random.key(0), num_streams)
thetas = {name: cell.init(jax.random.key(2)) for name, cell in networks.items()}
norms = {}
for name, cell in networks.items():
    drawn = jax.jit(jax.vmap(norms_by_lag, (None, None, 0)), static_argnums=0)(cell, thetas[name], keys)
    norms[name] = np.asarray(drawn).mean(axis=0)[: look_back - 30]  # the last lags reach the empty start

# %% [markdown]
# And what does that do to the gradient of a task? The target is a running mean of the first input over
# about 30 steps. Below, the relative error ∥ĝ − g∥ / ∥g∥ of truncated BPTT at initial parameters, over a
# long stretch of the stream, so that it is the bias that shows. A cut is a number: `truncation.given` with
# c = 0 takes the cuts as data, so one compiled program serves all lengths L (this is `truncated_bptt`,
# without its small memory).

# %%
stretch = 600
signal = jax.random.normal(jax.random.key(1), (stretch, 16, inputs_size))


def running_mean(mean, x):
    mean = mean + (x - mean) / 30
    return mean, mean


_, targets = jax.lax.scan(running_mean, jnp.zeros(16), signal[..., 0])
data = (0.5 * signal, 3.0 * targets[..., None])


def squared_error(prediction, target):
    return 0.5 * jnp.mean((prediction - target) ** 2)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


window_lengths = (1, 2, 4, 8, 16, 32, 64, 128)
errors = {}
for name, cell in networks.items():
    model = cells.model(cell, 1, squared_error)
    readout = {"kernel": jnp.ones((width, 1)) / np.sqrt(width), "bias": jnp.zeros(1)}
    params, hidden = jtrunc.Params(thetas[name], readout), model.initial_hidden((16,))

    @jax.jit
    def gradient(cuts, model=model, params=params, hidden=hidden):
        estimator = jtrunc.artbp(model.system, truncation.given(cuts, jnp.zeros(stretch)))
        estimate, _ = estimator.update(params, estimator.init(params, hidden), data)
        return estimate.grads.recurrent

    steps = np.arange(1, stretch + 1)
    exact = flat(gradient(jnp.zeros(stretch)))
    estimates = [flat(gradient(jnp.asarray(steps % length == 0))) for length in window_lengths]
    errors[name] = [np.linalg.norm(guess - exact) / np.linalg.norm(exact) for guess in estimates]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for (name, norm), marker in zip(norms.items(), "osD^", strict=True):
    left.semilogy(norm / norm[0], label=name)
    right.loglog(window_lengths, errors[name], marker=marker, markersize=4, label=name)
    decay = np.exp(np.polyfit(np.arange(20, 60), np.log(norm[20:60]), 1)[0])
    print(
        f"{name:<22} lags 20 to 60: × {decay:.3f} a step;"
        f" relative bias at L = 16: {errors[name][window_lengths.index(16)]:.2f}"
    )
left.set(xlabel="lag i (steps)", ylabel="∥G_i∥ / ∥G_0∥", ylim=(1e-6, 3), title="what a lag weighs")
right.set(
    xlabel="window length L (steps)", ylabel="relative bias of the gradient", title="what truncation loses"
)
right.set_xticks(window_lengths, [str(length) for length in window_lengths], minor=False)
left.legend(fontsize="small")
plt.show()

# %% [markdown]
# Where lags fade fast, short windows do; where a cell is made to remember, the same windows lose most of
# the gradient (this draw of an LSTM with forget bias 2, the ARTBP paper's, does not forget at all at
# first). Past the memory of a network the bias falls only like $1/L$, because of the thinned-out lags $(1 -
# i/L)$. And what a gradient does not see it cannot strengthen: a network that has not yet learned to
# remember shows short lags, so a fast decay is no proof that the task has no long dependency.
#
# A bias cannot be averaged away, a variance can. Notebook 02: how random cuts turn the one into the other.
