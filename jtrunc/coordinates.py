"""Float leaves of a tree as one real vector: the space in which influences live."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.trees import partition_inexact


class Coordinates(NamedTuple):
    """How the float leaves of a tree lie in a vector of real numbers.

    Leaf by leaf in the order of the tree, raveled; a complex leaf gives its real part, then its imaginary
    part. Integer and key leaves have no coordinates. As everywhere in jax, the cotangent of x + iy is stored
    as gₓ − i g_y, so that df = Re(cotangent · tangent).

    Attributes:
      leaves: shape and dtype of each float leaf.
      dtype: real dtype of vectors: wide enough for every leaf, and at least float32.

    Example:

      >>> space = Coordinates.of({"a": jnp.float32(1), "z": jnp.complex64(2 + 3j), "count": jnp.int32(7)})
      >>> space.size
      3
      >>> space.tangent_vector([jnp.float32(1), jnp.complex64(2 + 3j)]).tolist()
      [1.0, 2.0, 3.0]
      >>> space.cotangent_vector([jnp.float32(1), jnp.complex64(2 + 3j)]).tolist()
      [1.0, 2.0, -3.0]
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    dtype: Any

    @classmethod
    def of(cls, tree: PyTree) -> Coordinates:
        """The coordinates of a tree of arrays."""
        floats = [as_aval(leaf) for leaf in partition_inexact(tree)[0]]
        dtype = jnp.dtype(jnp.float32)
        for leaf in floats:
            dtype = jnp.promote_types(dtype, jnp.finfo(leaf.dtype).dtype)
        return cls(tuple(floats), dtype)

    @property
    def size(self) -> int:
        """S, the number of real coordinates."""
        return sum(leaf.size * (1 + _is_complex(leaf)) for leaf in self.leaves)

    def tangent_vector(self, leaves: list[jax.Array]) -> jax.Array:
        """(S,) from tangents of the float leaves."""
        return self._vector(leaves, imaginary_sign=1)

    def cotangent_vector(self, leaves: list[jax.Array]) -> jax.Array:
        """(S,) from cotangents of the float leaves."""
        return self._vector(leaves, imaginary_sign=-1)

    def tangents(self, vector: jax.Array) -> list[jax.Array]:
        """Tangents of the float leaves, in their dtypes, from (S,)."""
        return self._leaves(vector, imaginary_sign=1)

    def cotangents(self, vector: jax.Array) -> list[jax.Array]:
        """Cotangents of the float leaves, in their dtypes, from (S,)."""
        return self._leaves(vector, imaginary_sign=-1)

    def _vector(self, leaves: list[jax.Array], imaginary_sign: int) -> jax.Array:
        parts = []
        for leaf, aval in zip(leaves, self.leaves, strict=True):
            if _is_complex(aval):
                parts += [leaf.real.ravel(), imaginary_sign * leaf.imag.ravel()]
            else:
                parts.append(leaf.ravel())
        parts = [part.astype(self.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros(0, self.dtype), *parts])

    def _leaves(self, vector: jax.Array, imaginary_sign: int) -> list[jax.Array]:
        leaves, start = [], 0
        for aval in self.leaves:
            parts = []
            for _ in range(1 + _is_complex(aval)):
                parts.append(vector[start : start + aval.size].reshape(aval.shape))
                start += aval.size
            if len(parts) == 2:
                parts = [jax.lax.complex(parts[0], imaginary_sign * parts[1])]
            leaves.append(parts[0].astype(aval.dtype))
        return leaves


def as_aval(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a Python number, or of what has both."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)


def _is_complex(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)
