"""`fit`: from a table to a saved classifier, its figures and its page."""

import html
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from pictures import read_picture
from tables import labelled_rows, write_table

from mlmjax import Choice, Classifier, Decider
from mlmjax.cli import main
from mlmjax.cli.commands import cli
from mlmjax.cli.tables.choice import PromptLengths, choose, prompt_lengths
from mlmjax.cli.tables.lines import confusion_lines, length_lines, result_lines
from mlmjax.cli.tables.split import split_table
from mlmjax.config.task import load_task
from mlmjax.data.contamination import contamination, read_training_manifest
from mlmjax.data.reading.labelled import read_labelled
from mlmjax.errors import InputError
from mlmjax.statistics import reliability
from mlmjax.storage import hash_file

OPTIONS = ("--learning-rate", "1e-2", "--epochs", "25")


@pytest.fixture(scope="module")
def fitted(word_folder, tmp_path_factory):
    """The folder of a fitted table, with what the command printed."""
    folder = tmp_path_factory.mktemp("fit")
    table = write_table(folder / "tickets.csv", labelled_rows(60))
    out = folder / "out"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("click.echo", lambda text="", **options: found.append(text))
        code = main.run(
            ["fit", str(table), "--out", str(out), "--model", str(word_folder), *OPTIONS]
        )
    assert code == 0, found
    return out, found


def test_a_table_becomes_a_classifier_that_learned(fitted):
    out, printed = fitted
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["accuracy"] == 1.0
    assert results["methods"]["always 'sports'"]["accuracy"] == 0.5
    assert results["n"] == 12
    assert results["rows_trained"] == 48
    assert results["answer"] == "words"
    assert results["confusion"] == [[6, 0], [0, 6]]
    assert 0 <= results["calibration"]["ece"] < 0.2
    assert printed == list(result_lines(results))
    assert re.fullmatch(r"this classifier +100.0%   7\d\.\d% to 100.0%", printed[1])
    assert "TF-IDF + logistic regression" in results["methods"]


def test_the_saved_folder_gives_the_answers_that_were_measured(fitted):
    out, _ = fitted
    lines = (out / "report" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    rows = labelled_rows(60)
    numbers = [int(one["where"].rpartition(" ")[2]) - 2 for one in predictions]
    assert [rows[i]["label"] for i in numbers] == [one["gold"] for one in predictions]
    again = Classifier.from_pretrained(out).predict_proba([rows[i]["text"] for i in numbers])
    assert again.tolist() == [list(one["probabilities"].values()) for one in predictions]


def test_the_line_to_go_on_with_works(fitted, tmp_path, monkeypatch):
    out, printed = fitted
    (line,) = [text for text in printed if text.startswith("next: ")]
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "mlmjax"
    assert main.run(arguments) == 0
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 61
    assert line.removeprefix("next: ") in html.unescape((out / "report/report.html").read_text())


def test_what_a_decider_takes_can_be_served(fitted):
    out, printed = fitted
    results = json.loads((out / "report" / "results.json").read_text())
    assert printed[-1] == f"or: mlmjax serve --model {out}"
    assert not list(result_lines(results | {"serves": False}))[-1].startswith("or: ")
    with pytest.warns(UserWarning, match="a choice among money, sports is asked as the classifier"):
        decider = Decider(out)
    predictions = (out / "report" / "predictions.jsonl").read_text().splitlines()
    places = [json.loads(line)["where"].rpartition(" ")[2] for line in predictions]
    rows = [labelled_rows(60)[int(place) - 2] for place in places]
    asked = {"label": Choice("Which label?", ["sports", "money"])}
    answers = decider.decide_many([row["text"] for row in rows], asked)
    assert [one["label"].choice for one in answers] == [row["label"] for row in rows]


def test_the_page_shows_pictures_and_no_text_is_markup(fitted):
    page = (fitted[0] / "report" / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert all(read_picture(picture) for picture in pictures)
    assert len(pictures) == 3
    assert page.count("<dt>") == page.count("<dd>") == 3
    assert "No test row has a wrong answer." in page
    assert "mlmjax classify --model" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("names", "way", "rows", "expected"),
    [
        (["sports", "money"], None, 48, ("words", 10, 16)),
        (["sports news", "money"], None, 400, ("letters", 6, 16)),
        ([f"label {i}" for i in range(30)], None, 4000, ("head", 3, 32)),
        (["sports", "money"], "head", 100_000, ("head", 3, 32)),
    ],
)
def test_the_way_to_answer_follows_from_the_labels(word_folder, names, way, rows, expected):
    choice = choose(str(word_folder), names, rows, way=way)
    assert (choice.way, choice.epochs, choice.batch_size) == expected
    assert choice.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["sports", "money"], "each label is one token of its own"),
        (
            ["sports\x1b news", "money"],
            "the label 'sports⟨U+001B⟩ news' is not one token of its own;",
        ),
        (
            ["hot news", "old news", "money"],
            "2 of 3 labels are not one token of their own, such as",
        ),
        ([f"label {i}" for i in range(13)], "'label 0', and there are more than 12 labels"),
    ],
)
def test_a_label_that_prevents_words_is_named(word_folder, names, why):
    assert why in choose(str(word_folder), names, 100).why


