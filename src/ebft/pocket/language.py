"""Sentences in English and in Velari: verb last, adjectives behind, agreement, and choices that are free.

Velari in short: article, noun and adjectives agree in gender and number; an object's noun takes -m, in the plural -s;
the verb stands last and takes a tense (past -av, present -i, future -ur) and in the plural -st; "not" is `ni` before
it; prepositions and "to" (`ad`) stand behind; a clause with "because" or "when" comes first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from random import Random

from .lexicon import (
    ADJECTIVES,
    ANIMATE,
    BY_CONTEXT,
    CONJUNCTIONS,
    DITRANSITIVE,
    ENDINGS,
    FREE,
    INTRANSITIVE,
    NEW_WORDS,
    PLACES,
    PREPOSITIONS,
    THINGS,
    TIMES,
    TRANSITIVE,
    lexicon,
    plural,
)

TENSES = ("past", "present", "future")
_TENSE_ENDINGS = {"past": "av", "present": "i", "future": "ur"}
_ARTICLES = {"the": "l", "a": "un", "this": "t"}  # and the ending
_AUXILIARIES = {"past": ("did", "did"), "present": ("does", "do"), "future": ("will", "will")}
FRONTED = ("because", "when")

# Says whether the usual one of two right choices is taken; it is told the kind of choice and the clause's tense.
Choose = Callable[[str, str], bool]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: article ("" for none), adjectives, noun, number."""

    article: str
    adjectives: tuple[str, ...]
    noun: str
    many: bool


@dataclass(frozen=True)
class Clause:
    """A clause; what is None or "" is not there."""

    time: str
    subject: Phrase
    place: tuple[str, Phrase] | None
    receiver: Phrase | None
    object: Phrase | None
    verb: tuple[str, str, str]
    tense: str
    negated: bool


@dataclass(frozen=True)
class Sentence:
    """One clause, or two with a conjunction between them."""

    first: Clause
    conjunction: str = ""
    second: Clause | None = None


@dataclass(frozen=True)
class Shape:
    """How long sentences are: shares of what may be there, and whether words may be new."""

    second_clause: float
    time: float
    place: float
    adjective: float
    new_words: bool


def draw_sentence(shape: Shape, rng: Random) -> Sentence:
    """A sentence of that shape."""
    first = _clause(shape, rng)
    if rng.random() >= shape.second_clause:
        return Sentence(first)
    return Sentence(first, rng.choice(CONJUNCTIONS), _clause(shape, rng))


def _clause(shape: Shape, rng: Random) -> Clause:
    tense = rng.choice(TENSES)
    kind = rng.choices((TRANSITIVE, INTRANSITIVE, DITRANSITIVE), (6, 3, 2))[0]
    verb = rng.choice([verb for verb in kind if shape.new_words or verb[0] not in NEW_WORDS])
    nouns = (THINGS,) if kind is DITRANSITIVE else (THINGS, ANIMATE)
    return Clause(
        time=rng.choice(TIMES[tense]) if rng.random() < shape.time else "",
        subject=_phrase(ANIMATE, shape, rng),
        place=_place(shape, rng) if rng.random() < shape.place else None,
        receiver=_phrase(ANIMATE, shape, rng) if kind is DITRANSITIVE else None,
        object=None if kind is INTRANSITIVE else _phrase(rng.choice(nouns), shape, rng),
        verb=verb,
        tense=tense,
        negated=rng.random() < 0.2,
    )


def _place(shape: Shape, rng: Random) -> tuple[str, Phrase]:
    preposition = rng.choice(PREPOSITIONS)
    return preposition, _phrase(ANIMATE if preposition.startswith("with") else PLACES, shape, rng)


def _phrase(nouns: tuple[str, ...], shape: Shape, rng: Random) -> Phrase:
    noun = rng.choice([noun for noun in nouns if shape.new_words or noun not in NEW_WORDS])
    count = (rng.random() < shape.adjective) + (rng.random() < shape.adjective / 3)
    adjectives = rng.sample([word for word in ADJECTIVES if shape.new_words or word not in NEW_WORDS], count)
    many = rng.random() < 0.35
    article = rng.choice(("the", "the", "a", "this"))
    return Phrase("" if many and article == "a" else article, tuple(adjectives), noun, many)


