"""Translation: formats and prompts, scores against sacrebleu called by hand, and the way to COMET and back."""

import gzip
import itertools
import json
import sys
import venv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft.evaluation import comet
from ebft.evaluation.translation import Segment, check_template, codes_of, load_translations, translation_prompt
from ebft.evaluation.translation_scores import (
    TranslationScore,
    check_metrics,
    compare_translations,
    sentence_scores,
    translation_scores,
)
from stand_ins import comet_stand_in

ROWS = [{"translation": {"de": "Ein Hund.", "en": "A dog."}}, {"translation": {"de": "Zwei.", "en": "Two."}}]
SEGMENTS = [Segment("Ein Hund.", ("A dog.",), "de-en"), Segment("Zwei.", ("Two.",), "de-en")]
OTHER_WAY = [Segment("A dog.", ("Ein Hund.",), "en-de"), Segment("Two.", ("Zwei.",), "en-de")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- formats ---


def test_pairs_are_read_in_the_direction_that_is_asked_for(tmp_path):
    name = write(tmp_path / "a.jsonl", ROWS)
    assert load_translations(name, direction="de-en") == SEGMENTS
    assert load_translations(name, direction="en-de") == OTHER_WAY
    flat = write(tmp_path / "b.jsonl", [row["translation"] for row in ROWS])
    assert load_translations(flat, direction="en-de") == OTHER_WAY
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    assert load_translations(str(tmp_path / "c.json"), direction="de-en") == SEGMENTS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    assert load_translations(str(tmp_path / "d.parquet"), direction="de-en") == SEGMENTS


def test_source_and_target(tmp_path):
    rows = [
        {"source": "a", "target": "b", "direction": "de-en"},
        {"source": "c", "references": ["d", "e"], "direction": "cs-en"},
    ]
    name = write(tmp_path / "a.jsonl", rows)
    both = [Segment("a", ("b",), "de-en"), Segment("c", ("d", "e"), "cs-en")]
    assert load_translations(name) == both
    assert load_translations(name, direction="cs-en") == both[1:]
    bare = write(tmp_path / "b.jsonl", [{"source": "a", "target": "b"}])
    assert load_translations(bare, direction="de-en") == both[:1]


@pytest.mark.parametrize("suffix", ["tsv", "tsv.gz"])
def test_two_columns(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    content = b"Ein Hund.\tA dog.\r\n\nZwei.\tTwo.\n"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert load_translations(str(path), direction="de-en") == SEGMENTS


@pytest.mark.parametrize(
    ("rows", "direction", "message"),
    [
        (ROWS, None, r"line 1, in `translation`: which of \['de', 'en'\] is the source\? .* such as de-en"),
        (ROWS, "de-fr", r"line 1, in `translation`: the field `fr` is missing"),
        (ROWS, "german", r"translation: direction is 'german': give two different language codes with a dash"),
        (ROWS, "de-de", r"direction is 'de-de'"),
        (
            [ROWS[0], {"translation": {"de": "a", "en": " "}}],
            "de-en",
            r"line 2, in `translation`: the field `en` is bl",
        ),
        ([ROWS[0], {"translation": ["a"]}], "de-en", r"line 2: the field `translation` is list: make it an object"),
        ([{"source": "a", "target": "b"}], None, r"line 1: the field `direction` is missing: add it, or say which"),
        ([{"source": "a", "direction": "de-en"}], None, r"line 1: the field `target` is missing"),
        ([{"source": "a", "references": [], "direction": "de-en"}], None, r"line 1: the field `references` is empty"),
        ([{"source": "a", "references": ["b", 1]}], "de-en", r"line 1: element 1 of the field `references` is int"),
        ([{"source": "a", "target": "b", "direction": "x"}], None, r"line 1: the field `direction` is 'x'"),
        ([{"source": "a", "target": "b", "direction": "de-en"}], "cs-en", r"holds no segment of direction 'cs-en'"),
        ([{"text": "a"}], "de-en", r"line 1: the field `source` is missing \(there are \['text'\]\)"),
        ([], "de-en", r"^translation='.*' holds no rows"),
    ],
)
def test_bad_rows(tmp_path, rows, direction, message):
    with pytest.raises(ValueError, match=message):
        load_translations(write(tmp_path / "a.jsonl", rows), direction=direction)


def test_a_line_without_two_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\na b\n")
    with pytest.raises(ValueError, match=r"a\.tsv, line 2: 1 column\(s\) where source and target are expected"):
        load_translations(str(tmp_path / "a.tsv"), direction="de-en")


# --- prompts ---


def test_prompt():
    expected = "Translate this from German to English:\nGerman: Ein Hund.\nEnglish:"
    assert translation_prompt(SEGMENTS[0]) == expected
    assert translation_prompt(SEGMENTS[0], "{source} = {{}}") == "Ein Hund. = {}"
    braces = Segment("{source}", ("a",), "xx-en")
    assert translation_prompt(braces, "{source_language}: {source}", {"xx": "X", "en": ""}) == "X: {source}"
    with pytest.raises(
        ValueError, match="no name of the language 'xx' is known: write it into --translation_template"
    ):
        translation_prompt(braces)
    assert translation_prompt(braces, "{source} in {target_language}") == "{source} in English"
    for direction in ("en-zh_CN", "en-zh-CN", "en-zh_Hans_CN"):
        assert translation_prompt(Segment("a", ("b",), direction), "{source} {target_language}") == "a Chinese"


@pytest.mark.parametrize(
    ("direction", "codes"),
    [
        ("de-en", ("de", "en")),
        ("zh-CN-en", ("zh-CN", "en")),
        ("en-zh-CN", ("en", "zh-CN")),
        ("zh_Hant_TW-pt-BR", ("zh_Hant_TW", "pt-BR")),
        ("es-419-deu_Latn", ("es-419", "deu_Latn")),
    ],
)
def test_codes_with_scripts_and_countries(direction, codes):
    assert codes_of(direction) == codes


@pytest.mark.parametrize("direction", ["de", "de-", "de-en-fr", "de-de", "de_en", "de en-fr"])
def test_directions_that_are_none(direction):
    with pytest.raises(ValueError, match="direction is '.*': give two different language codes"):
        codes_of(direction)


@pytest.mark.parametrize(
    "template", ["{source_language}", "{source} {target}", "{source", "{source} {}", "{source!r:"]
)
def test_bad_templates(template):
    with pytest.raises(ValueError, match=r"^my_template="):
        check_template(template, "my_template")


# --- BLEU and chrF ---

TALKS = [
    (
        "The cat sat on the mat in the morning.",
        "A cat was sitting on the mat this morning.",
        "The cat sat on the mat.",
    ),
    ("He never saw the sea before that day.", "He had never seen the sea before that day.", "Sea he saw never."),
    ("We will meet again after the winter.", "We will meet again after winter is over.", "After the winter, we meet."),
    ("She reads a book every single week.", "Each week she reads a book.", "She reads one book every single week."),
]


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu", reason="needs sacrebleu (the extra `translation`)")


def talks(direction="de-en", references=1):
    return [Segment(f"s{i}", talk[:references], direction) for i, talk in enumerate(TALKS)]


def test_scores_are_sacrebleus(sacrebleu):
    first, second = [talk[1] for talk in TALKS], [talk[2] for talk in TALKS]
    rows = translation_scores(talks(), [list(pair) for pair in zip(first, second, strict=True)], n_bootstrap=100)
    assert [(row.direction, row.metric, row.hypotheses) for row in rows] == [
        ("de-en", metric, label)
        for metric in ("BLEU", "chrF")
        for label in ("first", f"best of 2 by sentence {metric}")
    ]
    references = [[talk[0] for talk in TALKS]]
    for row, metric in zip(rows[::2], (sacrebleu.BLEU(), sacrebleu.CHRF()), strict=True):
        assert row.score == metric.corpus_score(first, references).score
        assert row.half_width > 0 and abs(row.mean - row.score) < row.half_width
        assert "seed:12345" in row.signature and "bs:100" in row.signature and "version:" in row.signature
    assert translation_scores(talks(), [[text] for text in first], n_bootstrap=100)[0] == rows[0]  # same resamples


def test_sentences_have_scores_of_their_own(sacrebleu):
    texts = [talk[1] for talk in TALKS]
    judges = {"BLEU": sacrebleu.BLEU(effective_order=True), "chrF": sacrebleu.CHRF()}
    for found, text, talk in zip(sentence_scores(talks(), texts), texts, TALKS, strict=True):
        assert found == pytest.approx({name: j.sentence_score(text, talk[:1]).score for name, j in judges.items()})
    with pytest.raises(ValueError, match="hypotheses are of"):
        sentence_scores(talks(), texts[1:])


def test_the_best_of_k_is_the_best_of_each_sentence(sacrebleu):
    texts = [[talk[1], talk[2]] for talk in TALKS]
    rows = {(row.metric, row.hypotheses): row.score for row in translation_scores(talks(), texts, n_bootstrap=1)}
    chrf = sacrebleu.CHRF()
    scored = [[chrf.sentence_score(text, talk[:1]).score for text in talk[1:]] for talk in TALKS]
    best = [pair[scores.index(max(scores))] for pair, scores in zip(texts, scored, strict=True)]
    assert best not in ([pair[0] for pair in texts], [pair[1] for pair in texts])
    score = chrf.corpus_score(best, [[talk[0] for talk in TALKS]]).score
    assert rows["chrF", "best of 2 by sentence chrF"] == score > rows["chrF", "first"]
    # Of all choices, those of each sentence's best come out on top or next to it.
    bleu = sacrebleu.BLEU()
    choices = [bleu.corpus_score(choice, [[t[0] for t in TALKS]]).score for choice in itertools.product(*texts)]
    assert rows["BLEU", "best of 2 by sentence BLEU"] >= sorted(choices)[-3]
    swapped = translation_scores(talks(), [pair[::-1] for pair in texts], n_bootstrap=1)
    assert {row.score for row in swapped if row.hypotheses != "first"} == {
        score for (_, label), score in rows.items() if label != "first"
    }


def test_resamples_without_a_match_are_resamples_too(sacrebleu):
    """Their score is 0, a number of another type than sacrebleu's others."""
    segments = [Segment("der Hund", ("the dog",), "de-en")] * 3
    scores = translation_scores(segments, [["qqq"], ["zzz"], ["the dog"]])
    assert {score.metric for score in scores} == {"BLEU", "chrF"}
    assert all(score.half_width > 0 for score in scores if score.metric == "chrF")
    compare_translations(segments, {"a": ["qqq", "zzz", "the dog"], "b": ["the dog", "zzz", "qqq"]})


def test_each_direction_has_its_scores_and_its_tokeniser(sacrebleu):
    segments = [*talks()[:2], Segment("s", ("\u732b\u5750\u5728\u57ab\u5b50\u4e0a",), "en-zh")]
    hypotheses = [[TALKS[0][0]], [TALKS[1][0]], ["\u732b\u5750\u5728\u57ab\u5b50\u4e0a"]]
    rows = {(row.direction, row.metric): row for row in translation_scores(segments, hypotheses, n_bootstrap=10)}
    assert len(rows) == 4 and all(row.score == pytest.approx(100) for row in rows.values())
    assert "tok:13a" in rows["de-en", "BLEU"].signature and "tok:zh" in rows["en-zh", "BLEU"].signature
    assert rows["de-en", "chrF"].half_width == pytest.approx(0)


def test_a_country_or_script_does_not_change_the_tokeniser(sacrebleu):
    """The library knows `zh` alone: text without spaces would be scored as one long word."""
    hypotheses = [["\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002"]]
    scores = []
    for direction in ("en-zh", "en-zh_CN", "en-zh-CN", "en_GB-zh_Hans"):
        segment = Segment("s", ("\u732b\u5750\u5728\u57ab\u5b50\u91cc\u3002",), direction)
        bleu, _ = translation_scores([segment], hypotheses, n_bootstrap=1)
        assert "tok:zh" in bleu.signature
        scores.append(bleu.score)
    assert len(set(scores)) == 1


def test_what_cannot_be_scored_is_found_before_translating(sacrebleu, monkeypatch):
    """Scoring needs a package of its own for Japanese."""
    check_metrics(SEGMENTS)
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ValueError, match="'en-ja' cannot be scored by sacrebleu here"):
        check_metrics([*SEGMENTS, Segment("a", ("b",), "en-ja")])


def test_more_references_for_some_segments(sacrebleu):
    segments = [*talks(references=2)[:2], *talks()[2:]]
    rows = translation_scores(segments, [[talk[1]] for talk in TALKS], n_bootstrap=1)
    assert rows[0].score > translation_scores(talks(), [[talk[1]] for talk in TALKS], n_bootstrap=1)[0].score
    alone = translation_scores(segments[:2], [[talk[1]] for talk in TALKS[:2]], n_bootstrap=1)
    assert [row.score for row in alone] == pytest.approx([100, 100])


def test_models_are_compared_on_the_same_resamples(sacrebleu):
    segments = talks() * 8
    models = {"good": [talk[1] for talk in TALKS] * 8, "bad": ["The the."] * 32, "same": [t[1] for t in TALKS] * 8}
    rows = {(row.metric, row.model): row for row in compare_translations(segments, models, n_bootstrap=200)}
    assert list(rows) == [(metric, model) for metric in ("BLEU", "chrF") for model in models]
    for metric in ("BLEU", "chrF"):
        assert rows[metric, "good"].p_value is None
        assert rows[metric, "bad"].p_value < 0.01 and rows[metric, "bad"].score < rows[metric, "good"].score
        assert rows[metric, "same"].p_value == 1 and rows[metric, "same"].score == rows[metric, "good"].score
    with pytest.raises(ValueError, match="a comparison takes at least two"):
        compare_translations(segments, {"good": models["good"]})


@pytest.mark.parametrize(
    ("hypotheses", "message"),
    [
        ([["a"]], "hypotheses are of 1 segments, but there are 2"),
        ([["a"], []], r"hypotheses of segment 1: \[\]"),
        ([["a"], ["b", "c"]], r"hypotheses of segment 1: \['b', 'c'\]"),
        (["a", "b"], "hypotheses of segment 0: 'a'; give each segment a list"),
    ],
)
def test_hypotheses_that_do_not_match(hypotheses, message):
    with pytest.raises(ValueError, match=message):
        translation_scores(SEGMENTS, hypotheses)
    with pytest.raises(ValueError, match="segments is empty"):
        translation_scores([], [])


def test_without_sacrebleu_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        ValueError, match=r"needs sacrebleu, which is not installed: pip install 'ebft\[translation\]'"
    ):
        translation_scores(SEGMENTS, [["a"], ["b"]])


