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
# # 00 · Quick start
#
# A recurrent **system** is a transition and a loss, a **gradient estimator** is a pair `(init, update)`:
#
# $$h_t = F(x_t, h_{t-1}, \theta), \qquad \mathcal L = \sum_t \ell_t(h_t), \qquad
# \text{update}: (\theta, \text{state}, x_{t+1 \dots t+L}) \mapsto (\hat g, \text{state}).$$
#
# This notebook trains a system of your own, takes a cell from `jtrunc.cells` and one from flax, trains both
# truncated BPTT and its unbiased variant ARTBP on a real text, and puts a truncation law under `jax.grad`.

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jtrunc
from jtrunc import adapters, cells, training, truncation
from jtrunc.tasks import corpora, text

SMALL = bool(os.environ.get("JTRUNC_SMALL"))  # the tests run every cell, on fewer steps
plt.rcParams.update({"figure.dpi": 100, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## A system of your own
#
# A mass on a spring, pushed by a known random force $x_t$; its position is measured with noise. Stiffness $k$
# and damping $d$ are unknown:
#
# $$v_t = v_{t-1} + \Delta\,(x_t - k\,q_{t-1} - d\,v_{t-1}), \qquad q_t = q_{t-1} + \Delta\,v_t, \qquad
# \ell_t = \tfrac12\,(q_t - \text{measured}_t)^2.$$
#
# Hidden state, parameters and inputs may be any pytrees. `Params` has two fields: what the transition reads
# (`recurrent`) and what only the loss reads (`readout`, none here).

# %%
STEP = 0.1  # Δ, seconds


def transition(theta, hidden, inputs):
    position, velocity = hidden
    force, _ = inputs
    acceleration = force - theta["stiffness"] * position - theta["damping"] * velocity
    velocity = velocity + STEP * acceleration
    return position + STEP * velocity, velocity


def loss(params, hidden, inputs):
    position, _ = hidden
    _, measured = inputs
    return 0.5 * (position - measured) ** 2, {"position": position}  # a scalar, and anything worth keeping


system = jtrunc.System(transition, loss)
at_rest = (jnp.float32(0.0), jnp.float32(0.0))

# %% [markdown]
# `jtrunc.unroll` runs the system forward: with the true parameters it makes the data.

# %%
truth = {"stiffness": jnp.float32(4.0), "damping": jnp.float32(0.5)}  # s⁻², s⁻¹
length, num_windows = 50, 200 if SMALL else 600
force_key, noise_key = jax.random.split(jax.random.key(0))
force = jax.random.normal(force_key, (num_windows * length,))
_, (_, clean) = jtrunc.unroll(system, jtrunc.Params(truth), at_rest, (force, jnp.zeros_like(force)))
measured = clean["position"] + 0.02 * jax.random.normal(noise_key, force.shape)
windows = jax.tree.map(lambda leaf: leaf.reshape(num_windows, length), (force, measured))

# %% [markdown]
# ## Ten lines of training
#
# An estimator's gradient goes straight into any optax optimiser. The estimator's state carries the hidden
# state (and, where it needs one, a key) from window to window.

# %%
estimator = jtrunc.truncated_bptt(system, length)
optimizer = optax.adam(0.05)


@jax.jit
def step(params, state, opt_state, inputs):
    estimate, state = estimator.update(params, state, inputs)
    updates, opt_state = optimizer.update(estimate.grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, estimate


guess = jtrunc.Params(recurrent={"stiffness": jnp.float32(2.0), "damping": jnp.float32(0.1)})
params, path = guess, [guess.recurrent]
state, opt_state = estimator.init(params, at_rest), optimizer.init(params)
for force_window, measured_window in zip(*windows, strict=True):
    params, state, opt_state, estimate = step(params, state, opt_state, (force_window, measured_window))
    path.append(params.recurrent)

for name, value in truth.items():
    first, last = float(path[0][name]), float(path[-1][name])
    print(f"{name:>9}: from {first:.2f} to {last:.2f}, truth {float(value):.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
seconds = np.arange(num_windows + 1) * length * STEP
for color, (name, unit) in zip(("C0", "C1"), (("stiffness", "s⁻²"), ("damping", "s⁻¹")), strict=True):
    left.plot(seconds, [theta[name] for theta in path], color=color, label=f"{name} ({unit})")
    left.axhline(float(truth[name]), color=color, linestyle="--", linewidth=1)
left.set(xlabel="time in the stream (s)", ylabel="parameter", title="learned (dashed: truth)")
left.legend(loc="center right")
shown = (force[:200], measured[:200])
right.plot(np.arange(200) * STEP, shown[1], ".", color="0.5", markersize=4, label="measured")
for params_shown, label, color in ((guess, "first guess", "C2"), (params, "learned", "C3")):
    _, (_, aux) = jtrunc.unroll(system, params_shown, at_rest, shown)
    right.plot(np.arange(200) * STEP, aux["position"], color=color, linewidth=1, label=label)
right.set(xlabel="time in the stream (s)", ylabel="position (m)", title="the first 20 s, run again")
right.legend(loc="lower left", fontsize="small")
plt.show()

# %% [markdown]
# ## Estimators are interchangeable
#
# The same system, parameters and 200 steps of data; only the constructor changes. `bptt` is exact for the
# window. Truncation every 10 steps is not, and no amount of data repairs that. ARTBP cuts at random points,
# 10 steps apart on average, and reweights what crosses a possible cut: noisy, with the right mean.

# %%
inputs = jax.tree.map(lambda leaf: leaf[:4].reshape(-1), windows)
law = truncation.polynomial(mean_length=10, alpha=6)


def gradient(estimator, key=None):
    estimate, _ = jax.jit(estimator.update)(guess, estimator.init(guess, at_rest, key), inputs)
    return jnp.stack([estimate.grads.recurrent[name] for name in truth])


keys = jax.random.split(jax.random.key(1), 4000)
draws = jax.vmap(lambda key: gradient(jtrunc.artbp(system, law), key))(keys)
error = draws.std(axis=0) / np.sqrt(len(draws))
print(f"{'estimator':<36}{'∂L/∂stiffness':>18}{'∂L/∂damping':>18}")
for name, value in (
    ("bptt (exact)", gradient(jtrunc.bptt(system))),
    ("truncated_bptt, L = 10", gradient(jtrunc.truncated_bptt(system, 10))),
    ("artbp, mean length 10: one draw", draws[0]),
):
    print(f"{name:<36}{value[0]:>18.3f}{value[1]:>18.3f}")
columns = [f"{mean:.3f} ± {width:.3f}" for mean, width in zip(draws.mean(axis=0), error, strict=True)]
print(f"{f'artbp: mean of {len(draws)} draws':<36}{columns[0]:>18}{columns[1]:>18}")

# %% [markdown]
# ## Cells, from here and from flax
#
# `cells.model` puts a linear readout and a loss on a cell: a system whose inputs are pairs
# `(x, target)`. `adapters.linen` and `adapters.nnx` do the same for flax modules. Both declare their
# structure, so both get the fast backward pass. Two LSTMs of the same size, one call for both:

# %%
corpus = corpora.python_standard_library(200_000)
symbols, num_streams, width = corpus.vocabulary.size, 8, 32
print(f"{corpus.source.name}: {corpus.source.num_characters:,} characters, {symbols} symbols")
train_data, valid_data = (text.lanes(part, num_streams) for part in (corpus.train, corpus.valid))

model = cells.model(cells.lstm(symbols, width), symbols, cells.softmax_cross_entropy)
flax_system, flax_params, flax_hidden = adapters.linen(
    nn.OptimizedLSTMCell(width),
    nn.Dense(symbols),
    cells.softmax_cross_entropy,
    key=jax.random.key(2),
    inputs=jnp.zeros(num_streams, jnp.int32),
    embed=lambda token: jax.nn.one_hot(token, symbols),
)
first_window = jax.tree.map(lambda leaf: jnp.asarray(leaf[:20]), train_data)
for name, some_system, some_params, hidden in (
    ("jtrunc", model.system, model.init(jax.random.key(2)), model.initial_hidden((num_streams,))),
    ("flax", flax_system, flax_params, flax_hidden),
):
    estimator = jtrunc.truncated_bptt(some_system, 20)
    state = estimator.init(some_params, hidden)
    estimate, _ = jax.jit(estimator.update)(some_params, state, tuple(first_window))
    count = sum(leaf.size for leaf in jax.tree.leaves(some_params))
    print(f"{name:>7}: {count:,} parameters, first loss {estimate.loss / 20:.3f} nats a character")
print(f"uniform guess: {np.log(symbols):.3f} nats a character")

# %% [markdown]
# ## A real text: truncated BPTT and ARTBP
#
# The default corpus lies on every machine: the source text of Python's own standard library.
# `training.train` runs many updates in one compiled program, over data that lies on the device. Truncated
# BPTT gets windows of 20 steps; ARTBP draws windows of 20 steps on average out of a look-ahead of 400, so the
# same number of updates reads about the same amount of text.

# %%
mean_length, look_ahead, num_updates = 20, 400, 200 if SMALL else 4000
law = truncation.polynomial(mean_length, alpha=4)
reached = truncation.survival(law, look_ahead)[-1]
print(f"a window outlasts the look-ahead with probability {reached:.1e}")
runs = {}
for name, estimator, window in (
    ("truncated BPTT, L = 20", jtrunc.truncated_bptt(model.system, mean_length), mean_length),
    ("ARTBP, L₀ = 20, α = 4", jtrunc.online_artbp(model.system, law), look_ahead),
):
    runs[name] = training.train(
        model.system,
        model.init,
        model.initial_hidden((num_streams,)),
        estimator,
        optax.adam(4e-3),
        train_data,
        window=window,
        num_updates=num_updates,
        eval_data={"valid": valid_data},
        eval_every=num_updates // 10,
        log_every=num_updates // 50,
    )
    bits = runs[name].evaluations["valid"]["bits"][-1]
    print(f"{name}: {bits:.3f} bits a character after {runs[name].history['timestep'][-1]:,} steps")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for name, run in runs.items():
    read = run.history["timestep"] * num_streams / 1000
    left.plot(read, run.history["loss"] / np.log(2), label=name)
    checked = run.evaluations["valid"]
    steps_then = np.interp(checked["update"], run.history["update"], run.history["timestep"])
    right.plot(steps_then * num_streams / 1000, checked["bits"], marker="o", markersize=4, label=name)
left.set(xlabel="thousands of characters read", ylabel="bits a character", title="training text, as read")
right.set(xlabel="thousands of characters read", title="validation text")
right.legend()
plt.show()

# %% [markdown]
# One seed and a short run: this says that both work, not which is better. ARTBP pays for unbiasedness with
# noise, and what an LSTM learns first about a text reaches back less than 20 characters, so truncation costs
# little here. Notebook 01 shows where it costs everything, notebook 02 how ARTBP repairs that.
#
# ## `jtrunc.scan`: your simulator, `jax.grad`, and a law
#
# A fishery. The stock grows by itself, and each year a share $h$ of it is caught:
#
# $$s_t = s_{t-1} + r\,s_{t-1}(1 - s_{t-1}) - h\,s_{t-1}, \qquad \text{catch}_t = h\,s_{t-1}.$$
#
# A larger share means more fish *now* and fewer *for ever after*. The best steady share is $h^* = r/2$.
# `jtrunc.scan` is `jax.lax.scan` with a backward pass that follows a law; what is differentiated, and how, is
# up to you.

# %%
GROWTH, YEARS = 0.1, 400


def mean_catch(share, law, key):
    def year(stock, _):
        catch = share * stock
        return stock + GROWTH * stock * (1.0 - stock) - catch, catch

    _, catches = jtrunc.scan(year, jnp.float32(0.5), length=YEARS, truncation=law, key=key)
    return jnp.mean(catches)


laws = {
    "never (exact)": truncation.never(),
    "every 10 years": truncation.every(10),
    "random, 10 years on average": truncation.polynomial(mean_length=10, alpha=6),
}
share, keys = jnp.float32(0.07), jax.random.split(jax.random.key(3), 1000)
for name, law in laws.items():
    slopes = jax.jit(jax.vmap(lambda key, law=law: jax.grad(mean_catch)(share, law, key)))(keys)
    error = float(slopes.std()) / np.sqrt(len(keys))
    print(f"{name:<28} ∂catch/∂share = {slopes.mean():+.4f} ± {error:.4f} (standard error)")

# %% [markdown]
# Truncated every 10 years, the gradient has the wrong *sign*: it says that a fishery which catches too much
# should catch more. Follow each of the three uphill:


# %%
def climb(law, key, iterations=300):
    def iteration(share, key):
        slope = jax.grad(mean_catch)(share, law, key)
        return jnp.clip(share + 5e-4 * slope, 0.0, GROWTH), share

    return jax.lax.scan(iteration, jnp.float32(0.07), jax.random.split(key, iterations))[1]


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, law in laws.items():
    shares = jax.jit(climb, static_argnums=0)(law, jax.random.key(4))
    catches = jax.vmap(lambda share: mean_catch(share, truncation.never(), None))(shares)
    left.plot(shares, label=name)
    right.plot(catches, label=name)
left.axhline(GROWTH / 2, color="0.4", linestyle="--", linewidth=1, label="best steady share, r/2")
left.set(xlabel="iteration of gradient ascent", ylabel="share caught a year")
right.set(xlabel="iteration of gradient ascent", ylabel="mean catch a year (carrying capacity = 1)")
left.legend(fontsize="small")
plt.show()
