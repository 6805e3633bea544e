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
# # 03 · From RTRL to NoBackTrack
#
# Backpropagation through time needs the past: it stores it and walks back through it. Forward in time, all
# that the past has to say about a gradient is in one matrix, the **influence** $J_t = \partial h_t/\partial
# \theta$ of the parameters on the present state. With $h_t = F(x_t, h_{t-1}, \theta)$,
#
# $$J_t = D_t\,J_{t-1} + I_t, \qquad D_t = \frac{\partial F}{\partial h}, \quad
# I_t = \frac{\partial F}{\partial\theta}, \qquad
# \frac{\partial\ell_t}{\partial\theta} = \frac{\partial\ell_t}{\partial h_t}\,J_t.$$
#
# Carried as it is, $J$ makes *real-time recurrent learning* (RTRL): exact, online, and too large. NoBackTrack
# carries a random pair of vectors with $\mathbb E\,\bar v\,\bar w^\top = J$ instead, and is as cheap as the
# network itself. (Ollivier, Tallec and Charpiat, "Training recurrent networks online without backtracking",
# 2015; its equation numbers are used below.)

# %%
import itertools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree

import jtrunc
from jtrunc import cells, optimizers, training
from jtrunc.experiments.sampling import sample
from jtrunc.tasks import counting

SMALL = bool(os.environ.get("JTRUNC_SMALL"))  # the tests run every cell, on fewer draws and steps
jax.config.update("jax_enable_x64", True)  # for the exact comparisons below
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## RTRL in a few lines
#
# A leaky network of 5 units that must follow a running mean of its input, 50 steps, float64. The recursion
# above, written down with `jax.jacobian`:

# %%
T, NUM_UNITS = 50, 5
cell = cells.leaky(2, NUM_UNITS, 0.2)
model = cells.model(cell, 1, lambda y, target: 0.5 * jnp.sum((y - target) ** 2))
params, hidden = model.init(jax.random.key(0), jnp.float64), model.initial_hidden(dtype=jnp.float64)
signal = jax.random.normal(jax.random.key(1), (T, 2))


def running_mean(mean, x):
    mean = mean + (x - mean) / 10
    return mean, mean


_, follow = jax.lax.scan(running_mean, jnp.zeros(()), signal[:, 0])
data = (signal, 3.0 * follow[:, None])
theta, restore = ravel_pytree(params.recurrent)


def flat(tree):
    return ravel_pytree(tree)[0]


def rtrl_by_hand():
    def step(carry, x):
        h, J = carry

        def transition(theta, h):
            return model.system.transition(restore(theta), h, x)

        immediate, D = jax.jacobian(transition, (0, 1))(theta, h)
        h, J = transition(theta, h), D @ J + immediate
        slope, _ = jax.grad(lambda h: model.system.loss(params, h, x), has_aux=True)(h)
        return (h, J), slope @ J

    return jax.lax.scan(step, (hidden, jnp.zeros((hidden.size, theta.size))), data)[1].sum(axis=0)


def over_windows(estimator, length):
    """The gradients of T / length updates at fixed parameters, added up; the state is carried along."""
    windows = jax.tree.map(lambda leaf: leaf.reshape(-1, length, *leaf.shape[1:]), data)

    def update(state, window):
        estimate, state = estimator.update(params, state, window)
        return state, flat(estimate.grads.recurrent)

    run = jax.jit(lambda state: jax.lax.scan(update, state, windows)[1].sum(axis=0))
    return run(estimator.init(params, hidden))


exact = over_windows(jtrunc.bptt(model.system), T)


def deviation(gradient):
    return float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))


print(f"relative deviation from BPTT over all {T} steps, {theta.size} parameters")
print(f"{'RTRL by hand':<28}{deviation(jax.jit(rtrl_by_hand)()):.1e}")
for length in (1, 10):
    forward = deviation(over_windows(jtrunc.rtrl(model.system), length))
    cut = deviation(over_windows(jtrunc.truncated_bptt(model.system, length), length))
    print(f"updates of {length:>2} steps:  rtrl {forward:.1e}   truncated_bptt {cut:.1e}")

# %% [markdown]
# Whatever the window, RTRL is BPTT over the whole past, because $J$ crosses from one update to the next.
# Truncated BPTT forgets at each of them. The price: $J$ has $S \cdot |\theta|$ entries, $S$ the size of the
# state, and the product $D_t J_{t-1}$ takes $S^2 |\theta|$ multiplications a step, for a fully connected
# network $n^4$.

