"""Examples: the prompt that scoring sees with its answer in place; what is dropped is counted."""

import pytest
from row_files import answers_of, read, write_table

from mlmjax import InputError
from mlmjax.config.data import SourceConfig
from mlmjax.data.reading.examples import Counts, read_examples
from mlmjax.text.prompts import Template
from mlmjax.text.verbalizer import Verbalizer


@pytest.fixture
def source_of(tmp_path):
    def make(rows, prompt, answer="answer", **settings):
        path = write_table(tmp_path / "table.jsonl", rows)
        return SourceConfig(path=path, prompt=prompt, answer=answer, **settings)

    return make


def test_an_instruction_is_the_scored_prompt_with_its_answer(source_of, tokenizer):
    rows = [
        {"definition": "", "input": "Is [CLS] the sky blue? [SEP]", "answer": " yes\n"},
        {"definition": "Add.", "input": "[unused0] 2+2", "answer": "4"},
    ]
    source = source_of(rows, "{definition}\n{input}\nAnswer:", task="answer")
    examples, counts = read(source, tokenizer)
    for row, example in zip(rows, examples, strict=True):
        ids, slot = Template(source.prompt).encode(tokenizer, row, 64)
        (ids[slot],) = tokenizer.encode_plain(" " + row["answer"].strip())
        assert (example.ids.tolist(), example.answer_position) == (ids, slot)
        assert tokenizer.mask_id not in example.ids
        assert example.task == row["answer"]
    assert (counts.records, counts.dropped, counts.shortened) == (2, {}, {})


def test_what_cannot_be_used_is_dropped_and_counted(source_of, tokenizer):
    answers = ("yes", "entailment", "[SEP]", "a [MASK]", " \n")
    rows = [{"input": "fine", "answer": answer} for answer in answers]
    inputs = ("Fill the [MASK] in", "\n ", "word " * 100)
    rows += [{"input": text, "answer": "yes"} for text in inputs]
    examples, counts = read(source_of(rows, "Q: {input}"), tokenizer)
    assert (len(examples), counts.records) == (1, 8)
    dropped = dict.fromkeys(("blank answer", "blank prompt", "prompt too long"), 1)
    assert counts.dropped == dropped | {"answer is not one token": 2, "holds [MASK]": 2}


def test_a_field_named_in_shorten_is_cut_and_counted(source_of, tokenizer):
    rows = [{"input": "start " + "word " * 100 + "end", "answer": "yes"}] * 2
    rows += [{"input": "short", "answer": "yes"}]
    source = source_of(rows, "Q: {input}", shorten={"input": "middle"})
    examples, counts = read(source, tokenizer)
    template = Template(source.prompt, shorten={"input": "middle"})
    for row, example in zip(rows, examples, strict=True):
        ids, slot = template.encode(tokenizer, row, 64)
        ids[slot] = tokenizer.encode_plain(" yes")[0]
        assert example.ids.tolist() == ids
    assert (counts.dropped, counts.shortened) == ({}, {"input": 2})
    # Equal prompts have equal keys, whatever is around them in the file.
    assert examples[0].key == examples[1].key != examples[2].key
    change = {"prompt": "{input} " + "word " * 70}  # Shortening is not enough.
    examples, counts = read(source.model_copy(update=change), tokenizer)
    assert (examples, counts.dropped) == ([], {"prompt too long": 3})


PROMPT = "{text}\n{options}Answer:"
LABELS = ("World news", "Sport", "Business")


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (LABELS, ["Sport", " World news ", 2, "2", 0, 1.0], [1, 0, 2, 2, 0, 1]),
        ({"w": "World", "s": "Sport"}, ["s", "w "], [1, 0]),
        ({"1": "bad", "2": "good", "3": "good"}, [1, "2", 3.0], [0, 1, 1]),
        ({"false": "no", "true": "yes"}, [True, False], [1, 0]),
        (("1", "2"), ["1", "2"], [0, 1]),
    ],
)
def test_a_labelled_row_is_answered_by_its_letter(source_of, tokenizer, labels, values, expected):
    rows = [{"text": f"row {i}", "label": value} for i, value in enumerate(values)]
    source = source_of(rows, PROMPT, "label", labels=labels)
    examples, _ = read(source, tokenizer)
    names = list(source.label_names)
    letters = Verbalizer.letters(names).ids(tokenizer)
    found = [letters.index((example.ids[example.answer_position],)) for example in examples]
    assert found == expected
    ids, slot = Template(PROMPT).encode(tokenizer, {**rows[0], "options": names}, 64)
    assert examples[0].ids.tolist()[:slot] == ids[:slot]