@pytest.mark.parametrize(
    ("names", "way", "restarts", "helps"),
    [
        (["sports", "money"], "letters", 3, ["--answer words", "--learning-rate 0.003 or 0.03"]),
        (["hot news", "money"], "letters", 3, ["--learning-rate 0.003 or 0.03"]),
        (["sports", "money"], None, 0, ["--learning-rate 0.003 or 0.03", "--restarts 3"]),
    ],
)
def test_only_options_that_are_possible_are_named(word_folder, names, way, restarts, helps):
    choice = choose(str(word_folder), names, 100, way=way, restarts=restarts)
    options = list(choice.other_options(0.01))
    assert [one for one in options if not one.startswith("--epochs")] == helps


def test_why_letters_answer_reaches_settings_card_and_manifest(word_folder, tmp_path):
    named = {"sports": "hot sports", "money": "money"}
    rows = [row | {"label": named[row["label"]]} for row in labelled_rows(40)]
    table, model = write_table(tmp_path / "a.csv", rows), tmp_path / "model"
    shutil.copytree(word_folder, model)
    out = tmp_path / "out"
    fit = ["fit", str(table), "--model", str(model), "--out", str(out), "--epochs", "1"]
    assert main.run(fit) == 0
    why = "the label 'hot sports' is not one token of its own; small models learn letters less"
    assert Classifier.from_pretrained(out).answer_reason_.startswith(why)
    assert f"The reason: {why}" in (out / "README.md").read_text()
    (run,) = read_training_manifest(out).runs
    assert run.init_from == "model"
    (source,) = run.sources
    assert (source.name, source.records, source.unnamed) == ("a.csv", 40, 40)
    assert [(one.name, one.sha256) for one in source.files] == [("a.csv", hash_file(table))]
    other = tmp_path / "b.csv"  # the same rows, which no hash can show
    other.write_text(table.read_text() + "\n")
    for file, status in ((table, "found"), (other, "unknown")):
        assert contamination(load_task("sst2"), file, read_training_manifest(out)).status == status
    assert main.run([*fit, "--answer", "letters"]) == 0
    assert "the arguments, the prompt" in Classifier.from_pretrained(out).answer_reason_


