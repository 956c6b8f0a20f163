"""The report on rows: its figures are those of the rows, and no text in them can break it."""

import json
import re
import shutil
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from pages import read_markdown
from pictures import has_named_axes, read_picture
from row_files import HOSTILE, content, stored, write_table
from training import write_records, write_tokenizer

from mlmjax import InputError
from mlmjax.cli.main import run
from mlmjax.config.data import DataConfig, ExcludeConfig, SelectConfig, SourceConfig
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing import prepare, report, shuffle
from mlmjax.data.preparing.report import (
    KEPT,
    count_split,
    draw_lengths,
    draw_records,
    token_text,
    write_rows_report,
)
from mlmjax.data.rows import open_rows
from mlmjax.reporting.charts import svg
from mlmjax.reporting.markdown import cell, fenced, visible
from mlmjax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Rows of prompts and plain text, held out ones, nested sets and things that were dropped."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {
            "input": f"Question {i}: {HOSTILE[i % len(HOSTILE)]}",
            "answer": ["yes", "no", "two words", " Paris", "$"][i % 5],
            "task": HOSTILE[i // 7 % 40 % len(HOSTILE)] if i % 2 else f"task{i % 47}",
        }
        for i in range(1500)
    ]
    prompts = SourceConfig(
        path=write_table(folder / "a.jsonl", rows),
        prompt="{input}",
        answer="answer",
        task="task",
        name="q|`a`\n# x",
        normalize=("strip", "letter"),
        shorten={"input": "tail"},
    )
    rows = [{"text": f"Document {i} of {'many ' * (i % 40)}words. " * 3} for i in range(150)]
    text = SourceConfig(path=write_table(folder / "b.jsonl", rows), text="text", name="text")
    config = DataConfig(
        rows=str(folder / "rows"),
        seq_length=128,
        validation_rows=10,
        select=SelectConfig(sizes=(200, 600), answer_share=0.5),
        exclude=ExcludeConfig(tasks=("task7",)),
        sources=(prompts, text),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_TOKENS", 4000)  # several row files for each group
        prepare.prepare(config, tokenizer)
    return folder / "rows"


@pytest.fixture(scope="module")
def page(folder, tokenizer):
    return write_rows_report(folder, tokenizer)


@pytest.fixture(scope="module")
def found(page):
    return json.loads((page.parent / "report.json").read_bytes())


def count(folder, tokenizer, draw=0, seed=0):
    return count_split(folder, read_manifest(folder), "train", tokenizer, draw=draw, seed=seed)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_figures_are_those_of_the_rows(folder, found, split, tokenizer):
    manifest = read_manifest(folder)
    there = stored(folder, split)
    answered = [one for _, one in there if one.answer_position >= 0]
    plain = [one for _, one in there if one.answer_position < 0]
    assert min(len(answered), len(plain)) > 0
    reported = found["splits"][split]
    rows, tokens = sum(map(len, open_rows(folder, split))), sum(len(one) for _, one in there)
    totals = {"rows": rows, "examples": len(there), "tokens": tokens}
    assert totals.items() <= reported.items()
    assert reported["padding_share"] == pytest.approx(1 - tokens / (rows * manifest.seq_length))
    assert reported["tasks"] == Counter(manifest.tasks[one.task] for one in answered)
    by_task = {}
    for one in answered:
        answers = by_task.setdefault(manifest.tasks[one.task], Counter())
        answers[int(one.ids[one.answer_position])] += 1
    found_by_task = {one["task"]: one for one in reported["answers_by_task"]}
    for task, answers in by_task.items():
        most = max(answers.values())
        commonest = min(id for id, n in answers.items() if n == most)
        assert found_by_task.pop(task) == {
            "task": task,
            "examples": answers.total(),
            "answers": len(answers),
            "commonest": token_text(tokenizer, commonest),
            "commonest_share": most / answers.total(),
        }
    assert not found_by_task
    answers = {one["id"]: one["examples"] for one in reported["answers"]}
    assert answers == sum(by_task.values(), Counter())
    for kind, members in (("with_answer", answered), ("without", plain)):
        assert reported["lengths"][kind] == Counter(str(len(one)) for one in members)
    by_source = Counter(source.name for source, _ in there)
    assert {name: totals["examples"] for name, totals in reported["sources"].items()} == by_source
    for sizes in (reported["tasks"].values(), (a["examples"] for a in reported["answers_by_task"])):
        assert list(sizes) == sorted(reported["tasks"].values(), reverse=True)


def test_nothing_of_the_records_is_unaccounted_for(folder, found):
    prompts, text = found["sources"]
    assert prompts["records"] == prompts["examples"] + sum(prompts["dropped"].values()) == 1500
    in_rows = sum(prompts["examples_in_rows"].values())
    assert prompts["not_selected"] == prompts["examples"] - in_rows > text["not_selected"] == 0
    assert set(prompts["dropped"]) == {"answer is not one token", "task excluded by 'task7'"}
    assert prompts["normalized"] == {"strip": 300 - 3, "letter": 0}  # 3 are of the excluded task
    assert prompts["shortened"]["input"] > 0
    chosen = found["selection"]
    assert [one["asked"] for one in chosen["sets"]] == [200, 600]
    assert chosen["unbalanced"] + chosen["capped"] == prompts["not_selected"]
    for level, one in enumerate(found["splits"]["train"]["sets"]):
        assert one["rows"] == sum(map(len, open_rows(folder, "train", level=level)))
        assert one["examples"] == len(stored(folder, "train", level=level))


def test_prompts_are_examples_of_the_rows_with_the_answer_masked(folder, found, tokenizer):
    there = stored(folder, "train")
    manifest = read_manifest(folder)
    assert len({one["number"] for one in found["prompts"]}) == 20
    for one in found["prompts"]:
        source, example = there[one["number"]]
        expected, answer = example.ids.tolist(), None
        if example.answer_position >= 0:
            answer = expected[example.answer_position]
            expected[example.answer_position] = tokenizer.mask_id
            assert one["text"].endswith("[unused0][MASK][SEP]")
        facts = (answer, expected, source.name, manifest.tasks[example.task])
        assert (one["answer_id"], one["ids"], one["source"], one["task"]) == facts
        assert one["text"] == tokenizer.decode(expected)


def test_every_example_is_as_likely_to_be_drawn(folder, tokenizer):
    total = sum(file.examples for file in read_manifest(folder).splits["train"])
    drawn = [one for seed in range(30) for one in count(folder, tokenizer, 100, seed).drawn]
    quarters = np.bincount([one["number"] * 4 // total for one in drawn])
    assert quarters.sum() == 30 * 100
    assert np.abs(quarters / quarters.sum() - 0.25).max() < 0.04
    everything = count(folder, tokenizer, 10**6).drawn
    assert [one["number"] for one in everything] == list(range(total))


def test_no_text_breaks_the_page(page, found):
    page = page.read_text()
    blocks, outside = read_markdown(page)
    assert blocks == [visible(one["text"], keep="\n") for one in found["prompts"]]
    heads = [line for line in outside if line.startswith("#")]
    assert len(heads) == 8 + len(found["prompts"])
    assert not any(c in page for c in "\x1b\u202e\x07\u200b\r\U000f0000")
    for line in outside:
        if line.startswith("|"):
            assert "<" not in re.sub(r"`[^`]*`|</?code>", "", line)
        else:
            assert "<script" not in line.replace("`<script>alert(1)</script>`", "")
    tables = re.findall(r"(?:^\|.*\|$\n?)+", "\n".join(outside), flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("`~|<>$\\ #\n\r\t\0&*_[]()!\u202e中a"), max_size=30))
@example("```")
@example("a\n`````\n# b\n```")
def test_any_text_stays_in_its_place(text):
    blocks, outside = read_markdown(fenced(text))
    assert blocks == [visible(text, keep="\n")]
    assert not outside
    one = cell(text)
    assert not {"|", "\n"} & set(one)
    if one.startswith("<code>"):
        assert not set("`<>|*[]$\\") & set(one.removeprefix("<code>").removesuffix("</code>"))
    else:
        assert one.count("`") == 2


def test_the_same_rows_give_the_same_bytes_and_stay_as_they_are(page, folder, tokenizer):
    files = {path.name for path in page.parent.iterdir()}
    assert files == {"report.md", "report.json", "records.svg", "lengths.svg"}
    for path in page.parent.glob("*.svg"):
        assert read_picture(path.read_text())
    rows = content(folder)
    shutil.rmtree(page.parent)
    page.parent.mkdir()  # An empty folder is as good as none.
    partial = folder / "report.partial"
    partial.mkdir()  # as a kill leaves it
    (partial / ".building").touch()
    (partial / "records.svg").write_bytes(b"<svg half a pic")
    assert write_rows_report(folder, tokenizer) == page
    assert content(folder) == rows
    there = {path.name for path in folder.iterdir()}
    assert there == {"manifest.json", "report", "train", "validation"}
    at = page.stat().st_mtime_ns
    assert write_rows_report(folder, tokenizer) == page
    assert page.stat().st_mtime_ns == at


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer):
    def peak(examples):
        rows = [{"q": f"{i} " + "word " * (i % 40), "a": "yes", "t": "t"} for i in range(examples)]
        source, name = questions(tmp_path, rows), str(examples)
        config = {"rows": str(tmp_path / name), "seq_length": 64, "pack": False}
        folder = prepare.prepare(DataConfig(**config, sources=(source,)), tokenizer)
        count(folder, tokenizer, 20)
        tracemalloc.start()
        count(folder, tokenizer, 20)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2000) < peak(500) * 1.2 + 2**16


