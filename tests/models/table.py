"""Train every model of the zoo both ways and write the table of `docs/models.md`.

python -m tests.models.table                 print the table
python -m tests.models.table docs/models.md  write it below the heading that is there
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from tests.models.zoo import Case, Comparison, all_cases, compare, missing_packages

MARK = "<!-- Below: python -m tests.models.table docs/models.md -->\n"
COLUMNS = ("model", "tables managed", "dense", "coverage", "loss difference", "weight difference", "remarks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="the document to write to")
    parser.add_argument("--optimizer", default="sgd", help="(%(default)s)")
    parser.add_argument("--only", default="", help="models whose name holds this")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results = [(case, attempt(case, args.optimizer)) for case in all_cases() if args.only in case.id]
    text = document(results, args.optimizer)
    if args.path is None:
        print(text)
        return
    before, mark, _ = args.path.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"{args.path} has no line {MARK.strip()!r}, below which the table goes")
    args.path.write_text(before + MARK + text)


def attempt(case: Case, optimizer: str) -> Comparison | Exception:
    """Return the comparison, or the error that the managed run ended with."""
    try:
        return compare(case, optimizer)
    except Exception as error:  # a table of what works must go on to the next row, and says what did not
        return error


def document(results: list[tuple[Case, Comparison | Exception]], optimizer: str) -> str:
    compared = [result for _, result in results if isinstance(result, Comparison)]
    equal = sum(is_equal(result) for result in compared)
    covered = sum(result.coverage >= 0.99 for result in compared)
    lines = [
        f"\n{len(results)} models tried with {optimizer}: {equal} equal plain PyTorch, {len(results) - len(compared)} "
        f"ended with an error; {covered} have a coverage of at least 0.99.\n"
    ]
    if missing_packages():
        lines.append(f"Not installed, so not here: {', '.join(missing_packages())}.\n")
    for library in dict.fromkeys(case.library for case, _ in results):
        rows = [row(case, result) for case, result in results if case.library == library]
        lines += [f"\n## {library}\n", line_of(COLUMNS), line_of(["---"] * len(COLUMNS)), *map(line_of, rows)]
    return "\n".join(lines) + "\n"


def is_equal(result: Comparison) -> bool:
    limit = 1e-11 if str(result.case.dtype).endswith("float64") else 2e-5
    return result.loss_difference <= limit and result.weight_difference <= limit


def row(case: Case, result: Comparison | Exception) -> list[str]:
    if isinstance(result, Exception):
        return [case.name, "", "", "", "", "", f"{type(result).__name__}: {str(result)[:160]}"]
    remarks = [case.note] if case.note else []
    if result.missed:
        remarks.append("on demand: " + ", ".join(result.missed))
    if not is_equal(result):
        remarks.append("NOT EQUAL")
    return [
        case.name,
        f"{len(result.managed)} of {len(result.tables)}",
        shortened(result.dense),
        f"{result.coverage:.3f}",
        f"{result.loss_difference:.1e}",
        f"{result.weight_difference:.1e}",
        "; ".join(remarks),
    ]


def shortened(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def line_of(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
