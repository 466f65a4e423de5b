"""`ebft report`: run folders in, one HTML file out."""

from ebft.cli.words import WordParser

HELP = """\
usage: ebft report RUN [RUN ...] [--output_file FILE] [--max_rollouts N]

Writes one HTML file with what the runs are, accuracy, cross-entropy and feature-matching loss over training and by
completion length, the parts of the reward, the cost, and the rollouts themselves, token by token. It needs no network
to be viewed and can be sent to others. Runs that still go on are shown as far as they have come.

RUN is the output_dir of `ebft train`, the folder of a comparison, or that of `ebft evaluate`; runs that differ in
nothing but their seed become one line with a 95 % t-interval.

  --output_file FILE   default: RUN/report.html for one RUN, else report.html
  --max_rollouts N     most rollouts to show, spread evenly over steps and contexts (default: 20000)

examples:
  ebft report runs/Qwen2.5-0.5B-my
  ebft report runs/sft runs/ebft runs/evaluation-sft-ebft --output_file sft_and_ebft.html

Needs plotly: pip install 'ebft[report]'
"""


def run(argv: list[str]) -> None:
    """Write a report and say where.

    Args:
        argv: The words after `ebft report`.

    Raises:
        ValueError: An option or a folder cannot be used.
    """
    parser = WordParser("report")
    parser.add_argument("RUN", nargs="+")
    parser.add_argument("--output_file")
    parser.add_argument("--max_rollouts", type=int)
    options = parser.parse_args(argv)

    from ebft.report import write_report
    from ebft.report.report import MOST_ROLLOUTS

    most = MOST_ROLLOUTS if options.max_rollouts is None else options.max_rollouts
    if most < 0:
        raise ValueError(f"max_rollouts={most} must be at least 0: 0 shows none")
    path = write_report(options.RUN, options.output_file, most)
    print(f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
