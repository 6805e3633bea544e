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
# # 02 · ARTBP: truncation without bias
#
# Truncated BPTT cuts every $L$ steps. *Anticipated reweighted truncated backpropagation* (ARTBP) cuts at
# random: the boundary between steps $t$ and $t+1$ with probability $c_t$. What crosses a boundary that
# could have been cut but was not is multiplied by $1/(1-c_t)$:
#
# $$\lambda_t = \frac{\partial\ell_t}{\partial h_t} + w_{t+1}
# \left(\frac{\partial h_{t+1}}{\partial h_t}\right)^{\!\top} \lambda_{t+1}, \qquad
# w_{t+1} = \begin{cases} 0 & \text{with probability } c_t \\ 1/(1-c_t) & \text{otherwise,} \end{cases}
# \qquad \mathbb E\,w = 1.$$
#
# All $w = 1$ is BPTT, so the expectation of the estimate is the exact gradient, whatever the $c_t$ are;
# they may depend on the cuts so far and on the hidden state. The bias of truncation becomes variance, and
# the choice of $c_t$ says how much. (Tallec and Ollivier, "Unbiasing truncated backpropagation through
# time", 2017, eq. 10–14.)

# %%
import itertools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jtrunc
from jtrunc import cells, optimizers, training, truncation
from jtrunc.tasks import influence_balancing as balancing

SMALL = bool(os.environ.get("JTRUNC_SMALL"))  # the tests run every cell, on fewer draws and steps
jax.config.update("jax_enable_x64", True)  # for the exact comparison below
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Cut patterns
#
# As in notebook 01: a system that adds up a parameter $\theta_s$ of its own for each step, so that row $t$,
# column $s$ shows the weight with which the loss at $t$ reaches step $s$; exactly, all are 1 for $s \le t$.
# Three draws, and the mean of many.

# %%
STEPS = 24
adder = jtrunc.System(
    transition=lambda theta, hidden, inputs: hidden + theta[inputs[0]],
    loss=lambda params, hidden, inputs: (inputs[1] * hidden, ()),
)
estimator = jtrunc.artbp(adder, truncation.polynomial(mean_length=6, alpha=6))


def reach(key):
    def row(scored):
        params = jtrunc.Params(jnp.zeros(STEPS))
        state = estimator.init(params, jnp.zeros(()), key)  # the same key: the same cuts for all rows
        return estimator.update(params, state, (jnp.arange(STEPS), scored))[0].grads.recurrent

    return jax.vmap(row)(jnp.eye(STEPS))


keys = jax.random.split(jax.random.key(0), 20_000)
patterns = jax.jit(jax.vmap(reach))(keys)
for lag in (0, 6, 12, 23):
    weights = np.diagonal(patterns, -lag, axis1=1, axis2=2).mean(axis=1)
    print(f"lag {lag:>2}: mean weight {weights.mean():.3f} ± {weights.std() / np.sqrt(len(keys)):.3f}")
figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
titles = ("one draw", "another", "a third", f"mean of {len(keys):,}")
for axis, weights, title in zip(axes, (*patterns[:3], patterns.mean(axis=0)), titles, strict=True):
    image = axis.imshow(weights, cmap="viridis", vmin=0, vmax=4)
    axis.set(title=title, xlabel="step s of the action")
    axis.grid(False)
axes[0].set_ylabel("step t of the loss")
figure.colorbar(image, ax=axes, label="weight", shrink=0.8, extend="max")
plt.show()

# %% [markdown]
# Within a window the weight grows with the lag, because long lags survive more rarely: a lag of $i$ steps
# carries the reciprocal of its chance to survive.
#
# ## Laws
#
# A constant $c = 1/L_0$ makes window lengths geometric, and the weights grow exponentially. The paper's law
# (eq. 14),
#
# $$c_t = \frac{\alpha - 1}{(\alpha - 2)\,L_0 + \delta t}, \qquad
# \delta t = \text{steps since the last cut},$$
#
# has the mean length $L_0$ too, but a polynomial tail, $P(L) \sim L^{-\alpha}$, and the weights grow only
# like $L^{\alpha-1}$.

