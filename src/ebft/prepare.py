"""From the datasets a user gives to the documents a run trains on: tokenised, packed, checked for blocks."""

import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

from .config import EBFTConfig
from .data import BlockCollator, has_prompt, pack_documents, padding_id, tokenize_documents
from .layouts import batch_layout, completion_borders

DOCUMENTS_LOOKED_AT = 1024  # for completions without an end


def prepare_datasets(
    train_dataset, eval_dataset, processing_class, args: EBFTConfig, formatting_func: Callable | None
):
    """Tokenise and pack both datasets, decide where blocks go, and make sure that there are any.

    Args:
        train_dataset: In one of the formats of `ebft.data`, or None.
        eval_dataset: Likewise, or a dict of several.
        processing_class: The tokenizer.
        args: Lengths, masks, packing.
        formatting_func: Makes text of a row.

    Returns:
        `(train, eval, anchors)`; a dict of evaluation sets stays a dict, and `anchors` is `completion` or `all`.

    Raises:
        ValueError: A dataset is malformed, empty, or has no document long enough for one block; or several workers
            would read a stream.
    """
    first = train_dataset if train_dataset is not None else eval_dataset
    first = next(iter(first.values())) if isinstance(first, dict) else first
    if first is None:
        raise ValueError("train_dataset and eval_dataset are both missing: pass at least one.")

    def prompts_of(dataset) -> bool:
        return has_prompt(dataset, reasoning_tags=args.reasoning_tags, formatting_func=formatting_func)

    anchors = args.anchors
    if anchors is None:
        anchors = "completion" if prompts_of(first) else "all"
    if args.rollout == "completion" and anchors == "all":
        raise ValueError(
            "rollout='completion' needs prompts, and the data are text without any: give `prompt` and `completion`, "
            "`messages`, or use rollout: blocks."
        )

    def prepare(dataset, label: str):
        with args.main_process_first(desc=f"tokenising {label}"):  # the other ranks read its cache
            return prepare_here(dataset, label)

    def prepare_here(dataset, label: str):
        documents = tokenize_documents(
            dataset,
            processing_class,
            max_length=args.max_length,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            split_turns=args.split_turns,
            reasoning_tags=args.reasoning_tags,
            needs_turns=anchors == "completion" and bool(args.rl_coef),
            formatting_func=formatting_func,
            num_proc=args.dataset_num_proc,
            dataset_label=label,
        )
        rows = pack_documents(documents, args.max_length) if args.packing else documents
        if args.rl_coef and hasattr(documents, "__len__"):
            one_document_per_row = args.packing and not args.document_masking
            check_some_blocks(rows if one_document_per_row else documents, args, anchors, label, processing_class)
            if args.rollout == "completion":
                warn_of_open_completions(documents, args, label, processing_class)
        if anchors == "all" and args.anchors is None and dataset is not first and prompts_of(dataset):
            warnings.warn(
                f"{label} has prompts and the training data has none: blocks go over prompts too.", stacklevel=2
            )
        return rows

    train = None if train_dataset is None else prepare(train_dataset, "train_dataset")
    if train is not None and not hasattr(train, "__len__") and args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers}: the workers of a streamed dataset would "
            "number its documents alike, and these numbers seed the rollouts: use 0 or 1."
        )
    if isinstance(eval_dataset, dict):
        return train, {k: prepare(v, f"eval_dataset['{k}']") for k, v in eval_dataset.items()}, anchors
    return train, None if eval_dataset is None else prepare(eval_dataset, "eval_dataset"), anchors


def warn_of_open_completions(documents: Any, args: EBFTConfig, label: str, tokenizer) -> None:
    """Say, from the first documents, which share of completions has no end and so no rollouts."""
    open_ends, usual = _usual_end(documents, args, tokenizer)
    if open_ends:
        warnings.warn(
            f"{label}: {open_ends} of the first completions do not end in a stop token within max_length, and are not "
            f"compared with rollouts: set stop_token_ids to what ends them{usual}, or raise max_length.",
            stacklevel=3,
        )


def _usual_end(documents: Any, args: EBFTConfig, tokenizer) -> tuple[str, str]:
    """`3 of 8` where completions of the first documents have no end, else nothing; and the token that most end in."""
    collate, count, ends = BlockCollator(padding_id(tokenizer), args.document_masking), 0, Counter()
    for row in islice(documents, DOCUMENTS_LOOKED_AT):
        batch = collate([row])
        last = completion_borders(batch["completion_mask"], batch["doc_ids"])[1]
        ends.update(batch["input_ids"][last].tolist())
        count += int(batch_layout(batch, args, "completion", step=None).valid.sum())
    total = ends.total()
    token = ends.most_common(1)[0][0] if ends else None
    usual = "" if token is None else f" (most often {tokenizer.convert_ids_to_tokens(token)!r}, {token})"
    return f"{total - count} of {total}" if count < total else "", usual


def check_some_blocks(documents: Any, args: EBFTConfig, anchors: str, label: str, tokenizer) -> None:
    """Raise a ValueError unless at least one document has a block; stops at the first that does."""
    collate = BlockCollator(padding_id(tokenizer), args.document_masking)
    count = 0
    for row in documents:
        if batch_layout(collate([row]), args, anchors, step=None).num_blocks:
            return
        count += 1
    if args.rollout == "completion":
        names = tokenizer.convert_ids_to_tokens(list(args.stop_token_ids or ()))
        raise ValueError(
            f"{label}: none of the {count} documents has a prompt and a completion that ends in one of {names} within "
            f"max_length={args.max_length} tokens, which rollout='completion' compares with: raise max_length, set "
            f"stop_token_ids to what ends the completions{_usual_end(documents, args, tokenizer)[1]}, or use rollout: "
            "blocks."
        )
    prefix = "prompt" if anchors == "completion" else "prefix"
    raise ValueError(
        f"{label}: all {count} documents are too short for a block of completion_length={args.completion_length} "
        f"behind a {prefix} of at least context_length={args.context_length} tokens: use longer documents, lower one "
        "of the two, or set rl_coef: 0 for plain cross-entropy."
    )
