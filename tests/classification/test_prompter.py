"""Prompts: orders, rounds, windows, few-shot examples, several labels, labels of many tokens."""

from string import ascii_uppercase

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from labelled_texts import SHORT
from small_models import small_model
from training import write_tokenizer

from mlmjax.classification import rounds
from mlmjax.classification.classifier import Classifier
from mlmjax.classification.context import Shot, Shots, windows_of
from mlmjax.classification.prompter import Prompter, Query
from mlmjax.classification.rounds import in_rounds
from mlmjax.errors import InputError
from mlmjax.scoring.scorers import Scorer
from mlmjax.text.prompts import Template
from mlmjax.text.tokenizer import Tokenizer
from mlmjax.text.verbalizer import Verbalizer, option_names, usable_option_names

TOKENIZER = Tokenizer.from_pretrained()
TEXTS = ["a new goal", "the bank fell", "an old match of the team"]


def small_pair(positions, scale=0.3):
    sizes = {"max_position_embeddings": positions, "num_hidden_layers": 1, "hidden_size": 16}
    return small_model(scale=scale, **sizes), TOKENIZER


@pytest.fixture(scope="module")
def pair():
    return small_pair(512)


def scored(pair, template, rows, labels):
    """Score prompts one by one, by the scorer."""
    letters = option_names(labels, Template(template).names)
    scorer = Scorer(*pair, Template(template), Verbalizer({n: [f" {n}"] for n in letters}))
    return np.exp(scorer.log_probs(rows).astype(np.float64))


def check_shares(probabilities, shape):
    """Check that every label has some of the probability of each text."""
    assert probabilities.shape == shape
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_hundreds_of_labels_are_one_pass():
    labels, pair = [f"t{i}" for i in range(557)], small_pair(8192, 0.02)
    few, many = (Classifier(pair, labels[:count], batch_size=1) for count in (457, 557))
    check_shares(many.predict_proba(["which topic is this?"]), (1, 557))
    assert (many.prompts, few.prompts) == (1, 0)
    assert (many.settings_.names, few.settings_.names) == ("numbers", "letters")
    assert few.asking_.size == 457


def test_more_labels_than_fit_are_scored_in_rounds(pair):
    labels = [f"label number {i}" for i in range(30)]
    classifier = Classifier(pair, labels, template=SHORT, max_length=128)
    probabilities = classifier.predict_proba(TEXTS)
    size = classifier.asking_.size
    assert 2 < size < 30
    assert classifier.prompts == len(TEXTS) * (-(-30 // size) + 1)
    check_shares(probabilities, (3, 30))
    np.testing.assert_allclose(classifier.predict_proba(TEXTS[1:2])[0], probabilities[1], atol=1e-5)


def test_a_tokenizer_of_few_option_names_needs_rounds(noisy_pair):
    """Words that the tokenizer does not know are not option names."""
    assert usable_option_names("letters", noisy_pair[1], 60) == list(ascii_uppercase)
    classifier = Classifier(noisy_pair, [str(i) for i in range(60)], template=SHORT)
    check_shares(classifier.predict_proba(TEXTS), (3, 60))
    assert classifier.asking_.size <= 26
    assert classifier.settings_.names == "letters"


def test_a_tokenizer_without_option_names_is_rejected(pair, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", ["sun", "moon"])
    other = pair[0], Tokenizer.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="no two option names of one token"):
        Classifier(other, ["a", "b"]).predict(["sun"])


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 99))
def test_rounds_are_a_distribution_that_follows_scores(labels, size, seed):
    """With a model whose odds never depend on the other options, rounds find the best option."""
    truth = np.random.default_rng(seed).normal(size=labels) * 3
    asked = []

    def ask(numbers, choices):
        asked.extend(map(len, choices))
        assert list(numbers) == [0] * len(choices)
        scores = [truth[list(choice)] for choice in choices]
        return [score - np.logaddexp.reduce(score) for score in scores]

    choice = tuple(range(labels))
    [found] = in_rounds(ask, [choice], size)
    assert max(asked) <= size
    np.testing.assert_allclose(np.exp(found).sum(), 1)
    assert (np.exp(found) > 0).all()
    if labels <= size:
        np.testing.assert_allclose(found, truth - np.logaddexp.reduce(truth))
    groups = rounds._cut(choice, size)
    for group in groups:  # inside a group that had only one round, odds are the model's
        pairs = [(i, j) for i in group for j in group if truth[i] > truth[j]]
        assert all(found[i] > found[j] for i, j in pairs)


