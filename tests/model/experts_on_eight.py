"""A layer's experts on meshes of eight simulated devices.

Prints, per mesh, the largest relative error of a row against one device, what the devices exchange, and the
shape of a device's part of a stacked matrix.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vsurge.model import Experts, PartitionAxis, Qwen3Config, random_model
from vsurge.model.moe import experts_mlp
from vsurge.model.params import param_specs
from vsurge.model.sharding import AXIS_NAMES, Layout

from ..collectives import collectives
from ..devices import simulate_devices

CONFIG = Qwen3Config(40, 32, 48, 1, 4, 2, 16, dtype=np.dtype(np.float32), experts=Experts(16, 3, 24, True))
TP_ALONE = PartitionAxis(expert_axis="tp", mlp_intermediate_axis=None)
MESHES = {
    "ep=8": ((1, 1, 8, 1, 1), PartitionAxis()),
    "ep=2, tp=2": ((1, 1, 2, 2, 1), PartitionAxis()),
    "tp=4": ((1, 1, 1, 4, 1), PartitionAxis()),
    "fsdp=2, ep=2, sp=2": ((1, 2, 2, 1, 2), PartitionAxis()),
    "tp=8 over the experts": ((1, 1, 1, 8, 1), TP_ALONE),
}


def main() -> None:
    simulate_devices()
    layer = random_model(CONFIG, seed=0, dtype="float32").params.layers[0]
    layer = jax.tree.map(lambda array: array * 10, layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 32)), jnp.float32)
    run = jax.jit(experts_mlp, static_argnames=("config", "layout"))
    expected = np.asarray(run(layer, CONFIG, x))
    results = {}
    for name, (dims, axes) in MESHES.items():
        devices = np.array(jax.devices()[: np.prod(dims)]).reshape(dims)
        layout = Layout(Mesh(devices, AXIS_NAMES), axes)
        placed = jax.tree.map(
            lambda array, spec, layout=layout: jax.device_put(array, layout.sharding(*spec.axes)),
            layer,
            param_specs(CONFIG).layers[0],
        )
        there = jax.device_put(x, layout.sharding("tokens", None))
        program = run.lower(placed, CONFIG, there, layout=layout).compile()
        difference = np.asarray(program(placed, there)) - expected
        errors = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
        results[name] = {
            "error": float(errors.max()),
            "tokens": there.addressable_shards[0].data.shape[0],
            "sent": [[*key, count] for key, count in collectives(program).items()],
            "shard": list(placed.gate_proj.addressable_shards[0].data.shape),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
