"""What the viewer needs of a rollout is in its row: each token's text and log-prob."""

import pytest
import torch

from ebft.experience import token_texts
from tiny import byte_bpe_tokenizer
from training import read_rollouts, small_model, train


def test_a_run_writes_each_tokens_text_and_log_prob(tmp_path):
    train(small_model(), [{"text": "the quick brown fox jumps over the lazy dog"}], tmp_path)
    rows = [row for group in read_rollouts(tmp_path).values() for row in group]
    assert rows
    for row in rows:
        assert "".join(row["token_texts"]) == row["completion"]
        assert len(row["token_texts"]) == len(row["token_log_probs"]) == len(row["token_ids"])
        assert sum(row["token_log_probs"]) == pytest.approx(row["log_prob"], rel=1e-5)


@pytest.mark.parametrize(
    "text", ["the quick  brown fox\n", "gr\u00fc\u00dfe \u65e5\u672c\u8a9e \U0001f600!", "", "a\x00<b>"]
)
def test_texts_join_to_the_completion(text):
    tokenizer = byte_bpe_tokenizer()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(token_ids, tokenizer, {})
    assert "".join(texts) == text == tokenizer.decode(token_ids)
    assert len(texts) == len(token_ids)


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = byte_bpe_tokenizer()
    token_ids = tokenizer.encode("\u65e5", add_special_tokens=False)
    assert len(token_ids) == 3, "the tests' tokenizer has no Japanese merges"
    assert token_texts(token_ids, tokenizer, {}) == ["", "", "\u65e5"]
    # Cut off inside the character, what there is of it is told at the end.
    assert token_texts(token_ids[:2], tokenizer, {}) == ["", tokenizer.decode(token_ids[:2])]


def test_random_tokens_join_to_the_completion():
    tokenizer, known = byte_bpe_tokenizer(), {}
    generator = torch.Generator().manual_seed(0)
    for row in torch.randint(len(tokenizer), (200, 12), generator=generator).tolist():
        assert "".join(token_texts(row, tokenizer, known)) == tokenizer.decode(row)


class Trimming:
    """A tokenizer that drops a text's first space, as SentencePiece's do."""

    words = (" the", " quick", " fox", "es")

    def decode(self, token_ids):
        return "".join(self.words[i] for i in token_ids).removeprefix(" ")


def test_spaces_survive_a_tokenizer_that_trims_them():
    assert token_texts([0, 1, 2, 3], Trimming(), {}) == ["the", " quick", " fox", "es"]
