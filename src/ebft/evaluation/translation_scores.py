"""BLEU and chrF of translations through sacrebleu: of a corpus with intervals, of two models paired, of a sentence."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..extras import require
from .translation import Segment, base_language, codes_of

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric


class TranslationScore(NamedTuple):
    """A corpus score of one direction, and its bootstrap interval over segments.

    Attributes:
        direction: Such as "de-en".
        metric: "BLEU" or "chrF", from 0 to 100.
        hypotheses: Which ones were scored: "first", or "best of 4 by sentence BLEU".
        score: Of the corpus.
        mean: Of the resamples, the middle of the interval.
        half_width: Of the 95 % interval; 0 without resamples.
        signature: sacrebleu's, to be published with the score.
    """

    direction: str
    metric: str
    hypotheses: str
    score: float
    mean: float
    half_width: float
    signature: str

    @property
    def low(self) -> float:
        """Lower end of the interval: not below 0, which few segments could bring about."""
        return max(0.0, self.mean - self.half_width)

    @property
    def high(self) -> float:
        """Upper end of the interval: not above 100."""
        return min(100.0, self.mean + self.half_width)


class PairedScore(NamedTuple):
    """A model's score beside the first model's, by a paired bootstrap over the same resamples of segments.

    Attributes:
        direction: Such as "de-en".
        metric: "BLEU" or "chrF".
        model: Name of the model.
        score: Of the corpus.
        mean: Of the resamples.
        half_width: Of the 95 % interval.
        p_value: That a difference to the first model as large as this comes by chance; None for the first model.
        signature: sacrebleu's.
    """

    direction: str
    metric: str
    model: str
    score: float
    mean: float
    half_width: float
    p_value: float | None
    signature: str


def check_metrics(segments: Sequence[Segment]) -> None:
    """Refuse segments that cannot be scored here, before any is translated.

    Raises:
        ValueError: sacrebleu lacks a package for the words of a target language (Japanese, Korean), or itself.
    """
    for direction in _by_direction(segments):
        try:
            _metrics(direction)
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"direction={direction!r} cannot be scored by sacrebleu here: {error}") from error


def translation_scores(
    segments: Sequence[Segment], hypotheses: Sequence[Sequence[str]], *, n_bootstrap: int = 1000
) -> list[TranslationScore]:
    """BLEU and chrF of a model, per direction: of the first hypothesis of each segment, and of the best.

    The best is the one that comes closest to the references, by the same metric on the sentence: what a perfect choice
    among k samples would reach (an oracle), not what the model does on its own.

    Args:
        segments: What was translated.
        hypotheses: The k translations of each, [segments][k]; the first is the greedy one where there is one.
        n_bootstrap: Resamples of the segments for the intervals, with sacrebleu's fixed seed; 1 for none.

    Raises:
        ValueError: Numbers do not match, a segment has no hypothesis, or sacrebleu is not installed.
    """
    k = _check_hypotheses(segments, hypotheses)
    rows = []
    for direction, members in _by_direction(segments).items():
        references = _streams([segments[i] for i in members])
        judges = _metrics(direction, sentences=True)
        for name, metric in _metrics(direction).items():
            chosen = {"first": [hypotheses[i][0] for i in members]}
            if k > 1:
                best = [_best(judges[name], hypotheses[i], segments[i].references) for i in members]
                chosen[f"best of {k} by sentence {name}"] = best
            for label, texts in chosen.items():
                score: Any = metric.corpus_score(texts, references, n_bootstrap=n_bootstrap)
                mean, half_width = (score._mean, score._ci) if n_bootstrap > 1 else (score.score, 0.0)
                signature = str(metric.get_signature())
                rows.append(
                    TranslationScore(direction, name, label, score.score, float(mean), float(half_width), signature)
                )
    return rows


def sentence_scores(segments: Sequence[Segment], hypotheses: Sequence[str]) -> list[dict[str, float]]:
    """BLEU and chrF of each translation by itself, from 0 to 100: what can be averaged and paired, unlike a corpus's.

    Args:
        segments: What was translated.
        hypotheses: One translation of each.

    Raises:
        ValueError: Numbers do not match, or sacrebleu is not installed.
    """
    _check_hypotheses(segments, [[text] for text in hypotheses])
    judges = {direction: _metrics(direction, sentences=True) for direction in _by_direction(segments)}
    return [
        {
            name: judge.sentence_score(text, list(segment.references)).score
            for name, judge in judges[segment.direction].items()
        }
        for segment, text in zip(segments, hypotheses, strict=True)
    ]


def sentence_bleu(hypothesis: str, references: Sequence[str], direction: str | None = None) -> float:
    """BLEU of one translation, from 0 to 100, over the n-grams that so short a text has.

    Args:
        hypothesis: The translation.
        references: At least one.
        direction: Such as "de-en", for the words of the target language; None for those that blanks part.

    Raises:
        ValueError: sacrebleu is not installed, or the direction is none.
    """
    return _bleu_of_sentences(direction).sentence_score(hypothesis, list(references)).score


@cache
def _bleu_of_sentences(direction: str | None) -> Any:
    return _metrics(direction or "xx-en", sentences=True)["BLEU"]


def compare_translations(
    segments: Sequence[Segment], hypotheses: Mapping[str, Sequence[str]], *, n_bootstrap: int = 1000
) -> list[PairedScore]:
    """Several models on the same segments, by sacrebleu's paired bootstrap (Koehn 2004), per direction.

    Args:
        segments: What was translated.
        hypotheses: Model -> one translation of each segment; the first model is what the others are held against.
        n_bootstrap: Resamples of the segments, with sacrebleu's fixed seed.

    Raises:
        ValueError: Numbers do not match, there are fewer than two models, or sacrebleu is not installed.
    """
    if len(hypotheses) < 2:
        raise ValueError(f"hypotheses holds {len(hypotheses)} model(s): a comparison takes at least two.")
    for texts in hypotheses.values():
        _check_hypotheses(segments, [[text] for text in texts])
    require("sacrebleu", "translation", "BLEU and chrF")
    from sacrebleu.significance import PairedTest

    rows = []
    for direction, members in _by_direction(segments).items():
        references = _streams([segments[i] for i in members])
        written = {model: [texts[i] for i in members] for model, texts in hypotheses.items()}
        systems: Any = list(written.items())
        test = PairedTest(systems, _metrics(direction), references, test_type="bs", n_samples=n_bootstrap)
        signatures, scores = test()
        del scores["System"]  # the models' names, in our order
        for name, results in scores.items():
            for model, result in zip(written, results, strict=True):
                value: Any = result
                # Of equal texts all differences are zero, which sacrebleu would call significant.
                same = value.p_value is not None and written[model] == systems[0][1]
                p_value = 1.0 if same else value.p_value
                row = (value.score, float(value.mean), float(value.ci), p_value, str(signatures[name]))
                rows.append(PairedScore(direction, name.rstrip("2"), model, *row))
    return rows


def _check_hypotheses(segments: Sequence[Segment], hypotheses: Sequence[Sequence[str]]) -> int:
    """How many hypotheses each segment has."""
    if not segments:
        raise ValueError("segments is empty: pass at least one.")
    if len(segments) != len(hypotheses):
        raise ValueError(
            f"hypotheses are of {len(hypotheses)} segments, but there are {len(segments)}: give each some."
        )
    k = len(hypotheses[0])
    for i, texts in enumerate(hypotheses):
        if isinstance(texts, str) or not texts or len(texts) != k:
            raise ValueError(f"hypotheses of segment {i}: {texts!r:.80}; give each segment a list of the same length.")
    return k


def _by_direction(segments: Sequence[Segment]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, segment in enumerate(segments):
        members.setdefault(segment.direction, []).append(i)
    return members


def _streams(segments: Sequence[Segment]) -> Any:
    """References as sacrebleu takes them: one list with the first one of each segment, one with the second, ..."""
    most = max(len(segment.references) for segment in segments)
    padded = [[*segment.references, *[None] * (most - len(segment.references))] for segment in segments]
    return [list(stream) for stream in zip(*padded, strict=True)]


def _best(judge: Any, hypotheses: Sequence[str], references: tuple[str, ...]) -> str:
    """The hypothesis with the best score as a sentence; the first of several that are equally good."""
    return max(hypotheses, key=lambda text: judge.sentence_score(text, list(references)).score)


def _metrics(direction: str, *, sentences: bool = False) -> "dict[str, Metric]":
    """BLEU, with the tokeniser that sacrebleu has for the target language, and chrF."""
    require("sacrebleu", "translation", "BLEU and chrF")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    target = base_language(codes_of(direction)[1])  # sacrebleu knows zh, and takes zh_CN for a language with spaces
    # Sentences shorter than four words have no 4-gram: without the effective order their BLEU says nothing.
    from .._compat import with_python_scores

    return {"BLEU": BLEU(trg_lang=target, effective_order=sentences), "chrF": with_python_scores(CHRF())}