def test_orders_are_averaged_over_cyclic_shifts(pair):
    labels = ["sports", "money", "rain"]
    plain = Classifier(pair, labels, template=SHORT).predict_proba(TEXTS)
    every = Classifier(pair, labels, template=SHORT, orders="all")
    expected = np.zeros_like(plain)
    for shift in range(3):
        order = [(j + shift) % 3 for j in range(3)]
        rows = [{"text": t, "options": [labels[i] for i in order]} for t in TEXTS]
        expected[:, order] += scored(pair, SHORT, rows, 3) / 3
    np.testing.assert_allclose(every.predict_proba(TEXTS), expected, atol=1e-5)
    assert every.prompts == 9
    assert np.abs(plain - expected).max() > 1e-3
    # Averaged over all orders, only names that an option never had could tell the given one.
    moved = Classifier(pair, labels[1:] + labels[:1], template=SHORT, orders="all")
    np.testing.assert_allclose(
        moved.predict_proba(TEXTS), every.predict_proba(TEXTS)[:, [1, 2, 0]], atol=1e-5
    )


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1, max_size=400), st.integers(2, 40))
@example("0" * 25, 2)
def test_windows_hold_the_whole_text_and_fit(text, room):
    windows = windows_of(TOKENIZER, text, room)
    end = 0  # of the text held so far, white space after it included
    for window in windows:
        end += len(text[end:]) - len(text[end:].lstrip())
        # Equal windows of a text that repeats itself: the last place that leaves nothing out.
        start = text.rfind(window, 0, end + len(window))
        assert start >= 0
        end = max(end, start + len(window))
    assert not text[end:].strip()
    # One character can be several tokens, and is never cut.
    assert all(
        len(TOKENIZER.encode_plain(window)) <= room or len(window) <= 2 for window in windows
    )


def test_windows_are_equally_wide_and_overlap():
    text = " ".join(f"word{i}" for i in range(300))
    windows = windows_of(TOKENIZER, text, 40)
    assert min(len(TOKENIZER.encode_plain(window)) for window in windows) > 30
    starts = [text.index(window) for window in windows]
    ends = [start + len(window) for start, window in zip(starts, windows, strict=True)]
    assert all(start < end for start, end in zip(starts[1:], ends, strict=False))


def test_windows_that_are_blank_or_of_a_field_that_is_used_twice(pair):
    options = {"long_text": "mean", "max_length": 64}
    classifier = Classifier(pair, ["a", "b"], template="{text} {options}", **options)
    assert classifier.predict_proba(["goal" + " " * 4000 + "won"]).shape == (1, 2)
    twice = Classifier(pair, ["a", "b"], template="{text}{text}{options}", **options)
    twice.predict_proba(["goal", "rain " * 500])
    assert twice.shortened == 0


def test_three_labels_need_rounds_if_two_fit(pair):
    labels = [f"{name} " + "word " * 45 for name in "abc"]
    classifier = Classifier(pair, labels, template=SHORT, max_length=160)
    check_shares(classifier.predict_proba(["goal"]), (1, 3))
    assert classifier.prompts == 3  # of two labels, of one, and of the better two


@pytest.mark.parametrize("rule", ["mean", "max"])
def test_long_texts_are_scored_in_windows(pair, rule):
    text = " ".join(f"goal {i} match" for i in range(300))
    labels = ["sports", "money"]
    classifier = Classifier(pair, labels, template=SHORT, long_text=rule, max_length=128)
    found = classifier.predict_proba([text, "goal"])
    template = classifier.asking_.scorer.template
    fixed = template.length(pair[1], {"text": "", "options": labels})
    windows = windows_of(pair[1], text, 128 - 2 - fixed)
    assert classifier.prompts == len(windows) + 1 > 5
    assert classifier.shortened == 0
    rows = [{"text": text, "options": labels} for text in (*windows, "goal")]
    *each, short = scored(pair, SHORT, rows, 2)
    pooled = np.mean(each, axis=0) if rule == "mean" else np.max(each, axis=0)
    np.testing.assert_allclose(found, [pooled / pooled.sum(), short], atol=1e-5)


