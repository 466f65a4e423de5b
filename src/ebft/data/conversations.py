"""Conversations as documents: which tokens are an assistant turn's, behind the history that the model sees.

The chat template decides. Its markers, or those of TRL's training version of it, say what the assistant's tokens are;
what it makes of the messages before a turn, with its generation prompt, is what the model sees as it writes the turn.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ebft.data.chat import Chat
from ebft.data.encoded import Encoded, runs
from ebft.data.notes import OTHER_HISTORY, OWN_HISTORY, SHIFTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_MARKERS = "processing_class.chat_template does not mark the assistant's tokens, nor does TRL know how to"
_REMEDY = (
    "put {% generation %} and {% endgeneration %} around them, end-of-turn token included; or set split_turns=True, "
    "which makes each assistant turn a document of its own and needs no markers"
)


@dataclass(frozen=True)
class ConversationEncoder:
    """Makes documents of conversations; from `conversation_encoder`.

    Attributes:
        tokenizer: Has the chat template.
        template: TRL's training version of it, where it marks no assistant's tokens itself and TRL has one.
        own_marks: It does mark them.
        split_turns: Each assistant turn is a document of its own; None = where the whole has another history.
        completion_only_loss: Of rows with a prompt: train on what follows it alone.
        assistant_only_loss: Train on assistant turns alone.
        needs_turns: Refuse what has no assistant turn that can be told apart.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None
    own_marks: bool
    split_turns: bool | None
    completion_only_loss: bool
    assistant_only_loss: bool
    needs_turns: bool

    def documents(
        self, messages: list[dict[str, Any]], row: dict[str, Any], place: str, first: int = 0
    ) -> list[Encoded]:
        """Documents of one row: one, or one per assistant turn.

        Args:
            messages: The conversation, a given prompt included.
            row: Its row.
            place: What messages call the row.
            first: How many messages are a given prompt.

        Raises:
            ValueError: The messages cannot be used; names row and message.
        """
        chat = Chat(self.tokenizer, messages, row, place, first)
        turns = chat.turns(self.needs_turns or bool(self.split_turns))
        if first and len(messages) == first + 1:
            return [self._turn(chat, first, given=True)]
        if self.split_turns:
            return self._split(chat, turns)
        if not (self.template or self.own_marks):
            return [self._unmarked(chat)]
        whole = self._whole(chat, turns)
        if not whole.notes & OTHER_HISTORY or self.split_turns is False or not any(turns):
            return [whole]
        documents = self._split(chat, turns)
        documents[0].notes, documents[0].example = documents[0].notes | OWN_HISTORY, whole.example
        return documents

    def _whole(self, chat: Chat, turns: list[int]) -> Encoded:
        """The whole conversation as one document, in which each turn is an answer of its own."""
        text = chat.text(chat_template=self.template)
        found = chat.tokens(chat_template=self.template, return_assistant_tokens_mask=True)
        starts, ends = np.array(found["offset_mapping"], dtype=int).reshape(-1, 2).T
        marked = np.array(found["assistant_masks"], dtype=bool)
        turn_ends = [ends[run[-1]] for run in runs(found["assistant_masks"])]
        answers, behind, notes, example = marked.copy(), 0, 0, ""
        for turn in turns:
            prompt, alone = chat.prompt(turn), chat.text(turn + 1)
            begin, agreed = _shared(prompt, text), _shared(alone, text)
            # Some templates mark a part of the generation prompt, which the model is given.
            answers[(starts >= behind) & (ends <= begin)] = False
            behind = agreed
            # What is behind the turn may differ: some templates end a conversation with another token than a turn.
            if agreed < min(len(alone), next((end for end in turn_ends if end > begin), begin)):
                notes |= OTHER_HISTORY
                example = example or _difference(chat, turn, text, alone, agreed)
            elif begin < len(prompt) or ((starts < begin) & (ends > begin)).any():
                notes |= SHIFTED
        if self.needs_turns and not answers.any():
            raise _no_marks(chat)
        trained = np.ones(len(marked), dtype=bool)
        if chat.first and self.completion_only_loss:
            trained = ends > _shared(chat.prompt(chat.first), text)
        if self.assistant_only_loss:
            trained = trained & marked
        masks = [mask.astype(int).tolist() for mask in (answers, trained)]
        offsets = found["offset_mapping"]
        return Encoded(found["input_ids"], masks[0], masks[1], text, offsets, notes=notes, example=example)

    def _split(self, chat: Chat, turns: list[int]) -> list[Encoded]:
        """Each turn behind its own history, trained on alone; an opening turn is history and answers nothing."""
        documents = [self._turn(chat, turn) for turn in turns if turn]
        if not documents:
            raise ValueError(
                f"{chat.place}: {chat.name(0)}, the only assistant turn, answers nothing: put a message before it, "
                "remove the row, or leave split_turns out"
            )
        return documents

    def _turn(self, chat: Chat, turn: int, given: bool = False) -> Encoded:
        """A turn behind its history. If that is a given prompt, what is trained on is what TRL trains on."""
        prompt_ids = chat.tokens(turn, add_generation_prompt=True)["input_ids"]
        found = chat.tokens(turn + 1, return_assistant_tokens_mask=self.own_marks)
        completion, shifted = behind_prompt(prompt_ids, found["input_ids"])
        marked = found.get("assistant_masks", completion)
        answer = _both(completion, marked)
        if 1 not in answer:
            if self.needs_turns:
                raise _no_marks(chat)
            answer = completion
        trained = answer
        if given:
            trained = completion if self.completion_only_loss else [1] * len(completion)
            trained = _both(trained, marked) if self.assistant_only_loss else trained
        text, offsets = chat.text(turn + 1), found.get("offset_mapping")
        return Encoded(found["input_ids"], answer, trained, text, offsets, notes=SHIFTED * shifted)

    def _unmarked(self, chat: Chat) -> Encoded:
        """The whole conversation, of which nothing says what is the assistant's."""
        if self.needs_turns:
            raise ValueError(f"{chat.place}: `completion` has several messages, and {_NO_MARKERS}: {_REMEDY}")
        ids = chat.tokens()["input_ids"]
        completion, shifted = [1] * len(ids), False
        if chat.first:
            completion, shifted = behind_prompt(chat.tokens(chat.first, add_generation_prompt=True)["input_ids"], ids)
        trained = completion if self.completion_only_loss else [1] * len(ids)
        return Encoded(ids, completion, trained, notes=SHIFTED * shifted)


