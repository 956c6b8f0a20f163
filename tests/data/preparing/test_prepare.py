"""Preparing: nothing lost, nothing doubled, sets within sets, and no damaged rows are read."""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_files import change, change_source, make_rows, read, stored, two_sources, write_table

from mlmjax import InputError
from mlmjax.config.data import DataConfig, SourceConfig
from mlmjax.data.manifest import read_manifest
from mlmjax.data.preparing.prepare import prepare, summary
from mlmjax.data.rows import open_rows


@pytest.fixture
def config(tmp_path):
    return two_sources(tmp_path)


def prepared(config, tokenizer, **options):
    folder = prepare(config, tokenizer, **options)
    return folder, read_manifest(folder)


def facts(folder, split):
    return [
        (source.name, tuple(one.ids.tolist()), one.answer_position, one.task)
        for source, one in stored(folder, split)
    ]


def test_every_example_is_on_disk_once_in_one_split(config, tokenizer):
    folder, manifest = prepared(config, tokenizer)
    expected, keys = Counter(), {}
    for source in config.sources:
        for one in read(source, tokenizer)[0]:
            task = manifest.tasks.index(one.task)
            example = (source.name, tuple(one.ids.tolist()), one.answer_position, task)
            expected[example] += 1
            keys[example] = one.key
    train, validation = facts(folder, "train"), facts(folder, "validation")
    assert Counter(train) + Counter(validation) == expected
    # Equal prompts (and the windows of one document) are on one side.
    assert not {keys[e] for e in train} & {keys[e] for e in validation}
    assert len({keys[e] for e in train}) < len(train)

    rows = {split: sum(map(len, open_rows(folder, split))) for split in manifest.splits}
    assert 8 <= rows["validation"] <= 16
    assert rows["train"] > 60


def test_the_manifest_counts_what_is_there(config, tokenizer):
    calls = []
    folder, manifest = prepared(config, tokenizer, progress=lambda *read: calls.append(read))
    assert calls[-2:] == [("qa", 300), ("text", 20)]
    qa, text = manifest.sources
    assert (qa.records, qa.examples) == (300, 180)
    assert qa.dropped == {"answer is not one token": 60, "blank answer": 60}
    assert qa.files[0].bytes == os.path.getsize(config.sources[0].path)
    assert manifest.tasks == ["task0", "task1", "task2", "text"]
    assert (text.records, text.dropped) == (20, {})
    for split, files in manifest.splits.items():
        for file, source in zip(files, open_rows(folder, split), strict=True):
            rows = [[len(example) for example in source[i]] for i in range(len(source))]
            assert (file.rows, file.examples) == (len(rows), sum(map(len, rows)))
            assert file.tokens == sum(map(sum, rows))
            assert file.examples == sum(file.examples_per_task.values())
            assert file.padding_share == pytest.approx(1 - file.tokens / (64 * len(rows)))
            assert file.max_examples_per_row == max(map(len, rows)) == source.max_examples_per_row
            assert max(map(sum, rows)) <= 64
            assert source.text == (file.name == "text")
    indices = [example.index for _, example in stored(folder, "train")]
    assert sorted(indices) == list(range(len(indices)))
    lines = summary(manifest)
    assert "qa: 300 records, 180 examples, 60 dropped (answer is not one token)" in lines[0]
    assert lines[-1].startswith("validation: ")
    with pytest.raises(InputError, match="has no split 'test'; its splits: train, validation"):
        open_rows(folder, "test")


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(st.text("ab \n[MASK]", max_size=30).filter(str.strip), min_size=1, max_size=40),
    seq_length=st.sampled_from([24, 40]),
    pack=st.booleans(),
)
def test_no_token_is_lost_doubled_or_moved(tmp_path_factory, tokenizer, words, seq_length, pack):
    folder = tmp_path_factory.mktemp("property")
    path = write_table(folder / "t.jsonl", [{"text": text} for text in words])
    source = SourceConfig(path=path, text="text", name="t")
    settings = {"rows": str(folder / "rows"), "seq_length": seq_length, "pack": pack}
    rows = prepare(DataConfig(**settings, sources=(source,)), tokenizer)
    found = Counter(ids for _, ids, _, _ in facts(rows, "train"))
    expected = Counter(tuple(one.ids.tolist()) for one in read(source, tokenizer, seq_length)[0])
    assert found == expected
    if not pack:
        (only,) = open_rows(rows, "train")
        assert len(only) == expected.total()
        assert only.max_examples_per_row == 1


