"""What rollouts are worth: feature network and kernel together, and how a kernel is fixed before training.

A kernel's record is all that makes it: plain values that a checkpoint can hold, and nothing of any rollout.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, D features, M frequencies.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.functional import pad

from . import noise
from .blocks import BlockLayout
from .config import EBFTConfig
from .features import FeatureNetwork
from .kernels import NO_TOKEN, Kernel, kernel_gram, median_distance, ngram_gram
from .layouts import batch_layout
from .rewards import Gram, Rewards, rewards_from_gram
from .rollout import Rollouts

# Of a dataset, what the median distance is taken of: 30,000 pairs, from the documents of two typical steps.
DOCUMENTS, BLOCKS_OF_A_DOCUMENT = 32, 8
MOST_READ = 1024  # documents that are looked through for some with a block

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Scorer:
    """From rollouts to kernel values within their groups, and rewards.

    Attributes:
        network: The feature network; None where the kernel is of token ids.
        kernel: Which statistic is matched.
        rewarding: Keyword arguments of `rewards_from_gram`.
    """

    network: FeatureNetwork | None
    kernel: Kernel
    rewarding: dict[str, Any]

    def __call__(self, input_ids: Tensor, rollouts: Rollouts, layout: BlockLayout) -> tuple[Gram, Rewards]:
        """Kernel values and rewards of rollouts [B, K, N, G]; rewards [B, K, N], or [B, K, G, N] per token."""
        tokens, mask = rollouts.tokens, rollouts.mask
        if self.kernel.name == "ngram":
            there = tokens if mask is None else tokens.where(mask, NO_TOKEN)
            there, reference = _as_long(there, layout.references(input_ids))
            gram = ngram_gram(there, reference, self.kernel.sizes)
        else:
            assert self.network is not None, "loaded for every kernel of features"
            gram = kernel_gram(*self.network(input_ids, tokens, layout, rollouts.lengths), self.kernel)
        return gram, rewards_from_gram(gram, **self.rewarding)


def _as_long(tokens: Tensor, reference: Tensor) -> list[Tensor]:
    """Rollouts [B, K, N, G] and references [B, K, G'] as long as the longer of the two."""
    longest = max(tokens.shape[-1], reference.shape[-1])
    return [pad(x, (0, longest - x.shape[-1]), value=NO_TOKEN) for x in (tokens, reference)]


def fixed_kernel(
    args: EBFTConfig, network: FeatureNetwork | None, dataset: Iterable[Any], collate: Callable, anchors: str
) -> Record:
    """The record of a run's kernel: a function of settings, feature network and first documents, alike on all ranks.

    Args:
        args: Settings of the run.
        network: On its device; None where the kernel is of token ids.
        dataset: Tokenised documents, packed or not; the first ones are read, of a stream too, and none is used up.
        collate: Makes a batch of rows.
        anchors: `completion` or `all`.

    Raises:
        ValueError: The documents give no bandwidth.
    """
    bandwidth, size = args.kernel_bandwidth, None
    if network is not None:
        size = network.size(args.completion_length)
    if args.kernel in ("rbf", "characteristic") and bandwidth is None:
        assert network is not None, "loaded for every kernel of features"
        documents = first_blocks(args, dataset, collate, anchors)
        found = typical_distance(network, documents, "kernel_bandwidth", "set it")
        bandwidth = broadcast_object_list([found])[0]  # devices may round differently
    return kernel_record(args.kernel, bandwidth=bandwidth, features=size, **args.kernel_parameters)


def kernel_record(
    name: str,
    *,
    bandwidth: float | None,
    features: int | None,
    scales: Sequence[float],
    frequencies: int,
    seed: int,
    sizes: Sequence[int],
) -> Record:
    """The record of a kernel, of the parameters that it has.

    Args:
        name: Of `KERNELS`.
        bandwidth: Of rbf and characteristic.
        features: D, of characteristic.
        scales: Of rbf and characteristic, in bandwidths.
        frequencies: M, of characteristic.
        seed: Of the frequencies.
        sizes: Of ngram.
    """
    record: Record = {"name": name}
    if name in ("rbf", "characteristic"):
        record |= {"bandwidth": bandwidth, "scales": list(scales)}
    if name == "characteristic":
        record |= {"frequencies": frequencies, "features": features, "seed": seed}
        record["sha256"] = _hash(kernel_of(record).frequencies)
    if name == "ngram":
        record["sizes"] = list(sizes)
    return record


def kernel_of(record: Record, device: torch.device | str = "cpu") -> Kernel:
    """The kernel of a record; where there is a hash of its frequencies, they must have it.

    Raises:
        ValueError: numpy draws other frequencies now.
    """
    bandwidths = tuple(scale * record["bandwidth"] for scale in record.get("scales", ()))
    frequencies = None
    if "frequencies" in record:
        frequencies = noise.random_frequencies(record["features"], record["frequencies"], bandwidths, record["seed"])
        if record.get("sha256", _hash(frequencies)) != _hash(frequencies):
            raise ValueError(
                f"kernel='characteristic': seed {record['seed']} does not give the frequencies of the checkpoint any "
                "more: resume with the version of numpy that the run was started with."
            )
        frequencies = frequencies if torch.device(device).type == "mps" else frequencies.to(device)  # no float64 there
    return Kernel(record["name"], bandwidths, frequencies, tuple(record.get("sizes", ())))


def resumed_kernel(record: Record | None, ours: Record, args: EBFTConfig, checkpoint: str) -> Record:
    """The kernel that a resumed run goes on with: the checkpoint's, with its bandwidth.

    Args:
        record: In the checkpoint; None in those of before there was a choice.
        ours: What the settings and the data give now.
        args: Those settings.
        checkpoint: Its folder, for the message.

    Raises:
        ValueError: The settings choose another kernel.
    """
    record = record or {"name": "linear"}
    of_data = () if args.kernel_bandwidth is not None else ("bandwidth", "sha256")
    other = [key for key in {**record, **ours} if key not in of_data and record.get(key) != ours.get(key)]
    if other:
        theirs, mine = ({key: r.get(key) for key in dict.fromkeys(("name", *other))} for r in (record, ours))
        raise ValueError(
            f"resume_from_checkpoint='{checkpoint}' was trained with the kernel {theirs}, not {mine}: resume with "
            "that one."
        )
    return record


def first_blocks(
    args: EBFTConfig, dataset: Iterable[Any], collate: Callable, anchors: str
) -> Iterator[tuple[Tensor, BlockLayout]]:
    """Tokens [1, P] and layout of the first rows of a dataset that have blocks, one by one."""
    for row in islice(dataset, MOST_READ):
        batch = collate([row])
        yield batch["input_ids"], batch_layout(batch, args, anchors, step=None)


def typical_distance(
    network: FeatureNetwork,
    documents: Iterable[tuple[Tensor, BlockLayout]],
    field: str,
    remedy: str,
    places: slice | list[int] = slice(None),
) -> float:
    """Median distance between the features of reference blocks: the median heuristic (Gretton et al. 2012).

    Of the first `DOCUMENTS` with a block, some blocks each, spread over the document. With one feature per token,
    distances are between features of the same token of a block, as kernel values are.

    Args:
        network: The feature network.
        documents: Tokens [1, P] and layout of each.
        field: The option that an error names.
        remedy: And what it says to do.
        places: With one feature per token, of which tokens of a block.

    Raises:
        ValueError: There are no two blocks, or their features are all alike or not finite.
    """
    device, found = next(network.decoder.parameters()).device, []
    for input_ids, layout in documents:
        if layout.num_blocks:
            some = layout.select(spread(layout.valid, BLOCKS_OF_A_DOCUMENT))
            found.append(network.references(input_ids.to(device), some)[0])
        if len(found) == DOCUMENTS:
            break
    distance = float("nan")
    if sum(map(len, found)) > 1:
        features = torch.cat(found)
        features = features.transpose(0, 1)[places] if network.pooling == "token" else features
        distance = float(median_distance(features))
    if not 0 < distance < float("inf"):
        raise ValueError(
            f"{field}: the median distance between reference features of the first {len(found)} document(s) with a "
            f"block is {distance}, which is no bandwidth: {remedy}."
        )
    return distance


def spread(valid: Tensor, most: int) -> Tensor:
    """Which blocks to keep for at most `most` of each row, evenly spread: BoolTensor [B, K]."""
    place, count = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True).clamp(min=most)
    # The row is cut into `most` parts, of which each keeps its first block.
    return valid & (place * most // count != (place - 1) * most // count)


def _hash(frequencies: Tensor | None) -> str:
    assert frequencies is not None
    return hashlib.sha256(frequencies.numpy().tobytes()).hexdigest()