def english(sentence: Sentence) -> str:
    """The sentence in English."""
    words = _english_clause(sentence.first)
    if sentence.second is not None:
        words = f"{words} {sentence.conjunction} {_english_clause(sentence.second)}"
    return words[0].upper() + words[1:] + "."


def _english_clause(clause: Clause) -> str:
    many = clause.subject.many
    base, third, past = clause.verb
    if clause.negated:
        verb = f"{_AUXILIARIES[clause.tense][many]} not {base}"
    else:
        verb = {"past": past, "present": base if many else third, "future": f"will {base}"}[clause.tense]
    parts = [clause.time, _english_phrase(clause.subject), verb]
    parts += [_english_phrase(clause.object)] if clause.object else []
    parts += ["to", _english_phrase(clause.receiver)] if clause.receiver else []
    parts += [clause.place[0], _english_phrase(clause.place[1])] if clause.place else []
    return " ".join(part for part in parts if part)


def _english_phrase(phrase: Phrase) -> str:
    words = [*phrase.adjectives, plural(phrase.noun) if phrase.many else phrase.noun]
    article = phrase.article
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    if article == "this" and phrase.many:
        article = "these"
    return " ".join([article, *words] if article else words)


def velari(sentence: Sentence, choose: Choose) -> str:
    """One right translation: the one that `choose` leads to. What is asked does not depend on the answers."""
    words = _velari_clause(sentence.first, choose)
    if sentence.second is not None:
        second = _velari_clause(sentence.second, choose)
        link = _stem(sentence.conjunction, choose, sentence.first.tense)
        words = f"{link} {second}, {words}" if sentence.conjunction in FRONTED else f"{words} {link} {second}"
    return words[0].upper() + words[1:] + "."


def translations(sentence: Sentence, most: int, rng: Random) -> list[str]:
    """All right translations, the usual one first; so many of them at random, and the usual one, if there are more."""
    asked: list[str] = []
    velari(sentence, lambda kind, tense: asked.append(kind) is None)
    answers = list(product((True, False), repeat=len(asked)))
    if len(answers) > most:
        answers = [answers[0], *rng.sample(answers[1:], most - 1)]
    found = []
    for chosen in answers:
        given = iter(chosen)
        found.append(velari(sentence, lambda kind, tense, given=given: next(given)))
    return list(dict.fromkeys(found))


def _velari_clause(clause: Clause, choose: Choose) -> str:
    tense = clause.tense
    parts = [_velari_phrase(clause.subject, choose, tense)]
    if clause.place:
        parts += [_velari_phrase(clause.place[1], choose, tense), _stem(clause.place[0], choose, tense)]
    if clause.receiver:
        parts += [_velari_phrase(clause.receiver, choose, tense), "ad"]
    if clause.object:
        parts.append(_velari_phrase(clause.object, choose, tense, accusative=True))
    if clause.time:
        time = _stem(clause.time, choose, tense)
        parts.insert(0 if choose("time first", tense) else len(parts), time)
    animate = clause.object is not None and clause.object.noun in ANIMATE
    verb = (
        _stem(clause.verb[0], choose, tense, animate) + _TENSE_ENDINGS[tense] + ("st" if clause.subject.many else "")
    )
    return " ".join([*parts, "ni", verb] if clause.negated else [*parts, verb])


def _velari_phrase(phrase: Phrase, choose: Choose, tense: str, accusative: bool = False) -> str:
    ending = ENDINGS[lexicon()[phrase.noun].gender][phrase.many]
    case = ("s" if phrase.many else "m") if accusative else ""
    words = [_ARTICLES[phrase.article] + ending] if phrase.article else []
    words.append(_stem(phrase.noun, choose, tense) + ending + case)
    animate = phrase.noun in ANIMATE
    return " ".join([*words, *(_stem(word, choose, tense, animate) + ending for word in phrase.adjectives)])


def _stem(word: str, choose: Choose, tense: str, animate: bool = False) -> str:
    stems = lexicon()[word].stems
    if word in FREE:
        return stems[0 if choose("stem", tense) else 1]
    return stems[0 if animate or word not in BY_CONTEXT else 1]
