"""Translation: BLEU and chrF through sacrebleu, COMET on request; the greedy translation and the best of several."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ...extras import require
from .. import comet
from ..intervals import DocumentMean
from ..records import Record, RecordFile
from ..settings import GenerationSettings
from ..summary import Row, means_of
from ..translation import (
    LANGUAGE_NAMES,
    STOP,
    base_language,
    check_template,
    codes_of,
    load_translations,
    translation_prompt,
)
from ..translation_scores import check_metrics, compare_translations, sentence_scores, translation_scores
from .base import Session, Suite, Turn, files_fingerprint, generation_identity, prompt_tokens


class TranslationSuite(Suite):
    """The segments of an evaluation, and what each model made of them.

    Raises:
        ValueError: A segment, the template or a direction cannot be used; sacrebleu or COMET's environment is missing.
    """

    def __init__(self, session: Session):
        require("sacrebleu", "translation", "--translation")
        self.session, self.config = session, session.config
        if self.config.comet:
            comet.check_environment()
        template = self.config.translation_template
        check_template(template)
        self.segments = load_translations(
            str(self.config.translation),
            direction=self.config.translation_direction,
            split=self.config.translation_split,
            config=self.config.translation_config,
        )
        check_metrics(self.segments)
        names = LANGUAGE_NAMES | self.config.named_languages
        codes = {code for segment in self.segments for code in codes_of(segment.direction)}
        unused = sorted(self.config.named_languages.keys() - codes - set(map(base_language, codes)))
        if unused:
            raise ValueError(f"language_names: no segment is in {unused[0]!r}, only in {sorted(codes)}: remove it.")
        self.prompts = [translation_prompt(segment, template, names) for segment in self.segments]
        session.check_room([segment.place for segment in self.segments], self.prompts)
        self.translations: dict[str, list[list[str]]] = {}

    def measure(self, turn: Turn) -> dict[str, DocumentMean]:
        """Translate; means over segments of the scores that a single sentence has."""
        found: list[list[str]] = [[] for _ in self.segments]
        for kind, settings in self._runs().items():
            for texts, new in zip(found, self._translate(turn, kind, settings), strict=True):
                texts += new
        self.translations[turn.name] = found
        first = [texts[0] for texts in found]
        means = means_of(self._sentences(first))
        return means | means_of(self._comet(turn, first)) if self.config.comet else means

    def open_records(self, turn: Turn) -> None:
        """Those of the translations; COMET's depend on them, and are there only when all are."""
        files = {kind: self._file(turn, kind, settings) for kind, settings in self._runs().items()}
        if self.config.comet and len(files["greedy"].records) == len(self.segments):
            greedy = files["greedy"].records
            self._comet_file(turn, [greedy[i]["hypotheses"][0] for i in range(len(self.segments))])

    def _runs(self) -> dict[str, GenerationSettings]:
        runs = {"greedy": self.config.greedy()}
        if self.config.best_of > 1:
            runs["sampled"] = self.config.sampled(self.config.best_of - 1)
        return runs

    def _file(self, turn: Turn, kind: str, settings: GenerationSettings) -> RecordFile:
        about = generation_identity(settings, self.config.generation_engine)
        references = [segment.references for segment in self.segments]
        return turn.records(f"translation-{kind}", about, [self.prompts, references])

    def _translate(self, turn: Turn, kind: str, settings: GenerationSettings) -> list[list[str]]:
        """So many translations of each segment, as `settings` say."""
        file = self._file(turn, kind, settings)
        tokens, done = prompt_tokens(turn.tokenizer, self.prompts), [i in file for i in range(len(self.prompts))]
        with turn.progress(f"translation, {kind}", len(self.prompts)) as advance:
            advance(sum(done))
            for new in turn.complete(tokens, settings, [STOP] * len(done), done):
                file.append([{"id": i, "hypotheses": [t.strip() for t in texts]} for i, texts in new.items()])
                advance(len(new))
        return [file.records[i]["hypotheses"] for i in range(len(self.prompts))]

    def _sentences(self, hypotheses: Sequence[str]) -> list[Record]:
        """BLEU and chrF of each segment, as records of sums and counts."""
        return [
            {"id": i}
            | {f"{segment.direction}/sentence {name} (first)": [value, 1.0] for name, value in scores.items()}
            for i, (segment, scores) in enumerate(
                zip(self.segments, sentence_scores(self.segments, hypotheses), strict=True)
            )
        ]

    def _comet(self, turn: Turn, hypotheses: Sequence[str]) -> list[Record]:
        """COMET of each segment, as records of sums and counts."""
        file = self._comet_file(turn, hypotheses)
        if len(file.records) < len(hypotheses):
            self.session.console.print(f"{turn.name}: COMET ({self.config.comet_model})", highlight=False)
            turn.release()
            gpus = int(self.session.device.type == "cuda")
            scores = comet.comet_scores(self.segments, hypotheses, model=self.config.comet_model, gpus=gpus)
            file.append([{"id": i, "score": score} for i, score in enumerate(scores)])
        names = [f"{segment.direction}/COMET (first)" for segment in self.segments]
        return [{"id": i, name: [file.records[i]["score"], 1.0]} for i, name in enumerate(names)]

    def _comet_file(self, turn: Turn, hypotheses: Sequence[str]) -> RecordFile:
        local = Path(self.config.comet_model)
        # Size and time, as of the models' files: to read gigabytes at every start would take minutes on some disks.
        state = files_fingerprint([local]) if local.exists() else None
        settings = {"comet": self.config.comet_model, "comet_state": state}
        scored = [[segment.source, segment.references] for segment in self.segments]
        return turn.records("translation-comet", settings, [scored, list(hypotheses)])

    def rows(self) -> list[Row]:
        """Corpus scores with sacrebleu's own bootstrap over segments, and for each pair of models its paired one."""
        rows, signatures = [], {}
        sizes = [segment.direction for segment in self.segments]
        for name, hypotheses in self.translations.items():
            for score in translation_scores(self.segments, hypotheses):
                signatures[score.metric, score.signature] = None
                row = _row(name, score.direction, score.metric, score.hypotheses, score.score)
                row |= dict(low=score.low, high=score.high)
                rows.append(row | {"units": sizes.count(score.direction), "signature": score.signature})
        for metric, signature in signatures:
            self.session.console.print(f"{metric}: {signature}", highlight=False, style="dim")
        for one, other in combinations(self.translations, 2):
            first = {name: [texts[0] for texts in self.translations[name]] for name in (one, other)}
            scores = compare_translations(self.segments, first)
            for a, b in zip(scores[::2], scores[1::2], strict=True):
                row = _row(f"{other} - {one}", b.direction, b.metric, "first", b.score - a.score)
                rows.append(row | {"p_value": b.p_value, "units": sizes.count(b.direction), "signature": b.signature})
        return rows


def _row(model: str, direction: str, metric: str, hypotheses: str, value: float) -> dict[str, Any]:
    measure = f"{direction}/{metric} ({hypotheses})"
    return dict(model=model, measure=measure, length=None, mean=value, low=None, high=None)
