"""The table and its page say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lorchestra.fusion.methods.table import LAWS, METHODS

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"


def rows(heading):
    """First cell → the others, of the table whose first heading row begins with ``heading``."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0].strip("`"): dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_the_page_has_every_method_with_its_paper_and_density():
    listed = rows("| method | ΔW |")
    assert list(listed) == list(METHODS)
    for name, row in METHODS.items():
        address = row.paper.rsplit(" ", 1)[-1]
        assert f"](https://{address})" in listed[name]["paper"]
        said = re.search(r"--density` \(([\d.]+)\)", listed[name]["takes"])
        assert (float(said[1]) if said else None) == row.density
        assert ("--seed" in listed[name]["takes"]) == row.seeded


def test_the_page_has_every_law():
    listed = rows("| | gauge |")
    assert {name: {law for law, cell in row.items() if cell} for name, row in listed.items()} == {
        name: set(row.laws) for name, row in METHODS.items()
    }
    assert all(f"- *{law}*:" in PAGE.read_text(encoding="utf-8") for law in LAWS)


def test_the_table_costs_no_torch():
    code = "import sys; from lorchestra.fusion.methods.table import METHODS; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
