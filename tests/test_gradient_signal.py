"""Signal and noise of gradients: against gradients of known mean and covariance, and end to end on a tiny model."""

import json

import pytest
import torch

from benchmarks.gradient_signal import ARMS, between, cosine, gradients, main, signal_to_noise, with_error
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model


@pytest.fixture
def words(tmp_path):
    """Options of a short training."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    rows = [{"text": f"Number {i} is followed by {i + 1}, which is larger."} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(
            "--model_name_or_path",
            str(tmp_path / "model"),
            "--dataset_name",
            str(tmp_path / "data.jsonl"),
            "--use_cpu",
        ),
        *("--max_length", "32", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    ]


def test_known_mean_and_noise():
    torch.manual_seed(0)
    mean, other = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    mean[0], other[0], other[1] = 3.0, 1.0, 1.0  # 45 degrees apart
    a = mean + torch.randn(4000, 50, dtype=torch.float64)
    b = other + torch.randn(4000, 50, dtype=torch.float64)
    own, second = a @ a.T, b @ b.T
    assert float(between(own)) == pytest.approx(9.0, abs=0.3)
    assert float(signal_to_noise(own)) == pytest.approx(9 / 50, abs=0.02)
    assert float(cosine(own, second, a @ b.T)) == pytest.approx(0.5**0.5, abs=0.02)


def test_standard_error_is_the_spread_of_repetitions():
    torch.manual_seed(1)
    found, errors = [], []
    for _ in range(200):
        sample = 1.0 + torch.randn(20, 5, dtype=torch.float64)
        value, error = with_error(signal_to_noise, sample @ sample.T)
        found.append(value)
        errors.append(error)
    spread = torch.tensor(found).std()
    assert sum(errors) / len(errors) == pytest.approx(float(spread), rel=0.3)


def test_weights_stay_and_documents_change(words):
    rows = gradients([*words, *ARMS["SFT"]], updates=6)
    assert rows.shape[0] == 6
    assert not torch.equal(rows[0], rows[1])
    again = gradients([*words, *ARMS["SFT"]], updates=2)
    torch.testing.assert_close(rows[:2], again, rtol=0, atol=0)
    halves = gradients([*words, *ARMS["SFT"], "--gradient_accumulation_steps", "2"], updates=3)
    torch.testing.assert_close(halves[0], (rows[0] + rows[1]) / 2, rtol=0.2, atol=0.05)  # by tokens, nearly equal ones


def test_the_command_compares_all_arms(words, tmp_path, capsys):
    main([*words, "--updates", "4", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in rows] == list(ARMS)
    assert rows[0]["cosine"] == pytest.approx(1.0)
    assert all(row["rollouts"] > 0 for row in rows[1:])
    assert "EBFT, paper" in capsys.readouterr().out


def test_too_few_updates_are_refused(words):
    with pytest.raises(SystemExit):
        main([*words, "--updates", "2"])