# --- COMET: another Python, in which a small package of our own stands where COMET would be ---


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comet") / "environment"
    venv.create(folder, with_pip=False)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return comet_stand_in(tmp_path_factory.mktemp("comet") / "environment")


def test_comet_scores_come_back_in_order(environment):
    segments = [Segment("\u00e4\u00f6", ("a\nb",), "de-en"), *SEGMENTS]
    scores = comet.comet_scores(segments, ["a\nb", "A cat.", "Two."], model="known", folder=environment)
    assert scores == [2.5, 9.0, 5.5]


def test_comet_is_not_shadowed_by_our_own_file(environment, monkeypatch):
    """Our folder holds a comet.py too; neither it nor PYTHONPATH reaches the other Python."""
    monkeypatch.setenv("PYTHONPATH", str(comet._WORKER.parent))
    assert comet.comet_scores(SEGMENTS, ["", ""], model="known", folder=environment) == [9.0, 5.0]


def test_comet_errors_say_what_to_do(environment, bare_environment, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no environment at .*comet: make it once with `python -m ebft\.eval"):
        comet.check_environment()
    with pytest.raises(RuntimeError, match=r"no environment at .*comet: make it once with `python -m ebft\.eval"):
        comet.comet_scores(SEGMENTS, ["", ""])
    with pytest.raises(ValueError, match=r"(?s)does not work: make it once.*No module named 'comet'"):
        comet.check_environment(bare_environment)
    assert comet.check_environment(environment).parent.parent == environment
    with pytest.raises(RuntimeError, match=r"(?s)if it is not whole, make it once.*unbabel-comet cannot be imported"):
        comet.comet_scores(SEGMENTS, ["", ""], folder=bare_environment)
    with pytest.raises(RuntimeError, match=r"(?s)COMET failed in .*Model 'nosuch' not supported by COMET"):
        comet.comet_scores(SEGMENTS, ["", ""], model="nosuch", folder=environment)
    with pytest.raises(RuntimeError, match=r"COMET gave 1 scores for 2 segments"):
        comet.comet_scores(SEGMENTS, ["", ""], model="known", folder=environment, batch_size=99)
    with pytest.raises(ValueError, match="hypotheses: 1 for 2 segments"):
        comet.comet_scores(SEGMENTS, [""], folder=environment)


def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for occupied in (tmp_path / "file", tmp_path):
        with pytest.raises(RuntimeError, match="something else is there; name another folder"):
            comet.make_environment(occupied)
    assert (tmp_path / "file").exists()
    with pytest.raises(RuntimeError, match=r"(?s)COMET's environment .*-m venv .*failed"):
        comet.make_environment(tmp_path / "file" / "below")
    monkeypatch.setattr(comet, "REQUIREMENTS", ("./no such package",))
    with pytest.raises(RuntimeError, match=r"(?s)COMET's environment .*-m pip install .*failed"):
        comet.make_environment(tmp_path / "half")
    assert not (tmp_path / "half").exists(), "half of it would look like all of it"


@pytest.mark.parametrize(("mean", "interval"), [(1.0, (0, 4)), (98.0, (95, 100)), (50.0, (47, 53))])
def test_interval_is_one_of_scores(mean, interval):
    score = TranslationScore("de-en", "chrF", "first", mean, mean, half_width=3.0, signature="")
    assert (score.low, score.high) == interval