def test_prompts_show_examples_by_turns_as_many_as_fit(pair):
    pool = [("goal one", "sports"), ("goal two", "sports")]
    pool += [("bank one", "money"), ("x " * 400, "money")]
    labels = ["money", "sports"]
    classifier = Classifier(pair, labels, examples=pool, max_length=160, orders="all")
    probabilities = classifier.predict_proba(["a match"])
    assert classifier.examples_shown == {3: 2}
    rows = [row for _, row in classifier.asking_.rows(Query("a match", (0, 1)))]
    blocks = "".join(
        f"TEXT:\n{text}\nAnswer: {{{letter}}}\n\n"
        for text, letter in (("goal one", 0), ("bank one", 1), ("goal two", 0))
    )
    # The letters in the examples are those of the prompt's order.
    assert [row["examples"] for row in rows] == [blocks.format("B", "A"), blocks.format("A", "B")]
    template = classifier.asking_.scorer.template
    assert template.text.index("{options}") < template.text.index("{examples}")
    expected = scored(pair, template.text, rows, 2)
    np.testing.assert_allclose(probabilities[0], (expected[0] + expected[1][::-1]) / 2, atol=1e-5)


def test_examples_name_labels_or_say_yes_and_no(pair):
    def shown(labels, examples, choice=(0, 1), **options):
        prompter = Classifier.from_pretrained(pair, labels, examples=examples, **options).asking_
        query = Query("a match", choice) if choice else prompter.queries("a match")[1]
        ((_, row),) = prompter.rows(query)
        return [line for line in row["examples"].splitlines() if "Answer" in line]

    labels, pool = ["money", "sports"], [("goal one", "sports"), ("bank one", "money")]
    assert shown(labels, pool, answer="words") == ["Answer: sports", "Answer: money"]
    # About the label sports the first example says yes (A), the second no (B).
    pool = [("goal one", ["sports"]), ("bank one", [])]
    assert shown(labels, pool, None, multi_label=True) == ["Answer: A", "Answer: B"]
    # An example whose label is not among the options of a round is left out.
    assert shown([*labels, "rain"], [("x", "rain")]) == []


def test_labels_are_the_answers_of_a_prompt_without_options(pair):
    template, labels = "{text} is [unused0] [MASK]", ["sports", "money"]
    scorer = Scorer(*pair, Template(template), Verbalizer.words(labels))
    expected = np.exp(scorer.log_probs([{"text": text} for text in TEXTS]))
    found = Classifier(pair, labels, template=template).predict_proba(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_long_text_comes_before_examples(pair):
    pool = [("goal one", "sports"), ("bank one", "money")]
    classifier = Classifier(pair, ["money", "sports"], examples=pool, max_length=128)
    classifier.predict_proba(["word " * 30, "word " * 500])
    assert classifier.examples_shown[0] >= 1
    assert classifier.shortened == 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=30), st.sampled_from("abc"))),
    st.integers(0, 120),
)
def test_examples_never_take_more_than_their_room(pool, room):
    pool = [Shot(text=text, labels=(label,)) for text, label in pool]
    shots = Shots(pool, TOKENIZER)
    text = shots.fill(room, lambda shot: shot.labels[0])
    assert not text or len(TOKENIZER.encode_plain(text)) <= room


def test_several_labels_are_questions_of_yes_or_no(pair):
    labels = {"sports": "games", "money": "", "rain": ""}
    classifier = Classifier(pair, labels, multi_label=True, orders="all")
    found = classifier.predict_proba(TEXTS[:2])
    assert classifier.prompts == 2 * 3 * 2
    rows = [
        {"text": text, "label": label, "options": options}
        for options in (["yes", "no"], ["no", "yes"])
        for text in TEXTS[:2]
        for label in ("sports: games", "money", "rain")
    ]
    straight, turned = scored(pair, classifier.settings_.template, rows, 2).reshape(2, 2, 3, 2)
    np.testing.assert_allclose(found, (straight[..., 0] + turned[..., 1]) / 2, atol=1e-5)
    assert classifier.predict(TEXTS[:2]).tolist() == (found >= 0.5).astype(int).tolist()


def test_answers_are_objects_without_a_label_when_unsure(pair):
    plain = Classifier(pair, ["sports", "money"], template=SHORT)
    probabilities = plain.predict_proba(TEXTS)
    for answer, row in zip(plain.answers(iter(TEXTS)), probabilities, strict=True):
        assert list(answer) == ["label", "probability", "probabilities"]
        assert answer["label"] == ["sports", "money"][row.argmax()]
        np.testing.assert_allclose(list(answer["probabilities"].values()), row, atol=1e-6)
    limit = float(np.sort(probabilities.max(axis=1))[1])
    unsure = Classifier(pair, ["sports", "money"], template=SHORT, abstain_below=limit)
    assert [answer["label"] is None for answer in unsure.answers(TEXTS)].count(True) == 1
    several = Classifier(pair, ["sports", "money"], multi_label=True)
    for answer, row in zip(several.answers(TEXTS), several.predict(TEXTS), strict=True):
        assert answer["labels"] == [n for n, on in zip(["sports", "money"], row, strict=True) if on]


