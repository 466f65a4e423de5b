"""The translation task: Velari's grammar, all right translations, splits, prompts, and parallel text of one's own."""

import json
from random import Random

import pytest

from ebft.evaluation.translation import LANGUAGE_NAMES, load_translations, translation_prompt
from ebft.pocket import parallel_text, translation
from ebft.pocket.__main__ import main
from ebft.pocket.language import Clause, Phrase, Sentence, draw_sentence, english, translations, velari
from ebft.pocket.lexicon import BY_CONTEXT, ENDINGS, FREE, NEW_WORDS, lexicon
from pocket_folders import prompts_of_splits, rows, shared, smoke

SIZES = translation.Sizes(pretrain=500, train=200, train_small=20, validation=20, test=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smoke("translation", tmp_path_factory.mktemp("translation") / "out")


@pytest.fixture(scope="module")
def task():
    return translation.make(SIZES, 0)


def stem(word: str, second: bool = False) -> str:
    return lexicon()[word].stems[second]


def ending(noun: str, many: bool = False) -> str:
    return ENDINGS[lexicon()[noun].gender][many]


def usual(kind: str, tense: str) -> bool:
    return True


def other(kind: str, tense: str) -> bool:
    return False


CATS = Clause("yesterday", Phrase("the", ("old",), "cat", True), None, None, Phrase("a", ("red",), "apple", False),
              ("find", "finds", "found"), "past", False)  # fmt: skip
TEACHER = Clause("", Phrase("this", (), "teacher", False), ("near", Phrase("the", (), "river", False)),
                 Phrase("the", ("angry",), "wolf", True), Phrase("", (), "knife", True),
                 ("give", "gives", "gave"), "future", True)  # fmt: skip


def test_english_agrees():
    assert english(Sentence(CATS)) == "Yesterday the old cats found a red apple."
    assert english(Sentence(TEACHER)) == ("This teacher will not give knives to the angry wolves near the river.")
    apple = Clause("", Phrase("a", (), "apple", False), None, None, None, ("fall", "falls", "fell"), "present", False)
    assert english(Sentence(apple)) == "An apple falls."
    assert english(Sentence(apple, "because", CATS)).startswith("An apple falls because yesterday the old cats")


def test_velari_has_the_verb_last_adjectives_behind_and_agrees():
    cat, apple = ending("cat", True), ending("apple")
    subject = f"l{cat} {stem('cat')}{cat} {stem('old')}{cat}"
    thing = f"un{apple} {stem('apple')}{apple}m {stem('red')}{apple}"
    time = stem("yesterday")
    assert velari(Sentence(CATS), usual) == f"{time} {subject} {thing} {stem('find')}avst.".capitalize()
    assert velari(Sentence(CATS), other) == f"{subject} {thing} {time} {stem('find', True)}avst.".capitalize()
    teacher, river, wolf, knife = (ending("teacher"), ending("river"), ending("wolf", True), ending("knife", True))
    words = [
        *(f"t{teacher} {stem('teacher')}{teacher}", f"l{river} {stem('river')}{river} {stem('near')}"),
        *(f"l{wolf} {stem('wolf')}{wolf} {stem('angry')}{wolf} ad", f"{stem('knife')}{knife}s ni {stem('give')}ur."),
    ]
    assert velari(Sentence(TEACHER), usual) == " ".join(words).capitalize()


def test_clause_with_because_comes_first_and_one_with_and_does_not():
    first, second = velari(Sentence(CATS), usual)[:-1], velari(Sentence(TEACHER), usual)[:-1].lower()
    link = stem("because").capitalize()
    assert velari(Sentence(CATS, "because", TEACHER), usual) == f"{link} {second}, {first.lower()}."
    assert velari(Sentence(CATS, "and", TEACHER), usual) == f"{first} {stem('and')} {second}."


def test_context_says_which_stem_is_right():
    person, thing = Phrase("the", ("old",), "king", False), Phrase("the", ("old",), "map", False)
    know = ("know", "knows", "knew")
    clauses = [Clause("", person, None, None, object, know, "past", False) for object in (person, thing)]
    texts = [velari(Sentence(clause), usual) for clause in clauses]
    assert stem("know") + "av" in texts[0] and stem("know", True) + "av" in texts[1]
    assert texts[0].count(stem("old")) == 2 and texts[1].count(stem("old")) == 1
    assert stem("old", True) in texts[1] and stem("old", True) not in texts[0]


def test_lexicon_is_unambiguous_from_velari():
    stems = [stem for word in lexicon().values() for stem in word.stems]
    assert len(set(stems)) == len(stems)
    assert not {"ni", "ad"} & set(stems)
    assert not BY_CONTEXT & FREE
    assert all(len(lexicon()[word].stems) == 2 for word in BY_CONTEXT | FREE)
    assert set(lexicon()) >= NEW_WORDS


def test_translations_are_all_that_choices_lead_to():
    rng = Random(0)
    for _ in range(200):
        sentence = draw_sentence(translation.LONG, rng)
        right = translations(sentence, 10_000, rng)
        assert right[0] == velari(sentence, usual) and len(set(right)) == len(right)
        assert velari(sentence, other) in right
        drawn = {velari(sentence, lambda kind, tense: rng.random() < 0.5) for _ in range(8)}
        assert drawn <= set(right)
        few = translations(sentence, 4, rng)
        assert len(few) == min(4, len(right)) and set(few) <= set(right) and few[0] == right[0]


def test_choices_have_the_shares_of_their_tense():
    choose = translation.chooser(translation.TASK, Random(0))
    for kind, share in translation.TASK.items():
        assert sum(choose(*kind) for _ in range(4000)) / 4000 == pytest.approx(share, abs=0.03)


def test_documents_hold_right_translations(task):
    for name in ("validation", "test"):
        documents, segments = task.files[name], task.files[f"{name}_segments"]
        assert [row["source"] for row in documents] == [row["source"] for row in segments for _ in range(2)]
        for i, row in enumerate(documents):
            references = segments[i // 2]["references"]
            assert row["completion"][0] == " "
            if len(references) < SIZES.references:
                assert row["completion"][1:] in references
        assert any(a["completion"] != b["completion"] for a, b in zip(documents[::2], documents[1::2], strict=True))


def test_evaluation_prompts_equal_training_prompts(folder):
    about = json.loads((folder / "task.json").read_text())
    names = LANGUAGE_NAMES | dict([about["language_names"].split("=")])
    for name in ("validation", "test"):
        segments = load_translations(str(folder / f"{name}_segments.jsonl"))
        prompts = [translation_prompt(segment, names=names) for segment in segments]
        assert prompts == [row["prompt"] for row in rows(folder, name)[::2]]
        assert {segment.direction for segment in segments} == {about["direction"]}


def test_no_two_splits_share_a_sentence(folder):
    prompts = prompts_of_splits(folder)
    assert not shared(prompts)
    sources = {name: {row["source"] for row in rows(folder, name)} for name in ("train", "validation", "test")}
    assert not sources["train"] & (sources["validation"] | sources["test"])


def test_words_that_only_train_has(task):
    pretrain = {word.strip(".").lower() for row in task.files["pretrain"] for word in row["text"].split()}
    train = " ".join(row["source"].lower() for row in task.files["train"])
    assert not NEW_WORDS & pretrain
    assert all(word[:-1] in train for word in NEW_WORDS)


def test_same_seed_same_files_and_another_seed_others(task):
    assert translation.make(SIZES, 0).files == task.files
    assert translation.make(SIZES, 1).files["test"] != task.files["test"]


def pairs(start: int, stop: int) -> list[dict]:
    return [{"translation": {"de": f"Haus Nummer {i}.", "en": f"House number {i}."}} for i in range(start, stop)]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_parallel_text_makes_the_same_files(tmp_path):
    path = write(tmp_path / "text.jsonl", [*pairs(0, 200), *pairs(0, 20)])
    held_out = write(tmp_path / "held_out.json", pairs(150, 180))
    made = parallel_text.make(path, held_out, "de-en", LANGUAGE_NAMES, parallel_text.SMOKE, 0)
    assert {name: len(found) for name, found in made.files.items()} == {
        "validation": 6, "validation_segments": 6, "test": 8, "test_segments": 8,
        "train": 40, "train_small": 10, "pretrain": 100,
    }  # fmt: skip
    numbers = {name: {prompt.split()[-2] for prompt in prompts} for name, prompts in made.splits.items()}
    assert numbers["test"] <= {f"{i}." for i in range(150, 180)} and not numbers["test"] & numbers["train"]
    row = made.files["train"][0]
    number = row["source"].split()[-1]
    assert row["prompt"] == f"Translate this from German to English:\nGerman: Haus Nummer {number}\nEnglish:"
    assert row["completion"] == f" House number {number}"
    assert made.about["direction"] == "de-en"


def test_parallel_text_of_a_language_without_a_known_name(tmp_path):
    found = [{"source": f"Huus {i}", "target": f"House {i}", "direction": "gsw-en"} for i in range(60)]
    names = LANGUAGE_NAMES | {"gsw": "Alemannic"}
    made = parallel_text.make(write(tmp_path / "text.jsonl", found), None, None, names, parallel_text.SMOKE, 0)
    assert made.files["test"][0]["prompt"].startswith("Translate this from Alemannic to English:\nAlemannic: Huus ")
    assert made.about["language_names"] == "gsw=Alemannic"
    assert not set(made.splits["train"]) & set(made.splits["test"])


def test_parallel_text_in_two_columns_end_to_end(tmp_path):
    path = tmp_path / "text.tsv"
    path.write_text("".join(f"Haus {i}.\tHouse {i}.\n" for i in range(200)))
    folder = smoke("translation", tmp_path / "out", "--parallel_text", str(path), "--direction", "de-en")
    assert len(load_translations(str(folder / "test_segments.jsonl"))) == parallel_text.SMOKE.test
    assert not shared(prompts_of_splits(folder))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--parallel_text", "missing.jsonl"), "no such file"),
        (("--parallel_text", "text.jsonl"), "which of ['de', 'en'] is the source?"),
        (("--parallel_text", "text.jsonl", "--direction", "de-fr"), "`fr`"),
        (("--parallel_text", "few.jsonl", "--direction", "de-en"), "has 5 usable segments"),
        (("--parallel_text", "thirty.jsonl", "--direction", "de-en"), "leaves 16 segments"),
        (("--parallel_text", "text.jsonl", "--direction", "de-en", "--parallel_validation", "few.jsonl"), "has 5"),
        (("--parallel_text", "both.jsonl"), "choose one with --direction"),
        (("--parallel_text", "gsw.jsonl"), "--language_names gsw=NAME"),
        (("--parallel_text", "gsw.jsonl", "--language_names", "gsw"), "is not CODE=NAME"),
        (("--direction", "de-en"), "needs --parallel_text"),
    ],
)
def test_what_is_wrong_is_told(options, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text.jsonl", pairs(0, 100))
    write(tmp_path / "few.jsonl", pairs(0, 5))
    write(tmp_path / "thirty.jsonl", pairs(0, 30))
    rows = [{"source": f"Haus {i}", "target": f"House {i}", "direction": "de-en"} for i in range(50)]
    write(
        tmp_path / "both.jsonl",
        [*rows, *({**row, "source": f"a{i}", "direction": "nl-en"} for i, row in enumerate(rows))],
    )
    write(tmp_path / "gsw.jsonl", [{**row, "direction": "gsw-en"} for row in rows])
    with pytest.raises(SystemExit) as error:
        main(["translation", "--smoke", *options])
    assert error.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "pocket").exists()
