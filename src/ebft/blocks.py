"""Where the blocks of a document lie and which token may attend to which (strided block-parallel rollouts).

Shape letters: B documents (rows), K blocks, N rollouts, G generated tokens, P document tokens, T = P + K*N*G packed
tokens. Packed order: the P document tokens first, then the generated tokens in (block, rollout, token) order.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = -1  # the value of `doc_ids` where a row holds no token
_REGULAR: Any = None  # stands for the tensors of the regular layout, which `__post_init__` makes


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Anchors of the blocks: block k generates from, and is compared with, `document[a_k : a_k + completion_length]`.

    The regular layout has one document per row and the anchors `a_k = context_length + k * stride`, the same in every
    row. `from_documents` builds one anchor list per row for padded and packed rows. Layouts live on the CPU: they are
    small, and the sizes read from them must not cost a device synchronisation.

    Attributes:
        length: P, number of document tokens per row.
        stride: Distance between neighbouring anchors, in tokens.
        context_length: Shortest prefix a block may have, in tokens.
        completion_length: G, tokens per block.
        anchors: LongTensor [K] (regular) or [B, K]; 1 where not valid, so that it may always be used as an index.
        valid: BoolTensor of the same shape.
        prefix_starts: LongTensor of the same shape: first token of the document the block belongs to.
        doc_ids: LongTensor [B, P] or None: which document of its row each token belongs to, -1 for padding.
        multiplicity: float64 [B, K] or None for ones: how many blocks each one stands for, where a subset was drawn.
        reference_lengths: LongTensor [B, K] or None for `completion_length`: tokens of each block's reference, where
            blocks are whole completions that end somewhere; 1 where not valid.

    Raises:
        ValueError: A size is out of range, or no block fits into a regular layout.
    """

    length: int
    stride: int
    context_length: int
    completion_length: int
    anchors: Tensor = _REGULAR
    valid: Tensor = _REGULAR
    prefix_starts: Tensor = _REGULAR
    doc_ids: Tensor | None = None
    multiplicity: Tensor | None = None
    reference_lengths: Tensor | None = None

    def __post_init__(self):
        _check_positive(
            length=self.length,
            stride=self.stride,
            context_length=self.context_length,
            completion_length=self.completion_length,
        )
        if self.anchors is not None:
            return
        if self.completion_length > self.length - self.context_length:
            raise ValueError(
                f"completion_length={self.completion_length} does not fit behind context_length={self.context_length} "
                f"in a document of length={self.length}: shorten one of the two or use longer documents."
            )
        anchors = torch.arange(self.context_length, self.length - self.completion_length + 1, self.stride)
        object.__setattr__(self, "anchors", anchors)
        object.__setattr__(self, "valid", torch.ones_like(anchors, dtype=torch.bool))
        object.__setattr__(self, "prefix_starts", torch.zeros_like(anchors))

    @classmethod
    def from_documents(
        cls,
        doc_ids: Tensor,
        *,
        stride: int,
        context_length: int,
        completion_length: int,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> "BlockLayout":
        """Lay out the blocks of padded or packed rows; no block crosses a document's border.

        A block exists only if its own document gives it at least `context_length` tokens of prefix and its whole
        reference. Without `starts` the anchors are `context_length + k * stride` within each document.

        Args:
            doc_ids: LongTensor [B, P]: document of each token within its row, each one contiguous run; -1 = padding,
                on the right.
            stride: Distance between neighbouring anchors, in tokens.
            context_length: Shortest prefix, in tokens; a prompt counts as prefix.
            completion_length: G.
            starts: BoolTensor [B, P], True at the first token of each completion: the anchors are then `start`,
                `start + stride`, ... up to the completion's end.
            ends: BoolTensor [B, P], True at the last token of each completion; by default a completion ends with its
                document or where the next one starts.

        Returns:
            A layout whose `anchors` and `valid` are [B, K], K the largest number of blocks in a row (0 if none fits).

        Raises:
            ValueError: A size is out of range, a document is not one contiguous run, or padding is not on the right.
        """
        _check_positive(stride=stride, context_length=context_length, completion_length=completion_length)
        doc_ids = doc_ids.cpu()
        starts = None if starts is None else starts.cpu()
        ends = None if ends is None else ends.cpu()
        rows: list[list[tuple[int, ...]]] = []
        for row, ids in enumerate(doc_ids):
            found: list[tuple[int, ...]] = []
            for begin, end in document_spans(ids, row):
                if starts is None:
                    pieces = [(begin + context_length, end)]
                else:
                    pieces = completion_spans(begin, end, starts[row], None if ends is None else ends[row])
                for first, last in pieces:
                    anchors = range(first, last - completion_length + 1, stride)
                    found += [(a, begin) for a in anchors if a - begin >= context_length]
            rows.append(found)
        anchors, prefix_starts, valid = _padded(rows, (1, 0))
        return cls(
            doc_ids.shape[1], stride, context_length, completion_length, anchors, valid, prefix_starts, doc_ids=doc_ids
        )

    @classmethod
    def from_completions(
        cls, doc_ids: Tensor, starts: Tensor, ends: Tensor, completion_length: int, context_length: int = 1
    ) -> "BlockLayout":
        """One block per completion, from its first token to its end, which may be sooner or later for a rollout.

        A reference longer than `completion_length` counts as cut there, as a rollout is.

        Args:
            doc_ids: As in `from_documents`.
            starts: BoolTensor [B, P], True at the first token of each completion.
            ends: BoolTensor [B, P], True at the last token of each whole completion: one without an end is left out.
            completion_length: G, tokens of the longest rollout.
            context_length: Shortest prefix, in tokens.

        Returns:
            A layout with `reference_lengths`.
        """
        _check_positive(context_length=context_length, completion_length=completion_length)
        doc_ids, starts, ends = doc_ids.cpu(), starts.cpu(), ends.cpu()
        rows: list[list[tuple[int, ...]]] = []
        for row, ids in enumerate(doc_ids):
            found: list[tuple[int, ...]] = []
            for begin, end in document_spans(ids, row):
                for first, last in completion_spans(begin, end, starts[row], None):
                    whole = ends[row, first:last].nonzero().flatten().tolist()
                    if whole and first - begin >= context_length:
                        found.append((first, begin, min(whole[0] + 1, completion_length)))
            rows.append(found)
        anchors, prefix_starts, lengths, valid = _padded(rows, (1, 0, 1))
        sizes = (doc_ids.shape[1], completion_length, context_length, completion_length)
        return cls(*sizes, anchors, valid, prefix_starts, doc_ids=doc_ids, reference_lengths=lengths)

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.anchors.shape[-1]

    def select(self, keep: Tensor) -> "BlockLayout":
        """A layout from documents with the blocks where `keep` (BoolTensor [B, K]) is True, closed up to the left."""
        order = self.order(keep)
        valid, lengths = (keep & self.valid).gather(-1, order), self.reference_lengths
        return replace(
            self,
            anchors=self.anchors.gather(-1, order).where(valid, 1),
            prefix_starts=self.prefix_starts.gather(-1, order).where(valid, 0),
            valid=valid,
            multiplicity=None if self.multiplicity is None else self.multiplicity.gather(-1, order),
            reference_lengths=None if lengths is None else lengths.gather(-1, order).where(valid, 1),
        )

    def with_absent_block(self) -> "BlockLayout":
        """The layout with one more block in each row, which is not valid: something to run a forward of."""
        values = {"anchors": 1, "valid": 0, "prefix_starts": 0, "multiplicity": 1, "reference_lengths": 1}
        tensors = {name: getattr(self, name) for name in values}
        more = {name: pad(x, (0, 1), value=values[name]) for name, x in tensors.items() if x is not None}
        return replace(self, **more)

    def order(self, keep: Tensor) -> Tensor:
        """Which of this layout's blocks `select(keep)` has where: LongTensor [B, K'], K' the most that a row keeps.

        A row that keeps fewer ends in blocks it does not keep, which are not valid in `select(keep)`.
        """
        keep = keep & self.valid
        return keep.int().argsort(dim=-1, descending=True, stable=True)[:, : int(keep.sum(-1).max())]

    def shortened(self, completion_length: int) -> "BlockLayout":
        """The same blocks with fewer tokens each: those that the longest of a batch's completions has."""
        return replace(self, completion_length=completion_length)

    def expand(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """`anchors`, `valid` and `prefix_starts`, each [B, K], for a batch of `batch_size` rows."""
        first, second, third = (x.expand(batch_size, -1) for x in (self.anchors, self.valid, self.prefix_starts))
        return first, second, third

    def references(self, input_ids: Tensor) -> Tensor:
        """The documents' own tokens of every block, `document[a_k : a_k + G]`: [B, K, G], -100 where there is none.

        Of references that end, G is the length of the longest.
        """
        anchors, valid, _ = (x.to(input_ids.device) for x in self.expand(len(input_ids)))
        lengths = self.reference_lengths
        longest = self.completion_length if lengths is None else int(lengths.max()) if lengths.numel() else 1
        step = torch.arange(longest, device=anchors.device)
        at = (anchors[..., None] + step).clamp(max=self.length - 1)
        there = valid[..., None]
        if lengths is not None:
            there = there & (step < lengths.to(anchors.device)[..., None])
        rows = torch.arange(len(input_ids), device=anchors.device)[:, None, None]
        return input_ids[rows, at].where(there, -100)

    def position_ids(self, num_generations: int, doc_ids: Tensor | None = None) -> Tensor:
        """Position of every packed token within its own document.

        Generated token t of block k has the offset of its anchor plus t, with no restart inside the block.

        Args:
            num_generations: N.
            doc_ids: LongTensor [P] or [B, P], for document masking in a regular layout; by default the layout's own.

        Returns:
            LongTensor [T] or [B, T].
        """
        doc_ids = self.doc_ids if doc_ids is None else doc_ids.cpu()
        offsets = torch.arange(self.length)
        if doc_ids is not None:
            changes = torch.ones_like(doc_ids, dtype=torch.bool)
            changes[..., 1:] = doc_ids[..., 1:] != doc_ids[..., :-1]
            offsets = offsets - torch.where(changes, offsets, 0).cummax(-1).values
        anchors = self.anchors.expand(*offsets.shape[:-1], -1)
        block = offsets.gather(-1, anchors)[..., None, None] + torch.arange(self.completion_length)
        block = block.expand(*anchors.shape, num_generations, -1)
        return torch.cat([offsets, block.flatten(-3)], dim=-1)

    def attention_mask(self, num_generations: int, doc_ids: Tensor | None = None) -> Tensor:
        """The definition of who attends to whom, as a dense mask: for tests and for reading, not for speed.

        Document tokens attend causally. Generated token t of (block k, rollout j) attends to `document[0 : a_k]` and
        to tokens 0..t of the same rollout. With documents, both must belong to the same one, where the generated
        token stands for document position `a_k + t`.

        Args:
            num_generations: N.
            doc_ids: As in `position_ids`.

        Returns:
            BoolTensor [T, T] or [B, T, T], True where the row's token may attend to the column's.
        """
        doc_ids = self.doc_ids if doc_ids is None else doc_ids.cpu()
        N, G = num_generations, self.completion_length
        batch = () if doc_ids is None else doc_ids.shape[:-1]
        anchors = self.anchors.expand(*batch, -1)
        if doc_ids is None:
            batch = anchors.shape[:-1]
        document = torch.arange(self.length).expand(*batch, -1)
        step = torch.arange(G)
        stands_for = (anchors[..., None, None] + step).expand(*anchors.shape, N, G).flatten(-3)
        stands_for = torch.cat([document, stands_for], -1)  # [..., T]: the document position each token stands for
        anchor = torch.cat([document, anchors.repeat_interleave(N * G, -1)], -1)
        rollout = torch.cat([torch.full((self.length,), -1), torch.arange(self.num_blocks * N).repeat_interleave(G)])
        generated = rollout >= 0

        to_document = torch.where(
            generated[:, None],
            stands_for[..., None, :] < anchor[..., :, None],
            stands_for[..., None, :] <= anchor[..., :, None],
        )
        same_rollout = generated[:, None] & (rollout[:, None] == rollout[None, :])
        to_own = same_rollout & (stands_for[..., :, None] >= stands_for[..., None, :])
        mask = torch.where(generated[None, :], to_own, to_document)
        if doc_ids is not None:
            at = stands_for
            if self.reference_lengths is not None:  # a completion may outgrow its document
                at = torch.where(generated, anchor - 1, stands_for)
            doc = doc_ids.gather(-1, at.clamp(max=self.length - 1))
            mask = mask & (doc[..., :, None] == doc[..., None, :])
        return mask


def _padded(rows: list[list[tuple[int, ...]]], padding: tuple[int, ...]) -> list[Tensor]:
    """Columns of ragged rows of tuples as LongTensor [B, K], each padded with its number; and what is there."""
    most = max((len(row) for row in rows), default=0)
    table = torch.tensor([[*row, *[padding] * (most - len(row))] for row in rows], dtype=torch.long)
    valid = torch.arange(most) < torch.tensor([len(row) for row in rows])[:, None]
    return [*table.view(len(rows), most, len(padding)).unbind(-1), valid]


def document_spans(doc_ids: Tensor, row: int = 0) -> list[tuple[int, int]]:
    """`(first, last + 1)` of each document in one row's `doc_ids` [P].

    Raises:
        ValueError: A document is not one contiguous run, or padding is not on the right.
    """
    ids, counts = torch.unique_consecutive(doc_ids, return_counts=True)
    ids, counts = ids.tolist(), counts.tolist()
    if PADDING in ids[:-1]:
        raise ValueError(f"doc_ids has padding ({PADDING}) before the end of row {row}: pad on the right.")
    if len(set(ids)) < len(ids):
        raise ValueError(f"doc_ids lists a document twice in row {row}: a document must be one contiguous run.")
    spans, begin = [], 0
    for doc, count in zip(ids, counts, strict=True):
        if doc != PADDING:
            spans.append((begin, begin + count))
        begin += count
    return spans


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def completion_spans(begin: int, end: int, starts: Tensor, ends: Tensor | None) -> list[tuple[int, int]]:
    """`(first, last + 1)` of each completion within the document [begin, end)."""
    firsts = (begin + starts[begin:end].nonzero().flatten()).tolist()
    borders = [*firsts, end][1:]  # none without a first: a document may have no completion
    if ends is None:
        return list(zip(firsts, borders, strict=True))
    lasts = (begin + ends[begin:end].nonzero().flatten() + 1).tolist()
    return [(a, min([b, *(e for e in lasts if e > a)])) for a, b in zip(firsts, borders, strict=True)]