@pytest.mark.parametrize(
    ("interval", "words", "confidence", "says"),
    [
        ((0.7, 0.9), 0.5, 0.85, []),
        ((0.5, 0.9), 0.5, 0.85, ["not shown to be better"]),
        ((0.7, 0.9), 0.8, 0.85, ["TF-IDF is at least as accurate"]),
        ((0.7, 0.9), 0.5, 0.95, ["15 points above its accuracy"]),
    ],
)
def test_a_verdict_follows_the_accuracies(fitted, interval, words, confidence, says):
    results = json.loads((fitted[0] / "report" / "results.json").read_text())
    accuracies = {"this classifier": 0.8, "TF-IDF": words, "always 'a'": 0.5}
    results["methods"] = {
        name: {"accuracy": value, "accuracy_ci95": interval} for name, value in accuracies.items()
    }
    results["calibration"]["confidence"] = confidence
    lines = [line for line in result_lines(results) if line.startswith("verdict: ")]
    assert len(lines) == len(says)
    assert all(part in line for part, line in zip(says, lines, strict=True))
    tries = [line for line in result_lines(results) if line.startswith("to try: mlmjax fit ")]
    assert len(tries) == bool(says)
    if says:
        option = "--calibration-share 0.34" if confidence > 0.9 else "--epochs 75 --restarts 3"
        (line,) = tries
        assert option in line
        words = shlex.split(line.removeprefix("to try: mlmjax fit "))
        given = cli.commands["fit"].make_context("fit", words).params
        assert (given["table"], given["out"]) == (results["table"], results["out"])


def test_a_far_longer_text_is_named_and_can_be_shortened(word_folder, tmp_path, capsys):
    rows = labelled_rows(40)
    fit = ["fit", str(tmp_path / "a.csv"), "--model", str(word_folder), "--epochs", "2"]
    for length, says in ((1, False), (80, True)):
        rows[7] = rows[7] | {"text": " ".join([rows[7]["text"]] * length)}
        write_table(tmp_path / "a.csv", rows)
        given = ["--out", str(tmp_path / f"out{length}"), "--max-length", "48"]
        assert main.run([*fit, *given]) == 0
        err = capsys.readouterr().err
        assert "sets the length of all batches" not in err
        assert re.search(
            r"texts: \d+ tokens in the median, \d+ in the longest \(.*a\.csv line \d+\); "
            r"the prompt adds \d+ to each\n",
            err,
        )
        warning = (
            "warning: 1 of the 40 texts (2.5%) are shortened, because prompt and text together "
            "have at most 48 tokens, the max_length of this fit (--max-length)\n"
        )
        assert (warning in err) == says
        assert err.count("shortened") == says
        assert "epochs 2, updates 4\n" in err
    assert "(" + str(tmp_path / "a.csv") + " line 9)" in err
    saved = json.loads((tmp_path / "out80" / "mlmjax_classifier.json").read_text())
    assert saved["max_length"] == 48


@pytest.mark.parametrize(
    ("longest", "given", "limit", "suggests"),
    [
        (20, None, 8192, False),
        (500, None, 8192, True),
        (500, 48, 48, False),
        (500, None, 40, False),
    ],
)
def test_a_suggested_limit_counts_the_prompt(longest, given, limit, suggests):
    prompts = np.array([16] * 39 + [longest]) + 71
    found = PromptLengths(prompts, own=71, limit=limit, longest=8192)
    first, *others = length_lines([f"line {i}" for i in range(40)], found, given)
    assert first == (
        f"texts: 16 tokens in the median, {longest} in the longest (line 39); the prompt adds 71 "
        "to each"
    )
    hint = (
        "the longest text sets the length of all batches; --max-length 87, which counts prompt and "
        "text, shortens 1 text"
    )
    assert (hint in others) == suggests
    assert len(others) == suggests + (limit < 8192)


