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
# # 04 · Adaptive truncation
#
# How long must a window of backpropagation be? Too short, and the gradient leaves out what the network would
# have to learn; too long, and memory and time are spent on lags that add nothing. Aicher, Foti and Fox
# ("Adaptively truncating backpropagation through time to control gradient bias", 2019; its equation numbers
# are used below) turn the question round: **choose the bias that you tolerate, and measure how long a window
# it takes.** The measurement is how fast the loss's gradient fades on its way back,
#
# $$\phi_k = \Bigl\|\frac{\partial\ell_s}{\partial h_{s-k}}\Bigr\|, \qquad k = 0 \dots R.$$
#
# The same numbers also say how random truncation (notebook 02) should place its cuts.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jtrunc
from jtrunc import cells, diagnostics, optimizers, training, truncation
from jtrunc.tasks import copying

SMALL = bool(os.environ.get("JTRUNC_SMALL"))  # the tests run every cell, on fewer steps and draws
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## A network that has learned to copy
#
# The copy task: read 10 symbols out of 6, then write them, and so on. Half of the targets are symbols that
# were read 10 steps ago, and no nearer step says which: a loss reaches what it needs at lag 10, and there
# alone. Perplexity is 1 at best, and $\sqrt 6 = 2.45$ for who knows the phase but not the symbols.
#
# An LSTM of 50 units, 32 streams side by side, trained by BPTT(30, 15): each window of 31 states scores its
# last 15 losses. Gradients are means over a window's losses, and the steps are $\sqrt K$ times as long for
# windows of $K$ losses (section 4.1), here on top of Adam.

# %%
MEMORY = 10
NUM_STEPS, STREAMS = (2_400, 8) if SMALL else (60_000, 32)
classes = copying.num_classes()
model = cells.model(cells.lstm(classes, 50), classes, cells.softmax_cross_entropy)
system, hidden = model.system, model.initial_hidden((STREAMS,))
untrained = model.init(jax.random.key(2))


def steps(rows, first, last):
    return jax.tree.map(lambda leaf: leaf[first:last], rows)


streams = copying.sequences(jax.random.key(0), 20_600, STREAMS, length=MEMORY)
data, new_data = steps(streams, 0, 20_000), steps(streams, 20_000, 20_600)