def test_validation_sources_are_packed_by_themselves(config, tokenizer, tmp_path):
    path = write_table(tmp_path / "v.jsonl", make_rows(50, salt=9))
    held = SourceConfig(path=path, prompt="{input}", answer="answer", name="held")
    config = change(config, validation_rows=0, validation_sources=(held,))
    folder, manifest = prepared(config, tokenizer)
    assert [file.name for file in manifest.splits["validation"]] == ["held"]
    assert [report.examples for report in manifest.validation_sources] == [30]
    assert len(stored(folder, "validation")) == 30
    assert len(stored(folder, "train")) == sum(r.examples for r in manifest.sources)


def test_without_packing_a_row_is_an_example(config, tokenizer):
    _, manifest = prepared(change(config, pack=False), tokenizer)
    train, validation = manifest.splits.values()
    assert all(file.rows == file.examples for file in (*train, *validation))
    # A few more than 8, because equal prompts and the windows of a document go together.
    assert 8 <= sum(file.rows for file in validation) <= 20


def test_one_document_cannot_be_held_out(config, tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("some words of one document\n" * 200)
    source = {"path": str(tmp_path / "one.txt"), "text": "text"}
    table = config.model_dump(mode="json") | {"sources": [source], "validation_rows": 1}
    with pytest.raises(InputError, match=r"every document \(1\); set data\.validation_rows = 0"):
        prepare(DataConfig.from_dict(table), tokenizer)


def test_a_bad_last_source_is_found_before_the_first_is_read(config, tokenizer):
    bad = SourceConfig(path="nowhere*.csv", text="text")
    calls, config = [], change(config, sources=(*config.sources, bad))
    with pytest.raises(InputError, match="no file matches"):
        prepare(config, tokenizer, lambda *read: calls.append(read))
    assert calls == []


def tasks_of(folder, level):
    there = stored(folder, "train", level=level)
    return Counter(example.task for source, example in there if source.name == "qa")


def test_the_smaller_set_is_part_of_the_larger_and_of_the_same_rows(config, tokenizer):
    config = change(config, validation_rows=2, select={"sizes": (60, 120), "answer_share": 0.5})
    folder, manifest = prepared(config, tokenizer)
    assert [one.asked for one in manifest.selection.sets] == [60, 120]
    held_out = sum(f.examples for f in manifest.splits["validation"] if not f.text)
    sizes = []
    for level, one in enumerate(manifest.selection.sets):
        tasks = tasks_of(folder, level)
        sizes.append(tasks.total())
        assert one.asked <= one.examples <= one.asked + 10
        assert one.examples - held_out <= tasks.total() <= one.examples
        assert max(tasks.values()) <= one.per_task + 5
    assert sizes[0] < sizes[1]
    chosen = manifest.selection
    left_out = chosen.unbalanced + chosen.capped
    assert manifest.sources[0].examples - left_out == chosen.sets[-1].examples
    lines = "\n".join(summary(manifest))
    assert lines.count("selected: ") == 2
    assert f"left out: {chosen.unbalanced} by select.answer_share" in lines


def test_caps_hold_for_equal_prompts_and_the_report_is_true(config, tokenizer, tmp_path):
    same, other = {"input": "the same", "task": "same"}, {"answer": "yes", "task": "other"}
    rows = [same | {"answer": "yes" if i % 10 else "no"} for i in range(600)]
    rows += [other | {"input": f"another {i}"} for i in range(300)]
    path = write_table(tmp_path / "equal.jsonl", rows)
    select = {"sizes": (40, 70), "per_task": 50, "answer_share": 0.6}
    config = change(change_source(config, path=path), validation_rows=0, select=select)
    folder, manifest = prepared(config, tokenizer)
    reported = [(one.examples, one.per_task) for one in manifest.selection.sets]
    assert reported == [(40, 20), (70, 35)]
    assert [set(tasks_of(folder, level).values()) for level in (0, 1)] == [{20}, {35}]
    assert (manifest.selection.unbalanced, manifest.selection.capped) == (450, 380)


def test_classes_and_values_are_selected_too(config, tokenizer, tmp_path):
    rows = [{"input": f"text {i}", "answer": str(int(i % 10 == 0))} for i in range(200)]
    path = write_table(tmp_path / "classes.jsonl", rows)
    for labels, count in ((("0", "1"), 50), (None, 60)):
        names = labels and {"0": "zero", "1": "one"}
        source = SourceConfig(path=path, prompt="{input}", answer="answer", labels=names)
        kept = {"select": {"per_task": 60, "answer_share": 0.6}, "validation_rows": 0}
        rows = str(tmp_path / f"rows-{count}")
        one = change(config, rows=rows, sources=(source,), pack=False, **kept)
        _, manifest = prepared(one, tokenizer, head="classification")
        assert manifest.splits["train"][0].examples == count
        assert manifest.selection.sets[0].examples == count
