"""Token ids of prompts and references, as TRL's online trainers make those of prompts and completions."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..data.formats import are_messages

Ids = tuple[int, ...]
Text = str | list[dict[str, Any]]  # plain text or messages


@dataclass(frozen=True)
class Tokens:
    """What turns prompts and references into token ids.

    Attributes:
        tokenizer: The policy's.
        chat_template_kwargs: Of the trainer's config, for prompts of messages.
        max_completion_length: Longest completion that is sampled, to which references are cut; None for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_completion_length: int | None = None

    def prompt(self, prompt: Text) -> Ids:
        """The context that completions of a prompt are sampled in."""
        if isinstance(prompt, str):
            return self._plain(prompt)
        return self._rendered(prompt, add_generation_prompt=True)

    def reference(self, prompt: Text, reference: Text, place: str) -> Ids:
        """A reference as the completion that it would be: behind the prompt, ended by EOS, cut to the same length.

        Text is tokenised together with its prompt, or, where that changes the prompt's last token or the prompt is
        messages, by itself. Messages are rendered behind the prompt's, and end where a completion would: with the
        first EOS.

        Args:
            prompt: As the trainer gets it.
            reference: Text, or messages behind a prompt of messages.
            place: What an error calls the row.

        Raises:
            ValueError: It is neither, or messages behind a prompt of text.
        """
        context = self.prompt(prompt)
        if isinstance(reference, str):
            together = self._plain(prompt + reference) if isinstance(prompt, str) else ()
            ids = together[len(context) :]
            if together[: len(context)] != context:
                ids = self._plain(reference, add_special_tokens=False)
        elif are_messages(reference) and not isinstance(prompt, str):
            together = self._rendered(prompt + reference)
            ids = together[common_prefix_length(list(context), list(together)) :]
        else:
            raise ValueError(
                f"{place} is {reference!r:.60}: give text, messages behind a prompt of messages, or None (no reward)."
            )
        return self._ended(ids)[: self.max_completion_length]

    def is_whole(self, completion: Ids) -> bool:
        """Whether a completion ends by itself and was not cut."""
        return completion[-1:] == (self.tokenizer.eos_token_id,)

    def _ended(self, ids: Ids) -> Ids:
        eos: Any = self.tokenizer.eos_token_id
        return ids[: ids.index(eos) + 1] if eos in ids else (*ids, eos)

    def _plain(self, text: str, **options: Any) -> Ids:
        return tuple(self.tokenizer(text=text, verbose=False, **options)["input_ids"])

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> Ids:
        options |= {"tokenize": True, "return_dict": True, **self.chat_template_kwargs}
        rendered: Any = self.tokenizer.apply_chat_template(messages, **options)
        return tuple(rendered["input_ids"])
