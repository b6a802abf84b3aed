"""One table of what several runs of one benchmark measured.

python -m benchmarks.summary saves/gpu-steps/step_cost-*.json --output saves/gpu_steps.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import table
from utils import cli
from utils.errors import UserError
from utils.files import read_json, write_atomic


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="summary.py", description="One table of the results of several runs of a benchmark.")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help="what the runs wrote to their --output")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md", help="where the table goes, as Markdown")
    return parser


def main(args: argparse.Namespace) -> None:
    documents = [read_json(path) for path in args.results]
    names = {document["benchmark"] for document in documents}
    if len(names) > 1:
        raise UserError(f"results of several benchmarks: {', '.join(sorted(names))}; name those of one")
    text = f"{table(rows_of(documents))}\n\n{'; '.join(dict.fromkeys(map(_machine, documents)))}\n"
    write_atomic(args.output, text.encode())
    print(text, end="")


def rows_of(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all documents, each with its network, and None for what only others have."""
    rows = [{"network": document["settings"].get("model"), **row} for document in documents for row in document["rows"]]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _machine(document: Mapping[str, Any]) -> str:
    about = document["machine"]
    return f"{about['hardware']}, PyTorch {about['torch']}, commit {about['commit']}"


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