@pytest.mark.parametrize(
    "options", [{"answer": "words"}, {"answer": "letters"}, {"head": "classification"}]
)
def test_measured_prompts_are_those_that_are_read(word_folder, options):
    texts = [row["text"] * times for row, times in zip(labelled_rows(6), range(1, 7), strict=True)]
    classifier = Classifier(str(word_folder), ["sports", "money"], max_length=48, **options)
    found = prompt_lengths(classifier, texts)
    classifier.fit(texts, ["sports", "money"] * 3, epochs=1)
    scorer = classifier.asking_.scorer
    rows = [{"text": text, "options": ["sports", "money"]} for text in texts]
    before = scorer.shortened
    read = [len(prompt.ids) for prompt in scorer.prompts(rows)]
    assert np.minimum(found.prompts, 48).tolist() == read
    assert found.over(found.limit) == scorer.shortened - before
    assert found.limit == 48


MERGED = '"5 inch;sports\nbank;money\n7 inch";sports\n'


def test_a_dialect_is_set_as_the_messages_say(word_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{r['text']};{r['label']}\n" for r in labelled_rows(40))
    (tmp_path / "a.csv").write_text(f"text,a;label\n{rows}" + MERGED)
    fit = ["fit", "a.csv", "--model", str(word_folder), "--epochs", "1", "--out", "out"]
    fit += ["--text", "text,a", "--label", "label"]
    assert main.run(fit) == 2
    assert "--csv quote=" in capsys.readouterr().err
    assert main.run([*fit, "--csv", "quote=", "--csv", "separator=;"]) == 0
    shown = capsys.readouterr()
    assert "csv." not in shown.err.replace("a.csv", "")
    (line,) = [text for text in shown.out.splitlines() if text.startswith("next: ")]
    arguments = shlex.split(line.removeprefix("next: mlmjax ").replace("TABLE", "a.csv"))
    assert arguments.count("--csv") == 2
    assert main.run(arguments) == 0
    assert (tmp_path / "answers.csv").read_text().count("\n") == 44


def test_a_large_model_learns_at_a_lower_rate(word_folder, tmp_path, tokenizer):
    config = json.loads((word_folder / "config.json").read_text())
    config |= {"vocab_size": 50368, "hidden_size": 2048, "pad_token_id": tokenizer.pad_id}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert choose(str(tmp_path), ["yes", "no"], 100).learning_rate == 3e-5


def test_a_classifier_is_not_fitted_again(fitted):
    with pytest.raises(InputError, match="is already a classifier"):
        choose(str(fitted[0]), ["a", "b"], 100)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.csv", "--text", "txt"], "has no column 'txt'; did you mean 'text'?"),
        (["absent.csv"], "absent.csv: cannot be read"),
        (["a.xlsx"], "unknown kind of file"),
        (["a.csv", "--out", "taken"], "taken: holds files that are not part of a model (mine)"),
        (["a.csv", "--out", "mlmjax-small"], "is the name of the packaged model"),
        (["a.csv", "--csv", "separator"], "--csv 'separator': expected KEY=VALUE"),
        (["a.csv", "--csv", "seperator=;"], "did you mean 'separator'?"),
        (["a.jsonl", "--csv", "quote="], "--csv: says how a CSV file is written; a.jsonl is none"),
        (["few.csv"], "has too few rows to hold out some of them for a test"),
        (["a.csv", "--test-share", "1"], "Invalid value for '--test-share'"),
        (["a.csv", "--test-share", "nan"], "'--test-share': nan is not a finite number"),
        (["a.csv", "--learning-rate", "inf"], "'--learning-rate': inf is not a finite number"),
    ],
)
def test_bad_input_is_rejected_before_training(
    word_folder, tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "a.csv", labelled_rows(40))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "few.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main.run(["fit", "--model", str(word_folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in next(line for line in err.splitlines() if line.startswith("mlmjax: "))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_with_two_labels_is_never_tested(tmp_path):
    rows = labelled_rows(40)
    rows += [{**row, "label": "money"} for row in rows[:6] if row["label"] == "sports"]
    table = read_labelled(write_table(tmp_path / "a.csv", rows))
    split = split_table(table, 0.5, seed=0)
    tested = {table.texts[i] for i in split.test}
    assert not tested & {table.texts[i] for i in split.train}
    assert split.said == (
        "3 texts with more than one label: not tested",
        "warning: only 18 held-out rows are tested, so the figures may be chance",
    )