# %%
print(f"{'units':>6}{'parameters':>12}{'J in float32':>14}{'multiplications a step: network':>34}{'D·J':>10}")
for n in (20, 128, 512):
    count = n * n + 3 * n + n  # recurrent, three inputs, bias
    print(f"{n:>6}{count:>12,}{4 * n * count / 1e3:>11,.0f} kB{count:>34.1e}{n * n * count:>10.1e}")

# %% [markdown]
# ## The rank-one trick
#
# A sum of outer products, $A = \sum_i v_i w_i^\top$, and independent signs $\varepsilon_i = \pm1$
# (Proposition 1):
#
# $$\tilde A = \Bigl(\sum_i \varepsilon_i v_i\Bigr)\Bigl(\sum_j \varepsilon_j w_j\Bigr)^{\!\top}, \qquad
# \mathbb E\tilde A = \sum_{ij} \mathbb E[\varepsilon_i\varepsilon_j]\,v_i w_j^\top = A,$$
#
# because $\mathbb E[\varepsilon_i \varepsilon_j]$ is 1 for $i = j$ and 0 otherwise. Ten bumps along a
# diagonal make a matrix that one can recognise; all $2^{10}$ sign patterns can be listed.

# %%
positions = np.linspace(0, 1, 48)
centres, widths = np.linspace(0.08, 0.92, 10), np.linspace(0.03, 0.08, 10)
v = np.exp(-0.5 * ((positions - centres[:, None]) / 0.05) ** 2)  # (10, 48): one v a row
w = np.exp(-0.5 * ((positions - centres[:, None]) / widths[:, None]) ** 2)
A = v.T @ w
signs = np.array(list(itertools.product((-1, 1), repeat=len(v))))


def draw(signs):
    return np.outer(signs @ v, signs @ w)


mean = sum(draw(pattern) for pattern in signs) / len(signs)
print(f"mean over all {len(signs)} patterns: largest deviation from A {np.abs(mean - A).max():.1e}")
picked = signs[np.random.default_rng(0).integers(len(signs), size=100)]
print(f"one draw: {np.abs(draw(picked[0]) - A).max():.2f}; largest entry of A: {A.max():.2f}")
pictures = {
    "A": A,
    "one draw": draw(picked[0]),
    "another": draw(picked[1]),
    "mean of 10 (rank 10)": np.mean([draw(pattern) for pattern in picked[:10]], axis=0),
    "mean of 100": np.mean([draw(pattern) for pattern in picked], axis=0),
}
figure, axes = plt.subplots(1, 5, figsize=(12, 2.9), layout="constrained")
for axis, (title, matrix) in zip(axes, pictures.items(), strict=True):
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1.5, vmax=1.5)
    axis.set(title=title, xticks=[], yticks=[])
    axis.grid(False)
figure.colorbar(image, ax=axes, shrink=0.8, extend="both")
plt.show()

# %% [markdown]
# A draw has the diagonal right, always: there $\varepsilon_i^2 = 1$. What it adds are the cross terms, with
# signs that cancel on average. NoBackTrack applies this at every step to $D\bar v\,\bar w^\top + \sum_i e_i
# w_i^\top$: what was carried, and one term for each unit, $w_i = \partial F_i/\partial\theta$. As the
# recursion of $J$ is linear, the mean stays right through all steps.
#
# ## Scaling decides the variance
#
# $v_i w_i^\top = (\rho_i v_i)(w_i/\rho_i)^\top$: any $\rho_i$ gives the same $A$, but not the same cross
# terms. In the Hilbert–Schmidt norm (eq. 49),
#
# $$\mathbb E\|\tilde A\|^2 = \Bigl(\sum_i \rho_i^2\|v_i\|^2\Bigr)\Bigl(\sum_j \|w_j\|^2/\rho_j^2\Bigr)
# + 2 \sum_{i \ne j} \langle v_i, v_j\rangle\langle w_i, w_j\rangle,$$
#
# least for $\rho_i = \sqrt{\|w_i\|/\|v_i\|}$, which makes the two vectors of each pair equally long; the
# variance is then that of eq. 58. Eight pairs with scales from 0.1 to 10, and
# $\rho_i = (\|w_i\|/\|v_i\|)^s$:

