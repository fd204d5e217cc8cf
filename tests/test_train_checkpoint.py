"""Checkpoints: restored to the bit, whole or not there, and refused with everything that is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_model import TINIER

from engine import TTTConfig, TTTModel
from engine.training import checkpoint, run_file
from engine.training.checkpoint import export, latest, load, prune, save, steps
from engine.training.optimizer import OptimizerOptions, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = OptimizerOptions(lr=1e-2, warmup_steps=0, decay_steps=10)
META = {"data": "abc", "seed": 3, "optimizer": {"lr": 0.01, "b1": 0.9}}


class Run:
    """A model and its optimizer after some updates with made-up gradients."""

    def __init__(
        self, config: TTTConfig = TINIER, *, seed: int = 0, updates: int = 0, **options: Any
    ) -> None:
        self.model = TTTModel(config, seed=seed)
        self.optimizer = make_optimizer(self.model, replace(OPTIONS, **options))
        self.generator = torch.Generator().manual_seed(seed)
        for _ in range(updates):
            self.update()

    def update(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, directory: Path, step: int) -> Path:
        return save(directory, step=step, model=self.model, optimizer=self.optimizer, meta=META)

    def load(self, directory: Path, step: int, expected_meta: dict[str, Any] | None = None) -> dict[str, Any]:
        return load(
            directory, step, model=self.model, optimizer=self.optimizer, expected_meta=expected_meta or {}
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{key}.{name}": v.clone() for key, v in self.optimizer.state[parameter].items()}
        return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    Run(updates=2, seed=1).save(directory, 2)
    return directory


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A directory with the checkpoint of step 2."""
    return shutil.copytree(saved_once, tmp_path / "run")


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_restores_everything_to_the_bit(tmp_path: Path, decay_embeddings: bool) -> None:
    one = Run(updates=3, seed=1, decay_embeddings=decay_embeddings)
    torch.manual_seed(11)
    assert one.save(tmp_path, 3) == tmp_path / "step-00000003"
    drawn = torch.rand(4)
    other = Run(seed=2, updates=1, decay_embeddings=decay_embeddings)
    torch.manual_seed(12)
    assert other.load(tmp_path, 3, META) == META
    assert_same(one.tensors(), other.tensors())
    assert torch.equal(torch.rand(4), drawn)
    for run in (one, other):
        run.generator.manual_seed(5)
        run.update()
    assert_same(one.tensors(), other.tensors())


def test_before_the_first_update(tmp_path: Path) -> None:
    one = Run(seed=1)
    one.save(tmp_path, 0)
    other = Run(seed=2, updates=2)
    other.load(tmp_path, 0)
    for run in (one, other):
        run.generator.manual_seed(5)
        run.update()
    assert_same(one.tensors(), other.tensors())


