"""The demo: its data are what they claim, its report shows what it is given, and it runs."""

import re
import runpy
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from labelled_texts import word_model, word_tokenizer
from small_models import small_model

import mlmjax
from mlmjax.cli import demo
from mlmjax.cli.demo_report import Answer, Efficiency, efficiency_sentence, page
from mlmjax.config.run import parse_config
from mlmjax.errors import InputError, RunError
from mlmjax.evaluation.suite.entrants import tfidf_regression
from mlmjax.reporting.accuracy import Method
from mlmjax.scoring import engine

ASSETS = Path(mlmjax.__file__).parent / "assets" / "openstax"
TOOL = Path(__file__).parents[2] / "tools" / "make_demo_data.py"


@pytest.fixture(scope="module")
def train():
    return demo.read_jsonl(ASSETS / "train.jsonl")


@pytest.fixture(scope="module")
def test():
    return demo.read_jsonl(ASSETS / "test.jsonl")


class TestData:
    def test_is_balanced(self, train, test):
        assert set(Counter(row["label"] for row in train).values()) == {250}
        assert set(Counter(row["label"] for row in test).values()) == {63}
        assert 8 <= len({row["label"] for row in train}) <= 12

    def test_is_split_by_module(self, train, test):
        assert not {row["module"] for row in train} & {row["module"] for row in test}

    def test_no_ten_words_occur_twice(self, train, test):
        runs = Counter()
        for row in train + test:
            words = re.findall(r"\w+", row["text"].lower())
            runs.update({" ".join(words[i : i + 10]) for i in range(len(words) - 9)})
        assert max(runs.values()) == 1

    def test_holds_only_prose(self, train, test):
        for row in train + test:
            assert list(row) == ["text", "label", "book", "module"]
            assert 40 <= len(row["text"].split()) <= 150
            assert row["text"] == " ".join(row["text"].split())
            assert not re.search(r"OpenStax|https?:|Figure| ,|\[|Learning Objectives", row["text"])

    def test_every_label_is_one_token(self, train, tokenizer):
        labels = sorted({row["label"] for row in train})
        assert all(len(tokenizer.encode_plain(f" {label}")) == 1 for label in labels)

    def test_attribution_names_every_book_its_number_and_the_licence(self, train, test):
        text = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
        for book, number in Counter(row["book"] for row in train + test).items():
            line = next(line for line in text.splitlines() if f"[{book}]" in line)
            assert f"| {number} |" in line
            assert f"https://github.com/openstax/{book}" in line
        for needed in ("CC BY 4.0", "creativecommons.org/licenses/by/4.0/", "## Changes"):
            assert needed in text

    @pytest.mark.long
    @pytest.mark.data
    def test_the_tool_makes_the_same_files_again(self, test_data, tmp_path):
        main = runpy.run_path(str(TOOL))["main"]
        main(str(test_data / "text" / "openstax_ccby.jsonl.zst"), str(tmp_path))
        for name in ("train.jsonl", "test.jsonl", "ATTRIBUTION.md"):
            assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


class TestTool:
    tool = runpy.run_path(str(TOOL))

    def test_cleaning_keeps_prose_and_drops_the_rest(self):
        prose = "Cells divide, and then they grow again. " * 8
        kept = self.tool["clean"](
            [
                f"  {prose}\t",
                "Too short to keep.",
                prose + "as shown in .",
                prose + "See Figure 3.",
                prose.removesuffix(". "),
                "- " + prose,
                prose + "2x + 3y = 4, 5x = 6, 7 = 8y, 9x = 1, 2x - 3y = 4, 5x = 6 + 78y.",
            ]
        )
        assert list(kept) == [prose.strip()]

    def test_modules_are_used_in_turn_and_no_text_twice(self):
        modules = [(("book", "m1"), ["d e f", "a b c"]), (("book", "m2"), ["x", "A, b. C!"])]
        rows = self.tool["take_in_turn"]("physics", modules, 3, set())
        assert [(row["module"], row["text"]) for row in rows] == [
            ("m1", "a b c"),
            ("m1", "d e f"),
            ("m2", "x"),
        ]

    def test_too_few_paragraphs_are_an_error(self):
        with pytest.raises(SystemExit, match="physics: only 1 paragraphs; 2 are needed"):
            self.tool["take_in_turn"]("physics", [(("book", "m1"), ["a b c"])], 2, set())


