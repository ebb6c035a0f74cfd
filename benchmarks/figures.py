"""Draw the README's picture of the demo from a `result.json` that `taskgrad demo` wrote, and print its numbers.

python benchmarks/figures.py taskgrad-demo/result.json docs/demo.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from taskgrad.study.figures import readme_picture
from taskgrad.study.summary import HEADER, headline, rows


def main() -> None:
    """Read the result, write the picture, print the README's sentence and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="result.json of `taskgrad demo`")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.picture.write_text(readme_picture(result), encoding="utf-8")
    print(headline(result), end="\n\n")
    for row in (HEADER, ("---",) * len(HEADER), *rows(result)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