def test_loading_keeps_the_optimizer_options(saved: Path) -> None:
    run = Run(lr=0.5, weight_decay=0.3)
    run.load(saved, 2)
    assert [(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups] == [(0.5, 0.3)]


def test_inference_sees_loaded_weights(saved: Path) -> None:
    run = Run(seed=4)
    before = run.model.fingerprint()
    run.load(saved, 2)
    assert run.model.fingerprint() == Run(updates=2, seed=1).model.fingerprint() != before


def test_parameters_only(saved: Path) -> None:
    config = replace(
        TINIER,
        name="longer",
        window=99,
        rope_theta=2e6,
        inner_lr=0.5,
        ilr_init=0.1,
        ilr_warmup_steps=7,
        compute_dtype="bfloat16",
    )
    model = TTTModel(config)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    assert load(saved, 2, model=model, optimizer=None, expected_meta={"data": "abc"}) == META
    assert torch.equal(torch.get_rng_state(), state)
    expected = Run(updates=2, seed=1).model
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_names_of_steps(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    for name in ("step-00000012", "step-00000003", ".step-00000020.tmp-ab", "step-7", "step-00000030x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000040").touch()
    assert steps(tmp_path) == [3, 12]
    assert latest(tmp_path) == 12


def test_saving_is_refused(saved: Path) -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"step-00000002 is there already"):
        run.save(saved, 2)
    with pytest.raises(ValueError, match="step=-1"):
        run.save(saved, -1)
    with pytest.raises(ValueError, match="meta: not all of it"):
        save(saved, step=3, model=run.model, optimizer=run.optimizer, meta={"x": object()})
    with pytest.raises(ValueError, match="not the model's"):
        save(saved, step=3, model=TTTModel(TINIER), optimizer=run.optimizer, meta={})
    assert [path.name for path in saved.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "moment",
    [
        (dcp.FileSystemWriter, "write_data"),
        (dcp.FileSystemWriter, "finish"),
        (run_file, "described"),
        (run_file, "write"),
        (Path, "rename"),
    ],
    ids=lambda moment: moment[1],
)
def test_failed_save_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch, moment: Any) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    run = Run(updates=3, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(*moment, full_disk)
        with pytest.raises(OSError, match="no space left"):
            run.save(saved, 3)
    assert [path.name for path in saved.iterdir()] == ["step-00000002"]
    run.save(saved, 3)
    Run().load(saved, 3)


KILLED = """
import os, signal, sys
from pathlib import Path
from engine.training import run_file
from tests_of_checkpoints import Run

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

run_file.write = killed
Run(updates=3, seed=2).save(Path(sys.argv[1]), 3)
"""


@pytest.mark.slow
def test_killed_while_saving(saved: Path, tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path / "tests_of_checkpoints.py")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(saved)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    hidden = [path for path in saved.iterdir() if path.name.startswith(".step-00000003.tmp-")]
    assert len(hidden) == 1
    assert any(hidden[0].iterdir())
    assert latest(saved) == 2
    run = Run()
    run.load(saved, 2)
    run.save(saved, 3)
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", "step-00000003"]
    Run().load(saved, 3)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def truncated(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1000])