def train(estimator, window, num_updates, length=None, rate=0.005):
    """`length`: K where the estimator does not report it."""
    optimizer = optax.chain(optax.adam(rate), optimizers.scale_by_truncation_length(length=length))
    return training.train(
        system, untrained, hidden, estimator, optimizer, data, window=window, num_updates=num_updates,
        log_every=max(1, num_updates // 60), lead_in=False, key=jax.random.key(2),
    )  # fmt: skip


def train_fixed(length, num_steps=NUM_STEPS):
    estimator = jtrunc.windowed_bptt(system, 2 * length, length)
    return train(estimator, 2 * length + 1, num_steps // length, length)


def perplexity(params):
    """On 500 new steps, behind 100 others."""
    behind = training.evaluate(system, params, hidden, steps(new_data, 0, 100)).hidden
    return np.exp(training.evaluate(system, params, behind, steps(new_data, 100, 600)).nats)


runs = {"fixed K = 15": train_fixed(15)}
trained = runs["fixed K = 15"].params
print(f"perplexity before training: {perplexity(untrained):.3f}, after: {perplexity(trained):.3f}")

# %% [markdown]
# ## How a gradient fades
#
# `diagnostics.log_gradient_norms` follows losses of several times and all streams back through the same
# window, in one pass; here 8 times and 32 streams, 256 draws of the curve. Norms are kept as logarithms, and
# a norm of $10^{-60}$ is as good as any.

# %%
NUM_LAGS, NUM_TIMES, FIT_FROM = 60, 8, 48


@partial(jax.jit, static_argnames=("num_times", "streams", "weighted"))
def norms_of(params, hidden, inputs, num_times=NUM_TIMES, streams=True, weighted=False):
    """log φ, (samples, R + 1)."""
    return diagnostics.log_gradient_norms(
        system, params, hidden, inputs, NUM_LAGS, num_times=num_times, streams=streams, weighted=weighted
    )


networks = {"before training": untrained, "after training": trained}
log_norms, behind = {}, {}
for name, params in networks.items():
    behind[name] = training.evaluate(system, params, hidden, steps(new_data, 0, 100)).hidden
    log_norms[name] = norms_of(params, behind[name], steps(new_data, 100, 200))
mean_log_norms = jax.jit(diagnostics.mean_log_norms)
curve_band = jax.jit(
    lambda logs: diagnostics.bootstrap_bands(jax.random.key(3), logs, diagnostics.mean_log_norms)
)
lags = np.arange(NUM_LAGS + 1)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for axis, (title, logs) in zip(axes, log_norms.items(), strict=True):
    curve = np.asarray(mean_log_norms(logs))
    slope = diagnostics.log_decay_rate(curve, FIT_FROM)
    lower, upper = curve_band(logs)
    tail = np.arange(FIT_FROM, NUM_LAGS + 1)
    level = np.mean(curve[FIT_FROM:]) + slope * (tail - tail.mean())
    axis.semilogy(lags, np.exp(logs[::6].T), color="0.75", linewidth=0.6, zorder=1)
    axis.fill_between(lags, np.exp(lower), np.exp(upper), color="C0", alpha=0.4, linewidth=0)
    axis.semilogy(lags, np.exp(curve), color="C0", linewidth=2, label="mean, with 95 % band")
    axis.semilogy(tail, np.exp(level), "--", color="C3", linewidth=2, label=f"fit, β̂ = {np.exp(slope):.3f}")
    axis.axvline(MEMORY, color="k", linewidth=1, linestyle=":")
    axis.set(xlabel="lag k", title=title, ylim=(1e-9, 1e-1))
    axis.legend(loc="lower left")
axes[0].set_ylabel("φₖ  (nats per unit of the state)")
plt.show()

# %% [markdown]
# Grey: single draws. Before training the norm falls at the rate of the forget gates, and no lag stands out.
# After training it hardly falls until the symbol's own step, and faster beyond: the network keeps ten
# steps and has learned to forget the rest. The mean is made by few draws, those losses that are still large,
# and so it is uncertain: the band is a bootstrap over the draws.
#
# ## From norms to a length
#
# Let the norms fall at least at the rate $\beta$ from lag $\tau$ on. What BPTT(K, 1) leaves out is then
# bounded (eq. 23), and with it the bias relative to the gradient (eq. 24):
#
# $$\hat E(K) = \sum_{k=K+1}^{\tau-1} \phi_k + \frac{\phi_\tau}{1-\hat\beta} \;\;(K < \tau), \qquad
# \hat\Delta(K) = \frac{\hat E(K)}{\max_{k\le K}\bigl(\sum_{j\le k}\phi_j - \hat E(k)\bigr)}, \qquad
# \hat\kappa(\delta) = \min\{K : \hat\Delta(K) < \delta\}.$$
#
# $\hat\beta$ is the slope of the log norms on $[\tau, R]$, the dashed line above. Where it is not below 1,
# nothing bounds the rest, and $\hat\kappa$ is the largest length allowed, with a flag.

# %%
MAX_LENGTH, TOLERANCES = 60, (0.9, 0.5, 0.1)


@jax.jit
def estimates(logs):
    curve = diagnostics.mean_log_norms(logs)
    log_decay = diagnostics.log_decay_rate(curve, FIT_FROM)
    log_bias = diagnostics.log_absolute_bias(curve, log_decay, FIT_FROM, MAX_LENGTH)
    lengths = [
        diagnostics.estimate_length(logs, tolerance, fit_from=FIT_FROM, min_length=1, max_length=MAX_LENGTH)
        for tolerance in TOLERANCES
    ]
    return {
        "decay rate": jnp.exp(log_decay),
        "relative bias": diagnostics.relative_bias(curve, log_bias),
        "lengths": jnp.stack([found.length for found in lengths]),
    }


estimate_bands = jax.jit(lambda logs: diagnostics.bootstrap_bands(jax.random.key(4), logs, estimates))
found, bands = {}, {}
for name, logs in log_norms.items():
    found[name] = estimates(logs)
    bands[name] = estimate_bands(logs)
    low, high = bands[name]
    print(
        f"{name}:  β̂ = {found[name]['decay rate']:.3f}  [{low['decay rate']:.3f}, {high['decay rate']:.3f}]"
    )
    for i, tolerance in enumerate(TOLERANCES):
        length, least, most = (leaf["lengths"][i] for leaf in (found[name], low, high))
        print(f"    δ = {tolerance}:  κ̂ = {length}  [{least}, {most}]")

# %% [markdown]
# ## What δ means, and what Δ̂ is not
#
# With δ < 1 a step along the biased gradient still has a part along the true one, and SGD converges
# (Theorem 2). But Δ̂ is an estimate and no bound: $\sum\phi$ in its denominator stands for the norm of the
# gradient and is an *upper* stand-in. The terms of a gradient may cancel, the more so the better the network
# has learned, and then the true relative bias is larger than Δ̂ (errata 11). Where the terms of the missing
# part cancel instead, it is smaller.
#
# So compare. What lag $k$ adds to the gradient is $\lambda_{s-k}^\top\,\partial F/\partial\theta$, and one
# backward pass gives it for all lags; cumulative sums are $\hat g_K$ for all $K$ at once. Means over
# many times $s$ and the 32 streams, over 100 lags; recurrent parameters only, as those of the readout are
# never truncated.

# %%
ALL_LAGS = 100


def gradient_by_lag(params, inputs):
    """What each lag 0 … 100 adds to the gradient of the last loss of `inputs`, (101, |θ|)."""

    def forward(h, x):
        return system.transition(params.recurrent, h, x), h

    last, before = jax.lax.scan(forward, hidden, inputs)
    final = jax.tree.map(lambda leaf: leaf[-1], inputs)
    cotangent = jax.grad(lambda h: system.loss(params, h, final)[0])(last)

    def backward(cotangent, step):
        h, x = step
        _, pull = jax.vjp(lambda theta, h: system.transition(theta, h, x), params.recurrent, h)
        share, cotangent = pull(cotangent)
        return cotangent, ravel_pytree(share)[0]

    window = jax.tree.map(lambda leaf: leaf[-ALL_LAGS - 1 :], (before, inputs))
    return jax.lax.scan(backward, cotangent, window, reverse=True)[1][::-1]


@jax.jit
def mean_gradient_by_lag(params, inputs):
    starts = jnp.arange(0, 460, 46 if SMALL else 4)

    def add(total, start):
        window = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, 140), inputs)
        return total + gradient_by_lag(params, window), None

    num_weights = ravel_pytree(params.recurrent)[0].size
    return jax.lax.scan(add, jnp.zeros((ALL_LAGS + 1, num_weights)), starts)[0] / len(starts)


figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for axis, (name, params) in zip(axes, networks.items(), strict=True):
    by_lag = np.asarray(mean_gradient_by_lag(params, new_data))
    truncated = np.cumsum(by_lag, axis=0)
    size = np.linalg.norm(truncated[-1])
    bias = np.linalg.norm(truncated - truncated[-1], axis=1)[: NUM_LAGS + 1] / size
    low, high = (np.minimum(leaf["relative bias"], 1e3) for leaf in bands[name])
    axis.semilogy(lags, found[name]["relative bias"], label="Δ̂(K), with 95 % band")
    axis.fill_between(lags, low, high, color="C0", alpha=0.3, linewidth=0)
    axis.semilogy(lags, bias, "k", label="true relative bias")
    for tolerance in TOLERANCES:
        axis.axhline(tolerance, color="C3", linewidth=1, linestyle="--")
    axis.axvline(MEMORY, color="k", linewidth=1, linestyle=":")
    axis.set(xlabel="truncation length K", title=name, ylim=(1e-3, 10))
    axis.legend(loc="upper right")
    share = size / np.linalg.norm(by_lag, axis=1).sum()
    print(f"{name}: the gradient is {share:.2f} of the sum of its lags' norms; bias at κ̂(δ):")
    for tolerance, length in zip(TOLERANCES, found[name]["lengths"].tolist(), strict=True):
        print(f"    δ = {tolerance}:  κ̂ = {length:>2}  true relative bias {bias[length]:.2f}")
