"""The report on rows: its figures are those of the rows, and no text in them can break it."""

import json
import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import HOSTILE, content, write_table
from training import write_records, write_tokenizer

from mlmjax import InputError
from mlmjax.cli.main import run
from mlmjax.config.data import DataConfig, ExcludeConfig, SelectConfig, SourceConfig
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing import census, prepare, shuffle
from mlmjax.data.preparing.report import token_text, write_rows_report
from mlmjax.data.rows import open_rows
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
    text = [{"text": f"Document {i} of {'many ' * (i % 40)}words. " * 3} for i in range(150)]
    config = DataConfig(
        rows=str(folder / "rows"),
        seq_length=128,
        validation_rows=10,
        select=SelectConfig(sizes=(200, 600), answer_share=0.5),
        exclude=ExcludeConfig(tasks=("task7",)),
        sources=(
            SourceConfig(
                path=write_table(folder / "a.jsonl", rows),
                prompt="{input}",
                answer="answer",
                task="task",
                name="q|`a`\n# x",
                normalize=("strip", "letter"),
                shorten={"input": "tail"},
            ),
            SourceConfig(path=write_table(folder / "b.jsonl", text), text="text", name="text"),
        ),
    )
    patched = pytest.MonkeyPatch()
    patched.setattr(shuffle, "BUCKET_TOKENS", 4000)  # several row files for each group
    prepare.prepare(config, tokenizer)
    patched.undo()
    return folder / "rows"


@pytest.fixture(scope="module")
def report(folder, tokenizer):
    return write_rows_report(folder, tokenizer)


@pytest.fixture(scope="module")
def found(report):
    return json.loads((report.parent / "report.json").read_bytes())


def examples(folder, split):
    return [
        (source, example)
        for source in open_rows(folder, split)
        for row in range(len(source))
        for example in source[row]
    ]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_figures_are_those_of_the_rows(folder, found, split, tokenizer):
    manifest = read_manifest(folder)
    there = examples(folder, split)
    asked = [one for _, one in there if one.answer_position >= 0]
    plain = [one for _, one in there if one.answer_position < 0]
    assert asked
    assert plain
    told = found["splits"][split]
    assert told["examples"] == len(there)
    assert told["tokens"] == sum(len(one) for _, one in there)
    assert told["rows"] == sum(map(len, open_rows(folder, split)))
    padding = 1 - told["tokens"] / (told["rows"] * manifest.seq_length)
    assert told["padding_share"] == pytest.approx(padding)
    assert told["tasks"] == Counter(manifest.tasks[one.task] for one in asked)
    by_task = {}
    for one in asked:
        answers = by_task.setdefault(manifest.tasks[one.task], Counter())
        answers[int(one.ids[one.answer_position])] += 1
    assert {one["task"] for one in told["answers_by_task"]} == set(by_task)
    for one in told["answers_by_task"]:
        answers = by_task[one["task"]]
        assert one["examples"] == answers.total()
        assert one["answers"] == len(answers)
        commonest = min(id for id, n in answers.items() if n == max(answers.values()))
        assert one["commonest"] == token_text(tokenizer, commonest)
        assert one["commonest_share"] == max(answers.values()) / answers.total()
    sizes = [one["examples"] for one in told["answers_by_task"]]
    assert sizes == sorted(sizes, reverse=True)
    answers = {one["id"]: one["examples"] for one in told["answers"]}
    assert answers == Counter(int(one.ids[one.answer_position]) for one in asked)
    for kind, members in (("with_answer", asked), ("without", plain)):
        assert told["lengths"][kind] == Counter(str(len(one)) for one in members)
    by_source = Counter(source.name for source, _ in there)
    assert {name: totals["examples"] for name, totals in told["sources"].items()} == by_source
    assert list(told["tasks"].values()) == sorted(told["tasks"].values(), reverse=True)


