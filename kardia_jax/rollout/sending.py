"""Parameters on their way to a sampler that has devices of its own (``mesh.sampler``), before each rollout.

    send = Sender(mesh, cast)
    here = send(params)          # the same tree, laid out on the sampler's mesh by the table of ``sharding.py``

They are cast where they lie, so that in bfloat16 half the bytes travel. Under an adapter nothing is cast, since the
sampler adds A B to the base in float32 before it casts the sum; and what is the same array as last time, the frozen
base, is not sent again.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from kardia_jax.model.sharding import shardings
from kardia_jax.types import Params


class Sender:
    """Sends parameters to a mesh; ``cast`` makes them of the compute type."""

    def __init__(self, mesh: Mesh, cast: Callable[[Params], Params]):
        self._mesh, self._cast = mesh, cast
        self._sent: dict[int, tuple[Array, Array]] = {}

    def __call__(self, params: Params) -> Params:
        places = shardings(params, self._mesh)
        if not any(path[-1].key == "lora_a" for path, _ in jax.tree_util.tree_leaves_with_path(params)):
            return jax.device_put(self._cast(params), places)
        before, self._sent = self._sent, {}

        def send(leaf: Array, place: NamedSharding) -> Array:
            # The pair keeps the array alive, so no other one has its id.
            known = before.get(id(leaf))
            copy = jax.device_put(leaf, place) if known is None else known[1]
            self._sent[id(leaf)] = leaf, copy
            return copy

        return jax.tree.map(send, params, places)
