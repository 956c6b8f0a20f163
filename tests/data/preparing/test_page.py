"""Page and pictures of the report on rows: they tell all that was left out, broken or weighted."""

import doctest
import json
import re

import numpy as np
import pytest
from matplotlib.text import Text
from row_files import HOSTILE, write_table

from mlmjax.config.data import DataConfig, ExcludeConfig, SelectConfig, SourceConfig
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing import census, prepare, report
from mlmjax.data.preparing.report import write_rows_report
from mlmjax.data.preparing.rows_charts import bars, fates, lengths
from mlmjax.reporting.charts import own_style, save


def written(config, tokenizer):
    """Prepare rows; return the page of their report, its figures, and the lines printed."""
    rows = prepare.prepare(config, tokenizer)
    page = write_rows_report(rows, tokenizer)
    found = json.loads((page.parent / "report.json").read_bytes())
    return page.read_text(), found, "\n".join(prepare.summary(read_manifest(rows)))


def cells(page):
    """Return the cells of all table rows of a page whose texts are harmless."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[one.strip(" `") for one in line.strip("|").split("|")] for line in lines]


def test_what_is_broken_is_told(tmp_path, tokenizer):
    good = '{"text": "Some words."}\n'
    for name, lines in (("a", [good, "{\n", good]), ("b", [good])):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no such thing")
    paths = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.parquet"))
    source = SourceConfig(path=paths, text="text", broken="skip", name="s")
    config = DataConfig(rows=str(tmp_path / "rows"), seq_length=8, sources=(source,))
    page, found, printed = written(config, tokenizer)
    (told,) = found["sources"]
    assert (told["records"], told["dropped"], told["broken_files"]) == (4, {"broken record": 1}, 1)
    assert "a.jsonl line 2" in page
    assert "`s`: the first 1 of 1 files and the first 1 of 1 records." in page
    assert "4 records, 3 examples, 1 broken file, 1 dropped (broken record)" in printed


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_files_are_named_before_all_broken_records(tmp_path, tokenizer, workers):
    (tmp_path / "a.jsonl").write_text('{"text": "Some words."}\n' + "{\n" * 44)
    paths = [str(tmp_path / "a.jsonl")]
    for i in range(23):
        paths.append(str(tmp_path / f"b{i:02}.parquet"))
        (tmp_path / f"b{i:02}.parquet").write_bytes(b"PAR1 no such thing")
    source = SourceConfig(path=tuple(paths), text="text", broken="skip", name="s")
    config = DataConfig(
        rows=str(tmp_path / "rows"), seq_length=8, sources=(source,), workers=workers
    )
    page, found, printed = written(config, tokenizer)
    told = [row for row in cells(page) if row[0] == "s" and row[1].startswith(("file", "record "))]
    assert [row[1] for row in told] == [
        *(f"file {n}" for n in range(1, 21)),
        *(f"record {n}" for n in range(1, 6)),
    ]
    for row, path in zip(told[:20], paths[1:21], strict=True):
        assert row[2].startswith(path)
    assert "`s`: the first 20 of 23 files and the first 5 of 44 records." in page
    assert "23 broken files, 44 dropped (broken record)" in printed
    assert found["sources"][0]["records"] == 45
    assert len(found["sources"][0]["broken"]) == 20


def test_labels_of_a_classification_head_are_shown(tmp_path, tokenizer):
    rows = [{"text": f"Text {i}.", "label": i % 3} for i in range(30)]
    source = SourceConfig(
        path=write_table(tmp_path / "a.jsonl", rows),
        prompt="{text}",
        answer="label",
        labels=("a", "b", "c"),
    )
    config = DataConfig(rows=str(tmp_path / "rows"), pack=False, sources=(source,))
    page = write_rows_report(prepare.prepare(config, tokenizer, head="classification"), tokenizer)
    found = json.loads((page.parent / "report.json").read_bytes())
    assert found["splits"]["train"]["answers"] == []
    for one in found["prompts"]:
        number = int(re.search(r"Text (\d+)", one["text"])[1])
        assert one["label"] == number % 3
        assert "[MASK]" not in one["text"]
    assert page.read_text().count(" tokens, label ") == 20


def test_every_exclusion_is_told_with_what_it_kept_out(tmp_path, tokenizer):
    question = "Which of the two rivers that meet in the old town is the longer one of the pair"
    for name, text in (("rivers", question), ("towns", question.replace("rivers", "roads"))):
        write_table(tmp_path / f"{name}.jsonl", [{"q": text, "a": "yes"}])
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\ndata = "{name}.jsonl"\nprompt = "{{q}}"\nanswer = "a"\n'
            'labels = ["yes", "no"]\nverbalizer = "words"\n'
        )
    again = write_table(tmp_path / "again.jsonl", [{"q": "Nothing of that", "a": "no"}])
    rows = [{"q": f"Is {i} odd?", "a": "yes", "t": f"t{i % 4}"} for i in range(40)]
    rows += [{"q": f"So, {question}?", "a": "no", "t": "t0"}] * 3
    source = SourceConfig(
        path=write_table(tmp_path / "a.jsonl", rows), prompt="{q}", answer="a", task="t", name="s"
    )
    rivers, towns = (str(tmp_path / f"{name}.toml") for name in ("rivers", "towns"))
    overlap = ({"task": rivers}, {"task": rivers, "data": again}, {"task": towns})
    exclude = ExcludeConfig.model_validate(
        {"tasks": ("t3", "*nowhere'*"), "overlap": overlap, "ngram": 14}, strict=False
    )
    config = DataConfig(rows=str(tmp_path / "rows"), sources=(source,), exclude=exclude)
    page, found, _ = written(config, tokenizer)
    told = found["exclusions"]
    assert told["ngram"] == 14
    assert told["tasks"] == [
        {"glob": "t3", "records": 10},
        {"glob": "*nowhere'*", "records": 0},
    ]
    assert told["overlap"] == [
        {"set": "rivers", "data": [str(tmp_path / "rivers.jsonl"), again], "records": 3},
        {"set": "towns", "data": [str(tmp_path / "towns.jsonl")], "records": 0},
    ]
    table = cells(page)
    assert ["task", "*nowhere'*", "", "", "0"] in table
    assert ["text", "towns", "14", str(tmp_path / "towns.jsonl"), "0"] in table
    assert "nothing was kept out" not in page
    config = DataConfig(rows=str(tmp_path / "others"), sources=(source,))
    page, found, _ = written(config, tokenizer)
    assert found["exclusions"] == {"ngram": 13, "tasks": [], "overlap": []}
    assert "nothing was kept out for evaluation" in page


@pytest.mark.parametrize("per_task", [None, 20])
def test_a_set_that_is_too_small_is_told(tmp_path, tokenizer, per_task):
    rows = [{"q": f"Is {i} odd?", "a": "yes", "t": f"t{i % 2}"} for i in range(60)]
    source = SourceConfig(
        path=write_table(tmp_path / "a.jsonl", rows), prompt="{q}", answer="a", task="t", name="s"
    )
    config = DataConfig(
        rows=str(tmp_path / "rows"),
        sources=(source,),
        select=SelectConfig(sizes=(20, 3000), per_task=per_task),
    )
    page, _, printed = written(config, tokenizer)
    found, limits = (60, "") if per_task is None else (40, " within the limits")
    told = f"asked 3000, found {found}: there are no more{limits}"
    assert f"Set 2: {told}." in page
    assert f"{found} examples ({told}), at most {found // 2} a task" in printed
    assert page.count("there are no more") == printed.count("there are no more") == 1
    assert doctest.testmod(prepare).failed == 0


def test_weights_are_told_as_what_is_drawn(tmp_path, tokenizer):
    paths = [
        write_table(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}."} for i in range(count)])
        for name, count in (("a", 30), ("b", 10))
    ]

    def told(*weights):
        sources = tuple(
            SourceConfig(path=path, text="text", name=name, weight=weight)
            for name, path, weight in zip("ab", paths, weights, strict=True)
        )
        rows = str(tmp_path / f"rows{weights}")
        page, found, _ = written(DataConfig(rows=rows, pack=False, sources=sources), tokenizer)
        tokens = {one["source"]: f"{one['tokens']:,}" for one in found["weights"]}
        return tokens, cells(page), page

    tokens, lines, _ = told(2.0, 6.0)
    assert ["a", "30", tokens["a"], "2", "75.00%", "25.00%", "0.33"] in lines
    assert ["b", "10", tokens["b"], "6", "25.00%", "75.00%", "3.00"] in lines
    tokens, lines, page = told(None, None)
    assert ["a", "30", tokens["a"], "none", "75.00%", "75.00%", "1.00"] in lines
    assert ["b", "10", tokens["b"], "none", "25.00%", "25.00%", "1.00"] in lines
    assert "no source has a weight" in page


def test_answers_are_told_by_task_whenever_they_are_added_up(tmp_path, tokenizer, monkeypatch):
    rows = [
        {"q": f"Is {i} odd?", "a": "yes" if i % 2 or i % 3 == 0 else "no", "t": f"t{i % 40}"}
        for i in range(2000)
    ]
    rows += [{"q": f"Is {i} one?", "a": "no", "t": "big"} for i in range(90)]
    rows += [{"q": f"Is {i} two?", "a": "yes", "t": "big"} for i in range(10)]
    text = [{"text": f"Some words {i}."} for i in range(500)]
    sources = (
        SourceConfig(path=write_table(tmp_path / "t.jsonl", text), text="text", name="plain"),
        SourceConfig(
            path=write_table(tmp_path / "a.jsonl", rows), prompt="{q}", answer="a", task="t"
        ),
    )
    config = DataConfig(rows=str(tmp_path / "rows"), pack=False, sources=sources)
    page, found, _ = written(config, tokenizer)
    train = found["splits"]["train"]
    assert train["answers_by_task"][0] == {
        "task": "big",
        "examples": 100,
        "answers": 2,
        "commonest": "␣no",
        "commonest_share": 0.9,
    }
    assert ["big", "100", "2", "␣no", "90.00%"] in cells(page)
    assert "20 of 41 tasks have one answer only. Of the 30 largest:" in page
    assert len(train["answers_by_task"]) == 41
    assert "plain" not in train["tasks"]
    assert "Plain text, 500 examples, is no task" in page
    assert ["big", "100", "4.76%"] in cells(page)  # of the 2,100 that are no plain text
    expected = census.count(tmp_path / "rows", "train")
    monkeypatch.setattr(census, "_WAITING", 0)
    assert np.array_equal(census.count(tmp_path / "rows", "train").pairs, expected.pairs)
    assert expected.pairs[:, 2].sum() == 2100
    assert np.array_equal(np.bincount(expected.pairs[:, 0], expected.pairs[:, 2]), expected.tasks)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_pictures_take_any_names(tmp_path):
    names = [*HOSTILE, "", " ", "$", "\\", "العربية", "a\n\nb"]
    with own_style():
        save(bars([(name, 5) for name in names], 100, "other: 3", "title"), tmp_path / "a.png")
        save(bars([], 0, None, "title"), tmp_path / "b.png")
        fate = {"kept": 3, **dict.fromkeys(names, 2)}
        save(fates(dict.fromkeys(names, fate), ("kept",)), tmp_path / "c.png")
        save(fates({"s": {"kept": 0}}, ("kept",)), tmp_path / "d.png")
        for longest in (1, 3, 63, 64, 65, 1000):
            save(lengths(np.ones((2, longest + 1), np.int64)), tmp_path / "e.png")
        save(lengths(np.zeros((2, 9), np.int64)), tmp_path / "f.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_pictures_say_what_they_count():
    drawn = bars([("a", 50), ("b", 10)], 1000, "not shown: 9 other tasks", "Examples by task")
    assert len(drawn.axes[0].patches) == 2
    assert {"Examples by task", "examples\nnot shown: 9 other tasks"} <= set(texts(drawn))
    assert any("training split" in text for text in texts(lengths(np.ones((2, 9), np.int64))))
    told = texts(fates({"s": {"kept": 944, "x": 31, "y": 25, "z": 0}}, ("kept",)))
    assert any("records" in text and "both splits" in text for text in told)
    assert {"94%", "3%", "2%"} <= set(told)
    told = texts(fates({"s": {"kept": 976, "x": 24}}, ("kept",)))
    assert "2%" not in told


def test_a_picture_of_many_tasks_has_thirty_bars(tmp_path, tokenizer, monkeypatch):
    rows = [{"q": f"Is {i} odd?", "a": "yes", "t": f"t{i % 40}"} for i in range(400)]
    source = SourceConfig(
        path=write_table(tmp_path / "a.jsonl", rows), prompt="{q}", answer="a", task="t"
    )
    drawn = []
    monkeypatch.setattr(report, "bars", lambda *told: drawn.append(told) or bars(*told))
    written(DataConfig(rows=str(tmp_path / "rows"), sources=(source,)), tokenizer)
    (names, total, rest, title), (_, _, nothing, _) = drawn
    assert (len(names), total) == (30, 400)
    assert rest == "not shown: 10 other tasks, 100 examples (25.0%)"
    assert nothing is None
    assert "training split" in title
    assert "plain text left out" in title


def test_bars_hold_every_length_once():
    counts = np.arange(2 * 131).reshape(2, 131) + 1
    counts[:, 0] = 0
    figure = lengths(counts)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights) == counts.sum()
    assert heights[0] == counts[0, 1:4].sum()  # three lengths a bar