# %%
random = np.random.default_rng(1)
pairs = random.normal(size=(8, 6)), random.normal(size=(8, 9))
v, w = (vectors * 10 ** random.uniform(-1, 1, size=(8, 1)) for vectors in pairs)
signs = np.array(list(itertools.product((-1, 1), repeat=8)))
v_norms, w_norms = np.linalg.norm(v, axis=1), np.linalg.norm(w, axis=1)
cross = np.sum((v @ v.T) * (w @ w.T)) - np.sum(v_norms**2 * w_norms**2)  # the sum over i ≠ j


def formula(rho):
    """Eq. 49, less ‖A‖²."""
    return np.sum((rho * v_norms) ** 2) * np.sum((w_norms / rho) ** 2) + 2 * cross - np.sum((v.T @ w) ** 2)


def enumerated(rho):
    draws = np.einsum("pi,pj->pij", signs @ (rho[:, None] * v), signs @ (w / rho[:, None]))
    return np.mean(np.sum((draws - v.T @ w) ** 2, axis=(1, 2)))


least = np.sum(v_norms * w_norms) ** 2 - np.sum((v_norms * w_norms) ** 2) + cross
print(f"{'variance of Ã':<22}{'all signs':>14}{'eq. 49':>14}")
for name, s in (("ρ = 1", 0.0), ("halfway", 0.25), ("ρ = √(‖w‖/‖v‖)", 0.5)):
    rho = (w_norms / v_norms) ** s
    print(f"{name:<22}{enumerated(rho):>14.4f}{formula(rho):>14.4f}")
print(f"{'eq. 58':<22}{'':>14}{least:>14.4f}")
exponents = np.linspace(-0.25, 1.25, 61)
by_formula = [formula((w_norms / v_norms) ** s) for s in exponents]
by_signs = [enumerated((w_norms / v_norms) ** s) for s in exponents[::5]]

# %% [markdown]
# ### A variance that grows, and one that does not
#
# The paper's example (28): $h_{t+1} = (1-\alpha)\,h_t + \theta$, $h, \theta \in \mathbb R^n$, so $J_t \to
# 1/\alpha$ times the identity. Without scaling, $\bar v \leftarrow (1-\alpha)\bar v + \varepsilon$ is
# stationary, but $\bar w \leftarrow \bar w + \varepsilon$ is a random walk. `jtrunc.nobacktrack` balances the
# two before each sum.

# %%
ALPHA, SIZE, NUM_STEPS, NUM_DRAWS = 0.1, 10, 400, 200 if SMALL else 4_000
integrator = jtrunc.System(
    transition=lambda theta, h, x: (1 - ALPHA) * h + theta,
    loss=lambda params, h, x: (jnp.zeros(()), ()),
)
estimator = jtrunc.nobacktrack(integrator)
time = np.arange(1, NUM_STEPS + 1)
influence = (1 - (1 - ALPHA) ** time) / ALPHA  # J = this times the identity


def chain(key):
    """v̄ and w̄ after each step, (T, n) both."""
    fixed = jtrunc.Params(jnp.zeros(SIZE))

    def step(state, _):
        _, state = estimator.update(fixed, state, jnp.zeros(1))
        return state, (state.chains.tangents[0], state.chains.cotangents[0])

    return jax.lax.scan(step, estimator.init(fixed, jnp.zeros(SIZE), key), length=NUM_STEPS)[1]


def squared_error(v, w, scale):
    """‖v̄ w̄ᵀ − J‖² for J = scale · 1."""
    return (v**2).sum(-1) * (w**2).sum(-1) - 2 * scale * (v * w).sum(-1) + SIZE * scale**2


v, w = map(np.asarray, jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(2), NUM_DRAWS)))
print(f"scaled: v̄ = w̄ after each reduction, to {np.abs(v - w).max():.0e} (footnote 9)")
variance = {"ρ as in NoBackTrack": squared_error(v, w, influence).mean(axis=0)}

v, w, plain = np.zeros((NUM_DRAWS, SIZE)), np.zeros((NUM_DRAWS, SIZE)), []
for scale in influence:
    noise = random.choice((-1.0, 1.0), size=v.shape)
    v, w = (1 - ALPHA) * v + noise, w + noise
    plain.append(squared_error(v, w, scale).mean())
