"""Features of text: networks with a tokenizer of their own, of the policy's rollouts and references as they decode."""

import json
import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from ebft import BlockLayout, FeatureNetwork
from ebft.cli.train import run as run_train
from ebft.feature_models import load_feature_network
from ebft.text_features import DecoderReader, Text, TextFeatures
from test_completions import SETTINGS as COMPLETIONS
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model
from training import config, documents, read_metrics, small_model, train

TOKENIZER = byte_bpe_tokenizer()
TEXT = "the quick brown fox jumps over the lazy dog. def add(a, b): return a + b"
LETTERS = sorted(set(map(chr, range(32, 127))))


def letters(special: list[str], **names) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single letters."""
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], **names)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """A causal model that reads letters, with an EOS."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = letters(["<unk>", "<eos>"], eos_token="<eos>")
    tiny_model("llama", vocab_size=len(tokenizer), scale=3.0, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A BERT that reads letters, of which sentence-transformers makes a mean."""
    folder = tmp_path_factory.mktemp("encoder")
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = letters(["[UNK]", *names.values()], model_max_length=48, **names)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes)).save_pretrained(folder)
    return str(folder)


def blocks() -> tuple[torch.Tensor, torch.Tensor, BlockLayout]:
    """Two documents of real text, blocks of 3 tokens, and rollouts of which two of a group are equal."""
    ids = TOKENIZER(TEXT)["input_ids"][:24]
    input_ids = torch.tensor([ids, ids[::-1]])
    layout = BlockLayout(length=24, stride=8, context_length=4, completion_length=3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, len(TOKENIZER), (2, layout.num_blocks, 3, 3), generator=generator)
    tokens[0, 1, 2] = tokens[0, 1, 0]
    return input_ids, tokens, layout


def decoded(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def slow_decoder_features(path: str, prefix: torch.Tensor, rest: torch.Tensor, pooling: str, ended=False):
    """One text in one run of the whole model, its letters counted by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    before, whole = decoded(prefix), decoded(torch.cat([prefix, rest]))
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    known = tokenizer.get_vocab()
    ids = [known.get(letter, known["<unk>"]) for letter in whole] + [known["<eos>"]] * ended
    start = min(shared, len(ids) - 1)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    taps = torch.cat([hidden[max(1, math.floor(f * 4))][0] for f in (0.25, 0.5, 0.75)], dim=-1)
    features = normalize(taps, dim=-1)
    return features[-1] if pooling == "last_token" else features[start:].mean(0)


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling"])
def test_decoder_of_another_vocabulary(tmp_path, decoder, pooling):
    policy = small_model(dtype=torch.float32)
    phi = load_feature_network(policy, config(tmp_path, pooling=pooling), decoder, TOKENIZER)
    assert isinstance(phi, TextFeatures)
    input_ids, tokens, layout = blocks()
    generated, reference = phi(input_ids, tokens, layout)
    assert generated.shape == (2, layout.num_blocks, 3, 96) and reference.shape == (2, layout.num_blocks, 96)
    torch.testing.assert_close(phi.references(input_ids, layout), reference, rtol=0, atol=1e-6)
    for b in range(2):
        for k, anchor in enumerate(layout.anchors.tolist()):
            prefix = input_ids[b, :anchor]
            for n in range(3):
                expected = slow_decoder_features(decoder, prefix, tokens[b, k, n], pooling)
                torch.testing.assert_close(generated[b, k, n], expected, rtol=0, atol=2e-5)
            expected = slow_decoder_features(decoder, prefix, input_ids[b, anchor : anchor + 3], pooling)
            torch.testing.assert_close(reference[b, k], expected, rtol=0, atol=2e-5)
    assert torch.equal(generated[0, 1, 2], generated[0, 1, 0])  # to the last bit


def test_completion_that_ends(tmp_path, decoder):
    """One that ended has the network's own EOS behind its text, one that was cut has not; zeros if not valid."""
    phi = load_feature_network(
        small_model(dtype=torch.float32),
        config(tmp_path, **COMPLETIONS | dict(stop_token_ids=[7])),
        decoder,
        TOKENIZER,
    )
    ids = TOKENIZER("the quick brown fox")["input_ids"][:8]
    input_ids = torch.tensor([[*ids, 7], [*ids, 9]])
    starts, ends = torch.zeros(2, 2, 9, dtype=torch.bool)
    starts[:, 5], ends[0, 8] = True, True
    layout = BlockLayout.from_completions(torch.zeros(2, 9, dtype=torch.long), starts, ends, 4)
    tokens = torch.tensor([[[[50, 7, 0, 0], [51, 52, 53, 54]]], [[[0] * 4, [0] * 4]]])
    generated, reference = phi(input_ids, tokens, layout, torch.tensor([[[2, 4]], [[0, 0]]]))
    prefix = input_ids[0, :5]
    for n, (row, ended) in enumerate([(tokens[0, 0, 0, :2], True), (tokens[0, 0, 1], False)]):
        expected = slow_decoder_features(decoder, prefix, row, "last_token", ended)
        torch.testing.assert_close(generated[0, 0, n], expected, rtol=0, atol=2e-5)
    expected = slow_decoder_features(decoder, prefix, input_ids[0, 5:9], "last_token", True)
    torch.testing.assert_close(reference[0, 0], expected, rtol=0, atol=2e-5)
    assert not generated[1].any() and not reference[1].any()


def slow_encoder_features(path: str, text: str) -> torch.Tensor:
    """The mean over all tokens of BERT's last layer, of the text's last letters if there is no room for all."""
    model, tokenizer = BertModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = [tokenizer.get_vocab().get(letter, tokenizer.unk_token_id) for letter in text][-48:]
    with torch.no_grad():
        return normalize(model(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=-1)


def test_sentence_encoder(tmp_path, encoder):
    phi = load_feature_network(small_model(dtype=torch.float32), config(tmp_path), encoder, TOKENIZER)
    input_ids, tokens, layout = blocks()
    generated, reference = phi(input_ids, tokens, layout)
    assert phi.size(3) == generated.shape[-1] == 32
    for b in range(2):
        for k, anchor in enumerate(layout.anchors.tolist()):
            for n in range(3):
                text = decoded(torch.cat([input_ids[b, :anchor], tokens[b, k, n]]))
                torch.testing.assert_close(generated[b, k, n], slow_encoder_features(encoder, text), rtol=0, atol=2e-5)
            text = decoded(input_ids[b, : anchor + 3])
            torch.testing.assert_close(reference[b, k], slow_encoder_features(encoder, text), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("settings", [{}, dict(kernel="rbf"), COMPLETIONS], ids=["blocks", "rbf", "completions"])
def test_training(tmp_path, request, kind, settings):
    """A run, and its resume to the bit; what the network is stands in the checkpoint."""
    path = request.getfixturevalue(kind)
    rows = documents([23, 12, 17], prompts=[9, 5, 4], vocabulary=40)
    for row in rows:
        row["input_ids"][-1] = TOKENIZER.eos_token_id
    settings = dict(feature_model_name_or_path=path, max_steps=2, save_strategy="steps", save_steps=1) | settings
    model = small_model(dtype=torch.float32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    run = train(model, rows, tmp_path / "run", settings=settings)
    assert run.metrics[0]["grad_norm"] > 0 and run.metrics[0]["feature_matching_loss"] != 0
    model = small_model(dtype=torch.float32)
    model.load_state_dict(state)
    rest = train(model, rows, tmp_path / "rest", settings=settings, resume=str(tmp_path / "run" / "checkpoint-1"))
    for name, value in run.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], value), name


def test_command_line(tmp_path, encoder):
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(6)))
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data), "--max_length", "32"]
    words += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--max_steps", "1", "--save_strategy", "no"]
    run_train([*words, "--feature_model_name_or_path", encoder])
    assert read_metrics(tmp_path / "run")[0]["reward_std"] > 0


