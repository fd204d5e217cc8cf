"""Measures the official JAX implementation from a checkout of it, in a process of its own without torch.

Nothing of it is copied: its configuration is composed and its model run as its own evaluation does, which calls
`loss_for_sequence` too. `ttt.model.loop`, where that call is, wants its data loader and loggers besides.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MOST_RUNS = 5
LONG_RUN = 2.0
WARM_UP = 2
"""Runs that are not timed: the first compiles, the second has what XLA has made of a program by running it."""
WAYS: dict[str, tuple[str, ...]] = {
    "as published": (),
    # Attention by cuDNN in the blocks with fast weights too. Training cannot have it, as it has no second derivative.
    "force_flash": ("model.force_flash=True",),
}
"""Its own settings that make a difference to reading; those of recomputation make none without an outer gradient."""


def main() -> None:
    """Reads a job (JSON) from stdin, writes its result (JSON) to stdout, or only a `reason` where there is none."""
    job = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    found: dict[str, Any]
    try:
        found = measure(**job)
    except Exception as error:
        found = {"reason": in_a_line(error)}
    json.dump(found, lines)
    lines.flush()


def in_a_line(error: Exception) -> str:
    """What the error is, without the notes that JAX adds to it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def measure(path: str, experiment: str, platform: str, limit: float, **job: Any) -> dict[str, Any]:
    """What each of `WAYS` has come to: `read`'s result, or the `reason` why there is none.

    Args:
        path: the checkout. experiment: which of its experiments has the model, without the sequence's length.
        platform: of JAX, where it runs. limit: seconds; no further way is begun where it might take longer.
        job: further arguments of `read`.

    Raises RuntimeError where JAX has no such platform, on which it would use the processor unasked.
    """
    start = time.perf_counter()
    sys.path.insert(0, path)
    import jax

    try:
        device = jax.devices(platform)[0]
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(f"JAX has no {platform} device here ({in_a_line(error)})") from error
    from hydra import initialize_config_dir
    from ttt.config import register_configs

    register_configs()
    ways: dict[str, dict[str, Any]] = {}
    with initialize_config_dir(str(Path(path, "configs").resolve()), version_base=None):
        for name, overrides in WAYS.items():
            if ways and 2 * (time.perf_counter() - start) > limit:
                ways[name] = {"reason": "no time left"}
                continue
            try:
                ways[name] = read([f"+experiment={experiment}", *overrides], **job)
            except Exception as error:
                ways[name] = {"reason": in_a_line(error)}
    return {"jax": jax.__version__, "device": device.device_kind, "ways": ways}


def read(overrides: list[str], length: int, dtype: str, tokens: str, weights: str) -> dict[str, Any]:
    """Seconds of reading a sequence, its inner steps included, and the mean loss of every mini-batch.

    Args:
        overrides: of its configuration. dtype: in which it computes.
        tokens: a .npy file of (length,) tokens and of (length,) targets, one above the other.
        weights: a .safetensors file of all parameters in float32 under the names of the model's tree.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from hydra import compose
    from safetensors.numpy import load_file
    from ttt.model.data import Batch
    from ttt.model.transformer import MetaModel

    own = [f"training.seq_length={length}", "training.ilr_warmup_steps=0", f"model.compute_dtype={dtype}"]
    config = compose("config", [*overrides, *own])
    # Its table of rotations has twice as many rows. Cached keys have positions up to the window and a mini-batch.
    config.model.seq_len = max(length, config.model.sliding_window_size)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "state"))
    inputs, targets = (jnp.asarray(row, jnp.int32) for row in np.load(tokens))
    sequence = Batch(input_ids=inputs, target_tokens=targets, loss_masks=jnp.ones(length, jnp.float32))
    model, state = eqx.filter_jit(
        lambda: eqx.nn.make_with_state(MetaModel)(config, key=jax.random.PRNGKey(0))
    )()
    model = with_weights(model, load_file(weights))

    @eqx.filter_jit
    def losses(model: Any, state: Any, sequence: Any) -> Any:
        return model.loss_for_sequence(sequence, state)[1][MetaModel.MetricType.loss]

    seconds: list[float] = []
    with mesh:
        for _ in range(WARM_UP):
            jax.block_until_ready(losses(model, state, sequence))
        while len(seconds) < MOST_RUNS and sum(seconds) < LONG_RUN:
            start = time.perf_counter()
            found = jax.block_until_ready(losses(model, state, sequence))
            seconds.append(time.perf_counter() - start)
    return {"runs": seconds, "losses": np.asarray(found, np.float64).tolist()}


def with_weights(model: Any, weights: dict[str, np.ndarray]) -> Any:
    """The model with these parameters; raises ValueError where its own are others or of other shapes."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    def at(tree: Any, name: str) -> Any:
        for part in name.split("."):
            tree = getattr(tree, part, None)
        return tree

    for name, value in weights.items():
        there = getattr(at(model, name), "shape", None)
        if there != value.shape:
            raise ValueError(f"{name} is {there} there, {value.shape} here")
    parameters = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    if len(parameters) != len(weights):
        raise ValueError(f"it has {len(parameters)} parameters there, {len(weights)} here")
    values = [jnp.asarray(value) for value in weights.values()]
    return eqx.tree_at(lambda tree: [at(tree, name) for name in weights], model, values)


if __name__ == "__main__":
    main()
