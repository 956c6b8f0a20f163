"""The tasks that come with the package, the suites of the small model, and cleanings of texts."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import write_csv

from mlmjax.config.suite import load_suite
from mlmjax.config.tables import shipped_names
from mlmjax.config.task import load_task, newsgroup
from mlmjax.evaluation.questions import read_questions
from mlmjax.text.checks import check_row
from mlmjax.text.prompts import Template


def test_every_shipped_task_is_sound():
    names = shipped_names("task")
    assert {"mmlu", "mmlu_pro", "ag_news"} <= set(names)
    for name in names:
        shipped = load_task(name)
        assert shipped.name == name
        assert shipped.description
        assert shipped.licence
        assert shipped.hub is None or re.fullmatch("[0-9a-f]{40}", shipped.revision)
        if shipped.scorer == "pll":
            assert "option" in shipped.template().fields
            assert shipped.hub or re.search(
                r"github\.com/.* at commit [0-9a-f]{40}", shipped.description
            )
            continue
        for protocol in ("default", *shipped.protocols):
            task = shipped.under(protocol)
            prompt = Template(task.prompt, shorten=dict(task.shorten))
            assert "options" in prompt.fields
            assert prompt.shorten
            assert task.verbalizer_for(4).labels


FILES = {
    "mmlu": "mmlu_test",
    "mmlu_pro": "mmlu_pro_test",
    "ag_news": "ag_news_test",
    "arc_easy": "ai2_arc__ARC-Easy__validation",
    "arc_challenge": "ai2_arc__ARC-Challenge__validation",
    "boolq": "boolq__none__validation",
    "sst2": "sst2_test",
    "sst5": "sst5_test",
    "trec": "trec_test",
    "20newsgroups": "20newsgroups_bydate_test",
    "20newsgroups_raw": "20newsgroups_bydate_test",
    "rte": "glue__rte__validation",
    "cola": "cola_in_domain_dev",
    "mnli": "mnli_dev_olora",
}
FILES = {name: f"eval/{file}.parquet" for name, file in FILES.items()} | {
    name: f"raft/{name}__train.csv"
    for name in ("ade_corpus_v2", "neurips_impact_statement_risks", "one_stop_english")
}
RANKED = {
    "blimp": (
        "a.jsonl",
        '{"sentence_good": "Who sees it?", "sentence_bad": "It who sees?", "field": "syntax", '
        '"UID": "a", "pairID": "0"}\n'
        '{"sentence_good": "He ran.", "sentence_bad": "He run.", "field": "syntax", "UID": "b", '
        '"pairID": "1"}\n',
        [("Who sees it?", "a"), ("He ran.", "b")],
    ),
    "crows_pairs": (
        "a.csv",
        ",id,sent_more,sent_less,stereo_antistereo,bias_type,anon_writer,anon_annotators\n"
        '0,1,"Old, they say.","Young, they say.",stereo,age,a0,"[\'a77\', \'a78\']"\n'
        "1,2,Short.,Tall.,antistereo,physical-appearance,a1,['a20']\n",
        [("Old, they say.", "age"), ("Short.", "physical-appearance")],
    ),
    "bear_capitals": (
        "a.jsonl",
        '{"sub_id": "Q1", "sub_label": "Colombo", "sub_aliases": [], "obj_id": "Q2", '
        '"obj_label": "Sri Lanka", "answer_idx": 1}\n',
        [("Sri Lanka", "")],
    ),
}
"""For each task of texts: a small file of the layout of its source, right options and groups."""
LEFT_OUT = {"mnli": {"dropped": 131}, "20newsgroups": {"blank": 215}}


def test_no_shipped_task_goes_unread():
    assert set(FILES) | set(RANKED) == set(shipped_names("task"))


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(FILES))
def test_every_shipped_task_reads_its_file(test_data, name):
    shipped = load_task(name)
    questions, left_out = read_questions(shipped, test_data / FILES[name], None)
    assert left_out == {"dropped": 0, "blank": 0} | LEFT_OUT.get(name, {})
    for question in questions:
        check_row(question.row, ["options"], 20)
        assert all(question.row[field].strip() for field in question.row if field != "options")
        assert 0 <= question.gold < len(question.row["options"])
    golds = {question.gold for question in questions}
    assert len(golds) == (len(shipped.label_names) or max(golds) + 1)


@pytest.mark.parametrize("name", sorted(RANKED))
def test_tasks_of_texts_read_files_of_their_layout(tmp_path, name):
    file, content, expected = RANKED[name]
    (tmp_path / file).write_text(content)
    questions, left_out = read_questions(load_task(name), tmp_path / file, None)
    assert left_out == {"dropped": 0, "blank": 0}
    found = [(question.row["options"][question.gold], question.group) for question in questions]
    assert found == expected
    if name == "bear_capitals":
        assert questions[0].row["capital"] == "Colombo"
        assert len(questions[0].row["options"]) == 60
    else:
        assert [question.gold for question in questions] == [0, 1]


def test_blimp_reads_all_subsets_of_a_folder_laid_out_as_on_the_hub(tmp_path):
    configs = []
    for name in ("wh_island", "adjunct_island"):
        (tmp_path / name).mkdir()
        rows = {"sentence_good": [f"good {name}"], "sentence_bad": ["bad"], "UID": [name]}
        pq.write_table(pa.table(rows), tmp_path / name / "train-00000-of-00001.parquet")
        configs.append(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        )
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    local = load_task("blimp").model_copy(update={"hub": str(tmp_path)})
    questions, _ = read_questions(local, None, None)
    assert [question.group for question in questions] == ["adjunct_island", "wh_island"]
    assert [question.row["options"][question.gold] for question in questions] == [
        "good adjunct_island", "good wh_island"
    ]  # fmt: skip
    one = local.model_copy(update={"subset": "wh_island"})
    assert len(read_questions(one, None, None)[0]) == 1


def test_labels_of_raft_are_names_or_the_class_numbers_of_the_hub(tmp_path):
    """Class 0 is for rows without a label; the folder is laid out as the hub's parquet branch."""
    shipped = load_task("one_stop_english")
    names = ["Unlabeled", "advanced", "elementary", "intermediate"]
    schema = pa.schema([("Article", pa.string()), ("Label", pa.int64())])
    for folder, numbers in (("one_stop_english", [3, 0, 2, 1]), ("other", [9])):
        path = tmp_path / folder / "train"
        path.mkdir(parents=True)
        table = pa.table([["a b"] * len(numbers), numbers], schema=schema)
        pq.write_table(table, path / "0000.parquet")
    write_csv(tmp_path / "named.csv", [{"Article": "a b", "Label": names[n]} for n in (3, 0, 2, 1)])
    local = shipped.model_copy(update={"hub": str(tmp_path)})
    for source, data in ((local, None), (shipped, tmp_path / "named.csv")):
        questions, left_out = read_questions(source, data, None)
        assert [names[1:][question.gold] for question in questions] == [
            "intermediate", "elementary", "advanced"
        ]  # fmt: skip
        assert left_out == {"dropped": 1, "blank": 0}


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


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "test"])
def test_posts_are_cleaned_as_scikit_learn_cleans_them(test_data, split):
    from sklearn.datasets import _twenty_newsgroups as oracle

    path = test_data / "eval" / f"20newsgroups_bydate_{split}.parquet"
    for post in pq.read_table(path, columns=["text"])["text"].to_pylist():
        kept = oracle.strip_newsgroup_header(post)
        kept = oracle.strip_newsgroup_quoting(oracle.strip_newsgroup_footer(kept))
        assert newsgroup(post) == kept


HEADER = "From: a@b.c\nSubject: Re: cars\nReferences: <1@x>\n\t<2@y>\n\n"


@pytest.mark.parametrize(
    ("post", "left"),
    [
        (HEADER + "In article <1@x> Joe writes:\n> Which?\nThe red.\n-- \nA. B.\n", "The red."),
        (HEADER + "One.\n\nTwo.\n", "One."),
        (HEADER + "---\nAll of it.", "---\nAll of it."),
        (HEADER + "> Which?\n| quoted", ""),
        ("One.\n\nTwo, he said: no header.\n", "One.\n\nTwo, he said: no header.\n"),
        ("Note: this is the text.\n\nNot a header.", "Note: this is the text.\n\nNot a header."),
        ("", ""),
    ],
)
def test_what_is_left_of_a_post(post, left):
    assert newsgroup(post) == left
