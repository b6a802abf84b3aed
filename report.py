"""Tables and pictures over any number of runs: Markdown, CSV, PNG, and one HTML page that holds all of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models import check_model
from reporting.naming import PICTURE_NAMES, README_PICTURES
from utils import cli
from utils.errors import UserError

if TYPE_CHECKING:
    from reporting.comparison_table import ComparisonTable
    from reporting.gather import Results

SCRIPT = "report.py"
DOCS = Path(__file__).resolve().parent / "docs"
COMMITTED_RESULTS, FIGURES = DOCS / "studies" / "benchmark.jsonl.gz", DOCS / "figures"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Gather runs into tables and pictures. Only their small files are read.")
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="runs, folders of runs, or studies (default: saves, or docs/studies)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="where the report goes, with --readme its pictures (default: report, or docs/figures)")  # fmt: skip
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out, by name, runs that have not begun, instead of refusing them"
    )
    parser.add_argument("--title", default="Pruning and distillation: results", help="title of the page")
    parser.add_argument("--pictures", nargs="*", choices=PICTURE_NAMES, metavar="NAME",
                        help=f"which to draw, of {', '.join(PICTURE_NAMES)} (default: all; with --readme "
                        f"{', '.join(README_PICTURES)})")  # fmt: skip
    parser.add_argument("--compare", nargs="+", default=[], metavar="BASELINE|METHOD|...",
                        help="also tables of methods beside a baseline, with intervals; * stands for any text")  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--attention", type=Path, metavar="RUN", help="also draw what this pruning run and its teacher attend to"
    )
    instead.add_argument("--collect", type=Path, metavar="DIR",
                         help="only copy what a report reads of the runs to here, into one file if a .jsonl.gz")  # fmt: skip
    instead.add_argument(
        "--list", action="store_true", help="only list the runs, newest first: name, network, method, accuracy, state"
    )
    instead.add_argument("--readme", type=Path, metavar="FILE", help="only renew the results in this Markdown file")
    parser.add_argument("--images", type=cli.non_negative_int, nargs="+", metavar="POSITION",
                        help="test images for --attention (default: the first of each of four classes)")  # fmt: skip
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the dataset for --attention is (default: as its run says)"
    )
    for role, name in (("teacher", "t_model"), ("student", "s_model")):
        parser.checks[name] = check_model
        parser.add_argument(cli.flag_of(name), metavar="NAME",
                            help=f"the {role} of --attention, where its run names a Python file")  # fmt: skip
    attention_flags = ("images", "data_dir", "t_model", "s_model")
    parser.counts_only(*attention_flags, where=lambda args: args.attention is not None, only="with --attention RUN")
    parser.counts_only("skip_missing", where=lambda args: bool(args.runs), only="for runs that are named")
    parser.counts_only(
        "pictures", "output", where=lambda args: args.collect is None, only="without --collect, which draws nothing"
    )
    drawn = ("output", "skip_missing", "title", "pictures", "compare")
    parser.counts_only(*drawn, where=lambda args: not args.list, only="without --list, which draws nothing")
    parser.counts_only(
        "title",
        "compare",
        where=lambda args: args.collect is None and args.readme is None,
        only="for a page, without --collect and --readme",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.list:
        from reporting.listing import listing

        return print(listing(args.runs or [Path("saves")]))
    from reporting.gather import gather
    from reporting.publish import check_output, collect, update_readme, write_report

    default = PICTURE_NAMES if args.readme is None else README_PICTURES
    names = default if args.pictures is None else args.pictures
    runs = args.runs or [COMMITTED_RESULTS if args.readme else Path("saves")]
    results = gather(runs, skip_missing=args.skip_missing)
    for skipped in results.skipped:
        print(f"left out {skipped}")
    if args.readme is not None:
        update_readme(args.readme, results.groups, figures=args.output or FIGURES, picture_names=names)
    elif args.collect is not None:
        collect(results.groups, args.collect)
    else:
        output = args.output or Path("report")
        check_output(output)
        comparisons = compared(results, args.compare, skip_missing=args.skip_missing)
        attention = []
        if args.attention is not None:
            from reporting.attention import attention_pictures

            networks = {"t_model": args.t_model, "s_model": args.s_model}
            attention = attention_pictures(args.attention, images=args.images, data_dir=args.data_dir, **networks)
        write_report(output, results, title=args.title, picture_names=names, extra_pictures=attention, comparisons=comparisons)


def compared(results: Results, wanted: Sequence[str], *, skip_missing: bool) -> list[ComparisonTable]:
    """The tables that are `wanted`; with `skip_missing` without those whose runs have not all come to their end."""
    from reporting.comparison_table import comparison_tables

    tables = []
    for asked in wanted:
        try:
            tables += comparison_tables(results.groups, asked)
        except UserError as error:
            if not skip_missing:
                raise
            print(f"left out {error}")
    return tables


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
