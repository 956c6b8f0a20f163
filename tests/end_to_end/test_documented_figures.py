"""Figures in documents are those of the files next to them, which a stated command wrote."""

import json
import re

import pytest
from pages import ROOT

DOCS = ROOT / "docs"
STUDY = ROOT / "benchmarks" / "classifier_on_real_data.py"
PAGE = (DOCS / "classifier.md").read_text()
PARTS = json.loads((DOCS / "classifier.json").read_text())


def written(row):
    """Yield a figure of the study in every form in which the page may show it."""
    yield f"{row['value']:.3f}"
    for share in (row["value"], *row.get("interval", ())):
        yield f"{100 * share:.1f}"
    if "mean_size" in row:
        yield f"{row['mean_size']:.2f}"


KNOWN = {text for part in PARTS.values() for row in part["rows"] for text in written(row)}
CELLS = [
    line.split("|")[2:-1]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith("|---")
]
FIGURES = sorted({figure for cells in CELLS for figure in re.findall(r"\d+\.\d+", " ".join(cells))})


def test_every_figure_of_the_page_was_measured():
    assert len(FIGURES) > 100
    assert not [figure for figure in FIGURES if figure not in KNOWN]


def test_every_part_of_the_study_was_measured_with_the_packaged_model():
    names = re.search(r"^PARTS = \((.*)\)$", STUDY.read_text(), flags=re.MULTILINE)[1]
    assert list(PARTS) == names.split(", ")
    assert "default=PACKAGED" in STUDY.read_text()
    assert "benchmarks/classifier_on_real_data.py --data FOLDER --out FOLDER" in PAGE


SCREENSHOTS = ["pictures/page.png"]


@pytest.mark.parametrize("path", sorted([*DOCS.rglob("*.md"), ROOT / "README.md"]), ids=str)
def test_pictures_of_documents_are_svg_and_exist(path):
    text = path.read_text()
    shown = [*re.findall(r'<img src="([^"]+)"', text), *re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    for name in shown:
        assert (path.parent / name).suffix == ".svg" or name in SCREENSHOTS
        assert (path.parent / name).is_file()