@pytest.mark.parametrize("pooling", ["last_token", "mean_pooling"])
def test_a_text_of_special_tokens_alone(decoder, pooling):
    """Of which nothing is left for a network that reads text."""
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    network = FeatureNetwork(AutoModelForCausalLM.from_pretrained(decoder), pooling=pooling)
    reader = DecoderReader(network, tokenizer, most=64)
    empty, ended, other = reader.read([Text("", "", False), Text("", "", True), Text("ab", "c", False)])
    assert torch.equal(empty, ended) and not torch.equal(empty, other)
    tokenizer.eos_token = None
    assert reader.read([Text("", "", False)]).isfinite().all()


def test_refused(tmp_path, decoder, encoder, monkeypatch):
    rows = documents([20, 30])
    for path in (decoder, encoder):
        settings = dict(feature_model_name_or_path=path, pooling="token")
        with pytest.raises(ValueError, match="pooling='token': feature_model_name_or_path=.* reads text"):
            train(small_model(), rows, tmp_path, settings=settings)
    settings = dict(feature_model_name_or_path=encoder, feature_network="random")
    with pytest.raises(ValueError, match="is a sentence encoder, which feature_network='random' does not remake"):
        train(small_model(), rows, tmp_path, settings=settings)
    monkeypatch.setattr("ebft.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a sentence encoder, needs sentence_transformers, .* 'ebft\[encoder\]'"):
        train(small_model(), rows, tmp_path, settings=dict(feature_model_name_or_path=encoder))
