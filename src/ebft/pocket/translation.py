"""Translation from English to an invented language, Velari, with several right translations of each sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from ..evaluation.translation import LANGUAGE_NAMES, Segment, translation_prompt
from .files import Row, Task
from .language import Choose, Sentence, Shape, draw_sentence, english, translations, velari

# qaa is one of the codes that ISO 639 leaves for private use.
CODE, NAME = "qaa", "Velari"
DIRECTION = f"en-{CODE}"
NAMES = {**LANGUAGE_NAMES, CODE: NAME}
ABOUT = {
    "task": "translation",
    "direction": DIRECTION,
    "language_names": f"{CODE}={NAME}",
    "verifiable": "by BLEU against the references only",
    "max_new_tokens": 96,
}

# Share of the usual one of two right choices, by what is chosen and by the clause's tense.
Habits = Mapping[tuple[str, str], float]
TASK: Habits = {
    **{("stem", "past"): 0.9, ("stem", "present"): 0.6, ("stem", "future"): 0.2},
    **{("time first", "past"): 0.9, ("time first", "present"): 0.3, ("time first", "future"): 0.3},
}
PRETRAIN: Habits = dict.fromkeys(TASK, 0.5)

LONG = Shape(second_clause=0.5, time=0.4, place=0.4, adjective=0.4, new_words=True)
SHORT = Shape(second_clause=0.2, time=0.3, place=0.3, adjective=0.3, new_words=False)


@dataclass(frozen=True)
class Sizes:
    """How many sentences of each split."""

    pretrain: int = 20000
    train: int = 3000
    train_small: int = 300
    validation: int = 100
    test: int = 300
    references: int = 16


SMOKE = Sizes(pretrain=200, train=40, train_small=10, validation=6, test=8)


def make(sizes: Sizes, seed: int) -> Task:
    """All files of the task; no two splits share a sentence."""
    taken: set[str] = set()
    files: dict[str, list[Row]] = {}
    splits: dict[str, list[str]] = {}
    for name, count in (("test", sizes.test), ("validation", sizes.validation), ("train", sizes.train)):
        rng = Random(f"{seed} {name}")
        found = sentences(count, LONG, taken, rng)
        splits[name] = [prompt_of(source) for source in found]
        # Two independent translations of each held-out prompt: their variance is the floor of the feature loss.
        repeats = 1 if name == "train" else 2
        rows = enumerate(found.items())
        files[name] = [
            document(f"{name}/{i}" if repeats == 1 else f"{name}/{i}/{j}", source, sentence, rng)
            for i, (source, sentence) in rows
            for j in range(repeats)
        ]
        if name != "train":
            files[f"{name}_segments"] = [
                {
                    "id": f"{name}/{i}",
                    "source": source,
                    "references": translations(sentence, sizes.references, rng),
                    "direction": DIRECTION,
                }
                for i, (source, sentence) in enumerate(found.items())
            ]
    files["train_small"] = files["train"][: sizes.train_small]
    rng = Random(f"{seed} pretrain")
    found = sentences(sizes.pretrain, SHORT, taken, rng)
    splits["pretrain"] = [prompt_of(source) for source in found]
    files["pretrain"] = [
        {"text": f"{prompt_of(source)} {velari(sentence, chooser(PRETRAIN, rng))}"}
        for source, sentence in found.items()
    ]
    return Task(files, splits, ABOUT)


def sentences(count: int, shape: Shape, taken: set[str], rng: Random) -> dict[str, Sentence]:
    """So many different sentences by their English text, none of which is taken; they are from then on."""
    found: dict[str, Sentence] = {}
    while len(found) < count:
        sentence = draw_sentence(shape, rng)
        source = english(sentence)
        if source not in taken:
            found[source] = sentence
            taken.add(source)
    return found


def chooser(habits: Habits, rng: Random) -> Choose:
    """Draws each choice with its share."""
    return lambda kind, tense: rng.random() < habits[kind, tense]


def prompt_of(source: str) -> str:
    """What `ebft evaluate --translation` gives a model, to the letter."""
    return translation_prompt(Segment(source, (source,), DIRECTION), names=NAMES)


def document(identity: str, source: str, sentence: Sentence, rng: Random) -> Row:
    """A row to train or measure on, with one translation drawn from the task's habits."""
    completion = f" {velari(sentence, chooser(TASK, rng))}"
    return {
        "id": identity,
        "prompt": prompt_of(source),
        "completion": completion,
        "source": source,
        "direction": DIRECTION,
    }