def renamed(folder: Path) -> None:
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"abc"', '"abd"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"__0_0\.distcp has \d+ bytes, expected \d+"),
        (lambda f: flip(f / "__0_0.distcp", 20_000), r"__0_0\.distcp is damaged: its checksum"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
        (lambda f: flip(f / ".metadata", 20), r"\.metadata is damaged: its checksum"),
        (lambda f: (f / ".metadata").unlink(), r"\.metadata is missing"),
        (lambda f: (f / "run.json").unlink(), r"run\.json: there is no such file"),
        (lambda f: (f / "run.json").write_text('{"format": 1'), r"run\.json is damaged: Expecting"),
        (lambda f: (f / "run.json").write_text("[]"), r"run\.json: expected a checkpoint of format 1"),
        (lambda f: (f / "run.json").write_text('{"format": 1}'), r"run\.json is damaged: its checksum"),
        (renamed, r"run\.json is damaged: its checksum"),
        (shutil.rmtree, r"step-00000002: there is no such checkpoint; steps that have one: none"),
    ],
)
def test_damage_is_refused_and_nothing_changed(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved / "step-00000002")
    run = Run(updates=1, seed=7)
    before, state = run.tensors(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        run.load(saved, 2)
    assert_same(run.tensors(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_failed_reading_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_disk(*_: object) -> None:
        raise OSError("input/output error")

    run = Run(updates=1, seed=7)
    before = run.tensors()
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", broken_disk)
    with pytest.raises(OSError, match="step-00000002: process 0: input/output error"):
        run.load(saved, 2)
    assert_same(run.tensors(), before)


def refusal(run: Run, directory: Path, expected_meta: dict[str, Any] | None = None) -> list[str]:
    before = run.tensors()
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        run.load(directory, 2, expected_meta)
    assert_same(run.tensors(), before)
    return str(caught.value).split("cannot be loaded: ")[1].split("; ")


def test_everything_that_is_wrong_is_listed(saved: Path) -> None:
    folder = saved / "step-00000002"
    flip(folder / "__0_0.distcp", 20_000)
    run = Run(replace(TINIER, vocab_size=65, window=17), updates=1)
    found = refusal(run, saved, {"data": "xyz", "optimizer": {"lr": 0.01, "b1": 0.8}, "new": 1})
    assert found[:5] == [
        "config.vocab_size is 64, expected 65",
        "config.window is 16, expected 17",
        "meta.data is 'abc', expected 'xyz'",
        "meta.new is missing, expected 1",
        "meta.optimizer.b1 is 0.9, expected 0.8",
    ]
    assert found[5:] == ["__0_0.distcp is damaged: its checksum is another"] + [
        f"tensor {kind}.embed.weight is (64, 32) torch.float32, expected (65, 32) torch.float32"
        for kind in ("parameter", "exp_avg", "exp_avg_sq")
    ]


def test_other_names_are_listed(saved: Path) -> None:
    run = Run(replace(TINIER, num_layers=3, tie_embeddings=False), updates=1)
    found = refusal(run, saved)
    assert "config.num_layers is 2, expected 3" in found
    assert "tensor parameter.head.weight is missing" in found
    assert "tensor step.blocks.2.w_qkv is missing" in found
    assert "tensor parameter.blocks.1.fast_gate has no place in the model" in found
    assert "tensor exp_avg_sq.blocks.1.fast_gate has no place in the model" in found


def test_other_dtypes_are_listed(saved: Path) -> None:
    model = TTTModel(TINIER, dtype=torch.bfloat16)
    optimizer = make_optimizer(model, OPTIONS)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load(saved, 2, model=model, optimizer=optimizer, expected_meta={})
    assert "dtype is 'float32', expected 'bfloat16'" in str(caught.value)
    assert "parameter.blocks.0.w_o is (32, 32) torch.float32, expected (32, 32) torch.bfloat16" in str(
        caught.value
    )


def test_parameters_only_need_the_same_shapes(saved: Path) -> None:
    model = TTTModel(replace(TINIER, intermediate_size=48, norm_eps=1e-5))
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load(saved, 2, model=model, optimizer=None, expected_meta={})
    assert "config.intermediate_size is 64, expected 48" in str(caught.value)
    assert "config.norm_eps is 1e-06, expected 1e-05" in str(caught.value)
    assert "parameter.blocks.0.w_up is (64, 32)" in str(caught.value)
    assert "exp_avg" not in str(caught.value)


def test_a_renamed_checkpoint_is_refused(saved: Path) -> None:
    (saved / "step-00000002").rename(saved / "step-00000009")
    with pytest.raises(ValueError, match="step is 2, expected 9"):
        Run().load(saved, 9)


def test_prune(tmp_path: Path) -> None:
    for step in (0, 10, 15, 20, 25, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "file").touch()
    assert prune(tmp_path, keep=2, milestone=20) == [10, 15]
    assert steps(tmp_path) == [0, 20, 25, 30]
    assert prune(tmp_path, keep=1) == [0, 20, 25]
    assert prune(tmp_path, keep=1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]
    for wrong in ({"keep": 0}, {"keep": 1, "milestone": 0}):
        with pytest.raises(ValueError, match="=0 is not accepted"):
            prune(tmp_path, **wrong)


def test_prune_interrupted_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2]
    Run().save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export(tmp_path: Path, dtype: torch.dtype) -> None:
    model = TTTModel(replace(TINIER, bos_token_id=1), dtype=dtype, seed=5)
    save(tmp_path / "run", step=4, model=model, optimizer=make_optimizer(model, OPTIONS), meta={})
    export(tmp_path / "run", 4, tmp_path / "model")
    assert TTTModel.from_pretrained(tmp_path / "model").fingerprint() == model.fingerprint()
    with pytest.raises(ValueError, match="no such checkpoint; steps that have one: 4"):
        export(tmp_path / "run", 5, tmp_path / "model")


def test_run_json_says_what_it_belongs_to(saved: Path) -> None:
    run = json.loads((saved / "step-00000002" / "run.json").read_text())
    assert run["step"] == 2
    assert TTTConfig.from_dict(run["config"]) == TINIER
    assert run["meta"] == META
    assert run["versions"]["torch"] == torch.__version__
    assert set(run["files"]) == {".metadata", "__0_0.distcp"}
