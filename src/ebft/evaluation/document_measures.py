"""What held-out documents say about a model: every measure that needs no tests, from one batch of rollouts.

Each measure gives a sum and a count per document, so that means, paired differences and intervals are one matter for
all of them (`intervals`). Rollouts depend on the document and the seed alone: equal noise for every model.
Shape letters: B documents (rows), K contexts of a document, N rollouts, G tokens of the longest rollout, L lengths,
P document tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from ..blocks import BlockLayout
from ..features import FeatureNetwork
from ..forward import causal_lm, evaluation_mode
from ..kernels import Kernel
from ..metrics import cross_entropy_sums
from ..pretrained import end_ids
from ..rollout import Rollouts, sample_rollouts
from .batches import batches_of
from .contexts import behind_prompt, contexts_of
from .diversity import distinct, duplicate_rate, self_bleu, until_end
from .feature_matching import FirstContext, Sums, above_the_floor, feature_matching_sums, fixed_kernels, kernels_of
from .intervals import DocumentMean
from .settings import DocumentSettings
from .summary import means_of
from .token_statistics import TokenStatistics, token_statistics

NGRAMS = (1, 2, 3, 4)

NO_OTHERS: Mapping[str, Any] = MappingProxyType({})  # than the inner product

Record = dict[str, Any]  # of one document or group: measure -> [sums, count]; `id` is its first document's


def document_means(
    model: nn.Module,
    network: FeatureNetwork | None,
    documents: Sequence[Record],
    settings: DocumentSettings,
    tokenizer: Any = None,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, DocumentMean]:
    """Measure documents in one go.

    Args:
        model: As of `measure_documents`.
        network: As there.
        documents: Rows of `ebft.data.tokenize_documents`.
        settings: As there.
        tokenizer: As there.
        advance: Told how many documents are done.

    Returns:
        Measure -> a sum (of numbers, or of vectors over lengths or places) and a count of each document, or of each
        prompt that several documents share.

    Raises:
        ValueError: There are no documents.
    """
    records: list[Record] = []
    groups = prompt_groups(documents)
    sizes = {group[0]["document_id"]: len(group) for group in groups}
    kernels = fixed_kernels(network, documents, settings)
    for found in measure_documents(model, network, groups, settings, tokenizer, kernels):
        records += found
        advance(sum(sizes[record["id"]] for record in found))
    if not records:
        raise ValueError("documents is empty: pass at least one held-out document.")
    return means_of(records)


def prompt_groups(documents: Sequence[Record]) -> list[list[Record]]:
    """Documents by equal prompt, in order of first appearance; text without a prompt is a group of its own.

    What a document says under `prompt` decides, or else the tokens of its prompt.
    """
    groups: dict[Any, list[Record]] = {}
    for document in documents:
        prompt = document.get("prompt") or _prompt_tokens(document)
        groups.setdefault(prompt or ("alone", document["document_id"]), []).append(document)
    return list(groups.values())


def _prompt_tokens(document: Record) -> tuple[int, ...]:
    first = next((i for i, answer in enumerate(document["completion_mask"]) if answer), 0)
    return tuple(document["input_ids"][:first])


@torch.no_grad()
def measure_documents(
    model: nn.Module,
    network: FeatureNetwork | None,
    groups: Iterable[list[Record]],
    settings: DocumentSettings,
    tokenizer: Any = None,
    kernels: Mapping[str, Record] = NO_OTHERS,
) -> Iterator[list[Record]]:
    """Measure documents, a few groups at a time.

    Args:
        model: The causal LM.
        network: The frozen phi; its pooling is not used. None where `feature_matching` is not asked for.
        groups: From `prompt_groups`, of rows of `ebft.data.tokenize_documents`.
        settings: What and how.
        tokenizer: Of the model, for the diversity of texts; its EOS and those of the model's generation config end a
            rollout there. None leaves self-BLEU out.
        kernels: From `feature_matching.fixed_kernels`, of those that `settings` asks for.

    Yields:
        One record per group of a batch.

    Raises:
        ValueError: What the model says of a document is not finite.
    """
    device = next(model.parameters()).device
    if network is not None:
        network = network.with_pooling("token")
    known = kernels_of(kernels)
    with evaluation_mode(model):
        for some in _up_to(groups, settings.batch_size):
            parts: list[Record] = []
            for batch in batches_of((row for group in some for row in group), settings.batch_size, device):
                parts += _measure_batch(model, network, batch, settings, tokenizer, known)
            rows = iter(parts)
            yield [_of_group([next(rows) for _ in group], group, known, settings.lengths) for group in some]


def _up_to(groups: Iterable[list[Record]], size: int) -> Iterator[list[list[Record]]]:
    """Groups of together about `size` documents, each one whole."""
    some: list[list[Record]] = []
    for group in groups:
        if some and sum(map(len, some)) + len(group) > size:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _measure_batch(
    model: nn.Module,
    network: FeatureNetwork | None,
    batch: dict[str, Tensor],
    settings: DocumentSettings,
    tokenizer: Any,
    kernels: Mapping[str, Kernel],
) -> list[Record]:
    """One record per document; `behind_prompt` is its context there, if any."""
    measures, input_ids, doc_ids = settings.measures, batch["input_ids"], batch["doc_ids"].cpu()
    sums: Sums = {}

    @cache  # one forward for both where the rollouts' temperature is 1
    def text(temperature: float) -> TokenStatistics:
        return token_statistics(model, input_ids, doc_ids, temperature)

    if "cross_entropy" in measures:
        found = cross_entropy_sums(text(1.0).log_probs, batch)
        sums["cross_entropy/all"] = found["ce_loss/all"], found["all_tokens"]
        sums["cross_entropy/answer"] = found["ce_loss/answer"], found["answer_tokens"]
    first: list[FirstContext] = []
    if settings.samples:
        layout = contexts_of(batch, settings)
        rollouts = _rollouts(model, batch, layout, settings)
        if "calibration" in measures:
            sums |= _calibration(text(settings.temperature), rollouts, layout)
        if "diversity" in measures:
            ends = end_ids(causal_lm(model).generation_config, tokenizer)
            sums |= _diversity(rollouts.tokens, layout, tokenizer, ends)
        if "feature_matching" in measures:
            assert network is not None, "loaded whenever its measure is asked for"
            inputs = network, input_ids, rollouts.tokens, layout, settings.lengths
            found, first = feature_matching_sums(*inputs, kernels)
            sums |= found
    _check_finite(sums, causal_lm(model).config.name_or_path)
    records: list[Record] = [
        {name: [value[row].double().cpu(), count[row].double().item()] for name, (value, count) in sums.items()}
        for row in range(len(input_ids))
    ]
    if first:
        for row in behind_prompt(batch, layout).nonzero().flatten().tolist():
            records[row]["behind_prompt"] = first[row]
    return records


def _check_finite(sums: Sums, name: str | None) -> None:
    for measure, (value, _) in sums.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name or 'model'}: {measure} of a document is NaN or infinite: take another checkpoint, or try "
                "dtype float32 and a temperature nearer to 1."
            )


def _rollouts(model: nn.Module, batch: dict[str, Tensor], layout: BlockLayout, settings: DocumentSettings) -> Rollouts:
    ids, N = batch["document_ids"].cpu(), settings.num_generations
    uniforms = noise.sampling_uniforms(layout, ids, N, seed=settings.seed, purpose=noise.EVALUATION, step=0)
    options: dict[str, Any] = {"temperature": settings.temperature, "uniforms": uniforms}
    options["statistics"] = "calibration" in settings.measures
    return sample_rollouts(model, batch["input_ids"], layout, N, **options)


def _calibration(text: TokenStatistics, rollouts: Rollouts, layout: BlockLayout) -> Sums:
    """At each place k of a completion [G]: entropy of the k-th generated token, and what the reference says there.

    All at the temperature of the rollouts, which run on after an EOS, as everywhere here. For a calibrated model the
    entropy of what it writes equals its cross-entropy on text (Braverman et al. 2019).
    """
    anchors, valid, _ = (x.to(text.entropy.device) for x in layout.expand(len(text.entropy)))
    at = anchors[..., None] - 1 + torch.arange(layout.completion_length, device=anchors.device)
    at = at.clamp(max=text.entropy.shape[1] - 1).flatten(1)
    shape, counts = (*anchors.shape, layout.completion_length), valid.sum(-1)
    per_context = {
        "entropy/rollout": rollouts.entropy.mean(2),
        "entropy/reference": text.entropy.gather(1, at).view(shape),
        "cross_entropy/reference": -text.log_probs.gather(1, at).view(shape),
    }
    return {name: (value.double().where(valid[..., None], 0).sum(1), counts) for name, value in per_context.items()}


def _diversity(tokens: Tensor, layout: BlockLayout, tokenizer: Any, ends: Sequence[int]) -> Sums:
    """Means over the contexts of a document; a rollout ends at the first token of `ends`."""
    values: dict[str, list[list[float]]] = {}
    for row, valid in enumerate(layout.expand(len(tokens))[1]):
        for context in tokens[row, valid.to(tokens.device)].tolist():
            rollouts = [until_end(rollout, ends) for rollout in context]
            found: dict[str, float | None] = {"duplicate_rate": duplicate_rate(rollouts)}
            found |= {f"distinct_{n}": distinct(rollouts, n) for n in NGRAMS}
            found["self_bleu"] = self_bleu(tokenizer.batch_decode(rollouts)) if tokenizer is not None else None
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, [[] for _ in tokens])[row].append(value)
    return {
        name: (torch.tensor([float(sum(v)) for v in rows]), torch.tensor([len(v) for v in rows]))
        for name, rows in values.items()
    }


def _of_group(
    records: list[Record], group: list[Record], kernels: Mapping[str, Kernel], lengths: Sequence[int]
) -> Record:
    """The documents of one prompt as one record, and what only several references of one context can say.

    Only where all references have room for the longest length, and start behind the same tokens: some of them alone
    are not the text's distribution.
    """
    first = [record.pop("behind_prompt") for record in records if "behind_prompt" in record]
    whole: Record = {}
    for name in dict.fromkeys(name for record in records for name in record):
        parts = [record[name] for record in records if name in record]
        whole[name] = [sum(part[0] for part in parts), sum(part[1] for part in parts)]
    if len(first) == len(records) > 1 and len({_prompt_tokens(document) for document in group}) == 1:
        whole |= above_the_floor(first, kernels, lengths)
    as_lists = {name: [value.tolist(), count] for name, (value, count) in whole.items()}
    return {"id": group[0]["document_id"], **as_lists}
