"""The words of the translation task: English, and an invented language, Velari, whose stems are made of syllables.

Velari is the same whatever the seed of a task. Most words have one stem; some have two that are equally right, and
some two of which the context says which is right (of people and animals, or of things).
"""

from dataclasses import dataclass
from functools import cache
from random import Random

# Gender -> endings in the singular and in the plural, of nouns, adjectives and articles alike.
ENDINGS = {"m": ("o", "oi"), "f": ("a", "ai"), "n": ("e", "ei")}

ANIMATE = (
    *("baker", "child", "doctor", "farmer", "friend", "girl", "hunter", "king", "neighbour", "painter", "queen"),
    *("sailor", "soldier", "student", "teacher", "thief", "woman", "writer", "cat", "dog", "horse", "bird", "wolf"),
)
THINGS = (
    *("apple", "bag", "bell", "book", "bottle", "box", "bridge", "cake", "candle", "chair", "coat", "cup", "door"),
    *("flower", "hat", "key", "knife", "lamp", "letter", "map", "mirror", "picture", "ring", "rope", "shirt", "song"),
    *("stone", "story", "table", "wheel"),
)
PLACES = ("castle", "city", "field", "forest", "garden", "house", "island", "market", "mountain", "river", "school")
ADJECTIVES = (
    *(
        "angry",
        "bad",
        "beautiful",
        "big",
        "black",
        "brave",
        "cheap",
        "clean",
        "cold",
        "dark",
        "good",
        "green",
        "heavy",
    ),
    *("light", "long", "new", "old", "poor", "quiet", "red", "rich", "round", "small", "strange", "strong", "white"),
)
# Base form, third person, past.
TRANSITIVE = (
    *(("see", "sees", "saw"), ("find", "finds", "found"), ("know", "knows", "knew"), ("carry", "carries", "carried")),
    *(("buy", "buys", "bought"), ("sell", "sells", "sold"), ("love", "loves", "loved"), ("draw", "draws", "drew")),
    *(
        ("lose", "loses", "lost"),
        ("hide", "hides", "hid"),
        ("touch", "touches", "touched"),
        ("want", "wants", "wanted"),
    ),
    *(("clean", "cleans", "cleaned"), ("watch", "watches", "watched"), ("follow", "follows", "followed")),
    *(("leave", "leaves", "left"), ("save", "saves", "saved"), ("forget", "forgets", "forgot")),
)
INTRANSITIVE = (
    *(("sleep", "sleeps", "slept"), ("laugh", "laughs", "laughed"), ("wait", "waits", "waited")),
    *(("sing", "sings", "sang"), ("work", "works", "worked"), ("arrive", "arrives", "arrived")),
    *(("fall", "falls", "fell"), ("speak", "speaks", "spoke")),
)
DITRANSITIVE = (("give", "gives", "gave"), ("show", "shows", "showed"), ("send", "sends", "sent"))
TIMES = {
    "past": ("yesterday", "last week", "long ago"),
    "present": ("today", "now", "every day"),
    "future": ("tomorrow", "next year", "soon"),
}
PREPOSITIONS = ("in", "near", "behind", "with", "without")
CONJUNCTIONS = ("and", "but", "because", "when")

PLURALS = {"child": "children", "thief": "thieves", "woman": "women", "wolf": "wolves", "knife": "knives"}
# With one stem of people and animals, and another of things: of a verb's object, or of an adjective's noun.
BY_CONTEXT = {"know", "carry", "leave", "save", "old", "big", "good", "light", "strong"}
# With two stems, either of which is right everywhere.
FREE = {
    *("baker", "friend", "girl", "horse", "bird", "book", "box", "door", "lamp", "picture", "story", "stone", "house"),
    *("garden", "see", "find", "buy", "want", "watch", "work", "arrive", "give", "beautiful", "dark", "new", "small"),
    *("soon", "now", "near", "but"),
}
# In no text of pretrain: what only fine-tuning can teach.
NEW_WORDS = frozenset({"sailor", "wolf", "mirror", "rope", "island", "forget", "follow", "speak", "round", "brave"})

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "pr", "st", "tr")
_VOWELS, _CODAS = ("a", "e", "i", "o", "u", "ai", "ou"), ("l", "m", "n", "r", "s", "t", "k", "d", "v")


@dataclass(frozen=True)
class Word:
    """What an English word is in Velari.

    Attributes:
        stems: One, or two: equally right, or of people and animals first and of things second.
        gender: m, f or n; it means something of nouns only.
    """

    stems: tuple[str, ...]
    gender: str


@cache
def lexicon() -> dict[str, Word]:
    """English word -> Velari; no two words share a stem."""
    rng = Random("Velari")
    verbs = [base for base, _, _ in (*TRANSITIVE, *INTRANSITIVE, *DITRANSITIVE)]
    times = [time for names in TIMES.values() for time in names]
    nouns = (*ANIMATE, *THINGS, *PLACES)
    words = dict.fromkeys((*nouns, *ADJECTIVES, *verbs, *times, *PREPOSITIONS, *CONJUNCTIONS))
    used = {"ni", "ad", *(article + ending for article in "lt" for endings in ENDINGS.values() for ending in endings)}
    found = {}
    for word in words:
        stems = []
        while len(stems) < (2 if word in FREE | BY_CONTEXT else 1):
            short = word in PREPOSITIONS or word in CONJUNCTIONS
            stem = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(1 if short else 2))
            stem = stem + rng.choice(_CODAS) if not short or stem in used else stem
            if stem not in used:
                used.add(stem)
                stems.append(stem)
        found[word] = Word(tuple(stems), rng.choice("mfn"))
    return found


def plural(noun: str) -> str:
    """The English plural."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("x", "ch", "s")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
