"""Writes the tables of the README and the docs, and the figure of the evidence, from the lines in results/.

No number there is typed. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.

python experiments/tables.py            writes them
python experiments/tables.py --check    exit code 1 where they say something else than the results
"""

import argparse
import re
import sys
from functools import cache

import benchmark_tables
import evidence_figure
import evidence_tables
from layout import ROOT

TABLES = benchmark_tables.TABLES | evidence_tables.TABLES
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@cache
def table(name: str) -> str:
    if name not in TABLES:
        raise SystemExit(f"there is no table {name!r}: {', '.join(TABLES)}.")
    return TABLES[name]()


def filled(text: str) -> str:
    """The text of a page with each of its tables between its markers."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where something would change")
    check = parser.parse_args().check
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if check and before != after:
            sys.exit(f"{page.relative_to(ROOT)} differs from results/; run: make tables")
        if not check:
            page.write_text(after)
    if not evidence_figure.is_current():
        if check:
            sys.exit(f"{evidence_figure.FIGURE.relative_to(ROOT)} differs from results/; run: make tables")
        evidence_figure.draw()


if __name__ == "__main__":
    main()