def test_several_labels_are_learned_as_yes_and_no(pair, tokenizer, noisy_pair):
    truth, texts = [["money"], [], ["money", "sports"]], ["the bank", "the old", "goal bank"]
    classifier = Classifier(pair, ["sports", "money"], multi_label=True, orders=2)
    flags = [(False, True), (False, False), (True, True)]
    prompter = Prompter(classifier._read()[0], *pair)
    prompts, columns, *_ = prompter.examples(range(3), texts, flags, seed=0)
    found = []
    for prompt, column in zip(prompts, columns, strict=True):
        lines = tokenizer.decode(prompt.ids).splitlines()
        answer = next(line for line in lines if line.startswith(f"- {'AB'[column]}: "))
        label, text = (lines[lines.index(name) + 1] for name in ("LABEL:", "TEXT:"))
        found.append((text, label, answer[5:]))
    expected = [
        (text, name, "yes" if name in row else "no")
        for text, row in zip(texts, truth, strict=True)
        for name in ("sports", "money")
    ]
    assert found == expected
    yes = [column for column, (_, _, answer) in zip(columns, found, strict=True) if answer == "yes"]
    assert set(yes) == {0, 1}  # both orders of the options are trained on
    options = {"multi_label": True, "orders": 2, "template": f"LABEL:\n{{label}}\nTEXT:\n{SHORT}"}
    classifier = Classifier(noisy_pair, ["sports", "money"], **options)
    before = classifier.predict_proba(texts)
    classifier.fit(texts * 8, truth * 8, epochs=2, learning_rate=1e-2, batch_size=16)
    assert np.abs(classifier.predict_proba(texts) - before).max() > 1e-3
    assert classifier.history_[1]["loss"] < classifier.history_[0]["loss"]
    assert classifier.score(texts, truth) == classifier.score(texts, np.array(flags))


def test_labels_of_many_tokens_by_pseudo_log_likelihood(pair, tokenizer):
    """Equal to masking and summing by hand."""
    labels = ["sports", "untokenizable weather reports", "rain fall"]
    template = "{text} is about [unused0] [MASK] ."
    classifier = Classifier(pair, labels, answer="continuation", template=template)
    found = classifier.predict_proba(TEXTS[:2])
    call = jax.jit(pair[0].__call__)
    for row, text in zip(found, TEXTS, strict=False):
        ids, slot = Template(template).encode(tokenizer, {"text": text}, 500)
        scores = []
        for label in labels:
            tokens = tokenizer.encode_plain(f" {label}")
            words = label.split()
            ends = np.cumsum([len(tokenizer.encode_plain(f" {word}")) for word in words])
            assert ends[-1] == len(tokens)
            total = 0.0
            for at, token in enumerate(tokens):
                stop = next(end for end in ends if end > at)
                masked = [*tokens[:at], *[tokenizer.mask_id] * (stop - at), *tokens[stop:]]
                whole = [*ids[:slot], *masked, *ids[slot + 1 :]]
                padded = np.array([whole + [tokenizer.pad_id] * (48 - len(whole))])
                logits = call(padded, np.arange(48)[None] < len(whole))[0, slot + at]
                logits = np.asarray(logits, np.float64)
                total += logits[token] - np.logaddexp.reduce(logits)
            scores.append(total)
        np.testing.assert_allclose(row, np.exp(scores - np.logaddexp.reduce(scores)), atol=1e-5)