def test_nothing_of_the_records_is_unaccounted_for(folder, found):
    prompts, text = found["sources"]
    assert prompts["records"] == 1500
    assert prompts["records"] == prompts["examples"] + sum(prompts["dropped"].values())
    in_rows = sum(prompts["examples_in_rows"].values())
    assert prompts["not_selected"] == prompts["examples"] - in_rows > 0
    assert text["not_selected"] == 0
    assert set(prompts["dropped"]) == {"answer is not one token", "task excluded by 'task7'"}
    # Three are of the excluded task.
    assert prompts["normalized"] == {"strip": 300 - 3, "letter": 0}
    assert prompts["shortened"]["input"] > 0
    chosen = found["selection"]
    assert [one["asked"] for one in chosen["sets"]] == [200, 600]
    assert chosen["unbalanced"] + chosen["capped"] == prompts["not_selected"]
    sets = found["splits"]["train"]["sets"]
    for level, one in enumerate(sets):
        rows = open_rows(folder, "train", level=level)
        assert one["rows"] == sum(map(len, rows))
        assert one["examples"] == sum(len(r[i]) for r in rows for i in range(len(r)))


def test_prompts_are_examples_of_the_rows_with_the_answer_masked(folder, found, tokenizer):
    there = examples(folder, "train")
    manifest = read_manifest(folder)
    assert len({one["number"] for one in found["prompts"]}) == 20
    for one in found["prompts"]:
        source, example = there[one["number"]]
        expected = example.ids.tolist()
        if example.answer_position >= 0:
            assert one["answer_id"] == expected[example.answer_position]
            expected[example.answer_position] = tokenizer.mask_id
            assert one["text"].endswith("[unused0][MASK][SEP]")
        else:
            assert one["answer_id"] is None
        assert one["ids"] == expected
        assert one["text"] == tokenizer.decode(expected)
        assert (one["source"], one["task"]) == (source.name, manifest.tasks[example.task])


def test_every_example_is_as_likely_to_be_drawn(folder):
    total = sum(file.examples for file in read_manifest(folder).splits["train"])
    draws = 150
    drawn = [
        one.number
        for seed in range(draws)
        for one in census.count(folder, "train", draw=20, seed=seed).drawn
    ]
    quarters = np.bincount(np.array(drawn) * 4 // total, minlength=4)
    assert quarters.sum() == draws * 20
    assert np.abs(quarters / quarters.sum() - 0.25).max() < 0.04
    everything = census.count(folder, "train", draw=10**6).drawn
    assert [one.number for one in everything] == list(range(total))


def markdown(text):
    """Read a page as far as it matters here: its code blocks, and its lines outside of them."""
    fence, blocks, outside = None, [], []
    for line in text.split("\n"):
        if fence is None and (opened := re.match(r"(`{3,}|~{3,})", line)):
            fence = opened[1]
            blocks.append([])
        elif fence is not None and re.fullmatch(rf" {{0,3}}{fence}{fence[0]}*[ \t]*", line):
            fence = None
        elif fence is not None:
            blocks[-1].append(line)
        else:
            outside.append(line)
    assert fence is None
    return ["\n".join(block) for block in blocks], outside


def test_no_text_breaks_the_page(report, found):
    page = report.read_text()
    blocks, outside = markdown(page)
    assert blocks == [visible(one["text"], keep="\n") for one in found["prompts"]]
    heads = [line for line in outside if line.startswith("#")]
    assert len(heads) == 8 + len(found["prompts"])
    assert not any(c in page for c in "\x1b\u202e\x07\u200b\r\U000f0000")
    for line in outside:
        if line.startswith("|"):
            cells = re.sub(r"`[^`]*`", "", line)
            assert "<" not in re.sub(r"</?code>", "", cells)
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
    blocks, outside = markdown(fenced(text))
    assert blocks == [visible(text, keep="\n")]
    assert not outside
    one = cell(text)
    assert "|" not in one
    assert "\n" not in one
    if one.startswith("<code>"):
        assert not set("`<>|*[]$\\") & set(one.removeprefix("<code>").removesuffix("</code>"))
    else:
        assert one.count("`") == 2


def test_the_same_rows_give_the_same_bytes_and_stay_as_they_are(report, folder, tokenizer):
    before = content(report.parent)
    assert set(before) == {
        "report.md",
        "report.json",
        *(f"{name}.png" for name in ("records", "tasks", "answers", "lengths")),
    }
    rows = {path: path.read_bytes() for path in folder.rglob("*.arrow")}
    report.parent.rename(folder.parent / "old")
    partial = folder / "report.partial"
    partial.mkdir()  # as a kill leaves it
    (partial / ".building").touch()
    (partial / "tasks.png").write_bytes(b"half a pic")
    assert write_rows_report(folder, tokenizer) == report
    assert content(report.parent) == before
    assert {path: path.read_bytes() for path in folder.rglob("*.arrow")} == rows
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "report",
        "train",
        "validation",
    }
    at = report.stat().st_mtime_ns
    assert write_rows_report(folder, tokenizer) == report
    assert report.stat().st_mtime_ns == at


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer):
    def peak(count):
        path = write_table(
            tmp_path / f"{count}.jsonl",
            [{"input": f"{i} " + "word " * (i % 40), "answer": "yes"} for i in range(count)],
        )
        source = SourceConfig(path=path, prompt="{input}", answer="answer")
        config = DataConfig(
            rows=str(tmp_path / str(count)), seq_length=64, pack=False, sources=(source,)
        )
        rows = prepare.prepare(config, tokenizer)
        census.count(rows, "train", draw=20)
        tracemalloc.start()
        census.count(rows, "train", draw=20)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(8000) < peak(1000) * 1.2 + 2**16