def conversation_encoder(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    label: str,
    split_turns: bool | None,
    completion_only_loss: bool,
    assistant_only_loss: bool,
    needs_turns: bool,
    prompts: bool,
) -> ConversationEncoder:
    """Check the chat template, and find its training version where it marks nothing itself.

    Args:
        tokenizer: Has the chat template.
        label: What messages call the dataset.
        split_turns: As of `ConversationEncoder`.
        completion_only_loss: As there.
        assistant_only_loss: As there.
        needs_turns: As there; always so with `assistant_only_loss`.
        prompts: The rows have prompts, and mostly one answer each, which needs no markers.

    Raises:
        ValueError: There is no template, or none that marks the assistant's tokens where that is needed.
    """
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    if tokenizer.chat_template is None:
        raise ValueError(
            f"processing_class.chat_template is None, but {label} holds messages: use a model with a chat "
            "template, set processing_class.chat_template in Python, or give `prompt` and `completion` as strings"
        )
    fast = bool(tokenizer.is_fast)  # a slow tokenizer does not say which characters a token stands for
    own_marks = fast and has_generation_markers(tokenizer.chat_template)
    template = _training_template(tokenizer) if fast and not own_marks else None
    needs_turns = needs_turns or assistant_only_loss
    if needs_turns and not (template or own_marks or split_turns or prompts):
        why, other = "assistant_only_loss=True", "assistant_only_loss=False"
        if not assistant_only_loss:
            why = "blocks and reasoning_tags are of the assistant's turns"
            other = "(for training, without reasoning_tags) anchors='all'"
        raise ValueError(f"{why}, but {_NO_MARKERS}: {_REMEDY}; or set {other}")
    marks = template is not None or own_marks
    if needs_turns and marks and not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        warnings.warn(
            "the chat template leaves the assistant's end-of-turn token outside of its {% generation %} markers: "
            "from the turns alone the model does not learn to stop. Move {% endgeneration %} behind that token",
            stacklevel=4,
        )
    return ConversationEncoder(
        tokenizer, template, own_marks, split_turns, completion_only_loss, assistant_only_loss, needs_turns
    )


def _training_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):
        return None


def behind_prompt(prompt_ids: list[int], ids: list[int]) -> tuple[list[int], bool]:
    """Mask of what follows the prompt, as TRL has it, and whether the prompt's own tokens do not begin `ids`."""
    from trl.data_utils import common_prefix_length

    start = common_prefix_length(prompt_ids, ids)
    return [0] * start + [1] * (len(ids) - start), start < len(prompt_ids)


def _both(one: list[int], other: list[int]) -> list[int]:
    return [a & b for a, b in zip(one, other, strict=True)]


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _difference(chat: Chat, turn: int, whole: str, alone: str, at: int) -> str:
    return (
        f"{chat.place}: behind {whole[max(at - 20, 0) : at]!r} the whole has {whole[at : at + 20]!r}, and the "
        f"messages up to {chat.name(turn)} alone have {alone[at : at + 20]!r}"
    )


def _no_marks(chat: Chat) -> ValueError:
    return ValueError(
        f"{chat.place}: the chat template marks no token of an assistant turn here: put its {{% generation %}} "
        "markers around all that the assistant writes, or remove the row"
    )
