"""What a trained model writes."""

from __future__ import annotations

from functools import partial

import jax

from jtrunc.base import Params, PyTree
from jtrunc.cells import Model


def sample(
    model: Model, params: Params, prompt: jax.Array, num_tokens: int, key: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Reads `prompt`, then draws tokens one by one from softmax(prediction / temperature).

    Args:
      model: of one stream of tokens (its inputs are ``(token, target)``).
      params: its parameters.
      prompt: int32, (T,), T ≥ 1.
      num_tokens: how many to draw.
      key: a typed key.
      temperature: positive; lower is more conservative.

    Returns:
      int32, (num_tokens,).

    Raises:
      ValueError: an empty prompt, or a temperature that is not positive.
    """
    if prompt.shape[0] < 1 or temperature <= 0:
        raise ValueError(
            f"sample: prompt must have a token and temperature be positive, got {prompt.shape[0]} tokens and"
            f" {temperature}"
        )
    return _sample(model, num_tokens, params, prompt, key, temperature)


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    model: Model, num_tokens: int, params: Params, prompt: jax.Array, key: jax.Array, temperature: float
) -> jax.Array:
    def read(hidden: PyTree, token: jax.Array) -> tuple[PyTree, None]:
        return model.system.transition(params.recurrent, hidden, (token, token)), None

    def write(hidden: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
        token = jax.random.categorical(key, model.predict(params, hidden) / temperature).astype(prompt.dtype)
        return read(hidden, token)[0], token

    hidden, _ = jax.lax.scan(read, model.initial_hidden(), prompt)
    return jax.lax.scan(write, hidden, jax.random.split(key, num_tokens))[1]