variance["no scaling (ρ = 1)"] = np.array(plain)
for name, values in variance.items():
    later = ", ".join(f"{values[t - 1]:,.0f}" for t in (100, 200, 400))
    print(f"{name:<20} variance at t = 100, 200, 400: {later}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
left.semilogy(exponents, by_formula, label="eq. 49")
left.semilogy(exponents[::5], by_signs, "o", color="C0", markersize=4)
left.axhline(least, color="0.4", linestyle="--", linewidth=1, label="eq. 58")
left.set(xlabel="s, with ρ = (‖w‖/‖v‖)ˢ", ylabel="variance of Ã", title="eight pairs; dots: all signs")
left.legend()
for color, (name, values) in zip(("C0", "C3"), variance.items(), strict=True):
    right.plot(time, values / (SIZE * influence**2), color=color, label=name)
right.set(xlabel="time step t", ylabel="variance / ‖J‖²", title=f"h ← (1 − α) h + θ, α = {ALPHA}")
right.set_ylim(0)
right.legend()
plt.show()

# %% [markdown]
# ## Unbiased, and how noisy
#
# The network from above, at fixed parameters, step by step. Besides NoBackTrack of rank 1, 2 and 10 (the mean
# of as many independent chains): UORO, the same trick with one $\rho$ for the whole state; KF-RTRL, which
# carries $u \otimes A$, a vector times a matrix; and a NoBackTrack fed with uniform noise on $[-1, 1]$, of
# variance ⅓, a mistake found in the wild. `noise=` takes any function.


# %%
def uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


system = model.system
estimators = {
    "NoBackTrack, rank 1": jtrunc.nobacktrack(system),
    "NoBackTrack, rank 2": jtrunc.nobacktrack(system, rank=2),
    "NoBackTrack, rank 10": jtrunc.nobacktrack(system, rank=10),
    "UORO": jtrunc.uoro(system),
    "KF-RTRL": jtrunc.kf_rtrl(system),
    "wrong noise": jtrunc.nobacktrack(system, noise=uniform),
}


def gradients_by_step(estimator, key=None):
    """ĝₜ, the estimate of ∂ℓₜ/∂θ, (T, |θ|)."""

    def step(state, inputs):
        estimate, state = estimator.update(params, state, jax.tree.map(lambda leaf: leaf[None], inputs))
        return state, flat(estimate.grads.recurrent)

    return jax.lax.scan(step, estimator.init(params, hidden, key), data)[1]


NUM_KEYS = 200 if SMALL else 4_000
keys = jax.random.split(jax.random.key(3), NUM_KEYS)
_, (losses, _) = jtrunc.unroll(system, params, hidden, data)
slopes = np.sqrt(2 * losses) * np.linalg.norm(params.readout["kernel"])  # ‖∂ℓₜ/∂hₜ‖ of the squared error
by_step = np.asarray(gradients_by_step(jtrunc.rtrl(system)))
samples = {
    name: np.asarray(jax.jit(jax.vmap(lambda key, e=estimator: gradients_by_step(e, key)))(keys))
    for name, estimator in estimators.items()
}


# %%
def cosine(a, b):
    return a @ b / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b))


threshold = -jax.scipy.special.ndtri(0.01 / 2 / theta.size)  # Bonferroni
print(
    f"{NUM_KEYS:,} draws of the gradient over {T} steps. z: standard errors from their mean to the exact one,"
)
print(f"of {theta.size} parameters the largest; below {threshold:.1f} with probability 0.99 if unbiased")
print(f"{'':<22}{'z':>10}{'cosine of a draw':>20}{'of the mean':>13}{'noise / ‖g‖':>13}")
for name, draws in samples.items():
    total = draws.sum(axis=1)
    z = (total.mean(axis=0) - exact) / (total.std(axis=0) / np.sqrt(NUM_KEYS))
    similarity = cosine(total, exact)
    noise = np.sqrt(np.mean(np.sum((total - exact) ** 2, axis=1))) / np.linalg.norm(exact)
    print(
        f"{name:<22}{np.abs(z).max():>10.1f}{similarity.mean():>13.2f} ± {similarity.std():.2f}"
        f"{cosine(total.mean(axis=0), exact):>13.3f}{noise:>13.2f}"
    )

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
total = samples["NoBackTrack, rank 1"].sum(axis=1)
order = np.argsort(exact)
left.errorbar(
    np.arange(theta.size), total.mean(axis=0)[order], 2 * total.std(axis=0)[order] / np.sqrt(NUM_KEYS),
    fmt="none", ecolor="C0", label="rank 1, mean ± 2 standard errors",
)  # fmt: skip
wrong = samples["wrong noise"].sum(axis=1).mean(axis=0)
left.plot(wrong[order], ".", color="C3", markersize=4, label="wrong noise, mean")
left.plot(exact[order], color="k", linewidth=1, label="exact")
left.set(xlabel="parameter, sorted", ylabel="gradient", title=f"mean of {NUM_KEYS:,} draws")
left.legend(fontsize="small")
colors = dict(zip(estimators, ("C0", "C1", "C2", "C4", "C5", "C3"), strict=True))
for name, draws in samples.items():
    if name == "wrong noise":
        continue
    middle.hist(cosine(draws.sum(axis=1), exact), np.linspace(-1, 1, 61), histtype="step", density=True,
                color=colors[name], label=name)  # fmt: skip
    error = np.sqrt(np.mean(np.sum((draws - by_step) ** 2, axis=2), axis=0))
    right.plot(np.arange(1, T + 1), error / slopes, color=colors[name])