def noisy_table(path, count):
    """Write a table in which one label of eight is wrong, so that no classifier is always right."""
    rows = labelled_rows(count)
    for row in rows[::8]:
        row["label"] = "money" if row["label"] == "sports" else "sports"
    return write_table(path, rows)


def test_a_temperature_is_fitted_to_rows_of_neither_training_nor_test(
    word_folder, tmp_path, capsys
):
    path, out = noisy_table(tmp_path / "tickets.csv", 240), tmp_path / "out"
    fit = ["fit", str(path), "--out", str(out), "--model", str(word_folder), *OPTIONS[:2]]
    assert main.run([*fit, "--epochs", "4"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "report" / "results.json").read_text())
    assert (results["n"], results["rows_calibrated"], results["rows_trained"]) == (48, 24, 168)

    table = read_labelled(path)
    split = split_table(table, 0.2, 0, calibration_share=0.1)
    assert sorted([*split.train, *split.calibration, *split.test]) == list(range(240))
    saved = Classifier.from_pretrained(out)
    assert saved.calibration_.temperature == results["temperature"] != 1
    assert saved.calibration_.rows == 24
    texts, labels = table.at(split.test)
    gold = [list(saved.classes_).index(label) for label in labels]
    calibrated = saved.predict_proba(texts)
    assert reliability.calibration(np.log(calibrated), gold) == results["calibration"]

    settings = json.loads((out / "mlmjax_classifier.json").read_text())
    del settings["calibration"]
    (out / "mlmjax_classifier.json").write_text(json.dumps(settings))
    plain = Classifier.from_pretrained(out)
    raw = reliability.calibration(np.log(plain.predict_proba(texts)), gold)
    assert raw == pytest.approx(results["uncalibrated"], abs=1e-6)
    again = plain.calibrate(*table.at(split.calibration)).calibration_
    assert again.temperature == pytest.approx(results["temperature"], rel=1e-6)

    before, after = results["uncalibrated"], results["calibration"]
    shown = re.search(r"with temperature (\S+) \(24 other rows\) +(\S+)% +(\S+)\n", printed)
    assert float(shown[1]) == pytest.approx(results["temperature"], rel=1e-2)
    assert float(shown[3]) == pytest.approx(after["ece"], abs=1e-3)
    without = rf"without it +{before['confidence']:.1%} +{before['ece']:.3f}\n"
    assert re.search(without, printed)
    assert max(map(len, printed.split("classifier: ")[0].splitlines())) <= 80
    assert "calibrated by a temperature of" in (out / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (60, (), "probabilities stay as they are: 6 rows can be held out for a temperature"),
        (240, ("--calibration-share", "0"), ""),
        (240, (), "probabilities stay as they are: the answers of all these 24 rows are right"),
    ],
)
def test_probabilities_stay_as_they_are_where_no_temperature_fits(
    word_folder, tmp_path, capsys, count, options, said
):
    table = write_table(tmp_path / "tickets.csv", labelled_rows(count))
    fit = ["fit", str(table), "--out", str(tmp_path / "out"), "--model", str(word_folder)]
    assert main.run([*fit, *OPTIONS[:2], "--epochs", "10", *options]) == 0
    printed, err = capsys.readouterr()
    assert said in err
    assert ("probabilities stay" in err) == bool(said)
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert results["temperature"] is results["uncalibrated"] is None
    assert re.search(r"\nas saved +\d+\.\d% +0\.\d\d\d\n", printed)
    assert Classifier.from_pretrained(tmp_path / "out").calibration_ is None


def test_shares_that_leave_nothing_to_train_on_are_rejected(tmp_path):
    table = read_labelled(write_table(tmp_path / "a.csv", labelled_rows(40)))
    with pytest.raises(InputError, match=r"--test-share 0.5 and --calibration-share 0.5: leave no"):
        split_table(table, 0.5, 0, calibration_share=0.5)