# %%
MEAN_LENGTH, FAR = 20, 200_000
laws = {
    "constant c = 1/L₀": truncation.constant(1 / MEAN_LENGTH),
    "eq. 14, α = 3": truncation.polynomial(MEAN_LENGTH, 3),
    "eq. 14, α = 6": truncation.polynomial(MEAN_LENGTH, 6),
}
steps = np.arange(1, FAR + 1)
survival = {name: np.asarray(truncation.survival(law, FAR)) for name, law in laws.items()}

# The lengths that the online estimator really takes, on a system that does nothing.
idle = jtrunc.System(lambda theta, hidden, x: hidden, lambda params, hidden, x: (hidden, ()))


def sampled_lengths(law, look_ahead, num_windows):
    estimator = jtrunc.online_artbp(idle, law)
    params, inputs = jtrunc.Params(jnp.zeros(())), jnp.zeros(look_ahead)

    def window(state, _):
        estimate, state = estimator.update(params, state, inputs)
        return state, (estimate.num_steps, estimate.aux.diagnostics["look_ahead_hits"])

    state = estimator.init(params, jnp.zeros(()), jax.random.key(1))
    return jax.jit(lambda state: jax.lax.scan(window, state, length=num_windows)[1])(state)


num_windows = 20_000 if SMALL else 100_000
lengths = {name: np.asarray(sampled_lengths(law, 2_048, num_windows)[0]) for name, law in laws.items()}
print(f"{'law':<20}{'mean length':>14}{'sampled':>18}{'one window in 1000 exceeds':>30}")
for name, alive in survival.items():
    drawn = lengths[name]
    sampled = f"{drawn.mean():.2f} ± {drawn.std() / np.sqrt(num_windows):.2f}"
    print(f"{name:<20}{1 + alive.sum():>14.3f}{sampled:>18}{np.argmax(alive < 1e-3) + 1:>30}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
places = np.unique(np.geomspace(1, 1_000, 25).astype(int))
for color, (name, alive) in zip(("C0", "C1", "C2"), survival.items(), strict=True):
    left.plot(steps[:200], truncation.probabilities(laws[name], 200), color=color, label=name)
    middle.loglog(steps, alive, color=color)
    longer = np.array([np.sum(lengths[name] > place) for place in places])
    middle.loglog(places[longer >= 10], longer[longer >= 10] / num_windows, ".", color=color)
    right.semilogy(steps[:300], 1 / alive[:300], color=color)
left.set(xlabel="steps since the last cut, δt", ylabel="probability of a cut, c", title="the law")
middle.set(
    xlabel="window length L (steps)", ylabel="share of longer windows", xlim=(1, 1_000), ylim=(1e-5, 2)
)
middle.set_title("survival: exact, and sampled (dots)")
right.set(xlabel="lag i since a cut (steps)", ylabel="weight if it survives", title="1 / survival")
left.legend(fontsize="small")
plt.show()

# %% [markdown]
# (Dots that stand for fewer than ten windows are left out.) A lag's second moment is its square times the
# reciprocal survival. With a Jacobian of norm $\rho < 1$ it
# stays bounded under eq. 14 for any $L_0$, since $\rho^{2i}\,i^{\alpha-1} \to 0$; under a constant $c$ only
# if $c < 1 - \rho^2$.
#
# ## Exactly unbiased
#
# For a short sequence all cut patterns can be listed. Eight steps of a tanh network have $2^7$; weigh each
# pattern's gradient with its probability and add. `truncation.given` takes cuts drawn elsewhere. The third
# law looks at the hidden state.

# %%
T = 8
cell = cells.tanh(2, 3)
model = cells.model(cell, 1, lambda prediction, target: 0.5 * jnp.sum((prediction - target) ** 2))
params = model.init(jax.random.key(2), jnp.float64)
x_key, target_key = jax.random.split(jax.random.key(3))
data = jax.random.normal(x_key, (T, 2)), jax.random.normal(target_key, (T, 1))
hidden = model.initial_hidden(dtype=jnp.float64)
watched = model.system._replace(loss=lambda params, hidden, inputs: (jnp.zeros(()), hidden))
_, (_, states) = jtrunc.unroll(watched, params, hidden, data)

small_laws = {
    "constant c = 0.3": truncation.constant(0.3),
    "eq. 14, L₀ = 3, α = 4": truncation.polynomial(3, 4),
    "c from the state": truncation.from_probability(lambda elapsed, h: 0.1 + 0.6 * h[0] ** 2),
}
cuts = np.array([(*pattern, 0) for pattern in itertools.product((0, 1), repeat=T - 1)])


def pattern_probabilities(law):
    """c at each boundary of each pattern, (128, 8), and the probability of each pattern, (128,)."""
    c, elapsed = np.zeros(cuts.shape), np.zeros(len(cuts), int)
    for t in range(T - 1):
        elapsed += 1
        c[:, t] = [law.probability(truncation.Boundary(t, count, states[t])) for count in elapsed]
        elapsed[cuts[:, t] == 1] = 0
    return c, np.prod(np.where(cuts == 1, c, 1 - c), axis=1)


# %%
@jax.jit
def gradient(cuts, c):
    estimator = jtrunc.artbp(model.system, truncation.given(cuts, c))
    estimate, _ = estimator.update(params, estimator.init(params, hidden), data)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(estimate.grads)])