def test_a_continuation_leaves_room_for_its_longest_label(pair):
    labels = ["a", "many words " * 20]
    classifier = Classifier(pair, labels, answer="continuation", max_length=96)
    assert np.isfinite(classifier.predict_proba(["goal " * 400])).all()
    assert classifier.shortened == 1
    with pytest.raises(InputError, match="has 201 tokens"):
        Classifier(pair, ["a", "w " * 200], answer="continuation", max_length=64).predict(["x"])
    with pytest.raises(InputError, match="fit with answer='letters'"):
        classifier.fit(["x", "y"], ["a", "many words " * 20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": [("x", None)], "multi_label": True}, "example 1: its labels are None"),
        ({"examples": [("x", 3)], "multi_label": True}, "example 1: its labels are 3"),
        ({"examples": [("x", [None])], "multi_label": True}, "example 1: label is NoneType"),
        ({"examples": [("x", None)]}, "example 1: label is NoneType"),
        ({"examples": [("x", "c")]}, "example 1: label 'c' is not one of a, b"),
        ({"examples": ["x"]}, "example 1: is 'x'; expected a pair"),
        ({"examples": [("x", "a"), (" ", "a")]}, "example 2: text is blank"),
        ({"examples": [("x", "a")], "template": SHORT}, "has no {examples}"),
        ({"orders": 0}, "orders"),
        ({"orders": 2, "answer": "words"}, "not letters of options"),
        ({"long_text": "first"}, "long_text"),
        ({"instruction": "Say.", "template": SHORT}, "write the instruction into it"),
        ({"multi_label": True, "head": "classification"}, "leave out answer and head"),
        ({"multi_label": True, "template": SHORT}, "its fields are text, options"),
        ({"template": "hello {foo}"}, r"template: its fields are foo; expected \{text\}"),
        ({"template": Template("{title}")}, "its fields are title"),
        ({"head": "classification"}, "call fit"),
        ({"abstain_below": 2.0}, "abstain_below"),
        ({"answer": "phrase"}, "answer"),
        ({"batch_size": 1.5}, r"batch_size is 1\.5"),
        ({"batch_size": 10**9}, "at most 65536"),
        ({"examples": 5}, "examples: found one int"),
        ({"labels": {"a", "b"}}, "is a set, which has no order"),
        ({"labels": [f"{i} " + "word " * 300 for i in range(600)]}, "no two of the 600 labels fit"),
        ({"labels": ["one"]}, "found one; expected at least two"),
        ({"labels": []}, "found none"),
        ({"labels": ["a", "a"]}, "'a' appears twice"),
        ({"labels": ["a", "b", "a "]}, "'a' and 'a ' differ only in white space at their ends"),
        ({"labels": ["a", " "]}, "' ' is blank"),
        ({"labels": ["a", 1]}, "is int"),
        ({"labels": ["a", "b\0"]}, "ends in a NUL character"),
        ({"labels": "ab"}, "labels: found one str"),
        ({"labels": {"a": "x"}}, "found a; expected at least two"),
        ({"labels": {"a": "x", "b": None}}, "the description of 'b' is NoneType"),
        ({"labels": None}, "has no labels"),
        ({"labels": ["\u00e9", "e\u0301"], "answer": "continuation"}, "are the same tokens"),
        ({"source": 5}, "expected a folder, a hub id, or a pair"),
    ],
)
def test_bad_settings_and_labels_are_rejected(pair, options, message):
    with pytest.raises(InputError, match=message):
        Classifier(**{"source": pair, "labels": ["a", "b"]} | options).predict(["text"])


def test_an_instruction_may_hold_braces(pair):
    instruction = "Use {curly} [MASK-free] words."
    classifier = Classifier.from_pretrained(pair, ["a", "b"], instruction=instruction)
    assert "{{curly}}" in classifier.settings_.template
    prompts, *_ = classifier.asking_.examples([0], ["x"], [0], seed=0)
    assert TOKENIZER.decode(prompts[0].ids[1:-1]).startswith(instruction)


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        ({"labels": ["sports", "money"]}, "words", "each label is one token"),
        ({"labels": ["sports", "two words"]}, "letters", "not every label is one token"),
        ({"labels": {"sports": "games", "money": ""}}, "letters", "the descriptions of labels"),
        ({"labels": ["sports", "money"], "orders": 2}, "letters", "have orders"),
        ({"labels": ["sports", "money"], "multi_label": True}, "letters", "is asked yes or no"),
        (
            {"labels": ["sports", "money"], "answer": "letters"},
            "letters",
            "the arguments, the prompt",
        ),
        (
            {"labels": ["sports", "money"], "template": SHORT},
            "letters",
            "the arguments, the prompt",
        ),
        (
            {"labels": ["sports", "money"], "template": "{text}"},
            "words",
            "the arguments, the prompt",
        ),
    ],
)
def test_the_way_to_answer_is_chosen_kept_and_explained(pair, tmp_path, options, answer, reason):
    classifier = Classifier(pair, **options)
    assert classifier.answer_ == answer
    assert reason in classifier.answer_reason_
    classifier.save_pretrained(tmp_path / "saved")
    card = " ".join((tmp_path / "saved" / "README.md").read_text().split())
    shown = {"words": "with the label itself.", "letters": "by its letter or number."}[answer]
    assert f"{shown} The reason: {classifier.answer_reason_}." in card
    restored = Classifier.from_pretrained(tmp_path / "saved")
    assert (restored.answer_, restored.answer_reason_) == (answer, classifier.answer_reason_)
    # Other labels are a new choice, unless the prompt decides.
    if options.get("template") != "{text}":
        other = Classifier.from_pretrained(tmp_path / "saved", ["goal", "two words"])
        assert other.answer_ == "letters"
