"""The suites of the small model: their tasks are whole, and answered by single tokens."""

from pathlib import Path

import pytest

from mlmjax.config.suite import load_suite

SUITES = sorted((Path(__file__).parents[2] / "configs" / "suites").glob("*.toml"))


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


def test_the_network_from_scratch_is_fitted_as_the_trained_one_is():
    """Both are lines of one table."""
    trained, scratch = (
        load_suite(str(next(path for path in SUITES if path.stem == name)), [])[0].model_dump()
        for name in ("small_fine_tune", "small_from_scratch")
    )
    differing = {key for key in trained if trained[key] != scratch[key]}
    assert differing == {"name", "description", "heads"}
