"""Kept out of training: tasks by their name, texts of evaluation sets; everything counted."""

import pytest
from row_files import read, write_table

from mlmjax.config.data import ExcludeConfig, SourceConfig
from mlmjax.config.tables import decode
from mlmjax.data.reading.examples import MOST_NAMED
from mlmjax.data.reading.exclusion import Exclusion, evaluation_identity
from mlmjax.errors import InputError

QUESTION = "Which of the two rivers that meet in the old town is the longer one of the pair"
TASK = """
name = "rivers"
data = "rivers.jsonl"
prompt = "You will be given a question. Read it carefully, then select.\\n{q}\\n{options}"
columns = { q = "meta.question" }
options = "choices"
answer = "answer"
"""


def config(**keys):
    return decode(ExcludeConfig, keys, "data.exclude")


def exclude(**keys):
    return Exclusion(config(**keys))


@pytest.fixture
def rivers(tmp_path):
    """Write a task file with its data; give its path."""
    choices = ["It is the Danube, which is also the longest river of the whole union", "none"]
    row = {"meta": {"question": QUESTION}, "choices": choices, "answer": 0}
    write_table(tmp_path / "rivers.jsonl", [row])
    (tmp_path / "rivers.toml").write_text(TASK)
    return str(tmp_path / "rivers.toml")


def test_records_are_kept_out_by_task_and_by_text(rivers, tmp_path, tokenizer):
    rows = [
        {"text": "The sky?", "answer": "blue", "task": "plain"},
        {"text": "The sky?", "answer": "blue", "task": "my_MMLU_aux:1.0.0"},
        {"text": f"Q: {QUESTION.lower()}, in town?", "answer": "yes", "task": "plain"},
        {"text": f"Q: {QUESTION}?", "answer": "not one token", "task": "plain"},
        {"text": "You will be given a question. Read it carefully, then select.", "answer": "yes"},
        {"text": "it is the danube which is also the longest river of the whole union"},
    ]
    rows = [{"answer": "no", "task": "plain", **row} for row in rows]
    path = write_table(tmp_path / "train.jsonl", rows)
    source = SourceConfig(path=path, prompt="Say. {text}", answer="answer", task="task")
    kept, counts = read(source, tokenizer, exclusion=exclude(tasks=["*mmlu*"], overlap=[rivers]))
    assert len(kept) == 2
    assert counts.records == 6
    assert counts.dropped == {
        "task excluded by '*mmlu*'": 1,
        "overlaps rivers": 2,
        "answer is not one token": 1,
    }
    (first, words), (second, _) = counts.hits["rivers"]
    assert (first, second) == (f"{path} line 3", f"{path} line 6")
    assert words == " ".join(QUESTION.lower().split()[:13])
    assert len(read(source, tokenizer)[0]) == 5


def test_a_short_option_is_a_phrase_that_stands_anywhere(rivers, tmp_path):
    choices = ["the president of the united states", "none"]
    row = {"meta": {"question": "who is it that lives there"}, "choices": choices, "answer": 0}
    write_table(tmp_path / "rivers.jsonl", [row])
    exclusion = exclude(overlap=[rivers])
    assert exclusion.overlap("Who is it that lives there?").name == "rivers"
    assert exclusion.overlap("Lincoln was the president of the United States.") is None


def test_plain_text_and_sources_without_a_task_column(rivers, tmp_path, tokenizer):
    rows = [{"body": f"Of old. {QUESTION}."}, {"body": "Free."}]
    path = write_table(tmp_path / "texts.jsonl", rows)
    source = SourceConfig(path=path, text="body", name="books")
    kept, counts = read(source, tokenizer, exclusion=exclude(overlap=[rivers]))
    assert len(kept) == 1
    assert counts.dropped == {"overlaps rivers": 1}
    kept, counts = read(source, tokenizer, exclusion=exclude(tasks=["BOOK?"]))
    assert (kept, counts.dropped) == ([], {"task excluded by 'BOOK?'": 2})


def test_the_report_names_a_bounded_number_of_records(rivers, tmp_path, tokenizer):
    rows = [{"text": f"{QUESTION} {i}", "label": i % 2} for i in range(MOST_NAMED + 5)]
    rows.append({"text": "fine", "label": 1})
    source = SourceConfig(
        path=write_table(tmp_path / "train.jsonl", rows),
        prompt="{text}",
        answer="label",
        labels=("no", "yes"),
    )
    for head in ("mlm", "classification"):
        kept, counts = read(source, tokenizer, exclusion=exclude(overlap=[rivers]), head=head)
        assert len(kept) == 1
        assert counts.dropped == {"overlaps rivers": MOST_NAMED + 5}
        assert len(counts.hits["rivers"]) == MOST_NAMED


