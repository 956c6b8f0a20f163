"""Evaluation: the published protocol against torch, own tables, and what is rejected."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from small_models import noisy, small_model
from task_files import REVIEWS, ROWS, read_lines, task, write_csv

from mlmjax.classification.classifier import Classifier
from mlmjax.cli.main import run
from mlmjax.config.task import load_task
from mlmjax.errors import InputError, RunError
from mlmjax.evaluation.evaluate import run_evaluation
from mlmjax.evaluation.summary import summary_lines
from mlmjax.model.modernbert import ModernBertForSequenceClassification
from mlmjax.reporting import terminal
from mlmjax.scoring.scorers import HeadScorer, Scorer
from mlmjax.statistics.levels import level_metrics
from mlmjax.text.prompts import Template
from mlmjax.weights.pretrained import load_pretrained, save_pretrained

QUESTIONS = Path(__file__).parents[1] / "data" / "mmlu_500.jsonl"
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize("limit", [32, pytest.param(500, marks=pytest.mark.long)])
def test_published_mmlu_equals_torch(tmp_path, tokenizer, limit):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    torch.set_num_threads(1)  # its idle threads would spin against the other tests
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "local_attention": 32, "global_attn_every_n_layers": 2}
    oracle = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    oracle.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model", attention="dense")
    # One batch of 32 is one program.
    options = {"data": QUESTIONS, "protocol": "published", "batch_size": 32, "order_rows": 0}
    results = run_evaluation(*loaded, "mmlu", limit=limit, out=tmp_path / "out", **options)
    found, questions = read_lines(tmp_path / "out" / "predictions.jsonl"), read_lines(QUESTIONS)
    assert len(found) == results["n"] == limit

    encode, prompt = tokenizer.backend.encode, load_task("mmlu").prompt
    spaced, bare = (
        [encode(form + letter, add_special_tokens=False).ids[0] for letter in "ABCD"]
        for form in (" ", "")
    )
    correct, worst = 0, 0.0
    for question, line in zip(questions, found, strict=False):
        choices = zip("ABCD", question["choices"], strict=True)
        options = "".join(f"- {letter}: {choice}\n" for letter, choice in choices)
        text = prompt.replace("{question}", question["question"].strip())
        ids = encode(text.replace("{options}", options)).ids
        with torch.no_grad():
            last_mask = max(i for i, token in enumerate(ids) if token == tokenizer.mask_id)
            hidden = oracle.model(torch.tensor([ids])).last_hidden_state[0, last_mask]
            logits = oracle.decoder(oracle.head(hidden)).double()
        probabilities = torch.softmax(logits, -1).numpy()
        expected = probabilities[spaced] + probabilities[bare]
        worst = max(worst, np.abs(expected - list(line["probabilities"].values())).max())
        assert line["prediction"] == "ABCD"[expected.argmax()]
        assert line["gold"] == "ABCD"[question["answer"]]
        correct += expected.argmax() == question["answer"]
    assert worst < 1e-5
    assert results["accuracy"] == correct / limit
    assert len({line["prediction"] for line in found}) > 1


@pytest.mark.data
def test_the_mmlu_prompt_is_the_published_text(test_data):
    assert load_task("mmlu").prompt == (test_data / "prompts" / "mmlu.txt").read_text()


def test_a_table_end_to_end(model, tokenizer, reviews):
    calls, out = [], reviews.parent / "deep" / "out"
    results = run_evaluation(
        model, tokenizer, str(reviews), out=out, progress=lambda *at: calls.append(at)
    )
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results) >= {"task", "protocol", "macro_f1", "per_group", "shortened"}
    predictions = read_lines(out / "predictions.jsonl")
    assert [set(p) for p in predictions] == [{"index", "gold", "prediction", "probabilities"}] * 5
    assert [p["index"] for p in predictions] == list(range(5))
    assert [p["gold"] for p in predictions] == [row["label"] for row in ROWS]
    for p in predictions:
        assert list(p["probabilities"]) == ["bad", "good"]
        assert sum(p["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert p["prediction"] == max(p["probabilities"], key=p["probabilities"].get)
    assert results["accuracy"] == np.mean([p["gold"] == p["prediction"] for p in predictions])
    low, high = results["accuracy_ci95"]
    assert 0 <= low <= results["accuracy"] <= high <= 1
    assert (results["majority"], results["chance"], results["n"]) == (0.6, 0.5, 5)
    assert calls[-1] == (5, 5)
    # The limit keeps the first rows, and data overrides the file.
    write_csv(reviews.parent / "other.csv", ROWS[::-1])
    options = {"data": reviews.parent / "other.csv", "limit": 2, "out": out}
    assert run_evaluation(model, tokenizer, reviews, **options)["n"] == 2
    assert [p["gold"] for p in read_lines(out / "predictions.jsonl")] == ["bad", "bad"]


@pytest.mark.parametrize(
    ("labels", "answers"),
    [
        (("bad", "good"), ["bad", "good", 1, 0, "1", 1.0]),
        ({"0": "bad", "1": "good", "2": "good"}, [0, 1, 2, "0", "2", 1.0]),
        ({"true": "good", "false": "bad"}, [False, True, True, False, "true", True]),
    ],
)
def test_answers_are_found_by_name_index_or_table(answer, labels, answers):
    rows = [{"text": "film", "label": value} for value in answers]
    _, predictions = answer(rows, labels=labels)
    assert [p["gold"] for p in predictions] == ["bad", "good", "good", "bad", "good", "good"]


def test_options_of_the_row(answer):
    rows = [
        {"text": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "label": "C"},
        {"text": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "label": "2"},
    ]
    own = {"labels": None, "options": "choices.text", "option_names": "choices.label"}
    results, predictions = answer(rows, **own)
    assert [p["gold"] for p in predictions] == ["C", "B"]
    assert [list(p["probabilities"]) for p in predictions] == [["A", "B", "C"], ["A", "B"]]
    assert results["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    columns = [{"text": "q", "one": "x", "two": "y", "label": value} for value in ("B", 0, "1")]
    _, predictions = answer(columns, labels=None, options=("one", "two"))
    assert [p["gold"] for p in predictions] == ["B", "A", "B"]


def test_levels_have_figures_of_their_own(answer):
    rows = [{"text": "a film", "label": label} for label in ("bad", "fine", "good", "good")]
    results, predictions = answer(rows, labels=("bad", "fine", "good"), ordered=True)
    shares = np.array([list(one["probabilities"].values()) for one in predictions])
    expected = level_metrics(np.log(shares), [0, 1, 2, 2])
    assert results["levels"] == pytest.approx(expected)
    table = list(summary_lines(results))
    assert any(line.startswith("rps ") for line in table)
    assert answer(rows, labels=("bad", "fine", "good"))[0]["levels"] is None


def test_columns_groups_and_dropped_labels(answer):
    rows = [
        {"title": "a", "body": "b", "label": "good", "kind": "x"},
        {"title": "c", "body": "d", "label": "-", "kind": "x"},
        {"title": "e", "body": "f", "label": "bad", "kind": 7},
    ]
    changes = {"columns": {"text": ("text", "{title}: {body}")}, "group": "kind", "metric": "mcc"}
    results, predictions = answer(rows, drop_labels=("-",), **changes)
    assert results["dropped"] == 1
    assert [p["index"] for p in predictions] == [0, 2]
    assert {name: group["n"] for name, group in results["per_group"].items()} == {"x": 1, "7": 1}
    assert results["macro_accuracy"] == pytest.approx(results["accuracy"])
    assert results["metric"] == "mcc"
    assert -1 <= results[results["metric"]] <= 1


def test_words_and_explicit_forms_can_stand_for_labels(answer):
    rows = [{"text": "film", "label": "good"}]
    words, explicit, both = (
        answer(rows, verbalizer=verbalizer)[1]
        for verbalizer in (
            "words",
            {"bad": (" bad",), "good": (" good", " great")},
            {"bad": (" bad",), "good": (" good",)},
        )
    )
    assert words == both
    assert explicit[0]["probabilities"]["good"] > words[0]["probabilities"]["good"]


def test_long_texts_are_counted(answer):
    rows = [{"text": "film " * n, "label": "good"} for n in (3, 900)]
    assert answer(rows, shorten={"text": "tail"})[0]["shortened"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "god"}, "the answer 'god' is not one of 'bad', 'good'"),
        ({"label": 2}, "the answer 2 is not one of .* index from 0 to 1"),
        ({"label": None}, "the answer None is not one of"),
        ({"text": " "}, "field 'text' is blank"),
        ({"text": 5}, "field 'text' is int"),
        (None, "has no column 'text'.*'txt', 'label'"),
    ],
)
def test_a_broken_row_is_named(answer, change, message):
    broken = {"txt": "x", "label": "good"} if change is None else ROWS[2] | change
    with pytest.raises(InputError, match=rf"rows\.jsonl.*\b3\b.*{message}"):
        answer([ROWS[0], ROWS[1], broken])


def test_a_missing_column_is_reported_once_and_no_rows_are_an_error(answer, tmp_path):
    with pytest.raises(InputError, match=r"has no column 'label'.*--data.*answer of the task") as e:
        answer([{"text": "x"}] * 3)
    assert not e.value.details
    with pytest.raises(InputError, match="no row is left to answer; 5 were dropped"):
        answer(ROWS, drop_labels=("good", "bad"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("found", "put", "message"),
    [
        ("shorten =", "shorted =", "shorted: unknown key; did you mean 'shorten'"),
        ('answer = "label"', "answer = 3", "answer: found 3"),
        ('labels = ["bad", "good"]', 'labels = ["bad"]', "at least two distinct labels"),
        ('labels = ["bad", "good"]', "", "exactly one of options .* and labels"),
        ('labels = ["bad", "good"]', 'labels = ["bad", " "]', "a blank label"),
        ("labels =", 'verbalizer = { bad = [" bad"] }\nlabels =', "verbalizer names bad; expected"),
        ("labels =", "labels = [", "is not valid TOML"),
        (
            '["bad", "good"]\n',
            "['bad', 'good']\n[protocols.mine]\nnormalise = 'labels'\n",
            r"protocols\.mine\.normalise: .*'normalize'",
        ),
    ],
)
def test_a_bad_task_file_is_rejected(reviews, found, put, message):
    reviews.write_text(REVIEWS.replace(found, put))
    with pytest.raises(InputError, match=rf"reviews\.toml: .*{message}"):
        load_task(reviews)


def test_unknown_tasks_and_protocols_are_rejected(model, tokenizer, reviews, caplog):
    with pytest.raises(InputError, match=r"'mmlu-pro': .*did you mean 'mmlu_pro'\?.*ag_news"):
        load_task("mmlu-pro")
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot be read"):
        load_task("nowhere.toml")
    for asked, options, message in (
        (reviews, {"protocol": "published"}, "has no protocol 'published'; it has default"),
        (task(hub="a/b"), {}, r"hub dataset a/b: cannot be read"),
        ("20newsgroups_raw", {}, r"20newsgroups_raw: has neither data nor hub; .*--data"),
        (reviews, {"data": ""}, "task reviews: path is blank"),
        (reviews, {"limit": 0}, "limit is 0"),
        (task(), {}, "neither data nor hub"),
    ):
        with pytest.raises(InputError, match=message):
            run_evaluation(model, tokenizer, asked, **options)
    assert "a/b: revision is None, not a commit" in caplog.text


def test_a_folder_that_cannot_be_written_is_found_first(
    model, tokenizer, reviews, tmp_path, monkeypatch
):
    def score(self, rows):
        raise AssertionError("rows are scored")

    monkeypatch.setattr(Scorer, "log_probs", score)
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    with pytest.raises(InputError, match=r"out: cannot be used .*\(Permission denied\)"):
        run_evaluation(model, tokenizer, reviews, out=tmp_path / "out")


def head_model(labels):
    names, sizes = dict(enumerate(labels)), {"num_labels": len(labels), "num_hidden_layers": 1}
    return small_model(ModernBertForSequenceClassification, 0.1, id2label=names, **sizes)


def plain_probabilities(model, tokenizer, texts):
    scorer = HeadScorer(model, tokenizer, Template("{text}", slot=False))
    return np.exp(scorer.log_probs([{"text": text} for text in texts]))


def test_a_classification_head_reads_the_fields_and_answers_by_name(answer, tokenizer):
    model = head_model(["good", "bad"])  # the task has them the other way round
    _, lines = answer(ROWS, by=model)
    expected = plain_probabilities(model, tokenizer, [row["text"] for row in ROWS])
    found = [[line["probabilities"][name] for name in ("good", "bad")] for line in lines]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 1e-3
    assert [line["gold"] for line in lines] == [row["label"] for row in ROWS]
    guesses = [("good", "bad")[best] for best in expected.argmax(axis=1)]
    assert [line["prediction"] for line in lines] == guesses


def test_the_task_says_what_a_head_reads(answer, tokenizer):
    model = head_model(["bad", "good"])
    rows = [{"a": "fine", "b": "film", "label": "good"}, {"a": "dull", "b": "plot", "label": "bad"}]
    for changes, texts in (
        ({}, ["film\nfine", "plot\ndull"]),
        ({"head_prompt": "{a}: {b}."}, ["fine: film.", "dull: plot."]),
    ):
        prompt = "{b} {options} {a} [unused0] [MASK]"
        _, lines = answer(rows, by=model, prompt=prompt, **changes)
        found = [list(line["probabilities"].values()) for line in lines]
        expected = plain_probabilities(model, tokenizer, texts)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_heads_of_other_labels_are_rejected(answer):
    for labels in (["good", "fair"], ["good", "bad", "fair"], ["good", "good"]):
        names = ", ".join(map(repr, labels))
        with pytest.raises(InputError, match=f"head has the labels {names}; task t has 'bad', 'go"):
            answer(ROWS, by=head_model(labels))
    rows = [{"text": "x", "choices": ["a", "b"], "label": 0}]
    with pytest.raises(InputError, match="other options in each row"):
        answer(rows, by=head_model(["a", "b"]), labels=None, options="choices")
    for prompt, message in (
        ("{text} [MASK]", "head does not read"),
        ("no field", "names no field"),
    ):
        with pytest.raises(ValueError, match=message):
            task(head_prompt=prompt)


def test_weights_that_are_not_numbers_are_an_error(answer, model):
    with pytest.raises(RunError, match="not finite"):
        answer(ROWS, by=noisy(model, scale=np.nan))


POST = "From: a@b.c\nSubject: Re: cars\n\n"


def test_blank_posts_are_counted_but_not_prompted(answer):
    rows = [
        {"text": POST + "One.\n\nTwo.", "label": "good"},
        {"text": POST + "> quoted", "label": "good"},
        {"text": " ", "label": "bad"},
        {"text": "Sent without its header", "label": "bad"},
    ]
    cleaning = {"clean": {"text": "newsgroup"}}
    results, predictions = answer(rows, **cleaning)
    assert (results["n"], results["blank"], results["dropped"]) == (2, 2, 0)
    assert [line["index"] for line in predictions] == [0, 3]
    with pytest.raises(InputError, match=r"no row is left .* 2 were blank after cleaning"):
        answer(rows[1:3], **cleaning)
    with pytest.raises(InputError, match=r"field 'text'.*int"):
        answer([{"text": 5, "label": "bad"}], **cleaning)
    with pytest.raises(ValueError, match="'body' is not a field of the prompt"):
        task(clean={"body": "newsgroup"})


@pytest.mark.parametrize("is_classifier", [False, True])
def test_the_command_counts_rows_and_names_a_prompt_it_does_not_use(
    tmp_path, tokenizer, model, reviews, capsys, monkeypatch, is_classifier
):
    if is_classifier:
        Classifier((model, tokenizer), ["good", "bad"]).save_pretrained(tmp_path / "model")
    else:
        save_pretrained(model, tokenizer, tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--task", str(reviews)]
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.0)
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 5
    assert re.match(r"rows scored 5/5 \| \d+ s", err.splitlines()[-2])
    assert err.splitlines()[-1].startswith("warning: only 5 rows are tested")
    own_prompt = "its own prompt; the task's prompt is used instead"
    assert (own_prompt in err) == is_classifier
