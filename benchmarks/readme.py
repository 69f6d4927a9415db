"""Fill the marked tables of README.md from the JSON files in benchmarks/results: `make results`.

A block stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`; its table is made from
`benchmarks/results/NAME.json`. Numbers reach the README by this script only, and
`tests/test_project.py` holds them to the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accuracy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results:(?P=name) -->)", re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"signs": accuracy.table}


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked block replaced by its table; blocks without a result file become empty."""

    def replace(match: re.Match[str]) -> str:
        name, path = match["name"], results / f"{match['name']}.json"
        if name not in TABLES:
            raise ValueError(
                f"README.md has a block results:{name}, which benchmarks/readme.py does not know."
            )
        table = TABLES[name](json.loads(path.read_text())) + "\n" if path.exists() else ""
        return match[1] + table + match[3]

    return BLOCK.sub(replace, text)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