def test_without_options_the_label_is_its_own_answer(source_of, tokenizer):
    rows = [{"text": "fine", "label": 1}, {"text": "fine", "label": "negative"}]
    names = ("negative", "positive")
    source = source_of(rows, "{text} It is", "label", labels=names)
    assert answers_of(read(source, tokenizer)[0], tokenizer) == [" positive", " negative"]


@pytest.mark.parametrize(
    ("labels", "prompt", "message"),
    [
        (("yes", "entailment"), "{text}", r"labels: label 'entailment'.*' entail' \+ 'ment'"),
        (("yes", " "), PROMPT, "blank"),
        ({"0": "yes", "1": "yes"}, PROMPT, "at least two"),
        (("yes", "no"), "{text} [MASK] [MASK]", r"prompt: template"),
    ],
)
def test_labels_and_prompts_are_checked_before_anything_is_read(
    source_of, tmp_path, tokenizer, labels, prompt, message
):
    source = source_of([], prompt, "label", labels=labels, name="mine")
    (tmp_path / "table.jsonl").write_text("not JSON")
    with pytest.raises(InputError, match=r"source mine: .*" + message):
        read_examples(source, tokenizer, 64, Counts())


@pytest.mark.parametrize(
    ("row", "labels", "message"),
    [
        ({"label": 3}, LABELS, "column 'label' is 3; expected one of"),
        ({"label": -1}, LABELS, "column 'label' is -1; expected"),
        ({"label": None}, LABELS, "column 'label' is null; expected"),
        ({"label": [1]}, LABELS, "column 'label' has 1 probabilities"),
        ({"label": 1}, ("1", "2"), "column 'label' is 1, which may be a name or a position"),
        ({"label": 1, "text": " \n"}, LABELS, "text is blank; expected some text"),
        ({"label": 1}, None, "column 'label' is int .1.; expected text; give labels"),
        ({"label": None}, None, "column 'label' is null"),
    ],
)
def test_a_row_that_does_not_fit_is_named(source_of, tokenizer, row, labels, message):
    first = {"text": "fine", "label": labels[0] if labels else "yes"}
    rows = [first, {"text": "x"} | row]
    source = source_of(rows, PROMPT if labels else "{text}", "label", labels=labels)
    with pytest.raises(InputError, match=f"table.jsonl line 2: {message}"):
        read(source, tokenizer)


def test_a_row_with_its_own_options_is_answered_by_a_letter(source_of, tokenizer):
    row = {"question": "2+2?", "options": ["3", "4"], "answer": "B"}
    source = source_of([row], "{question}\n{options}")
    assert answers_of(read(source, tokenizer)[0], tokenizer) == [" B"]
    source = source_of([row | {"options": "3, 4"}], "{question}\n{options}")
    with pytest.raises(InputError, match=r"table.jsonl line 1: field 'options': found one str"):
        read(source, tokenizer)


@pytest.mark.parametrize("cut", ["window", "sentence"])
def test_plain_text_is_cut_into_windows_that_lose_nothing(tmp_path, tokenizer, cut):
    sentences = "This is a sentence of eight tokens. " * 20 + "The end is near."
    texts = ["word " * 100, " ", "short", "[MASK] [SEP] " * 30, sentences]
    path = write_table(tmp_path / "table.jsonl", [{"body": text} for text in texts])
    source = SourceConfig(path=path, text="body", name="mine", cut=cut)
    examples, counts = read(source, tokenizer, 32)
    assert counts.dropped == {"blank text": 1}
    by_document = {}
    for example in examples:
        assert (example.answer_position, example.task) == (-1, "mine")
        first, *inner, last = example.ids.tolist()
        assert (first, last) == (tokenizer.cls_id, tokenizer.sep_id)
        assert len(inner) <= 30
        by_document.setdefault(example.key, []).extend(inner)
    expected = [tokenizer.encode_plain(text) for text in texts if text.strip()]
    assert list(by_document.values()) == expected
    last = [one for one in examples if one.key == examples[-1].key]
    parts = [tokenizer.decode(one.ids[1:-1]).strip() for one in last]
    assert all(part.endswith(".") for part in parts) == (cut == "sentence")


@pytest.mark.data
def test_the_filter_agrees_with_known_answer_tokens(test_data, tokenizer):
    path = test_data / "instruct" / "single_token_instruct.jsonl.zst"
    columns = {"prompt": "{definition}\n{input}", "answer": "target", "task": "target_id"}
    source = SourceConfig(path=str(path), limit=3000, **columns)
    examples, counts = read(source, tokenizer, 4096)
    assert counts.records == len(examples) == 3000
    assert all(one.ids[one.answer_position] == int(one.task) for one in examples)
