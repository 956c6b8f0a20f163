"""Kept out of training: tasks by their name, texts of evaluation sets; everything counted."""

import pytest
from row_files import answers_of, read, write_table

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
    assert (len(kept), counts.records) == (2, 6)
    dropped = {"task excluded by '*mmlu*'": 1, "overlaps rivers": 2, "answer is not one token": 1}
    assert counts.dropped == dropped
    (first, words), (second, _) = counts.hits["rivers"]
    assert (first, second) == (f"{path} line 3", f"{path} line 6")
    assert words == " ".join(QUESTION.lower().split()[:13])
    assert len(read(source, tokenizer)[0]) == 5


def test_a_short_option_is_a_phrase_of_many_texts(rivers, tmp_path):
    meta = {"question": "who is it that lives there"}
    choices = ["the president of the united states", "none"]
    write_table(tmp_path / "rivers.jsonl", [{"meta": meta, "choices": choices, "answer": 0}])
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
    path, labels = write_table(tmp_path / "train.jsonl", rows), ("no", "yes")
    source = SourceConfig(path=path, prompt="{text}", answer="label", labels=labels)
    for head in ("mlm", "classification"):
        kept, counts = read(source, tokenizer, exclusion=exclude(overlap=[rivers]), head=head)
        assert len(kept) == 1
        assert counts.dropped == {"overlaps rivers": MOST_NAMED + 5}
        assert len(counts.hits["rivers"]) == MOST_NAMED


def test_a_set_may_have_files_of_its_own(rivers, tmp_path):
    row = {"meta": {"question": "a b c d e f"}, "choices": ["a", "b"], "answer": 0}
    other = write_table(tmp_path / "other.jsonl", [row])
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
    known = {first["texts"], evaluation_identity(wanted)[0]["texts"]}
    for line in ('blank = ["q"]', 'csv = { separator = ";" }'):
        with open(rivers, "a") as file:
            file.write(f"{line}\n")
        known.add(evaluation_identity(wanted)[0]["texts"])
    assert len(known) == 4


def test_a_set_of_the_hub_is_reported_by_its_commit():
    (reported,) = evaluation_identity(config(overlap=["mmlu"]))
    assert (reported["hub"], reported["split"]) == ("cais/mmlu", "test")
    assert len(reported["revision"]) == 40


def test_rows_and_revisions_of_a_set_are_checked(rivers, tmp_path):
    problems = {"task rivers: has 5 where text": {"question": 5}}
    problems["has no column 'meta.question'"] = {}
    for problem, meta in problems.items():
        broken = write_table(tmp_path / "b.jsonl", [{"meta": meta, "choices": ["a", "b"]}])
        with pytest.raises(InputError, match=rf"b.jsonl line 1: {problem}"):
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
    assert answers_of(kept, tokenizer) == [" C", " no"]
    assert not counts.normalized
    rules = ("strip", "letter", "period", "letter", "lower")
    kept, counts = read(source.model_copy(update={"normalize": rules}), tokenizer)
    assert answers_of(kept, tokenizer) == [" a", " b", " c", " yes", " d", " no"]
    assert counts.normalized == {"strip": 1, "letter": 3, "period": 2, "lower": 5}
    assert not counts.dropped


def test_labels_are_found_after_normalising(tmp_path, tokenizer):
    rows = [{"text": "Say", "label": value} for value in ("(a)", "B.", "a")]
    path, labels = write_table(tmp_path / "train.jsonl", rows), {"a": "good", "b": "bad"}
    source = SourceConfig(path=path, prompt="{text} {options}", answer="label", labels=labels)
    rules = {"normalize": ("letter", "lower")}
    kept, counts = read(source.model_copy(update=rules), tokenizer)
    assert answers_of(kept, tokenizer) == [" A", " B", " A"]
    assert counts.normalized == {"letter": 2, "lower": 1}
    with pytest.raises(InputError, match=r"line 1: column 'label' is '\(a\)'"):
        read(source, tokenizer)
