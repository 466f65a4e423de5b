"""Translation: segments in the common formats, and the prompts that ask for them."""

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .rows import Row, given, read_rows, strings_of, text_of, value_of

# The prompt of ALMA (Xu et al. 2023, "A Paradigm Shift in Machine Translation", and its README). What the model writes
# is its translation up to `STOP`.
TEMPLATE = (
    "Translate this from {source_language} to {target_language}:\n{source_language}: {source}\n{target_language}:"
)
STOP = ("\n",)

# A language, and behind it a script (four letters), a country (two) or a region (three digits): zh, zh_CN, zh-Hant-TW.
_CODE = "[A-Za-z]+(?:[_-](?:[A-Z][a-z]{3}|[A-Z]{2}|[0-9]{3}))*"

# Language codes (ISO 639-1) -> names, for the prompt.
LANGUAGE_NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish"},
    **{"de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian"},
    **{"fi": "Finnish", "fr": "French", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi"},
    **{"hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese"},
    **{"ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian"},
    **{"mk": "Macedonian", "mr": "Marathi", "ms": "Malay", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian"},
    **{"pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak"},
    **{"sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu"},
    **{"th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese"},
    **{"zh": "Chinese"},
}


@dataclass(frozen=True)
class Segment:
    """One text to translate.

    Attributes:
        source: The text.
        references: Its translations by people, at least one.
        direction: Codes of both languages, such as "de-en" or "en-zh_CN".
        place: File and line, or dataset and row, for messages; two segments are equal without it.
    """

    source: str
    references: tuple[str, ...]
    direction: str
    place: str = field(default="segment", compare=False)


def load_translations(
    name: str,
    *,
    direction: str | None = None,
    split: str = "test",
    config: str | None = None,
    field: str = "translation",
) -> list[Segment]:
    """Read parallel text.

    The formats: `translation: {"de": ..., "en": ...}` (Hugging Face, ALMA) or the columns `de` and `en`, either of
    which `direction` says how to read; `source` with `target` or `references` (a list) and, optionally, `direction`;
    .tsv with two columns, the source first.

    Args:
        name: A .jsonl, .json, .tsv (each may end in .gz) or .parquet file, a folder, or a Hub name.
        direction: Such as "de-en". Of rows with a direction of their own, only those are taken.
        split: Split of a folder or a Hub dataset.
        config: Hub configuration (subset).
        field: The option that `name` comes from, for messages.

    Raises:
        ValueError: There is no such file or dataset, no segment, or no direction; or a row lacks a field, or holds one
            that is blank or of another type. Names file and line (or dataset and row) and the field.
    """
    if direction is not None:
        codes_of(direction, f"{field}: direction")
    path = Path(name).expanduser()
    if path.is_file() and path.name.lower().removesuffix(".gz").endswith(".tsv"):
        rows = list(_tsv_rows(path))
    else:
        rows = read_rows(name, split, config, field, also=".tsv, ")
    segments = [replace(_segment(row, place, direction), place=place) for place, row in rows]
    if direction is not None:
        segments = [segment for segment in segments if segment.direction == direction]
    if not segments:
        raise ValueError(f"{field}={name!r} holds no segment of direction {direction!r}: choose another direction")
    return segments


def codes_of(direction: str, label: str = "direction") -> tuple[str, str]:
    """Both languages of a direction.

    Raises:
        ValueError: It is not two codes with a dash between.
    """
    codes = re.fullmatch(f"({_CODE})-({_CODE})", direction)
    if codes is None or codes[1] == codes[2]:
        raise ValueError(f"{label} is {direction!r}: give two different language codes with a dash, such as de-en")
    return codes[1], codes[2]


def translation_prompt(segment: Segment, template: str = TEMPLATE, names: Mapping[str, str] = LANGUAGE_NAMES) -> str:
    """What a model is given to translate a segment.

    Args:
        segment: Which.
        template: A format string with {source}, and optionally {source_language} and {target_language}.
        names: Language codes -> names in the prompt; looked up only where the template has them.

    Raises:
        ValueError: The template is not such a string, or a language that it names has no name.
    """
    check_template(template)
    source, target = codes_of(segment.direction)
    asked = {name for _, name, _, _ in string.Formatter().parse(template)}
    known = {
        field: _language(code, names, segment)
        for field, code in (("source_language", source), ("target_language", target))
        if field in asked
    }
    return template.format(source=segment.source, **known)


def _language(code: str, names: Mapping[str, str], segment: Segment) -> str:
    """A language's name: of its code, or else of the code before script and country.

    Raises:
        ValueError: Neither is known.
    """
    for known in (code, base_language(code)):
        if known in names:
            return names[known]
    raise ValueError(
        f"{segment.place}: direction={segment.direction!r}: no name of the language {code!r} is known: write it into "
        "--translation_template in place of {source_language} or {target_language}, or give "
        f"--language_names {code}=NAME (in Python, pass `names`)."
    )


def base_language(code: str) -> str:
    """The language of a code alone: zh of zh_CN."""
    return re.split("[_-]", code)[0].lower()


def check_template(template: str, field: str = "translation_template") -> None:
    """Refuse a template that cannot be filled in.

    Raises:
        ValueError: It is no format string, lacks {source}, or has a field that is not known.
    """
    known = {"source", "source_language", "target_language"}
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{field}={template!r} is no format string ({error}): write {{{{ for a brace") from error
    if fields - known or "source" not in fields:
        wanted = ", ".join(f"{{{name}}}" for name in sorted(known))
        raise ValueError(
            f"{field}={template!r} has the fields {sorted(fields)}: use {wanted}, and {{source}} for sure"
        )
    try:
        template.format(**dict.fromkeys(known, ""))
    except (ValueError, LookupError) as error:
        raise ValueError(f"{field}={template!r} cannot be filled in ({error}): write plain {{source}}") from error


def _segment(row: Row, place: str, direction: str | None) -> Segment:
    if given(row, "translation"):
        return _of_pair(value_of(row, place, "translation", dict), f"{place}, in `translation`", direction)
    if not given(row, "source") and direction is not None and set(codes_of(direction)) <= row.keys():
        return _of_pair(row, place, direction)
    languages = [code for code in row if re.fullmatch(_CODE, code) and base_language(code) in LANGUAGE_NAMES]
    if not given(row, "source") and direction is None and len(languages) > 1:
        return _of_pair({code: row[code] for code in languages}, place, None)
    source = text_of(row, place, "source")
    if given(row, "references"):
        references = strings_of(row, place, "references")
        if not references or not all(reference.strip() for reference in references):
            raise ValueError(f"{place}: the field `references` is empty or holds a blank one: give each a translation")
    else:
        references = (text_of(row, place, "target"),)
    own = text_of(row, place, "direction") if given(row, "direction") else direction
    if own is None:
        raise ValueError(f"{place}: the field `direction` is missing: add it, or say which for all, such as de-en")
    codes_of(own, f"{place}: the field `direction`")
    return Segment(source, references, own)


def _of_pair(pair: Row, place: str, direction: str | None) -> Segment:
    """A segment of a row that says each language's text but not which of them is the source."""
    if direction is None:
        codes = sorted(pair)
        raise ValueError(
            f"{place}: which of {codes} is the source? Say it with --translation_direction (in Python, `direction`), "
            f"such as {'-'.join(codes[:2])}"
        )
    source, target = codes_of(direction)
    return Segment(text_of(pair, place, source), (text_of(pair, place, target),), direction)


def _tsv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    from ebft.data.loading import numbered_lines

    for number, line in numbered_lines(path):
        columns = line.rstrip("\r\n").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 2:
            raise ValueError(
                f"{path}, line {number}: {len(columns)} column(s) where source and target are expected: keep these "
                "(cut -f1,2), or write JSON lines with `source` and `references`"
            )
        yield f"{path}, line {number}", {"source": columns[0], "target": columns[1]}
