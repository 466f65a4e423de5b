"""Feature-matching loss by completion length, under the inner product and other kernels, and its floor.

Shape letters: B documents (rows), K contexts of a document, N rollouts, G tokens of the longest rollout, L lengths,
M references of one prompt, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocks import BlockLayout
from ..features import FeatureNetwork
from ..kernels import Kernel, kernel_gram, ngram_gram
from ..rewards import Gram, loss_from_gram
from ..scoring import Record, kernel_of, kernel_record, typical_distance
from .batches import batches_of
from .contexts import contexts_of
from .settings import DocumentSettings

SCALES, FREQUENCIES, SIZES = [1.0], 512, [1, 2, 3]

Sums = dict[str, tuple[Tensor, Tensor]]  # measure -> sums [B, ...] and counts [B], float64


@dataclass(frozen=True, eq=False)
class FirstContext:
    """What is known of a document's first context; on the CPU.

    Attributes:
        losses: Kernel -> its loss [L].
        features: Of the reference, [L, D].
        tokens: Of the reference, [G].
    """

    losses: dict[str, Tensor]
    features: Tensor
    tokens: Tensor


def fixed_kernels(
    network: FeatureNetwork | None, documents: Sequence[dict[str, Any]], settings: DocumentSettings
) -> dict[str, Record]:
    """Records of the kernels asked for, a function of documents, network and settings: the same for every model.

    One bandwidth for all lengths, the median distance between reference features of the same length: a curve over
    lengths then says how the texts differ, and not how the ruler does.

    Args:
        network: The feature network, on its device.
        documents: All that are measured; the first ones with a context are read.
        settings: What is measured.

    Raises:
        ValueError: The documents give no bandwidth.
    """
    if not settings.kernels:
        return {}
    assert network is not None, "loaded whenever its measure is asked for"
    network, bandwidth = network.with_pooling("token"), None
    if {"rbf", "characteristic"} & set(settings.kernels):

        def contexts() -> Iterator[tuple[Tensor, BlockLayout]]:
            for document in documents:
                (batch,) = batches_of([document], 1, "cpu")
                yield batch["input_ids"], contexts_of(batch, settings)

        places, remedy = [length - 1 for length in settings.lengths], "give more documents, or leave these kernels out"
        bandwidth = typical_distance(network, contexts(), "kernels", remedy, places)
    options: dict[str, Any] = {"bandwidth": bandwidth, "features": network.size(1), "seed": settings.seed}
    options |= {"scales": SCALES, "frequencies": FREQUENCIES, "sizes": SIZES}
    return {name: kernel_record(name, **options) for name in settings.kernels}


def kernels_of(records: Mapping[str, Record]) -> dict[str, Kernel]:
    """All kernels that losses are measured under: the inner product first."""
    return {"linear": Kernel("linear"), **{name: kernel_of(record) for name, record in records.items()}}


def measure_of(number: str, kernel: str) -> str:
    """The name of a `loss`, `floor`, `shared` loss or `excess` under a kernel."""
    return f"feature_matching_{number}" + ("" if kernel == "linear" else f"/{kernel}")


def feature_matching_sums(
    network: FeatureNetwork,
    input_ids: Tensor,
    tokens: Tensor,
    layout: BlockLayout,
    lengths: Sequence[int],
    kernels: Mapping[str, Kernel],
) -> tuple[Sums, list[FirstContext]]:
    """Unbiased losses [B, L] of the documents under each kernel; and each document's first context (of none: zeros).

    Args:
        network: Its pooling is `token`.
        input_ids: LongTensor [B, P].
        tokens: LongTensor [B, K, N, G], the rollouts.
        layout: Of the contexts.
        lengths: L completion lengths.
        kernels: From `kernels_of`.
    """
    generated, reference = network(input_ids, tokens, layout)  # [B, K, G, N, D], [B, K, G, D]
    last = torch.tensor(lengths, device=generated.device) - 1
    features, ids = (generated[:, :, last], reference[:, :, last]), (tokens, layout.references(input_ids))
    losses = {name: loss_from_gram(_gram(kernel, features, ids, lengths)) for name, kernel in kernels.items()}
    valid = layout.expand(len(tokens))[1].to(generated.device)
    sums = {
        measure_of("loss", name): (loss.where(valid[..., None], 0).sum(1), valid.sum(-1))
        for name, loss in losses.items()
    }
    of_first = {name: loss[:, :1].sum(1).cpu() for name, loss in losses.items()}
    first_features, first_ids = features[1][:, :1].sum(1).double().cpu(), ids[1][:, :1].sum(1).cpu()
    first = [
        FirstContext({name: loss[row] for name, loss in of_first.items()}, first_features[row], first_ids[row])
        for row in range(len(tokens))
    ]
    return sums, first


def above_the_floor(
    first: Sequence[FirstContext], kernels: Mapping[str, Kernel], lengths: Sequence[int]
) -> dict[str, list[Any]]:
    """What only several references of one context can say: the loss, its floor and what is above that, each [L].

    With M references y_i the floor is their variance under the kernel, estimated without bias (`reference_variance`).
    It is what L_CFM (eq 2) of the text's own distribution is; the rest of L_CFM is L_FM (eq 1), the squared MMD.
    """
    features = torch.stack([context.features for context in first], dim=1)  # [L, M, D]
    ids = torch.stack([context.tokens for context in first])  # [M, G]
    found: dict[str, list[Any]] = {}
    for name, kernel in kernels.items():
        values = _gram(kernel, (features, features[:, 0]), (ids, ids[0]), lengths).rollouts
        loss = torch.stack([context.losses[name] for context in first], dim=1).mean(-1)
        floor = reference_variance(values)
        for number, value in (("floor", floor), ("shared", loss), ("excess", loss - floor)):
            found[measure_of(number, name)] = [value, 1.0]
    return found


def reference_variance(values: Tensor) -> Tensor:
    """Unbiased E k(y, y) - E k(y, y') of kernel values [..., M, M] between M >= 2 references: [...].

    With the inner product the variance E|phi|^2 - |E phi|^2 of their features.
    """
    M, own = values.shape[-1], values.diagonal(dim1=-2, dim2=-1).sum(-1)
    return own / M - (values.sum((-2, -1)) - own) / (M * (M - 1))


def _gram(kernel: Kernel, features: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Gram:
    """Kernel values of every length: features [..., L, n, D] and [..., L, D], or the first of the ids' G tokens.

    Completions shorter than an n-gram have none: at length 1 only single tokens are counted.
    """
    if kernel.name != "ngram":
        return kernel_gram(*features, kernel)
    grams = []
    for length in lengths:
        sizes = [size for size in kernel.sizes if size <= length]
        grams.append(ngram_gram(ids[0][..., :length], ids[1][..., :length], sizes))
    rollouts, cross, reference = zip(*grams, strict=True)
    return Gram(torch.stack(rollouts, -3), torch.stack(cross, -2), torch.stack(reference, -1))
