"""One conversation, checked, and what the chat template makes of its first messages."""

import json
from typing import TYPE_CHECKING, Any

from ebft.data.encoded import describe
from ebft.data.formats import as_chatml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """The messages of one row; the template is that of the tokenizer unless `chat_template` says otherwise.

    Args:
        tokenizer: Has the chat template.
        messages: The conversation, a given prompt included.
        row: Its row, for `tools` and `chat_template_kwargs`.
        place: What messages call the row.
        first: How many messages are a given prompt.

    Raises:
        ValueError: A message has no content, or the row's options are none; names row and message.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        row: dict[str, Any],
        place: str,
        first: int,
    ):
        self.options = {"tools": _tools(row, place), **_template_options(row, place)}
        self.tokenizer, self.messages, self.place, self.first = tokenizer, as_chatml(messages), place, first
        for i, message in enumerate(self.messages):
            if message.get("content") is None and not message.get("tool_calls"):
                raise ValueError(f"{place}: {self.name(i)} has no `content`: give it some, or remove the row")

    def name(self, i: int) -> str:
        """What messages call a message."""
        if not self.first:
            return f"`messages`[{i}]"
        return f"`prompt`[{i}]" if i < self.first else f"`completion`[{i - self.first}]"

    def turns(self, wanted: bool) -> list[int]:
        """The assistant's messages that are no part of a given prompt.

        Args:
            wanted: There must be one.

        Raises:
            ValueError: There is none, or one of them is empty; names row and message.
        """
        turns = [i for i in range(self.first, len(self.messages)) if self.messages[i].get("role") == "assistant"]
        if wanted and not turns:
            roles = ", ".join(str(message.get("role")) for message in self.messages[self.first :])
            raise ValueError(
                f"{self.place}: no message of {'`completion`' if self.first else '`messages`'} has the role assistant "
                f"(roles: {roles}): name the model's turns so, or remove the row"
            )
        for i in turns:
            said = (value for key, value in self.messages[i].items() if key not in ("role", "name", "weight"))
            if not any(value.strip() if isinstance(value, str) else value for value in said):
                raise ValueError(
                    f"{self.place}: {self.name(i)} is an assistant turn that says nothing: fill in its `content`, or "
                    "remove the turn"
                )
        return turns

    def text(self, end: int | None = None, **options: Any) -> str:
        """The messages before `end`, rendered."""
        return self._apply(end, tokenize=False, **options)

    def prompt(self, turn: int) -> str:
        """What the model is given to write a turn: nothing before the first message."""
        return self.text(turn, add_generation_prompt=True) if turn else ""

    def tokens(self, end: int | None = None, **options: Any) -> Any:
        """`input_ids` of the messages before `end`; `offset_mapping`, `assistant_masks` if there are and asked for."""
        # Not verbose: what is longer than the model's own limit is cut later, and said so.
        ours = {"verbose": False, "return_offsets_mapping": self.tokenizer.is_fast}
        return self._apply(end, tokenize=True, return_dict=True, tokenizer_kwargs=ours, **options)

    def _apply(self, end: int | None, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(self.messages[:end], **self.options, **options)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            part = f" as far as {self.name(end - 1)}" if end and end < len(self.messages) else ""
            raise ValueError(
                f"{self.place}: the chat template cannot render these messages{part} ({error}): make each `content` a "
                "string and the roles those that the template knows, in its order, or remove the row"
            ) from error


def _tools(row: dict[str, Any], place: str) -> Any:
    tools = row.get("tools")
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: `tools` is no JSON ({error}): make it a list of tools, or remove it") from error


def _template_options(row: dict[str, Any], place: str) -> dict[str, Any]:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{place}: `chat_template_kwargs` is {describe(options)}: make it an object, or remove it")
    return options
