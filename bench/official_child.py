"""Measures the official JAX implementation from a checkout of it, in a process of its own without torch.

Nothing of it is copied: its configuration is composed and its model run as its own train.py does, forward only.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MOST_RUNS = 5
LONG_RUN = 2.0


def main() -> None:
    """Reads a job (JSON) from stdin, writes its result (JSON) to stdout."""
    job = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    json.dump(measure(**job), lines)
    lines.flush()


def measure(path: str, experiment: str, length: int, tokens: str, weights: str) -> dict[str, Any]:
    """Seconds of reading a sequence, its inner steps included, and the mean loss of its tokens.

    Args:
        path: the checkout. experiment: which of its experiments has the model, without the sequence's length.
        tokens: a .npy file of (length,) tokens and of (length,) targets, one above the other.
        weights: a .safetensors file of all parameters in float32 under the names of the model's tree.
    """
    sys.path.insert(0, path)
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from hydra import compose, initialize_config_dir
    from safetensors.numpy import load_file
    from ttt.config import register_configs
    from ttt.model.data import Batch
    from ttt.model.transformer import MetaModel

    register_configs()
    with initialize_config_dir(str(Path(path, "configs").resolve()), version_base=None):
        config = compose(
            "config",
            [
                f"+experiment={experiment}",
                f"training.seq_length={length}",
                f"model.seq_len={length}",
                "training.ilr_warmup_steps=0",
            ],
        )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "state"))
    inputs, targets = (jnp.asarray(row, jnp.int32) for row in np.load(tokens))
    sequence = Batch(input_ids=inputs, target_tokens=targets, loss_masks=jnp.ones(length, jnp.float32))
    model, state = eqx.filter_jit(
        lambda: eqx.nn.make_with_state(MetaModel)(config, key=jax.random.PRNGKey(0))
    )()
    model = with_weights(model, load_file(weights))

    @eqx.filter_jit
    def read(model: Any, state: Any, sequence: Any) -> Any:
        return model.loss_for_sequence(sequence, state)[1][MetaModel.MetricType.loss]

    seconds: list[float] = []
    with mesh:
        jax.block_until_ready(read(model, state, sequence))
        while len(seconds) < MOST_RUNS and sum(seconds) < LONG_RUN:
            start = time.perf_counter()
            losses = jax.block_until_ready(read(model, state, sequence))
            seconds.append(time.perf_counter() - start)
    return {
        "runs": seconds,
        "seconds": statistics.median(seconds),
        "mean_nll": float(np.asarray(losses, np.float64).mean()),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def with_weights(model: Any, weights: dict[str, np.ndarray]) -> Any:
    """The model with these parameters; raises ValueError for one of another shape."""
    import equinox as eqx
    import jax.numpy as jnp

    def at(tree: Any, name: str) -> Any:
        for part in name.split("."):
            tree = getattr(tree, part)
        return tree

    for name, value in weights.items():
        if at(model, name).shape != value.shape:
            raise ValueError(f"{name} is {at(model, name).shape} there, {value.shape} here")
    values = [jnp.asarray(value) for value in weights.values()]
    return eqx.tree_at(lambda tree: [at(tree, name) for name in weights], model, values)


if __name__ == "__main__":
    main()
