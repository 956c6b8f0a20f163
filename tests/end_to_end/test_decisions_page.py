"""docs/decisions.md is true: its programs run, and its request is answered."""

import json
import re
import warnings

import pytest
from pages import ROOT, blocks
from servers import serving
from small_models import small_model

from mlmjax import Decider
from mlmjax.classification.fitting import LearnedNothingWarning

PAGE = (ROOT / "docs" / "decisions.md").read_text()
PROGRAMS = blocks("python", PAGE)


@pytest.fixture(scope="module")
def decider(tokenizer):
    return Decider((small_model(num_hidden_layers=1, max_position_embeddings=192), tokenizer))


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_run_on_a_tiny_model(decider, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    decider.save_pretrained(tmp_path / "tiny")
    program = PROGRAMS[number].replace('"mlmjax-small"', '"tiny"')
    with warnings.catch_warnings():  # it has random weights, and guesses
        warnings.simplefilter("ignore", LearnedNothingWarning)
        warnings.filterwarnings("ignore", "noul/2 is not calibrated")
        exec(compile(program, "decisions.md", "exec"), {})


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_run_as_written(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():  # the small model guesses at yes and no
        warnings.filterwarnings("ignore", "noul/2 is not calibrated")
        exec(compile(PROGRAMS[number], "decisions.md", "exec"), {})


def test_the_requests_of_the_pages_are_answered(decider):
    """Those of the page on typed questions, and of the page that leads from a table to a server."""
    tables = (ROOT / "docs" / "tables.md").read_text()
    bodies = re.findall(r"-d '(.*?)'\n```", PAGE + tables, flags=re.DOTALL)
    assert len(bodies) >= 2
    with serving(decider) as client:
        for body in map(json.loads, bodies):
            status, _, found = client.ask(body)
            assert status == 200
            assert list(found["answers"]) == list(body["questions"])
