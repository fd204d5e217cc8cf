"""A model's weights: how they start, their fingerprint, and saving and loading them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import TTTConfig, TTTModel
from engine.data import Sequences, open_store
from engine.files import atomic_write
from engine.pretrained import CONFIG_FILE, WEIGHTS_FILE

CONFIG = TTTConfig.preset("tiny", hidden_size=24, intermediate_size=20, num_layers=3, num_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TTTModel(CONFIG, seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same_weights(a: TTTModel, b: TTTModel) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_parameters_have_the_documented_names_and_shapes() -> None:
    model = TTTModel(TTTConfig.preset("tiny", tie_embeddings=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["embed.weight"] == shapes["head.weight"] == (256, 192)
    assert shapes["blocks.0.w_qkv"] == (576, 192)
    assert shapes["blocks.0.q_norm"] == (64,)
    assert shapes["blocks.3.fast_gate"] == shapes["blocks.3.w_up"] == (384, 192)
    assert shapes["blocks.3.fast_down"] == (192, 384)
    assert "blocks.2.fast_gate" not in shapes
    assert model.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_and_fast_matrices_are_never_rounded(dtype: torch.dtype) -> None:
    model = TTTModel(CONFIG, dtype=dtype)
    master = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        kept = parameter.ndim == 1 or ".fast_" in name
        assert parameter.dtype == (master if kept else dtype), name


def test_refuses_a_dtype() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.int8.*float32, bfloat16"):
        TTTModel(CONFIG, dtype=torch.int8)


def test_weights_depend_on_the_seed_only() -> None:
    first = TTTModel(CONFIG, seed=1)
    torch.manual_seed(5)
    assert same_weights(first, TTTModel(CONFIG, seed=1))
    assert not same_weights(first, TTTModel(CONFIG, seed=2))
    rounded = TTTModel(CONFIG, seed=1, dtype=torch.bfloat16)
    assert torch.equal(rounded.blocks[0].w_qkv, first.blocks[0].w_qkv.bfloat16())


def test_initial_weights_have_the_documented_spread() -> None:
    model = TTTModel(TTTConfig.preset("tiny"))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, tie: bool) -> None:
    config = TTTConfig.from_dict(CONFIG.to_dict() | {"tie_embeddings": tie})
    model = TTTModel(config, dtype=dtype, seed=4)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = TTTModel.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == config
    assert same_weights(model, loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_loading_in_another_dtype(folder: Path) -> None:
    loaded = TTTModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert same_weights(loaded, TTTModel(CONFIG, seed=3, dtype=torch.bfloat16))


def test_failed_save_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("engine.pretrained.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        TTTModel(TTTConfig.preset("tiny")).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is not a folder"):
        TTTModel(CONFIG).save_pretrained(tmp_path / "file")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def tensor_set(**values: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, change in values.items():
            tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors")

    return damage


def without_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed.weight"]
    save_file(tensors, folder / "model.safetensors")


def config_set(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 100), r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: there is no such file"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: there is no such file"),
        (lambda f: (f / "config.json").write_text('{"name": '), r"config\.json: Expecting value"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: expected a JSON object, found list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: .*utf-8"),
        (config_set(unheard_of=1), r"config\.json: unknown config fields: unheard_of"),
        (config_set(num_heads=5), r"config\.json: hidden_size=24 is not accepted"),
        (config_set(num_layers=4), r"missing tensors: .*blocks\.3\.w_qkv"),
        (config_set(tie_embeddings=False), r"missing tensors: head\.weight"),
        (config_set(suffix_layers=0), r"no place for: .*blocks\.2\.fast_gate"),
        (config_set(vocab_size=257), r"embed\.weight is \(256, 24\).*expected \(257, 24\)"),
        (without_embedding, r"missing tensors: embed\.weight"),
        (tensor_set(final_norm=Tensor.half), r"final_norm is .*float16; expected"),
        (tensor_set(**{"embed.weight": Tensor.int}), r"embed\.weight is torch\.int32; expected"),
        (tensor_set(**{"blocks.0.w_o": Tensor.half}), r"w_o is .*float16; expected"),
    ],
)
def test_damage_is_refused_with_the_reason(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        TTTModel.from_pretrained(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder.* model in the package: tiny-stdlib"):
        TTTModel.from_pretrained(tmp_path / "nowhere")


def test_the_trained_model_of_the_package_learns_as_it_reads() -> None:
    """Of held-out files; beyond its window by more than it does with fast weights that stay what they are."""
    model = TTTModel.from_pretrained("tiny-stdlib")
    frozen = TTTModel.from_pretrained("tiny-stdlib")
    frozen.config = replace(frozen.config, inner_lr=0.0)
    sequences = Sequences(open_store("stdlib", None, "val", None), 1024)
    tokens = sequences.read(range(0, len(sequences), 50))

    def nll(reader: TTTModel, beyond: int) -> float:
        return reader.prefill(tokens, reader.init_state(len(tokens))).nll[:, beyond:].mean().item()

    window = model.config.window
    assert window is not None
    assert nll(model, 4 * window) < 1.25
    assert nll(model, 4 * window) < nll(frozen, 4 * window) - 0.1


def test_a_folder_goes_before_a_model_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TTTModel(CONFIG).save_pretrained(tmp_path / "tiny-stdlib")
    monkeypatch.chdir(tmp_path)
    assert TTTModel.from_pretrained("tiny-stdlib").config.hidden_size == CONFIG.hidden_size


def test_fingerprint_follows_weights_and_config(folder: Path) -> None:
    model = TTTModel(CONFIG, seed=3)
    first = model.fingerprint()
    assert first == model.fingerprint() == TTTModel.from_pretrained(folder).fingerprint()
    assert TTTModel(CONFIG, seed=4).fingerprint() != first
    other = TTTConfig.from_dict(CONFIG.to_dict() | {"rope_theta": 1e4})
    assert TTTModel(other, seed=3).fingerprint() != first
    with torch.no_grad():
        model.blocks[1].w_down[3, 2] += 1
    changed = model.fingerprint()
    assert changed != first
    with torch.no_grad():
        model.blocks[1].w_down.copy_(TTTModel(CONFIG, seed=3).blocks[1].w_down)
    assert model.fingerprint() == first
    model.config = other
    assert model.fingerprint() == TTTModel(other, seed=3).fingerprint()
    model.final_norm = torch.nn.Parameter(torch.zeros_like(model.final_norm))
    assert model.fingerprint() not in (first, changed)


def test_fingerprint_after_a_detour_through_another_dtype() -> None:
    model = TTTModel(CONFIG)
    first = model.fingerprint()
    assert model.bfloat16().float().fingerprint() != first


def test_fingerprint_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TTTModel(CONFIG)
    first = model.fingerprint()
    monkeypatch.setattr(TTTModel, "_hash", lambda *_: pytest.fail("computed again"))
    assert model.fingerprint() == first


def test_fingerprint_of_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = TTTModel(CONFIG, seed=3)
        assert model.fingerprint() == TTTModel(CONFIG, seed=3).fingerprint()


def test_atomic_write_keeps_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "atomic") as path:
        path.write_text("y")
    assert (tmp_path / "atomic").read_text() == "y"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
