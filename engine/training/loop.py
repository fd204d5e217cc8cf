"""Training: one outer step after the other, from the configuration to the last checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, cast

import torch

from engine.config import DTYPES
from engine.data import Batches
from engine.inner import learning_rate as inner_rate
from engine.loss import DEFAULT_METHOD, Method
from engine.model import TTTModel
from engine.training import checkpoint, distributed
from engine.training.dataset import open_sequences
from engine.training.distributed import World
from engine.training.evaluation import evaluate
from engine.training.interruption import Interruption
from engine.training.log import TrainLog
from engine.training.optimizer import clip_, learning_rate, make_optimizer
from engine.training.run import AUTO, Run

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
_KEPT_CHECKPOINTS = 2


def train(run: Run) -> int:
    """Trains as `run` says, from its last checkpoint where there is one; returns the exit status.

    Status 130 after an interruption (SIGINT or SIGTERM), before which the step under way is finished and a
    checkpoint written. Raises `ValueError` for what cannot be trained, a loss that is not finite included.
    """
    world = distributed.setup(run.device)
    try:
        status, done = _Training(run, world).run()
    finally:
        distributed.cleanup()
    if done == run.total_steps and not run.eval_mode and world.rank == 0:
        # By one process alone, whatever the number of those that wrote the checkpoint.
        folder = run.log_dir / MODEL_FOLDER
        checkpoint.export(run.checkpoint_dir, done, folder)
        logger.info("the model is in %s", folder)
    return status


class _Training:
    def __init__(self, run: Run, world: World) -> None:
        self._run, self._world = run, world
        config = run.model
        share = world.size * run.accum_steps
        if run.global_batch_size % share:
            raise ValueError(
                f"training.global_batch_size={run.global_batch_size} is not accepted: it must be a multiple of "
                f"{world.size} processes times training.accum_steps={run.accum_steps}"
            )
        self._rows = run.global_batch_size // world.size
        sequences = open_sequences(run.dataset, run.dataset.split, config, run.seq_length)
        self._batches = Batches(sequences, run.global_batch_size, run.data_seed)
        # Before hours of training, not after.
        self._held_out = open_sequences(run.dataset, run.dataset.eval_split, config, run.seq_length)
        self._model = TTTModel(
            config, dtype=DTYPES[run.param_dtype], device=world.device, seed=run.model_seed
        )
        distributed.shard(self._model, world)
        self._optimizer = make_optimizer(self._model, run.optimizer)
        self._method = cast(Method, DEFAULT_METHOD if run.method == AUTO else run.method)
        self._meta = {
            "data": sequences.store.fingerprint(),
            "data_seed": run.data_seed,
            "seq_length": run.seq_length,
            "global_batch_size": run.global_batch_size,
        }
        self._last_saved: int | None = None

    def run(self) -> tuple[int, int]:
        """The exit status, and how many steps are done."""
        run = self._run
        start = self._restore()
        logger.info(
            "%s parameters, from step %d of %d", f"{self._model.num_parameters:,}", start, run.total_steps
        )
        if run.eval_mode or start >= run.total_steps:
            self._evaluate(start)
            return 0, start
        end = run.total_steps if run.break_step is None else min(run.total_steps, run.break_step + 1)
        with (
            Interruption() as interruption,
            TrainLog(run.log_dir, run.total_steps, run.wandb, resume_step=start) as log,
        ):
            for step in range(start, end):
                began = time.perf_counter()
                values = self._step(step)
                log.record(step + 1, seconds=time.perf_counter() - began, **values)
                stop = interruption.asked(self._world)
                if stop or self._is_milestone(step + 1) or step + 1 == end:
                    self._save(step + 1)
                if stop:
                    logger.warning("interrupted after step %d; the same command goes on from there", step + 1)
                    return 130, step + 1
        if end == run.total_steps:
            self._evaluate(end)
        return 0, end

    def _restore(self) -> int:
        """The step to start with: after this run's own last checkpoint, else with what it is to start from."""
        run = self._run
        own = checkpoint.latest(run.checkpoint_dir)
        if own is not None:
            self._load(run.checkpoint_dir, own, everything=not run.eval_mode)
            self._last_saved = own
            return own
        if run.resume_checkpoint_dir is None:
            if run.eval_mode:
                raise ValueError(f"training.eval_mode: there is no checkpoint in {run.checkpoint_dir}")
            return 0
        step = checkpoint.latest(run.resume_checkpoint_dir) if run.resume_step is None else run.resume_step
        if step is None:
            raise ValueError(
                f"training.load_part={run.load_part}: there is no checkpoint in {run.resume_checkpoint_dir}"
            )
        everything = run.load_part == "all" and not run.eval_mode
        self._load(run.resume_checkpoint_dir, step, everything=everything)
        return step if everything or run.eval_mode else 0

    def _load(self, folder: Any, step: int, *, everything: bool) -> None:
        logger.info("loading %s of step %d from %s", "all" if everything else "parameters", step, folder)
        checkpoint.load(
            folder,
            step,
            model=self._model,
            optimizer=self._optimizer if everything else None,
            expected_meta=self._meta if everything else {},
        )

    def _step(self, step: int) -> Mapping[str, Any]:
        """One update; what there is to tell of it."""
        run, world = self._run, self._world
        rows = slice(world.rank * self._rows, (world.rank + 1) * self._rows)
        tokens = self._batches.batch(step, rows).to(world.device)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=world.device)
        for part in tokens.chunk(run.accum_steps):
            total += self._learn(part, step)
        norm = clip_(self._model.parameters(), run.optimizer.clip)
        loss_value = distributed.mean(total.item(), world)
        self._check_finite(step, loss_value, norm.item())
        rate = learning_rate(run.optimizer, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return {
            "loss": loss_value,
            "grad_norm": norm.item(),
            "lr": rate,
            "inner_lr": inner_rate(run.model, step) if run.model.suffix_layers else 0.0,
            "tokens": run.global_batch_size * run.seq_length,
        }

    def _learn(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """Adds a micro-batch's share of the gradient; returns its share of the loss.

        On its own, so that nothing of a micro-batch is still there when the next one is read.
        """
        run = self._run
        loss = self._model.loss(
            tokens,
            step,
            backend=run.backend,
            method=self._method,
            truncate_steps=run.truncate_steps,
            checkpoint_blocks=run.checkpoint_blocks is not False,
        ).loss
        share = loss / run.accum_steps
        share.backward()
        return share.detach()

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        good = (
            "there is no checkpoint yet"
            if self._last_saved is None
            else f"the last good checkpoint is that of step {self._last_saved} in {self._run.checkpoint_dir}"
        )
        raise ValueError(
            f"step {step}: the loss is {loss} and its gradient's norm {norm}; the batch has the sequences "
            f"{self._batches.indices(step)} of {self._batches.sequences.store.name}; {good}"
        )

    def _is_milestone(self, done: int) -> bool:
        frequency = self._run.save_milestone_freq
        return frequency > 0 and done % frequency == 0

    def _save(self, done: int) -> None:
        run = self._run
        checkpoint.save(
            run.checkpoint_dir, step=done, model=self._model, optimizer=self._optimizer, meta=self._meta
        )
        self._last_saved = done
        checkpoint.prune(
            run.checkpoint_dir, keep=_KEPT_CHECKPOINTS, milestone=run.save_milestone_freq or None
        )

    def _evaluate(self, done: int) -> None:
        run, world = self._run, self._world

        def nll(tokens: torch.Tensor) -> torch.Tensor:
            return self._model.loss(tokens, backend=run.backend).nll

        self._optimizer.zero_grad(set_to_none=True)
        # No more than a step takes, so that what had memory enough to train has enough here.
        at_a_time = min(run.eval_batch_size // world.size, self._rows // run.accum_steps)
        result = evaluate(
            nll,
            run.model,
            self._held_out,
            max(1, at_a_time),
            world.device,
            rank=world.rank,
            world_size=world.size,
            show=world.rank == 0,
        )
        if world.rank == 0:
            path = run.log_dir / f"evaluation-{done:08d}.json"
            run.log_dir.mkdir(parents=True, exist_ok=True)
            result.write(path, step=done, model=run.model.name, data=self._held_out.store.name)
            logger.info("loss on %d held-out sequences: %.4f (%s)", result.sequences, result.loss, path)