right.plot(np.arange(1, T + 1), np.linalg.norm(by_step, axis=1) / slopes, color="k", label="‖gₜ‖ itself")
middle.set(xlabel="cosine with the exact gradient", ylabel="density", title=f"single draws, {T} steps")
middle.legend(fontsize="small", loc="upper left")
right.set(xlabel="step t", ylabel="noise of ĝₜ / ‖∂ℓₜ/∂hₜ‖", title="step by step")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# The last row is caught: its draws are less noisy than most, and their mean is wrong. The others' mean is
# right, but a single draw over so few steps points only roughly where the gradient does. $K$ chains have
# $1/K$ of the variance; KF-RTRL has less than one chain, at a higher price. Step by step: NoBackTrack's first
# estimate is exact, the noise then grows until what fades and what is drawn anew balance, several times the
# gradient itself. Learning averages it away, if its steps are small.
#
# ## Learning $a^n b^n$, one update a character
#
# The stream `aaa⏎bbb⏎a⏎b⏎…` with $n$ uniform on $[1; 8]$. Who counts needs $\log_2 8 = 3$ bits a block of 11
# characters on average; who knows the blocks but does not compare the two numbers ($a^n b^p$) twice that.
# The network is the paper's (eq. 37): 20 units whose state is the pre-activation, each keeping a random fixed
# share of it, $h \leftarrow \alpha h + W \sigma(h) + r x + b$, here $\alpha$ up to 0.7, sigmoids, and small
# weights at first.
#
# The gradient goes to `optimizers.qdop`, a quasi-diagonal Kalman filter: about $(\sum_t g_t g_t^\top +
# \Lambda)^{-1} g_t$, with a learning rate of 1 and the prior $\Lambda$ = number of units (Algorithm 2).
# `norms="kalman"` measures $\bar v, \bar w, w_i$ in the filter's own metric (Appendix B), which
# `training.train` feeds back after each update. Truncated BPTT gets the same optimiser, windows of 15
# or of 4 characters, and one update for each of them.

# %%
LONGEST, UNITS = 8, 20
NUM_CHARACTERS, NUM_SEEDS = (9_000, 2) if SMALL else (300_000, 4)
stream = [lane[:, 0] for lane in counting.sequences(jax.random.key(4), NUM_CHARACTERS, longest=LONGEST)]
print(counting.VOCABULARY.decode(stream[0][:60]).replace("\n", "⏎"))
feedback = np.asarray(jax.random.uniform(jax.random.key(5), (UNITS,), maxval=0.7))
counter = cells.model(
    cells.preactivation(3, UNITS, activation="sigmoid", feedback=feedback), 3, cells.softmax_cross_entropy
)


def small_weights(key):
    first = counter.init(key, jnp.float64)
    return first._replace(recurrent=jax.tree.map(lambda leaf: 0.1 * leaf, first.recurrent))


NUM_LINES = 50
runs = {}
for name, estimator, window in (
    ("Kalman NoBackTrack, rank 1", jtrunc.nobacktrack(counter.system, norms="kalman"), 1),
    ("RTRL", jtrunc.rtrl(counter.system), 1),
    ("truncated BPTT, L = 15", jtrunc.truncated_bptt(counter.system, 15), 15),
    ("truncated BPTT, L = 4", jtrunc.truncated_bptt(counter.system, 4), 4),
):
    num_updates = NUM_CHARACTERS // window
    runs[name] = training.train(
        counter.system, small_weights, counter.initial_hidden(dtype=jnp.float64), estimator,
        optimizers.qdop(prior=float(UNITS)), tuple(stream), window=window, num_updates=num_updates,
        log_every=num_updates // NUM_LINES, key=jax.random.key(6), seeds=NUM_SEEDS,
    )  # fmt: skip

