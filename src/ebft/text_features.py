"""Features of texts: a network with a tokenizer of its own reads what rollouts and references decode to.

Each text is the prefix and what follows it, and costs a run of its own. Both sides go through the same path.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockLayout
from .completion_features import Completion, completion_features
from .extras import require
from .features import POOLINGS_OF_COMPLETIONS, FeatureNetwork

AT_A_TIME = 16  # texts of a forward


@dataclass(frozen=True)
class Text:
    """What a network reads: a prefix, what follows it, and whether that ended by itself."""

    prefix: str
    rest: str
    ended: bool


def check_reads_text(name: str, pooling: str, is_encoder: bool) -> None:
    """Refuse settings that features of texts cannot have.

    Args:
        name: Of the network.
        pooling: As configured.
        is_encoder: A sentence encoder; else a decoder of another vocabulary.

    Raises:
        ValueError: A pooling is per token of the policy, or the package of encoders is missing.
    """
    field = f"feature_model_name_or_path='{name}'"
    if pooling not in POOLINGS_OF_COMPLETIONS:
        raise ValueError(
            f"pooling='{pooling}': {field} reads text by a tokenizer of its own, so that its tokens are not the "
            f"policy's: use {' or '.join(POOLINGS_OF_COMPLETIONS)}."
        )
    if is_encoder:
        require("sentence_transformers", "encoder", f"{field}, a sentence encoder,")


class TextFeatures:
    """Feature map phi of decoded text, in the place of a `FeatureNetwork`.

    Args:
        reader: Makes features [M, D] of M texts.
        tokenizer: The policy's, which decodes; its special tokens are left out.
        stop_token_ids: Ids that end a completion.
    """

    def __init__(self, reader: Any, tokenizer: Any, stop_token_ids: Sequence[int] = ()):
        self.reader, self.tokenizer, self.stops = reader, tokenizer, frozenset(stop_token_ids)

        # What a run tells and stores of its network, moves to its device and counts.
        self.model, self.decoder, self.layer_indices = reader.model, reader.decoder, reader.layer_indices
        self.pooling, self.norm, self.reduction = reader.pooling, reader.norm, reader.reduction

    def size(self, completion_length: int) -> int:
        """D."""
        return self.reader.size(completion_length)

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, K, N, D] and [B, K, D]; arguments and zeros as in `FeatureNetwork`."""
        every = self._texts(input_ids, layout, tokens, lengths)
        generated, reference = every[..., :-1, :], every[..., -1, :]
        return generated, reference

    @torch.no_grad()
    def references(self, input_ids: Tensor, layout: BlockLayout) -> Tensor:
        """Features [B, K, D] of the reference blocks alone."""
        return self._texts(input_ids, layout, None, None)[..., 0, :]

    def _texts(self, input_ids: Tensor, layout: BlockLayout, tokens: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Features [B, K, N + 1, D] of the rollouts and, last, the reference."""
        B, device = len(input_ids), input_ids.device
        ids, follows = input_ids.cpu(), [layout.references(input_ids).cpu()[:, :, None]]
        if tokens is not None:
            there = tokens if lengths is None else tokens.where(_steps(tokens) < lengths[..., None], -1)
            follows.insert(0, there.cpu())
        anchors, valid, begins = layout.expand(B)
        texts: list[Text] = []
        for b, k in valid.nonzero().tolist():
            prefix = ids[b, begins[b, k] : anchors[b, k]].tolist()
            for group in follows:
                texts += [self._text(prefix, row[row >= 0].tolist()) for row in group[b, k]]
        different = list(dict.fromkeys(texts))  # equal ones are read once: they have equal features to the last bit
        features = dict(zip(different, self.reader.read(different), strict=True))
        count = sum(group.shape[2] for group in follows)
        found = torch.stack([features[text] for text in texts]).to(device)
        out = found.new_zeros(*valid.shape, count, found.shape[-1])
        out[valid.to(device)] = found.unflatten(0, (-1, count))
        return out

    def _text(self, prefix: list[int], rest: list[int]) -> Text:
        decode: Callable[..., str] = self.tokenizer.decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = decode(prefix, **options), decode([*prefix, *rest], **options)
        # A character whose bytes they share shows in the whole alone.
        start = next((i for i, pair in enumerate(zip(before, whole, strict=False)) if len(set(pair)) > 1), None)
        start = min(len(before), len(whole)) if start is None else start
        return Text(whole[:start], whole[start:], bool(rest) and rest[-1] in self.stops)


class DecoderReader:
    """A causal decoder that reads texts by its own tokenizer, pooled as blocks are.

    Args:
        network: With pooling `last_token` or `mean_pooling`.
        tokenizer: Its own.
        most: Tokens that it may be given; of longer texts the beginning is left out.
    """

    def __init__(self, network: FeatureNetwork, tokenizer: Any, most: int):
        self.network, self.tokenizer, self.most = network, tokenizer, most

        self.model, self.decoder, self.layer_indices = network.model, network.decoder, network.layer_indices
        self.pooling, self.norm, self.reduction = network.pooling, network.norm, network.reduction

    def size(self, completion_length: int) -> int:
        """D."""
        return self.network.size(completion_length)

    def read(self, texts: Sequence[Text]) -> Tensor:
        """Features [M, D]: of the last token of each text, or the mean over the tokens behind its prefix."""
        return completion_features(self.network, [self._tokens(text) for text in texts], AT_A_TIME)

    def _tokens(self, text: Text) -> Completion:
        """Tokens of the whole text; the first that reaches behind the prefix begins the completion."""
        encoded = self.tokenizer(text.prefix + text.rest, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(text.prefix)), len(ids))
        end = self.tokenizer.eos_token_id
        if text.ended and isinstance(end, int):
            ids.append(end)
        if not ids:  # of the policy's special tokens alone, no text is left
            ids.append(end if isinstance(end, int) else 0)
        start = min(start, len(ids) - 1)  # a rollout that adds no text: the last token before it
        cut = max(0, len(ids) - self.most)
        return Completion(tuple(ids[cut : max(start, cut)]), tuple(ids[max(start, cut) :]))


class EncoderReader:
    """A sentence encoder, which pools and normalises in its own way.

    Args:
        name: Hub name or path, of `sentence-transformers` or of a transformers encoder, whose tokens it then averages.
        revision: Branch, tag or commit on the Hub.
        norm: `none` leaves its vectors as they are; else they have length 1.
    """

    pooling, reduction, layer_indices = "of the encoder", "of the encoder", ()

    def __init__(self, name: str, revision: str | None, norm: str):
        from sentence_transformers import SentenceTransformer

        options = {"revision": revision, "device": "cpu", "trust_remote_code": False}
        self.model = SentenceTransformer(name, **options, model_kwargs={"use_safetensors": True}).requires_grad_(False)
        self.model.tokenizer.truncation_side = "left"  # of a long text what it is about stands at its end
        self.decoder, self.norm = self.model[0].auto_model, norm

    def size(self, completion_length: int) -> int:
        """D."""
        return int(self.model.get_embedding_dimension() or 0)

    def read(self, texts: Sequence[Text]) -> Tensor:
        """Features [M, D] of whole texts."""
        return self.model.encode(
            [text.prefix + text.rest for text in texts],
            batch_size=AT_A_TIME,
            convert_to_tensor=True,
            normalize_embeddings=self.norm != "none",
            show_progress_bar=False,
        )


def _steps(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[-1], device=tokens.device)