all_gradients = jax.jit(jax.vmap(gradient))
uncompensated = np.asarray(all_gradients(jnp.asarray(cuts), jnp.zeros(cuts.shape)))
exact = uncompensated[np.flatnonzero(cuts.sum(axis=1) == 0)[0]]  # no cut, no weight: plain BPTT
every_third = np.flatnonzero((cuts == (np.arange(1, T + 1) % 3 == 0)).all(axis=1))[0]


def deviation(value):
    return np.linalg.norm(value - exact) / np.linalg.norm(exact)


print(f"relative deviation from BPTT over {len(exact)} parameters")
print(f"{'truncated every 3 steps':<34}{deviation(uncompensated[every_third]):>12.1e}")
estimates = {}
for name, law in small_laws.items():
    c, probability = pattern_probabilities(law)
    estimates[name] = np.asarray(all_gradients(jnp.asarray(cuts), jnp.asarray(c))), probability
    print(f"{name + ', not reweighted':<34}{deviation(probability @ uncompensated):>12.1e}")
    print(f"{name + ', ARTBP':<34}{deviation(probability @ estimates[name][0]):>12.1e}")

# %% [markdown]
# Random cuts alone do not help: they are as biased as regular ones. The factors do it, to rounding. Each
# dot below is one of the 128 possible estimates of one component.

# %%
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
values, probability = estimates["eq. 14, L₀ = 3, α = 4"]
component = int(np.argmax(np.abs(exact - uncompensated[every_third])))
axis.plot(values[:, component], probability, ".", color="C0", label="an estimate of ARTBP")
axis.axvline(exact[component], color="k", label="BPTT")
mean = probability @ values[:, component]
axis.axvline(mean, color="C1", linestyle="--", linewidth=2, label="mean of ARTBP")
axis.axvline(
    uncompensated[every_third, component], color="C3", linestyle=":", label="truncated, every 3 steps"
)
axis.set(xlabel=f"gradient, component {component}", ylabel="probability of the cut pattern")
axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %% [markdown]
# ## What unbiasedness costs
#
# A leaky network that must follow a running mean of its input, 300 steps. The relative standard deviation
# $\sqrt{\mathbb E\|\hat g - g\|^2}/\|g\|$ of ARTBP for several laws, beside the relative bias of truncated
# BPTT with the same mean length. $L_0$ and $\alpha$ are data here: one compiled program for the whole
# plane.