def test_a_set_may_have_files_of_its_own(rivers, tmp_path):
    other = write_table(
        tmp_path / "other.jsonl",
        [{"meta": {"question": "a b c d e f"}, "choices": ["a", "b"], "answer": 0}],
    )
    wanted = config(overlap=[rivers, {"task": rivers, "data": other}], ngram=7)
    exclusion = Exclusion(wanted)
    assert exclusion.overlap("A, b, c, d, e, f!").name == "rivers"
    assert exclusion.overlap(" ".join(QUESTION.split()[:7])).name == "rivers"
    first, second = evaluation_identity(wanted)
    assert first["texts"] == second["texts"]
    assert list(second["files"]) == [other]
    assert evaluation_identity(wanted) == [first, second]
    (tmp_path / "other.jsonl").write_text("{}")
    assert evaluation_identity(wanted)[1] != second
    with open(rivers, "a") as file:
        file.write('strip = ["q"]\n')
    assert evaluation_identity(wanted)[0]["texts"] != first["texts"]


def test_a_set_of_the_hub_is_reported_by_its_commit():
    (reported,) = evaluation_identity(config(overlap=["mmlu"]))
    assert (reported["hub"], reported["split"]) == ("cais/mmlu", "test")
    assert len(reported["revision"]) == 40


def test_rows_and_revisions_of_a_set_are_checked(rivers, tmp_path):
    path, choices = tmp_path / "broken.jsonl", ["a", "b"]
    broken = write_table(path, [{"meta": {"question": 5}, "choices": choices}])
    with pytest.raises(InputError, match=r"broken.jsonl line 1: task rivers: has 5 where text"):
        exclude(overlap=[{"task": rivers, "data": broken}])
    write_table(path, [{"meta": {}, "choices": choices}])
    with pytest.raises(InputError, match=r"broken.jsonl line 1: has no column 'meta.question'"):
        exclude(overlap=[{"task": rivers, "data": broken}])
    (tmp_path / "loose.toml").write_text(TASK.replace('data = "rivers.jsonl"', 'hub = "a/b"'))
    with pytest.raises(InputError, match=r"hub dataset a/b has no commit"):
        exclude(overlap=[str(tmp_path / "loose.toml")])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"overlap": ["mmlu-pro"]}, r"mmlu-pro: task 'mmlu-pro': is neither.*you mean 'mmlu_pro'"),
        ({"overlap": ["20newsgroups_raw"]}, r"has neither data nor hub.*data = \"FILE\""),
        ({"overlap": [{"task": "mmlu", "data": "no.csv"}]}, "overlap: mmlu: no.csv: no file"),
        ({"tasks": [" "]}, r"tasks.0 is blank"),
        ({"overlap": [{"tusk": "mmlu"}]}, r"overlap.0.t.sk: "),
        ({"overlap": [5]}, r"overlap.0: found 5"),
        ({"ngram": 0}, r"ngram: found 0"),
        ({"task": ["x"]}, r"task: unknown key; did you mean 'tasks'"),
    ],
)
def test_what_cannot_be_excluded_is_rejected(keys, message):
    with pytest.raises(InputError, match=message):
        exclude(**keys)


def test_answers_are_normalised_and_counted(tmp_path, tokenizer):
    values = ["(A)", " B. ", "C", "Yes.", "(D) .", "no"]
    rows = [{"text": "Say", "answer": value} for value in values]
    path = write_table(tmp_path / "train.jsonl", rows)
    source = SourceConfig(path=path, prompt="{text}", answer="answer")
    kept, counts = read(source, tokenizer)
    assert [tokenizer.decode([e.ids[e.answer_position]]) for e in kept] == [" C", " no"]
    assert not counts.normalized
    rules = ("strip", "letter", "period", "letter", "lower")
    kept, counts = read(source.model_copy(update={"normalize": rules}), tokenizer)
    found = [tokenizer.decode([e.ids[e.answer_position]]).strip() for e in kept]
    assert found == ["a", "b", "c", "yes", "d", "no"]
    assert counts.normalized == {"strip": 1, "letter": 3, "period": 2, "lower": 5}
    assert not counts.dropped


def test_labels_are_found_after_normalising(tmp_path, tokenizer):
    rows = [{"text": "Say", "label": value} for value in ("(a)", "B.", "a")]
    source = SourceConfig(
        path=write_table(tmp_path / "train.jsonl", rows),
        prompt="{text} {options}",
        answer="label",
        labels={"a": "good", "b": "bad"},
        normalize=("letter", "lower"),
    )
    kept, counts = read(source, tokenizer)
    letters = [tokenizer.decode([e.ids[e.answer_position]]) for e in kept]
    assert letters == [" A", " B", " A"]
    assert counts.normalized == {"letter": 2, "lower": 1}
    with pytest.raises(InputError, match=r"line 1: column 'label' is '\(a\)'"):
        read(source.model_copy(update={"normalize": ()}), tokenizer)