LABELS = ["art", "law", "war"]
RUN = {"init_from": "a <b>", "out": "run", "steps": 2}
RUN |= {"data": {"rows": "rows", "seq_length": 64, "batch_size": 8}}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report():
    """A page about three labels."""
    names = ("chance", "majority", "zero-shot")
    methods = [Method(name, 0.5, purpose=f"why <{name}>") for name in names]
    ours = Method("ours", 0.75, (0.6, 0.8), is_ours=True)
    text = page(
        methods=[*methods, ours],
        efficiency=[Efficiency(0, methods[2], methods[0]), Efficiency(75, ours, methods[0])],
        curve=[
            {"step": 1, "split": "train", "loss_atp": 2.0, "answer_accuracy": 0.1},
            {"step": 2, "split": "train", "loss_atp": 1.0, "answer_accuracy": None},
            {"step": 2, "split": "validation", "loss_atp": 1.5, "answer_accuracy": 0.4},
        ],
        labels=LABELS,
        confusion=np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]),
        answers=[
            Answer("<script>a & b</script>", {"art": 0.2, "law": 0.7, "war": 0.1}, "law"),
            Answer("plain", {"art": 0.8, "law": 0.1, "war": 0.1}, "war"),
        ],
        sentences=[Answer("ours", {"art": 0.3, "law": 0.4, "war": 0.3})],
        **demo.facts(Path("my out"), parse_config(RUN), small_model()),
        trained=1000,
        seconds=61,
    )
    return Page(text)


class TestReport:
    def test_needs_nothing_outside_itself(self, report):
        tags = report.tags
        pictures = [attrs for tag, attrs in tags if tag == "svg"]
        assert len(pictures) == 4
        assert all(attrs["aria-label"] and attrs["viewbox"] for attrs in pictures)
        assert not [tag for tag, _ in tags if tag in {"script", "link", "iframe", "img"}]
        sources = [attrs.get(name) for _, attrs in tags for name in ("src", "href")]
        assert all(source is None or source.startswith("#m") for source in sources)

    def test_shows_texts_and_figures(self, report):
        shown = " ".join(report.text.split())
        for text in (
            "a <b>, a small ModernBERT, finds the subject (one of 3) of 50% of 8 textbook",
            "75% after 61 seconds of training on 1,000 other paragraphs.",
            "2 layers of 32, 2 heads,",
            "2 updates of 8 rows with 64 tokens",
            "mlmjax classify --model 'my out/model' --labels art,law,war FILE",
            "<script>a & b</script>",
            "[unused0]",
            "why <chance>",
            "The language model is clearly ahead with 75 labels per subject. With 0, neither is:",
        ):
            assert text in shown

    def test_says_what_was_right_and_wrong(self, report):
        text = report.text
        assert text.count("✓ correct: law") == 1
        assert text.count("✗ the book says: war") == 1
        assert text.count("70%") == 1  # the bar of the right answer


INTERVALS = {"low": (0.1, 0.3), "middle": (0.25, 0.5), "high": (0.45, 0.7)}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (
            [(0, "high", "low"), (8, "middle", "low"), (75, "low", "high")],
            "The language model is clearly ahead with 0 labels per subject. TF-IDF is clearly "
            "ahead with 75 labels per subject. With 8, neither is: the 95 % intervals overlap.",
        ),
        (
            [(0, "low", "low"), (8, "high", "middle")],
            "With 0 and 8 labels per subject, neither is clearly ahead: the 95 % intervals "
            "overlap.",
        ),
        (
            [(8, "high", "low"), (32, "high", "low"), (75, "high", "low")],
            "The language model is clearly ahead with 8, 32 and 75 labels per subject.",
        ),
    ],
)
def test_the_sentence_about_labels_follows_from_the_intervals(points, expected):
    methods = {name: Method("", sum(ends) / 2, ends) for name, ends in INTERVALS.items()}
    found = [Efficiency(number, methods[a], methods[b]) for number, a, b in points]
    assert efficiency_sentence(found) == expected


def test_few_labels_are_the_first_of_each_subject(train):
    texts, gold = zip(*((row["text"], row["label"]) for row in train), strict=True)
    small, large = demo.few_labels(texts, gold, (8, 32))
    assert set(Counter(label for _, label in small).values()) == {8}
    assert set(Counter(label for _, label in large).values()) == {32}
    assert set(small) < set(large)
    assert demo.few_labels(texts, gold, (250,)) == []


