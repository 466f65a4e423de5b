"""`ebft convert`: settings of the authors' release or of Axolotl in, our YAML out."""

from pathlib import Path

from ebft.cli.words import WordParser

HELP = """\
usage: ebft convert authors FILE [--sweep N] [--output_file FILE.yaml]
       ebft convert axolotl FILE [--output_file FILE.yaml]

Turns FILE into options of `ebft train`: of `authors` a YAML config of their release, or a shell script that calls it;
of `axolotl` a YAML file with `rl: ebft`. The YAML is printed, or written to --output_file, their defaults spelt out.
A comment at its head says of each setting that changes or has no counterpart how, or why; one that cannot be left out
ends the command with what to do instead. docs/migration.md has every setting.

  --sweep N    which setting of the authors' `sweep`, counted as their SLURM_ARRAY_TASK_ID is

examples:
  ebft convert authors configs/qa_code.yaml --sweep 4 --output_file qa_code.yaml
  ebft convert axolotl strided.yaml > ebft.yaml && ebft plan --config ebft.yaml
"""


def run(argv: list[str]) -> None:
    """Convert.

    Args:
        argv: The words after `ebft convert`.

    Raises:
        ValueError: The words or the file cannot be used.
    """
    parser = WordParser("convert")
    parser.add_argument("SOURCE", choices=["authors", "axolotl"])
    parser.add_argument("FILE", type=Path)
    parser.add_argument("--sweep", type=int)
    parser.add_argument("--output_file", type=Path)
    options = parser.parse_args(argv)
    if options.sweep is not None and options.SOURCE != "authors":
        raise ValueError("sweep: only configs of the authors have a sweep; remove it")
    text = converted(options.SOURCE, options.FILE, options.sweep)
    if options.output_file is None:
        print(text, end="")
    else:
        options.output_file.write_text(text, encoding="utf-8")
        print(f"Written: {options.output_file}")


def converted(source: str, path: Path, sweep: int | None = None) -> str:
    """Our YAML of a file of theirs.

    Raises:
        ValueError: The file cannot be read, or has a setting without a counterpart; names the file.
    """
    import yaml

    from ebft.credentials import place_of
    from ebft.migration import authors, axolotl
    from ebft.migration.rules import header

    try:
        text = path.read_text(encoding="utf-8")
        given = authors.read(text, sweep) if source == "authors" else axolotl.read(text)
        ours, notes = (authors if source == "authors" else axolotl).translate(given)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{place_of(error)}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return header(path.name, notes) + yaml.safe_dump(ours, sort_keys=False, allow_unicode=True)
