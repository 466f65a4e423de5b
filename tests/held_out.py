"""Held-out documents and models for the tests of their measures: random ones, and text that a model wrote itself."""

import math
from dataclasses import replace

import torch
from datasets import Dataset
from torch import Tensor

from ebft import BlockLayout
from ebft.data import tokenize_documents
from ebft.evaluation.diversity import until_end
from ebft.rollout import sample_rollouts
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

EOS, OPENING, VOCABULARY = 2, range(3, 11), 61  # of `transitions`; the tokens behind the opening are the body


def model_and_network():
    """A model and the one whose features it is compared by."""
    return tiny_model(seed=0, scale=3.0), tiny_model(seed=1, scale=3.0)


def raw_documents() -> list[dict]:
    """Raw text of unequal lengths; the last is too short for a context."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 61, (n,), generator=generator).tolist()} for n in (17, 30, 9, 5)]
    return list(tokenize_documents(Dataset.from_list(rows), byte_bpe_tokenizer(), max_length=64))


def transitions() -> Tensor:
    """Logits [V, V] of the next token by the last one: text that is not the same at its start, middle and end.

    It starts with the opening, token by token and for certain, goes on at random, and ends with a rare EOS, so that
    the cross-entropy of first words is small and that of last ones large.
    """
    table = torch.full((VOCABULARY, VOCABULARY), -20.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    body = OPENING.stop
    table[:, body:] = torch.randn(VOCABULARY, VOCABULARY - body, dtype=torch.float64, generator=generator) * 2
    table[:, EOS] = table[:, body:].logsumexp(-1) - 5
    for token in OPENING[:-1]:
        table[token] = -20.0
        table[token, token + 1] = 0.0
    return table


@torch.no_grad()
def markov_model(table: Tensor):
    """A causal LM that looks at the last token alone: its next one has the logits `table[last]`, [V, V]."""
    width = 64 * math.ceil(len(table) / 64)
    model = tiny_model("llama", vocab_size=len(table), hidden_size=width)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(len(table), width))
    model.lm_head.weight.zero_()[:, : len(table)] = table.T / width**0.5  # the norm makes a 1 of `width` a root of it
    return model


def own_text(temperature: float):
    """The model of `transitions` and 300 documents that it wrote at a temperature, of at most 41 tokens."""
    model, start = markov_model(transitions()), torch.full((300, 2), OPENING.start)
    layout = replace(BlockLayout(2, 1, 1, 1), completion_length=40)
    options = dict(generator=torch.Generator().manual_seed(1), temperature=temperature)
    written = sample_rollouts(model, start, layout, 1, **options).tokens[:, 0, 0].tolist()
    rows = [[OPENING.start, *until_end(text, [EOS])] for text in written]
    rows = [[*row, EOS] if len(row) < 41 else row for row in rows]
    return model, [
        {"input_ids": row, "completion_mask": [1] * len(row), "loss_mask": [1] * len(row), "document_id": i}
        for i, row in enumerate(rows)
    ]