def test_tfidf_finds_the_subjects_of_most_paragraphs(train, test):
    texts, labels = zip(*((row["text"], row["label"]) for row in train[:300]), strict=True)
    found = tfidf_regression(texts, labels, [row["text"] for row in test])
    assert np.mean([row["label"] == name for row, name in zip(test, found, strict=True)]) > 0.7


def run(out, *overrides):
    """Run the demo with a network of one layer instead of the packaged one."""
    start = out.parent / "start"
    if not start.exists():
        subjects = {row["label"] for row in demo.read_jsonl(ASSETS / "test.jsonl")}
        tokenizer = word_tokenizer(start, sorted(subjects))
        model = word_model(tokenizer, vocab_size=80, max_position_embeddings=256)
        mlmjax.save_pretrained(model, tokenizer, start)
    few = ["steps=2", "evaluation.every=0", f"init_from={start}"]
    return demo.run_demo(out, [*few, *overrides], limit=24)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "out"


class TestRun:
    @pytest.fixture(autouse=True)
    def one_bucket(self, monkeypatch):
        """Compile one program of each kind instead of three."""
        monkeypatch.setattr(engine, "bucket_lengths", lambda longest: (longest,))
        monkeypatch.setattr(demo, "FEWER", (1, 32))

    def test_leaves_what_it_promises_and_prints_only_results(self, out, capfd):
        accuracies = run(out)
        printed, said = capfd.readouterr()
        assert accuracies["chance"] == 1 / 8
        assert accuracies["TF-IDF + logistic regression"] > accuracies["chance"]
        lines = printed.splitlines()
        for name, accuracy in accuracies.items():
            line = next(line for line in lines if line.startswith(name))
            assert f" {accuracy:.1%}" in line
        assert all(sentence in printed for sentence in demo.SENTENCES)
        assert f"report: {out / 'report.html'}" in lines
        assert "step 2/2" in said
        assert "step" not in printed
        shown = Page((out / "report.html").read_text(encoding="utf-8"))
        assert "astronomy" in shown.text
        (head,) = [i for i, line in enumerate(lines) if line.startswith("labels per subject")]
        assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["0", "1", "3"]
        shares = Counter(row["label"] for row in demo.read_jsonl(out / "data" / "train.jsonl"))
        assert set(shares.values()) == {3}
        assert "✓" in shown.text or "✗" in shown.text
        assert (out / "data" / "ATTRIBUTION.md").read_bytes() == (
            ASSETS / "ATTRIBUTION.md"
        ).read_bytes()

    def test_the_export_is_a_classifier_that_agrees_with_the_evaluation(self, out):
        test = demo.read_jsonl(out / "data" / "test.jsonl")
        classifier = mlmjax.Classifier.from_pretrained(out / "model")
        chosen = classifier.predict([row["text"] for row in test])
        model, tokenizer = mlmjax.load_pretrained(out / "run" / "export")
        results = mlmjax.run_evaluation(model, tokenizer, out / "subjects.toml")
        assert results["n"] == 24
        assert results["accuracy"] == np.mean(chosen == [row["label"] for row in test])

    def test_again_in_the_same_folder_finds_the_run_complete(self, out, capfd):
        before = (out / "model" / "model.safetensors").read_bytes()
        run(out)
        said = capfd.readouterr().err
        assert "complete at step 2" in said
        assert "step 2/2 | validation" not in said
        assert (out / "model" / "model.safetensors").read_bytes() == before

    def test_another_run_in_the_same_folder_is_rejected(self, out):
        with pytest.raises(InputError, match="seed"):
            run(out, "seed=5")

    @pytest.mark.parametrize("name", ["model", "run", "rows"])
    def test_a_folder_of_another_program_is_left_alone(self, tmp_path, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("mine")
        with pytest.raises(InputError, match="already exists and was not written by the demo"):
            run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name / "README.md").read_text() == "mine"

    def test_a_folder_that_would_hide_the_packaged_model_is_rejected(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="is the name of the packaged model"):
            demo.run_demo(Path("mlmjax-small"))
        assert not list(tmp_path.iterdir())

    def test_a_differing_export_is_an_error(self, tmp_path):
        before = np.array([[0.5, 0.5], [0.1, 0.9]])
        demo.check_same(tmp_path, before, before.copy())
        with pytest.raises(RunError, match="1 of 2 texts"):
            demo.check_same(tmp_path, before, before + np.array([[0, 1e-17], [0, 1e-15]]))