def test_calibration_takes_no_label_its_last_training_row(tmp_path):
    rows = [{"id": f"x{i}", "text": f"rain {i}", "label": f"kind {i % 30}"} for i in range(90)]
    table = read_labelled(write_table(tmp_path / "a.csv", rows))
    split = split_table(table, 0.2, 0, calibration_share=0.6)
    assert len(split.calibration) == 30
    assert len({table.labels[i] for i in split.train}) == 30


def test_confusions_fit_a_terminal_or_become_a_list():
    few = list(confusion_lines(["a", "long name"], np.array([[3, 10], [0, 4]])))
    assert few[1:] == [
        "            a  long name",
        "a           3         10",
        "long name   0          4",
    ]
    names = [f"a label with number {i}" for i in range(9)]
    many = list(confusion_lines(names, np.eye(9, dtype=int) + np.eye(9, k=1, dtype=int)))
    assert many[0] == "most frequent confusions"
    assert len(many) == 9
    assert max(map(len, [*few, *many])) <= 80


def test_a_label_of_one_row_is_trained_on_and_named(tmp_path):
    rows = [*labelled_rows(80), {"id": "x", "text": "some rain", "label": "weather"}]
    table = read_labelled(write_table(tmp_path / "a.csv", rows))
    split = split_table(table, 0.4, seed=0)
    assert split.said == ("warning: no row is tested for 1 label: weather",)
    assert table.labels.index("weather") in split.train


def test_a_table_in_another_encoding_is_fitted_and_the_next_line_says_so(
    word_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = labelled_rows(40, {"sports": "größe", "money": "maß"})
    path = write_table(tmp_path / "a.csv", rows)
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    fit = ["fit", "a.csv", "--model", str(word_folder), "--out", "out", "--epochs", "1"]
    assert main.run(fit) == 2
    assert "is not UTF-8 (byte " in capsys.readouterr().err
    assert main.run([*fit, "--encoding", "latin-1"]) == 0
    out = capsys.readouterr().out
    assert "größe" in out
    (line,) = [text for text in out.splitlines() if text.startswith("next: ")]
    arguments = line.removeprefix("next: mlmjax ").split()
    assert main.run(arguments) == 0
    assert (tmp_path / "answers.csv").read_text(encoding="utf-8").count("\n") == 41


def test_a_fit_that_learned_nothing_says_so_everywhere(word_folder, tmp_path, capsys):
    table, out = write_table(tmp_path / "tickets.csv", labelled_rows(60)), tmp_path / "out"
    given = ("--learning-rate", "1e-7", "--epochs", "1")
    assert (
        main.run(["fit", str(table), "--out", str(out), "--model", str(word_folder), *given]) == 0
    )
    printed, said = capsys.readouterr()
    warning = json.loads((out / "report" / "results.json").read_text())["fit"]["warning"]
    assert warning.startswith("the fit may have learned nothing: its loss on 48 training texts is ")
    assert "learned nothing" not in said
    assert printed.splitlines().count(f"warning: {warning}") == 1
    assert warning.endswith(
        "What usually helps: --learning-rate 3e-08 or 3e-07, --epochs 3, --restarts 3"
    )
    assert "on 48 training rows " in printed
    page = html.unescape((out / "report" / "report.html").read_text())
    assert "<strong>Warning:</strong> the fit may have learned nothing" in page
    verdict = "verdict: it is not shown to be better than always giving the commonest label"
    assert verdict in printed.splitlines()
    assert f">{verdict}.<" in page
    again = f"mlmjax fit --epochs 3 --restarts 3 {table} --out {out} --model {word_folder}"
    (line,) = [line for line in printed.splitlines() if line.startswith("to try: ")]
    assert line == f"to try: {again} --learning-rate 1e-7"
    assert f"<pre>{again} --learning-rate 1e-7</pre>" in page