# %%
entropy = counting.entropy_rate_bits(1, LONGEST)
independent = counting.independent_entropy_rate_bits(1, LONGEST)
print(f"bits a character: aⁿbⁿ {entropy:.4f}, aⁿbᵖ {independent:.4f}; last tenth of the run, by seed:")
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for color, (name, run) in zip(("C0", "C1", "C3", "C4"), runs.items(), strict=True):
    bits = run.history["loss"] / np.log(2)
    read = run.history["update"] * (NUM_CHARACTERS / run.history["update"][-1])
    axis.plot(read, bits, color=color, linewidth=1, alpha=0.5)
    axis.plot(read, np.median(bits, axis=1), color=color, linewidth=2, label=name)
    print(f"{name:<28}" + ", ".join(f"{value:.3f}" for value in bits[-NUM_LINES // 10 :].mean(axis=0)))
axis.axhline(entropy, color="0.3", linewidth=1, label="entropy rate of aⁿbⁿ")
axis.axhline(independent, color="0.3", linewidth=1, linestyle="--", label="aⁿbᵖ, n and p independent")
axis.set(xlabel="characters read", ylabel="bits a character", ylim=(0.2, 1.2))
axis.legend(fontsize="small")
plt.show()

# %% [markdown]
# What the networks write after the end of their stream, and how many of some 2,700 blocks are well formed, as
# many b's as a's, 1 to 8:

# %%
prompt = jnp.asarray(stream[0][-1_000:])
for name, run in runs.items():
    for seed in range(NUM_SEEDS):
        trained = jax.tree.map(lambda leaf, seed=seed: leaf[seed].astype("float32"), run.params)
        tokens = sample(counter, trained, prompt, 30_000, jax.random.key(7))
        written = counting.VOCABULARY.decode(np.asarray(tokens))
        blocks = counting.score(written, longest=LONGEST)
        shown = written[:72].replace("\n", "⏎")
        print(f"{name:<28}seed {seed}: {blocks.fraction:>4.0%} well formed")
        if seed == 0:
            print(f"    {shown}")

# %% [markdown]
# Windows of 4 characters hardly ever see both numbers of a block, and truncated BPTT with them learns the
# likely sizes but not to match them well. One pair $(\bar v, \bar w)$, as small as the network and without
# any window, gets past it: the noise costs time, and now and then a setback, but no dependency is out of
# reach. RTRL shows what the exact gradient is worth, and windows of 15 that it is not needed where most
# blocks are shorter than that.
#
# ## Which one to take
#
# For $n$ fully connected units and $|\theta| \approx n^2$ parameters, a step of the network costs $n^2$:
#
# | estimator | carries | memory | cost | right on average? |
# | --- | --- | --- | --- | --- |
# | `rtrl` | $J$ | $n^3$ | $n^4$ | exact |
# | `diagonal_rtrl` | $J$, own units only | $n^2$ | $n^2$ | exact, if units read only their own past |
# | `snap(order=1)` | $J$, own units only | $n^2$ | $n^2$ | biased: what takes two steps is dropped |
# | `eprop`, `rflo` | a trace a parameter | $n^2$ | $n^2$ | biased: recurrent paths are dropped |
# | `uoro` | $\tilde s \otimes \tilde\theta$ | $n^2$ | $n^2$ | unbiased, the most noise |
# | `nobacktrack(rank=K)` | $\bar v_k \otimes \bar w_k$ | $K n^2$ | $K n^2$ | unbiased, noise as $1/\sqrt K$ |
# | `kf_rtrl`, `optimal_kronecker_sum` | $u \otimes A$ | $n^2$ | $n^3$ | unbiased, less noise than one pair |
#
# * `rtrl` up to some tens of units; `diagonal_rtrl` wherever the recurrence is elementwise (linear recurrent
# units): exact at the price of one trace a parameter.
# * `nobacktrack` for an endless stream and long dependencies, on one update a step: with `norms="kalman"` and
# `optimizers.qdop`, or Euclidean with small steps. `uoro` for any system of your own, without structure.
# * `kf_rtrl` or `optimal_kronecker_sum` where $n^3$ is affordable: a cell that declares its affine maps.
# * `snap`, `eprop`, `rflo` where noise hurts more than bias, or as models of biology.
#
# "Right on average" is meant at fixed $\theta$. While $\theta$ moves, every forward estimator differentiates
# along the path that it took: small steps, compared with how fast the network forgets, keep the two together.
