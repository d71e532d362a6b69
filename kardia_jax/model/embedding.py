"""Rows of the input table, on a mesh without ever gathering the table.

Each device keeps some rows and some columns of the table [V, D]. It looks up its columns for the tokens of every device
that shares them, 0 where another one has the row, and then columns change place for rows of the batch: with the table
over 2 (columns) and 4 tokens,

    device 0     columns 0-1 of tokens a b c d     ->     all columns of a b
    device 1     columns 2-3 of tokens a b c d     ->     all columns of c d

What moves grows with the tokens, not with the table. The gradient takes the same way back.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kardia_jax.model.sharding import Column, Cut, active, cut, first_row


def looked_up(
    table: Float[Array, "V D"], tokens: Int[Array, "P ..."], dtype: DTypeLike, column: Column = "stored"
) -> Float[Array, "P ... D"]:
    """The table's rows of these tokens, in this type; ``column`` is that of the table's place in ``TABLE``."""
    mesh, where = active(), cut(column)
    if mesh is None or tokens.shape[0] % math.prod(mesh.shape[axis] for axis in where.rows):
        return table[tokens].astype(dtype)
    rows = PartitionSpec(where.rows)
    specs = PartitionSpec(where.vocabulary, where.width), rows
    here = functools.partial(_looked_up_here, where, jnp.dtype(dtype))
    return jax.shard_map(here, in_specs=specs, out_specs=rows)(table, tokens)


def _looked_up_here(where: Cut, dtype: DTypeLike, table: Array, tokens: Array) -> Array:
    if where.width:
        tokens = jax.lax.all_gather(tokens, where.width, tiled=True)
    place = tokens - first_row(len(table), where.vocabulary)
    found = table.at[jnp.clip(place, 0, len(table) - 1)].get(mode="promise_in_bounds")
    x = jnp.where(((place >= 0) & (place < len(table)))[..., None], found, 0).astype(dtype)
    if where.width:
        x = jax.lax.all_to_all(x, where.width, split_axis=0, concat_axis=x.ndim - 1, tiled=True)
    return jax.lax.psum(x, where.vocabulary) if where.vocabulary else x