# %%
T = 300
signal = jax.random.normal(jax.random.key(4), (T, 4))
_, target = jax.lax.scan(lambda m, x: (m + (x - m) / 20,) * 2, jnp.zeros(()), signal[:, 0])
follower = cells.model(cells.leaky(4, 16, 0.2), 1, lambda y, target: 0.5 * jnp.sum((y - target) ** 2))
params, hidden = follower.init(jax.random.key(5), jnp.float64), follower.initial_hidden(dtype=jnp.float64)
data = (signal, 3.0 * target[:, None])


def recurrent_gradient(law, key=None):
    estimator = jtrunc.artbp(follower.system, law)
    estimate, _ = estimator.update(params, estimator.init(params, hidden, key), data)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(estimate.grads.recurrent)])


def spread(law, keys):
    draws = jax.lax.map(lambda key: recurrent_gradient(law, key), keys)
    return jnp.sqrt(jnp.mean(jnp.sum((draws - reference) ** 2, axis=1))) / jnp.linalg.norm(reference)


spread_polynomial = jax.jit(lambda n, alpha, keys: spread(truncation.polynomial(n, alpha), keys))
spread_constant = jax.jit(lambda c, keys: spread(truncation.constant(c), keys))


@jax.jit
def truncated(cuts):
    return recurrent_gradient(truncation.given(cuts, jnp.zeros(T)))


