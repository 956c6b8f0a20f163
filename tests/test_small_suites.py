"""The suites of the small model: their tasks are whole, and answered by single tokens."""

from pathlib import Path

import pytest

from mlmjax.suite_config import load_suite

SUITES = sorted((Path(__file__).parents[1] / "configs" / "suites").glob("*.toml"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_every_answer_is_one_token_of_its_own(suite, tokenizer):
    _, planned = load_suite(str(suite), [])
    assert len(planned) >= 3
    for _, task in planned:
        names = task.label_names or ["w", "x", "y", "z"]
        forms = list(task.verbalizer_for(len(names)).ids(tokenizer))
        assert len(forms) == len(names)
        every = [token for ids in forms for token in ids]
        assert len(set(every)) == len(every)