axes[0].set_ylabel("bias / gradient (dashed: δ)")
plt.show()

# %% [markdown]
# Short lengths are judged severely, because the denominator subtracts what may be missing. From about K = 15
# on Δ̂ is a little too small: the terms of the gradient do not all agree (after training its norm is a third
# of the sum of theirs), and at κ̂(0.1) the true bias is somewhat more than a tenth. Both times Δ̂ is of the
# right size and falls where the bias does. That is what it is good for; a guarantee it is not.
#
# ## Training with a tolerated bias
#
# `adaptive_bptt` does all this while it trains: every 2000 steps of the stream it measures the norms on the
# data ahead, chooses K, and makes BPTT(2K, K) updates with it. K is data in one compiled program. Against it
# K = 5, whose losses reach back 5 to 10 lags, and K = 15 from above. Steps that an estimate reads count.

# %%
adaptive = jtrunc.adaptive_bptt(
    system, tolerance=0.5, num_lags=NUM_LAGS, min_length=2, max_length=MAX_LENGTH, initial_length=15,
    estimate_every=2_000, unit="steps", fit_from=FIT_FROM, num_times=NUM_TIMES, streams=True,
)  # fmt: skip
runs["fixed K = 5"] = train_fixed(5)
runs["adaptive, δ = 0.5"] = train(adaptive, 2 * MAX_LENGTH + 1, NUM_STEPS // 12)


def curve_of(name):
    """Steps read, those of estimates included, and training perplexity."""
    history = runs[name].history
    updates = np.diff(history["update"], prepend=0)
    read = history["timestep"] + np.cumsum(history.get("estimation_steps", 0) * updates)
    return read, np.exp(history["loss"])


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
for color, name in (("C3", "fixed K = 5"), ("C1", "fixed K = 15"), ("C0", "adaptive, δ = 0.5")):
    read, values = curve_of(name)
    left.plot(read, values, color=color, label=name)
    print(
        f"{name:<20}{read[-1]:>8,.0f} steps read, perplexity on new data {perplexity(runs[name].params):.3f}"
    )
history = runs["adaptive, δ = 0.5"].history
middle.step(history["timestep"], history["truncation_length"], where="mid", color="C0")
middle.axhline(MEMORY, color="k", linewidth=1, linestyle=":")
right.plot(history["timestep"], history["relative_bias"], color="C0")
right.axhline(0.5, color="C3", linewidth=1, linestyle="--", label="δ")
memoryless = copying.memoryless_perplexity()
left.axhline(memoryless, color="0.4", linewidth=1, linestyle="--", label="without memory")
left.set(xlabel="steps read of each stream", ylabel="perplexity (training)", ylim=(0.95, 2.8))
middle.set(xlabel="steps", ylabel="K (mean over a line)", ylim=(0, None))
right.set(xlabel="steps", ylabel="Δ̂(K) at the last estimate", ylim=(0, 1))
left.legend(fontsize="small")
right.legend()
plt.show()

# %% [markdown]
# K = 5 does learn when to write, but of the symbols only what one loss in five tells. Adaptive truncation
# begins with 15, finds that about the memory of the task is enough, and stays near it: where one would have
# put a fixed K, had one known. It is no oracle. A few large losses make the mean of the norms, and now and
# then K falls short for a while, which the perplexity shows. And the norms are those of the present network:
# one that keeps nothing has gradients that fade fast, and a large δ then lets K shrink before the memory is
# learned. A `min_length`, many draws (`num_times`, streams) and a smaller δ guard against both.
#
# ## Norms that count
#
# `weighted=True` measures $\|\lambda^\top\,\partial F/\partial\theta\|$ instead, the size of what a lag adds
# to the gradient (section 5.4 proposes such a norm): directions of the state that no parameter moves count
# for nothing. It costs a backward product for each stream.

# %%
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
weighted = norms_of(trained, behind["after training"], steps(new_data, 100, 200), weighted=True)
for name, logs in (("‖λ‖", log_norms["after training"]), ("‖λᵀ ∂F/∂θ‖", weighted)):
    curve = np.exp(mean_log_norms(logs))
    axis.semilogy(lags, curve / curve[0], label=name)
    lengths = estimates(logs)["lengths"].tolist()
    print(f"{name:<14}" + ", ".join(f"δ = {t}: κ̂ = {k}" for t, k in zip(TOLERANCES, lengths, strict=True)))
axis.axvline(MEMORY, color="k", linewidth=1, linestyle=":")
axis.set(xlabel="lag k", ylabel="norm / norm at lag 0", ylim=(1e-6, 10))
axis.legend()
plt.show()

# %% [markdown]
# While a symbol is only carried, a step adds little to the gradient; at lag 10, where it was read, much.
# $\|\lambda\|$ does not see that, and need not: the lengths are about the same.
#
# ## The best place for random cuts
#
# Random truncation (ARTBP, notebook 02) has no bias, whatever the law of its cuts; the law decides on the
# variance. Let $G(i)$ be the probability that a window reaches its $i$-th step. What flows back from step $j$
# to step $i$ of a window survives with probability $G(j)/G(i)$ and is scaled by its inverse. For
# contributions that are not correlated the variance a step is
#
# $$V = \sum_k \phi_k^2 \Bigl(\frac{\sum_i G(i)^2/G(i+k)}{\sum_i G(i)} - 1\Bigr), \qquad
# \sum_i G(i) = L_0,$$
#
# with the mean length $L_0$ as the price. `truncation.optimal(φ, L₀)` minimises $V$ over all decreasing $G$.
# Here $\phi_k = \|\lambda^\top\,\partial F/\partial\theta\|$ on 200 steps of 8 streams, in a network that is
# still learning, and windows of 5 steps on average: half the memory that the task needs. The prediction
# against the variance of the whole stretch's gradient over the cuts:

# %%
MEAN_LENGTH, STRETCH, NUM_DRAWS = 5, 200, 20 if SMALL else 400
learning = trained if SMALL else train_fixed(15, 12_000).params
start = training.evaluate(system, learning, hidden, steps(new_data, 0, 100)).hidden
start = jax.tree.map(lambda leaf: leaf[:8], start)
stretch = tuple(leaf[:, :8] for leaf in steps(new_data, 100, 100 + STRETCH))
norms = np.exp(norms_of(learning, start, stretch, num_times=100, streams=False, weighted=True))
laws = {
    "constant": truncation.constant(1 / MEAN_LENGTH),
    "polynomial, α = 4": truncation.polynomial(MEAN_LENGTH, 4),
    "optimal": truncation.optimal(norms, MEAN_LENGTH),
}


@jax.jit
def draws_of(table, keys):
    """Gradients of the whole stretch, (draws, |θ|), with cuts drawn from a table of c."""
    estimator = jtrunc.artbp(system, truncation.tabulated(table))

    def draw(key):
        estimate, _ = estimator.update(learning, estimator.init(learning, start, key), stretch)
        return ravel_pytree(estimate.grads.recurrent)[0]

    return jax.lax.map(draw, keys, batch_size=50)


keys = jax.random.split(jax.random.key(5), NUM_DRAWS)
exact = np.asarray(draws_of(jnp.zeros(STRETCH), keys))[0]  # c = 0: backpropagation through all of it
tables = {}
print(f"variance a step, {NUM_DRAWS} draws of the gradient of {STRETCH} steps, mean window {MEAN_LENGTH}")
print(f"{'':<20}{'predicted':>12}{'sampled':>24}{'‖mean − exact‖ / expected':>28}")
for name, law in laws.items():
    predicted = float(diagnostics.truncation_variance(law, norms))
    tables[name] = truncation.probabilities(law, STRETCH)
    draws = np.asarray(draws_of(tables[name], keys))
    squares = np.sum((draws - exact) ** 2, axis=1) / STRETCH
    error = squares.std() / np.sqrt(NUM_DRAWS)
    off = np.linalg.norm(draws.mean(axis=0) - exact) / np.sqrt(squares.mean() * STRETCH / NUM_DRAWS)
    print(f"{name:<20}{predicted:>12.2e}{squares.mean():>14.2e} ± {error:.1e}{off:>20.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.7), layout="constrained")
for color, (name, table) in zip(("C1", "C2", "C0"), tables.items(), strict=True):
    c = np.asarray(table)[:60]
    left.semilogy(np.arange(1, 61), np.cumprod(np.append(1.0, 1 - c[:-1])), color=color, label=name)
    right.plot(np.arange(1, 61), c, ".-", color=color, linewidth=1, markersize=4)
for axis in (left, right):
    axis.axvline(MEMORY + 1, color="k", linewidth=1, linestyle=":")
left.set(xlabel="step i of a window", ylabel="G(i): probability to reach it", ylim=(1e-4, 1.5))
right.set(xlabel="steps since the last cut", ylabel="c: probability of a cut", ylim=(0, 1))
left.legend()
plt.show()

# %% [markdown]
# The last column of the table is about 1 for an unbiased estimator. The variances come out as predicted,
# but for the correlations, which the formula leaves out (`diagnostics.lag_products` has them, for small
# systems).
#
# The optimal law cuts three windows in four after their first step and leaves the others alone until they
# hold the memory (dotted). The factor $1/(1-c)$ multiplies all that flows back across a boundary. At a
# constant rate every gradient pays it at each of ten boundaries; here only those pay, and once, that cross
# the first of their window.
#
# ## And while training
#
# `adaptive_artbp` measures the norms every now and then and draws its windows from the law that is optimal
# for them, as soon as the stream has passed the steps that were measured, so that no cut depends on the data
# that it cuts: unbiased throughout. Beside it the polynomial law, both with windows of 5 steps on average,
# and BPTT(10, 5) from above, whose windows have eleven.

# %%
random = {
    "ARTBP, polynomial law": jtrunc.online_artbp(system, laws["polynomial, α = 4"]),
    "ARTBP, adaptive law": jtrunc.adaptive_artbp(
        system, MEAN_LENGTH, num_lags=40, num_times=16, estimate_every=2_000, unit="steps", weighted=True
    ),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.7), layout="constrained")
left.plot(*curve_of("fixed K = 5"), color="C3", label="fixed K = 5")
for color, (name, estimator) in zip(("C2", "C4"), random.items(), strict=True):
    runs[name] = train(estimator, 400, NUM_STEPS // MEAN_LENGTH, 1, rate=0.003)
    hits = runs[name].history["look_ahead_hits"].mean()
    left.plot(*curve_of(name), color=color, label=name)
    print(f"{name:<24}perplexity on new data {perplexity(runs[name].params):.3f}, uncut windows {hits:.0e}")
history = runs["ARTBP, adaptive law"].history
right.plot(history["timestep"], history["first_cut"], color="C4")
left.set(xlabel="steps read of each stream", ylabel="perplexity (training)", ylim=(0.95, 2.8))
right.set(xlabel="steps", ylabel="c₁: share of windows of one step", ylim=(0, 1))
left.legend()
plt.show()

# %% [markdown]
# Windows of 5 steps at fixed places stall; of 5 steps on average at random places they learn, and faster
# with the law that the norms suggest. K = 15 above was faster still: it has no such noise, at the price of
# windows six times as long. Which one to take:
#
# * `windowed_bptt(system, 2 * K, K)` where the memory of the task is known, and short enough to pay for.
# * `adaptive_bptt(system, tolerance, …)` where it is not known or changes while the network learns; with
#   `optimizers.scale_by_truncation_length()` behind the optimiser. Estimates cost about 1 % of the training
#   time at one in 4000 steps.
# * `adaptive_artbp(system, mean_length, …)` where windows must be shorter than the memory, and small steps
#   can average the noise away.
# * `diagnostics.log_gradient_norms` at any time, on any system: what the gradient of this network still
#   knows of a step that lies k steps back.
