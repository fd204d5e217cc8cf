"""Runs of the training loop that take a moment: a small model on a small text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_model import CONFIG
from torch import Tensor

from engine.config import TTTConfig
from engine.training.optimizer import OptimizerOptions
from engine.training.options import DatasetOptions
from engine.training.run import Run

MODEL = TTTConfig.from_dict(CONFIG.to_dict() | {"vocab_size": 256, "bos_token_id": None})
WORDS = ("the", "window", "slides", "while", "weights", "remember", "what", "it", "has", "forgotten")


def write_text(folder: Path, files: int = 40) -> Path:
    """Files of words in an order that depends on the file."""
    folder.mkdir(parents=True)
    for index in range(files):
        order = torch.randint(len(WORDS), (60,), generator=torch.Generator().manual_seed(index)).tolist()
        (folder / f"{index:03}.txt").write_text(" ".join(WORDS[i] for i in order), encoding="utf-8")
    return folder


def run(folder: Path, **changes: Any) -> Run:
    """Six steps of four sequences of three mini-batches, on the text in `folder`/text, written on demand."""
    text = folder / "text"
    if not text.exists():
        write_text(text)
    base = Run(
        model=MODEL,
        exp_name="small",
        log_dir=folder / "log",
        checkpoint_dir=folder / "checkpoints",
        resume_checkpoint_dir=None,
        resume_step=None,
        load_part="none",
        eval_mode=False,
        total_steps=6,
        break_step=None,
        save_milestone_freq=0,
        seq_length=3 * MODEL.mini_batch_size,
        global_batch_size=4,
        accum_steps=1,
        eval_batch_size=8,
        model_seed=0,
        data_seed=0,
        dataset=DatasetOptions("text", text, "train", "val", None, False),
        optimizer=OptimizerOptions(lr=1e-2, warmup_steps=2, decay_steps=6),
        wandb=None,
        truncate_steps=None,
        method="auto",
        checkpoint_blocks=None,
        device="cpu",
        backend=None,
        param_dtype="float32",
        raw={},
    )
    return replace(base, **changes)


def state(run: Run, step: int) -> dict[str, Tensor]:
    """The model that a run left behind after `step` steps."""
    from engine.model import TTTModel
    from engine.training import checkpoint

    folder = run.log_dir.parent / f"exported-{step}"
    checkpoint.export(run.checkpoint_dir, step, folder)
    return TTTModel.from_pretrained(folder).state_dict()
