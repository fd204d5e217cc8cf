"""`python -m engine generate`, and generation with the real model."""

from pathlib import Path

import pytest
import torch

from engine import TTTConfig, TTTModel
from engine.__main__ import main
from engine.generate import generate

GREEDY = ["generate", "--preset", "tiny", "--temperature", "0"]


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*GREEDY, *arguments]) == 0
    return capsys.readouterr().out


def test_it_writes_what_generate_returns(capsys: pytest.CaptureFixture[str]) -> None:
    ids = generate(TTTModel(TTTConfig.preset("tiny")), list(b"import os"), max_new_tokens=12, temperature=0)
    text = bytes(ids.tolist()).decode("utf-8", errors="replace")
    assert main([*GREEDY, "--prompt", "import os", "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "random weights" in err


def test_a_saved_model_and_a_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TTTModel(TTTConfig.preset("tiny")).save_pretrained(tmp_path / "model")
    (tmp_path / "prompt").write_text("import os", encoding="utf-8")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--prompt-file",
        str(tmp_path / "prompt"),
        "--temperature",
        "0",
    ]
    assert main(["generate", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == written(capsys, "--prompt", "import os")
    assert err == ""


def test_a_loaded_state_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(tmp_path / "state.safetensors")
    model = TTTModel(TTTConfig.preset("tiny"))
    state = model.init_state()
    first = generate(model, list(b"ab" * 80), max_new_tokens=4, temperature=0, state=state)
    second = generate(model, list(b"c"), max_new_tokens=8, temperature=0, state=state)
    out = written(capsys, "--prompt", "ab" * 80, "--max-new-tokens", "4", "--save-state", saved)
    assert out == bytes(first.tolist()).decode("utf-8", errors="replace") + "\n"
    out = written(capsys, "--prompt", "c", "--max-new-tokens", "8", "--load-state", saved)
    assert out == bytes(second.tolist()).decode("utf-8", errors="replace") + "\n"


def test_generation_takes_an_inner_step_when_a_mini_batch_is_full() -> None:
    model = TTTModel(TTTConfig.preset("tiny", mini_batch_size=8))
    state = model.init_state()
    ids = generate(model, [1, 2, 3], max_new_tokens=20, temperature=0, state=state)
    read = torch.cat((torch.tensor([1, 2, 3]), ids))[None]
    whole = model.init_state()
    expected = model.prefill(read, whole).logits
    going_on = model.decode(ids[-1:], state)
    torch.testing.assert_close(going_on, model.decode(ids[-1:], whole), atol=2e-5, rtol=0)
    assert not torch.allclose(expected, model.prefill(read[:, -3:], model.init_state()).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "huge", "--prompt", "a"], "huge"),
        (["--preset", "tiny", "--prompt", ""], "prompt"),
        (["--preset", "tiny", "--prompt-file", "missing"], "missing"),
        (["--model", "missing", "--prompt", "a"], "missing"),
        (["--preset", "tiny", "--prompt", "a", "--tokenizer", "missing"], "missing"),
        (["--preset", "tiny", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--preset", "tiny", "--prompt", "a", "--top-p", "0"], "top_p"),
        (["--preset", "tiny", "--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["--preset", "tiny", "--prompt", "a", "--backend", "abacus"], "abacus"),
        (["--preset", "tiny", "--prompt", "a", "--device", "nothing"], "nothing"),
        (["--preset", "tiny", "--prompt", "a", "--load-state", "missing"], "missing"),
        (["--preset", "tiny", "--prompt", "a", "--save-state", "missing/state"], "missing"),
        (["--preset", "tiny", "--prompt", "a", "--tokenizer", "llama3"], "tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if "random weights" not in line]) == 1
    assert not list(tmp_path.iterdir())