def test_damaged_rows_and_another_tokenizer_are_rejected(tmp_path, folder, tokenizer):
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="another tokenizer"):
        write_rows_report(folder, Tokenizer.from_pretrained(tmp_path / "tokenizer"))
    path = write_table(tmp_path / "a.jsonl", [{"text": "One. " * 90}] * 5)
    written(tmp_path, tokenizer, SourceConfig(path=path, text="text"), seq_length=64)
    rows = tmp_path / "rows"
    shutil.rmtree(rows / "report")
    (file,) = rows.glob("train/*.arrow")
    sound = file.read_bytes()
    for at in range(400, len(sound) - 400, len(sound) // 7):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(InputError, match="row file is damaged"):
            write_rows_report(rows, tokenizer)
        assert not (rows / "report").exists()
    file.write_bytes(sound)
    page = write_rows_report(rows, tokenizer)
    assert "No training example has an answer token." in page.read_text()
    assert "No training example has a task." in page.read_text()


def test_the_command_writes_the_report_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    write_records(tmp_path / "records.jsonl", 60)
    (tmp_path / "run.toml").write_text(
        'out = "out"\nsteps = 2\ntokenizer = "tokenizer"\nmodel = {}\ndata.rows = "rows"\n'
        'data.sources = [{ path = "records.jsonl", prompt = "{prompt}", answer = "answer" }]\n'
    )
    for _ in range(2):
        assert run(["prepare", "run.toml"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "report: rows/report/report.md"
    (tmp_path / "rows" / "report" / "report.md").unlink()
    assert run(["prepare", "run.toml"]) == 2
    assert "has no report.md; delete the folder" in capsys.readouterr().err


def written(folder, tokenizer, *sources, name="rows", head="mlm", **settings):
    """Prepare rows; return the page of their report, its figures, and the lines printed."""
    config = DataConfig(rows=str(folder / name), sources=sources, **settings)
    rows = prepare.prepare(config, tokenizer, head=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save", lambda figure, path, description: None)  # most of the time
        page = write_rows_report(rows, tokenizer)
    found = json.loads((page.parent / "report.json").read_bytes())
    return page.read_text(), found, "\n".join(prepare.summary(read_manifest(rows)))


def questions(folder, rows):
    path = write_table(folder / "a.jsonl", rows)
    return SourceConfig(path=path, prompt="{q}", answer="a", task="t", name="s")


def cells(page):
    """Return the cells of all table rows of a page whose texts are harmless."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[one.strip(" `") for one in line.strip("|").split("|")] for line in lines]


def test_broken_files_are_named_before_all_broken_records(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "Some words."}\n' + "{\n" * 44)
    for i in range(1, 24):
        (tmp_path / f"b{i:02}.parquet").write_bytes(b"PAR1 no such thing")
    source = SourceConfig(path=str(tmp_path / "*.*"), text="text", broken="skip", name="s")
    page, found, printed = written(tmp_path, tokenizer, source, seq_length=8)
    rows = [row for row in cells(page) if row[0] == "s"]
    named = [row[1:3] for row in rows if row[1].startswith(("file", "record "))]
    whats = [f"file {n} of 23" for n in range(1, 21)] + [f"record {n} of 44" for n in range(1, 6)]
    assert [what for what, _ in named] == whats
    for n, (_, message) in enumerate(named[:20], 1):
        assert message.startswith(str(tmp_path / f"b{n:02}.parquet"))
    assert "23 broken files, 44 dropped (broken record)" in printed
    reported = found["sources"][0]
    assert (reported["records"], len(reported["broken"])) == (45, 20)


def test_labels_of_a_classification_head_are_shown(tmp_path, tokenizer):
    rows = [{"text": f"Text {i}.", "label": i % 3} for i in range(30)]
    path, labels = write_table(tmp_path / "a.jsonl", rows), ("a", "b", "c")
    source = SourceConfig(path=path, prompt="{text}", answer="label", labels=labels)
    page, found, _ = written(tmp_path, tokenizer, source, pack=False, head="classification")
    assert found["splits"]["train"]["answers"] == []
    for one in found["prompts"]:
        assert one["label"] == int(re.search(r"Text (\d+)", one["text"])[1]) % 3
        assert "[MASK]" not in one["text"]
    assert page.count(" tokens, label ") == 20


def test_every_exclusion_is_reported_with_what_it_kept_out(tmp_path, tokenizer):
    question = "Which of the two rivers that meet in the old town is the longer one of the pair"
    rest = 'prompt = "{q}"\nanswer = "a"\nlabels = ["yes", "no"]\nverbalizer = "words"\n'
    for name, text in (("rivers", question), ("towns", question.replace("rivers", "roads"))):
        write_table(tmp_path / f"{name}.jsonl", [{"q": text, "a": "yes"}])
        task = f'name = "{name}"\ndata = "{name}.jsonl"\n{rest}'
        (tmp_path / f"{name}.toml").write_text(task)
    again = write_table(tmp_path / "again.jsonl", [{"q": "Nothing of that", "a": "no"}])
    rows = [{"q": f"Is {i} odd?", "a": "yes", "t": f"t{i % 4}"} for i in range(40)]
    rows += [{"q": f"So, {question}?", "a": "no", "t": "t0"}] * 3
    source = questions(tmp_path, rows)
    rivers, towns = (str(tmp_path / f"{name}.toml") for name in ("rivers", "towns"))
    overlap = ({"task": rivers}, {"task": rivers, "data": again}, {"task": towns})
    exclude = ExcludeConfig.model_validate(
        {"tasks": ("t3", "*nowhere'*"), "overlap": overlap, "ngram": 14}, strict=False
    )
    page, found, _ = written(tmp_path, tokenizer, source, exclude=exclude)
    assert found["exclusions"] == {
        "ngram": 14,
        "tasks": [{"glob": "t3", "records": 10}, {"glob": "*nowhere'*", "records": 0}],
        "overlap": [
            {"set": "rivers", "data": [str(tmp_path / "rivers.jsonl"), again], "records": 3},
            {"set": "towns", "data": [str(tmp_path / "towns.jsonl")], "records": 0},
        ],
    }
    table = cells(page)
    assert ["task", "*nowhere'*", "", "0"] in table
    assert ["text", "towns", str(tmp_path / "towns.jsonl"), "0"] in table
    assert "14 words in a row" in page
    assert "`data.exclude` is empty" not in page
    page, found, _ = written(tmp_path, tokenizer, source, name="others")
    assert found["exclusions"] == {"ngram": 13, "tasks": [], "overlap": []}
    assert "`data.exclude` is empty" in page


@pytest.mark.parametrize("per_task", [None, 20])
def test_a_set_that_is_too_small_is_reported(tmp_path, tokenizer, per_task):
    rows = [{"q": f"Is {i} odd?", "a": "yes", "t": f"t{i % 2}"} for i in range(60)]
    select = SelectConfig(sizes=(20, 3000), per_task=per_task)
    page, _, printed = written(tmp_path, tokenizer, questions(tmp_path, rows), select=select)
    found, limits = (60, "") if per_task is None else (40, " within the limits")
    reported = f"asked 3000, found {found}: there are no more{limits}"
    assert f"| 3,000 | {found} ({reported}) |" in page
    assert f"{found} examples ({reported}), at most {found // 2} a task" in printed
    assert page.count("there are no more") == printed.count("there are no more") == 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((2.0, 6.0), [("2", "75.00%", "25.00%", "0.33"), ("6", "25.00%", "75.00%", "3.00")]),
        ((None, None), [("none", s, s, "1.00") for s in ("75.00%", "25.00%")]),
    ],
)
def test_weights_are_reported_as_what_is_drawn(tmp_path, tokenizer, weights, expected):
    sources = []
    for name, count, weight in zip("ab", (30, 10), weights, strict=True):
        rows = [{"text": f"{name} {i}."} for i in range(count)]
        path = write_table(tmp_path / f"{name}.jsonl", rows)
        sources.append(SourceConfig(path=path, text="text", name=name, weight=weight))
    page, found, _ = written(tmp_path, tokenizer, *sources, pack=False)
    for one, count, rest in zip(found["weights"], ("30", "10"), expected, strict=True):
        assert [one["source"], count, f"{one['tokens']:,}", *rest] in cells(page)
    assert ("No source has a `weight`" in page) == (weights[0] is None)


def test_answers_are_counted_by_task(tmp_path, tokenizer):
    rows = [
        {"q": f"Is {i} odd?", "a": "yes" if i % 2 or i % 3 == 0 else "no", "t": f"t{i % 40}"}
        for i in range(1000)
    ]
    rows += [{"q": f"Is {i} two?", "a": "yes" if i < 10 else "no", "t": "big"} for i in range(100)]
    path = write_table(tmp_path / "t.jsonl", [{"text": f"Some words {i}."} for i in range(300)])
    text = SourceConfig(path=path, text="text", name="plain")
    sources = [text, questions(tmp_path, rows)]
    page, found, _ = written(tmp_path, tokenizer, *sources, pack=False)
    train = found["splits"]["train"]
    assert tuple(train["answers_by_task"][0].values()) == ("big", 100, 2, "␣no", 0.9)
    assert len(train["answers_by_task"]) == 41
    assert "plain" not in train["tasks"]
    assert "20 of 41 tasks have only one answer. The 30 largest tasks:" in page
    assert "The 300 examples of plain text are not a task." in page
    table = cells(page)
    assert ["big", "100", "2", "␣no", "90.00%"] in table
    assert ["other 11 tasks", "275", "25.00%"] in table
    assert ["big", "100", "9.09%"] in table  # of the 1,100 that are no plain text
    counted = count(tmp_path / "rows", tokenizer)
    assert counted.tasks == Counter(task for task, _ in counted.pairs.elements())
    assert counted.tasks.total() == 1100


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def source(name, records, not_selected=0, **dropped):
    return {"name": name, "records": records, "not_selected": not_selected, "dropped": dropped}


def test_pictures_take_any_names():
    names = [*HOSTILE, "", " ", "$", "\\", "العربية", "a\n\nb"]
    many = [source(name, 30, **dict.fromkeys(names, 2)) for name in names] * 3
    drawn = [draw_records(many), draw_records([source("s", 0)])]
    for longest in (0, 1, 3, 63, 64, 65, 1000):
        counts = dict.fromkeys(map(str, range(1, longest + 1)), 1)
        drawn.append(draw_lengths({"with_answer": counts, "without": counts}, longest or 9))
    for figure in (*drawn[:3], drawn[-1]):  # Saving is most of the time.
        assert read_picture(svg(figure, "it"))
        assert has_named_axes(figure)


def test_pictures_say_what_they_count():
    drawn = draw_lengths({"with_answer": {"3": 2}, "without": {"9": 1}}, 9)
    assert any("training split" in text for text in texts(drawn))
    shown = texts(draw_records([source("s", 1000, x=120, y=110)]))
    assert any(text.endswith("both splits") for text in shown)
    assert {KEPT, "x", "y", "77%", "12%", "11%"} <= set(shown)
    assert "9%" not in texts(draw_records([source("s", 1000, x=90)]))
    # Similar reasons are one, and those beyond the colours another.
    reasons = {"overlaps a": 2, "overlaps b": 2, **{f"r{n}": 2 for n in range(9)}}
    shown = texts(draw_records([source(f"s{n}", 100 - n, **reasons) for n in range(30)]))
    assert {"shares text with an evaluation set", "other reasons"} <= set(shown)
    assert "r8" not in shown
    assert sum("records" in text for text in set(shown)) == 24 + 1  # and the axis
    assert any(text.startswith("other 7 sources") for text in shown)


def test_bars_hold_every_length_once():
    counts = {kind: {str(n): n for n in range(1, 131)} for kind in ("with_answer", "without")}
    heights = [patch.get_height() for patch in draw_lengths(counts, 130).axes[0].patches]
    assert sum(heights) == 130 * 131
    assert heights[0] == 1 + 2 + 3  # three lengths a bar
