"""The configuration: published shapes, the two baselines, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from engine import TTTConfig, TTTModel

PUBLISHED = {
    # hidden, layers, heads, fast MLPs, intermediate size, that of the baselines
    "125m": (768, 12, 12, 3, 1664, 2048),
    "350m": (1024, 24, 16, 6, 2304, 2816),
    "760m": (1536, 24, 16, 6, 3328, 4096),
    "1b": (2048, 24, 32, 6, 4352, 5376),
    "3b": (2560, 32, 32, 8, 5632, 6912),
}


def count(config: TTTConfig) -> int:
    return TTTModel(config, device="meta").num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    config = TTTConfig.preset(name)
    shape = (
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.suffix_layers,
        config.intermediate_size,
    )
    assert shape == PUBLISHED[name][:5]
    assert config.name == name
    assert (config.vocab_size, config.bos_token_id, config.tie_embeddings) == (128256, 128000, True)
    assert (config.window, config.mini_batch_size, config.rope_theta) == (8192, 1024, 500_000.0)
    assert (config.inner_lr, config.inner_clip, config.ilr_warmup_steps) == (1.0, 1.0, 0)


def test_tiny_reads_bytes() -> None:
    config = TTTConfig.preset("tiny")
    assert (config.vocab_size, config.bos_token_id) == (256, None)
    assert config.window is not None
    assert config.window <= 512
    assert 1_000_000 <= count(config) <= 2_000_000


def test_presets_are_listed() -> None:
    assert TTTConfig.presets() == ("tiny", *PUBLISHED)


@pytest.mark.parametrize("name", TTTConfig.presets())
def test_baselines_match_in_parameters(name: str) -> None:
    config = TTTConfig.preset(name)
    full, sliding = config.as_full_attention(8192), config.as_sliding_window()
    if name in PUBLISHED:
        assert full.intermediate_size == sliding.intermediate_size == PUBLISHED[name][5]
    assert count(full) == count(sliding) == pytest.approx(count(config), rel=0.02)
    assert (full.suffix_layers, full.window) == (0, None)
    assert (sliding.suffix_layers, sliding.window) == (0, config.window)
    assert sliding.rope_theta == full.rope_theta == 500_000.0


def test_baseline_of_a_baseline_keeps_its_size() -> None:
    sliding = TTTConfig.preset("125m").as_sliding_window()
    assert sliding.as_full_attention(8192).intermediate_size == sliding.intermediate_size


def test_sliding_window_needs_a_window() -> None:
    with pytest.raises(ValueError, match="window=None"):
        TTTConfig.preset("tiny", window=None).as_sliding_window()


@pytest.mark.parametrize(
    ("context", "theta"),
    [(1, 5e5), (8192, 5e5), (16384, 1e6), (32768, 2e6), (65536, 2e6 * 5**0.5), (131072, 1e7), (2**20, 1e7)],
)
def test_full_attention_theta_grows_with_context(context: int, theta: float) -> None:
    assert TTTConfig.preset("125m").as_full_attention(context).rope_theta == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("context", [0, -1, 8192.0])
def test_full_attention_refuses_context(context: Any) -> None:
    with pytest.raises(ValueError, match=f"context={context}"):
        TTTConfig.preset("tiny").as_full_attention(context)


def test_overrides_and_derived_sizes() -> None:
    config = TTTConfig.preset("125m", window=2048, compute_dtype="bfloat16")
    assert (config.window, config.head_dim, config.prefix_layers) == (2048, 64, 9)
    assert str(config.torch_dtype) == "torch.bfloat16"


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"preset='2b'.*tiny, 125m, 350m, 760m, 1b, 3b"):
        TTTConfig.preset("2b")


@pytest.mark.parametrize("name", TTTConfig.presets())
def test_dict_round_trip(name: str) -> None:
    config = TTTConfig.preset(name, compute_dtype="float16", tie_embeddings=False)
    assert TTTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_unknown_and_missing_fields() -> None:
    values = TTTConfig.preset("tiny").to_dict()
    with pytest.raises(ValueError, match="unknown config fields: windows"):
        TTTConfig.from_dict(values | {"windows": 3})
    del values["window"], values["hidden_size"]
    with pytest.raises(ValueError, match="missing config fields: hidden_size, window"):
        TTTConfig.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("vocab_size", 0),
        ("hidden_size", 192.0),
        ("hidden_size", 200),
        ("hidden_size", 195),
        ("intermediate_size", -1),
        ("num_layers", True),
        ("num_heads", 0),
        ("suffix_layers", -1),
        ("suffix_layers", 5),
        ("mini_batch_size", 0),
        ("window", 0),
        ("window", "all"),
        ("rope_theta", 0.0),
        ("rope_theta", float("inf")),
        ("inner_lr", -1.0),
        ("inner_clip", float("nan")),
        ("ilr_init", "1"),
        ("ilr_warmup_steps", -1),
        ("bos_token_id", 256),
        ("bos_token_id", -1),
        ("norm_eps", 0),
        ("tie_embeddings", 1),
        ("compute_dtype", "int8"),
    ],
)
def test_refused_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value!r} is not accepted: it must be "):
        dataclasses.replace(TTTConfig.preset("tiny"), **{field: value})


def test_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TTTConfig.preset("tiny").window = 3  # type: ignore[misc]