reference = truncated(jnp.zeros(T))
mean_lengths = np.array([5.0, 10.0, 20.0, 40.0, 80.0])
keys = jax.random.split(jax.random.key(6), 100 if SMALL else 2_000)
deviations = {f"α = {a}": [spread_polynomial(n, float(a), keys) for n in mean_lengths] for a in (3, 4, 6, 12)}
deviations["constant c"] = [spread_constant(1 / n, keys) for n in mean_lengths]
cuts_every = [jnp.asarray(np.arange(1, T + 1) % n == 0) for n in mean_lengths]
bias = np.array(
    [jnp.linalg.norm(truncated(cuts) - reference) / jnp.linalg.norm(reference) for cuts in cuts_every]
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for name, values in deviations.items():
    left.loglog(mean_lengths, values, marker="o", markersize=4, label=f"ARTBP, {name}")
left.loglog(mean_lengths, bias, "k--", marker="s", markersize=4, label="bias of truncated BPTT")
left.set(xlabel="mean length L₀, or L (steps)", ylabel=f"relative error of one estimate ({T} steps)")
left.set_xticks(mean_lengths, [f"{n:.0f}" for n in mean_lengths])
left.set_xticks([], minor=True)
left.set_yticks([0.05, 0.1, 0.2, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.5", "1"])
left.set_yticks([], minor=True)
left.legend(fontsize="small")
num_averaged = np.geomspace(1, 1e4, 50)
for color, i in (("C0", 1), ("C1", 2), ("C2", 3)):
    n = mean_lengths[i]
    one_window = float(deviations["α = 6"][i]) * np.sqrt(T / n)  # an estimate adds up T / L₀ windows
    right.loglog(num_averaged, one_window / np.sqrt(num_averaged), color=color, label=f"ARTBP, L₀ = {n:.0f}")
    right.axhline(bias[i], color=color, linestyle="--", linewidth=1, label=f"truncated, L = {n:.0f}")
    print(f"L = {n:.0f}: noise equals bias after about {(one_window / bias[i]) ** 2:.0f} windows")
right.set(xlabel="windows averaged", ylabel="relative error of the mean", title="α = 6")
right.legend(fontsize="small", loc="lower left")
plt.show()

# %% [markdown]
# In a single window the noise of ARTBP is larger than the bias of truncated BPTT. But descent with
# small steps averages over many windows: the noise fades, the bias stays. How many it takes depends on how
# much long lags matter; here, where the target asks for 20 steps and more, it is few. Longer windows help
# both, and for short ones the heavy tails (small α) pay: they leave the weights small.
#
# ## Online, with a look-ahead
#
# `artbp` needs the whole sequence. On a stream, `online_artbp` draws one window per update, runs forward
# and backward over just that window, and goes on behind it. It is given a look-ahead of $N$ steps, the
# memory there is. A window that is still uncut after $N$ steps ends there without compensation: a bias,
# counted in `aux.diagnostics["look_ahead_hits"]`. How often it happens is the law's survival $G(N)$, so
# choose $N$ by it.

# %%
law = truncation.polynomial(mean_length=16, alpha=6)
alive = np.asarray(truncation.survival(law, 4096))
look_aheads = (8, 16, 32, 64, 96)
hits = [float(np.mean(sampled_lengths(law, n, num_windows)[1])) for n in look_aheads]
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axis.loglog(np.arange(1, 4097), alive, label="survival G(N)")
axis.loglog(look_aheads, hits, "o", markersize=5, label=f"share of {num_windows:,} windows that hit")
axis.set(
    xlabel="look-ahead N (steps)", ylabel="windows that reach it", title="L₀ = 16, α = 6", ylim=(1e-9, 2)
)
axis.legend()
plt.show()
for rate in (1e-3, 1e-6):
    print(f"one window in {1 / rate:,.0f} reaches a look-ahead of {np.argmax(alive < rate) + 1} steps")

# %% [markdown]
# ## Convergence where truncation diverges
#
# Influence balancing, as in notebook 01: a parameter that helps at short lags and harms more at long ones.
# Truncated BPTT with L = 10 follows the wrong sign. ARTBP's windows are hardly longer, 16 steps on average,
# and right on average. `training.train` with `seeds` runs all seeds in one program.

# %%
task, look_ahead = balancing.build(), 1024
num_steps, seeds = (100_000, 2) if SMALL else (1_000_000, 5)
schedule = optimizers.inverse_square_root(3e-4)
optimizer = optax.chain(optimizers.scale_by_timestep_schedule(schedule), optax.scale(-1.0))
runs = {}
for name, estimator, window, mean_length in (
    ("truncated BPTT, L = 10", jtrunc.truncated_bptt(task.system, 10), 10, 10),
    ("ARTBP, L₀ = 16, α = 6", jtrunc.online_artbp(task.system, law), look_ahead, 16),
):
    runs[name] = training.train(
        task.system,
        task.params,
        task.hidden,
        estimator,
        optimizer,
        balancing.inputs(look_ahead),
        window=window,
        num_updates=num_steps // mean_length,
        seeds=seeds,
    )
    print(f"{name}: final θ =", ", ".join(f"{theta:.4g}" for theta in runs[name].params.recurrent))
print(f"optimum: θ* = {balancing.optimum():.4g}")

figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for color, (name, run) in zip(("C3", "C0"), runs.items(), strict=True):
    history = run.history
    time = history["timestep"].reshape(len(history["update"]), -1)  # truncated: one clock for all seeds
    total = np.cumsum(history["loss"] * history["num_steps"].reshape(time.shape), axis=0)
    thin = np.unique(np.geomspace(1, len(time), 400).astype(int)) - 1
    average = (total / time)[thin]
    time = np.broadcast_to(time[thin], average.shape)
    axis.loglog(time[:, 0], average[:, 0], color=color, linewidth=1, label=name)
    axis.loglog(time[:, 1:], average[:, 1:], color=color, linewidth=1, alpha=0.6)
axis.set(xlabel="time step t", ylabel="average loss over steps 1 … t", ylim=(1e-3, 1e3))
axis.legend()
plt.show()

# %% [markdown]
# ## When to use what
#
# * `bptt` where the sequence fits into memory (`checkpoint="sqrt"` makes it fit sooner). * `truncated_bptt`
# or `windowed_bptt` where lags fade well within the window: least noise for the time. * `online_artbp`
# where long lags matter or nobody knows, on a stream: right on average, with an $L_0$ near the   length
# that memory and speed allow, $\alpha$ between 3 and 6, and a learning rate small enough to average its
# noise. * `artbp` and `jtrunc.scan` inside a given sequence. A cut there saves no memory and no time: they
# are for   studies, and for gradients that explode along a long simulation.