def change_bytes(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_rows_and_another_tokenizer_are_refused(tmp_path, folder, tokenizer):
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="another tokenizer"):
        write_rows_report(folder, Tokenizer.from_pretrained(tmp_path / "tokenizer"))
    path = write_table(tmp_path / "a.jsonl", [{"text": "One. " * 90}] * 5)
    config = DataConfig(
        rows=str(tmp_path / "rows"), seq_length=64, sources=(SourceConfig(path=path, text="text"),)
    )
    rows = prepare.prepare(config, tokenizer)
    (file,) = rows.glob("train/*.arrow")
    sound = file.read_bytes()
    for at in range(400, len(sound) - 400, len(sound) // 7):
        file.write_bytes(sound)
        change_bytes(file, at)
        with pytest.raises(InputError, match="row file is damaged"):
            write_rows_report(rows, tokenizer)
        assert not (rows / "report").exists()
    file.write_bytes(sound)
    page = write_rows_report(rows, tokenizer)
    assert "No example has an answer" in page.read_text()
    assert "No example has a task." in page.read_text()
    assert {path.name for path in page.parent.glob("*.png")} == {"records.png", "lengths.png"}


def test_blocks_are_the_rows_one_after_another(folder):
    for split in ("train", "validation"):
        for source in open_rows(folder, split):
            rows = [source.columns(row) for row in range(len(source))]
            for joined, column in zip(
                zip(*source.blocks(), strict=True), zip(*rows, strict=True), strict=True
            ):
                assert np.array_equal(np.concatenate(joined), np.concatenate(column), True)


def test_the_command_writes_the_report_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    write_records(tmp_path / "records.jsonl", 60)
    (tmp_path / "run.toml").write_text(
        """out = "out"
steps = 2
tokenizer = "tokenizer"
model = {}
data.rows = "rows"
data.sources = [{ path = "records.jsonl", prompt = "{prompt}", answer = "answer" }]
"""
    )
    page = tmp_path / "rows" / "report" / "report.md"
    assert run(["prepare", "run.toml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: rows/report/report.md"
    first, rows = content(page.parent), content(tmp_path / "rows" / "train")
    assert run(["prepare", "run.toml"]) == 0
    assert content(page.parent) == first
    page.unlink()
    assert run(["prepare", "run.toml"]) == 2
    assert "has no report.md; delete the folder" in capsys.readouterr().err
    for path in page.parent.iterdir():
        path.unlink()
    assert run(["prepare", "run.toml"]) == 0
    assert content(page.parent) == first
    assert content(tmp_path / "rows" / "train") == rows
