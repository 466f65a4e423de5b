"""RLVR's completions on disk: a reward function that also writes what it is asked about, for the report's viewer."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from ..artifacts import RunFolder
from ..experience import CONTEXT_TOKENS, token_texts
from .rewards import Reward

DOCUMENT = "ebft_document"  # the column of each row's place in the dataset; users have a `document_id`


class KeptCompletions:
    """A reward function that writes `rollouts/step_*.parquet` of the first and every so many updates.

    Like an EBFT run's, with `reward` and `advantage` (leave-one-out, of the reward alone: TRL's own also has the KL
    penalty), and without what only EBFT has. Each process's own completions; the first process writes.

    Args:
        reward: What it is in the place of.
        tokenizer: Splits the completions.
        every: `rollout_save_steps`; 0 for never.
        num_generations: Completions of a prompt, which stand together.
    """

    def __init__(self, reward: Reward, tokenizer: PreTrainedTokenizerBase, every: int, num_generations: int):
        self.reward, self.tokenizer, self.every, self.num_generations = reward, tokenizer, every, num_generations
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # what TRL calls it in its metrics
        self._runner = asyncio.Runner()  # one loop for all steps: a client of the user's may be bound to it
        self._trainer: Trainer | None = None
        self._folder: RunFolder | None = None

    def write_for(self, trainer: Trainer) -> None:
        """Begin to write, into the trainer's folder; its evaluation leaves nothing."""
        self._trainer = trainer
        self._folder = RunFolder(str(trainer.args.output_dir), writes=trainer.is_world_process_zero())

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """The rewards, unchanged."""
        rewards: Any = self.reward(prompts=prompts, completions=completions, **columns)
        if inspect.iscoroutine(rewards):  # TRL would await it, but sees this object, which is no coroutine function
            rewards = self._runner.run(rewards)
        trainer = self._trainer
        if self._folder is not None and trainer is not None and trainer.model is not None and trainer.model.training:
            step = trainer.state.global_step + 1
            if self.every and (step == 1 or step % self.every == 0):
                self._folder.save_rollouts(self._rows(prompts, rewards, columns, step), step)
        return rewards

    def _rows(self, prompts, rewards, columns: dict[str, Any], step: int) -> list[dict[str, Any]]:
        n, rows, known = self.num_generations, [], {}
        for i, (prompt, reward, tokens) in enumerate(zip(prompts, rewards, columns["completion_ids"], strict=True)):
            ids = self.tokenizer(text=prompt)["input_ids"]
            group = rewards[i // n * n : (i // n + 1) * n]
            rows.append(
                {
                    "step": step,
                    "document_id": int(columns[DOCUMENT][i]),
                    "block": len(ids),
                    "context": self.tokenizer.decode(ids[-CONTEXT_TOKENS:]),
                    "reference": columns["reference"][i],
                    "rollout": i % n,
                    "completion": self.tokenizer.decode(tokens),
                    "token_ids": list(tokens),
                    "token_texts": token_texts(list(tokens), self.tokenizer, known),
                    "reward": reward,
                    "advantage": advantage(reward, group),
                }
            )
        return rows


def advantage(reward: float | None, group: Sequence[float | None]) -> float | None:
    """A reward beyond the mean of its siblings that have one."""
    known = [value for value in group if value is not None]
    if reward is None or len(known) < 2:
        return None
    return reward - (sum(known) - reward) / (len(known) - 1)
