"""Deciders: equal answers whatever else is asked, fitting, calibrating, saving."""

import json
import warnings

import numpy as np
import pytest
from labelled_texts import WORDS, examples
from small_models import noisy
from texts import SCRIPTS

from mlmjax import Choice, Classifier, Decider, InputError, Score, YesNo
from mlmjax.classification.fitting import LearnedNothingWarning
from mlmjax.decisions.answers import answer_json
from mlmjax.decisions.states import as_state
from mlmjax.statistics import option_orders
from mlmjax.storage import DECIDER
from mlmjax.weights import convert

STATE = {"subject": "Billed twice", "body": "Refund the duplicate today or we cancel."}
QUESTIONS = {
    "team": Choice("Which team?", {"billing": "invoices", "support": None}),
    "churn": YesNo("Does the customer threaten to leave?"),
    "urgency": Score("How urgent is it?", ["can wait", "this week", "today"]),
    "many": Choice("Which one?", [f"name {i}" for i in range(90)]),
}
FAST = {"epochs": 8, "learning_rate": 1e-2, "batch_size": 16}


@pytest.fixture(scope="module")
def answers(decider):
    return decider.decide(STATE, QUESTIONS)


def test_answers_have_what_the_protocol_says(answers):
    team, churn, urgency = (answers[key] for key in ("team", "churn", "urgency"))
    assert list(team.probabilities) == ["billing", "support"]
    assert sum(team.probabilities.values()) == pytest.approx(1, abs=1e-9)
    assert team.choice == max(team.probabilities, key=team.probabilities.get)
    assert 0 <= churn.probability <= 1
    assert urgency.score == pytest.approx(sum(i * p for i, p in enumerate(urgency.probabilities)))
    assert urgency.level == int(np.argmax(urgency.probabilities))
    assert all(0 <= one.confidence <= 1 and one.tokens > 20 for one in answers.values())
    shown = json.loads(json.dumps(answer_json(urgency)))
    assert shown["legend"] == {"0": "can wait", "1": "this week", "2": "today"}
    assert set(shown) == {"type", "score", "legend", "probabilities", "confidence"}


def others(count):
    """Return more questions, of other lengths and numbers of options."""
    return {
        f"other {i}": Choice("Is it so? " * (1 + i % 5), [f"o{i}{j}" for j in range(2 + i % 9)])
        for i in range(count)
    }


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        *[({"alone": QUESTIONS[key]}, {"alone": key}) for key in QUESTIONS],
        ({**others(20), **QUESTIONS}, {key: key for key in QUESTIONS}),
        ({f"{key} 🙂": one for key, one in QUESTIONS.items()}, {f"{k} 🙂": k for k in QUESTIONS}),
        (dict(reversed(QUESTIONS.items())), {key: key for key in QUESTIONS}),
    ],
)
def test_an_answer_does_not_depend_on_what_else_is_asked(decider, answers, asked, names):
    found = decider.decide(STATE, asked)
    assert list(found) == list(asked)
    for name, key in names.items():
        assert found[name] == answers[key]  # to the last bit


def test_many_states_are_answered_as_each_alone(decider, answers):
    states = ["a text " * 60, STATE, "", [1, 2], STATE]
    found = list(decider.decide_many(iter(states), QUESTIONS))
    assert found[1] == found[4] == answers
    assert found[0] == decider.decide(states[0], QUESTIONS)
    assert found[0]["team"].shortened > 0
    assert found[2]["team"].shortened == 0


def test_names_in_ten_scripts_come_back_unchanged(decider):
    asked = {name: Choice(name, SCRIPTS) for name in SCRIPTS}
    found = decider.decide("text", asked)
    assert list(found) == SCRIPTS
    assert all(list(one.probabilities) == SCRIPTS for one in found.values())


def test_the_most_options_levels_and_orders(decider, tokenizer):
    most = {
        "choice": Choice("", [f"option {i}" for i in range(255)]),
        "score": Score("How?", [f"level {i}" for i in range(10)]),
    }
    found = decider.decide("text", most)
    assert sum(found["choice"].probabilities.values()) == pytest.approx(1)
    assert len(found["score"].probabilities) == 10
    shuffled = Decider((decider.model, tokenizer), orders="all")
    one = Choice("Which?", ["a", "b", "c"])
    forth = shuffled.decide("text", {"q": one})["q"].probabilities
    back = shuffled.decide("text", {"q": Choice("Which?", ["b", "c", "a"])})["q"].probabilities
    assert forth == pytest.approx(back, abs=1e-6)
    windows = Decider((decider.model, tokenizer), long_text="mean").decide(
        "word " * 400, {"q": one}
    )
    assert windows["q"].shortened == 0


def test_errors_name_the_row_and_the_question(decider):
    with pytest.raises(InputError, match=r"row 2 \(index 1\): state: is int"):
        list(decider.decide_many(["a", 3], QUESTIONS))
    with pytest.raises(InputError, match="question 'long': the prompt has"):
        decider.decide("a", {"long": YesNo("why " * 300)})
    with pytest.raises(InputError, match="expected a list of states"):
        list(decider.decide_many("text", QUESTIONS))


def labelled(count, seed):
    """Return texts that one word decides, questions of three types, and answers with gaps."""
    texts, labels = examples(count, seed)
    asked = {
        "topic": Choice("text", list(WORDS)),
        "sports": YesNo("sports"),
        "level": Score("price", list(WORDS)),
    }
    right = [
        {"topic": label, "sports": label == "sports", "level": list(WORDS).index(label)}
        for label in labels
    ]
    gaps = [
        {k: v for n, (k, v) in enumerate(one.items()) if (i + n) % 5} for i, one in enumerate(right)
    ]
    return texts, asked, right, gaps


def accuracy(decider, texts, asked, right):
    found = list(decider.decide_many(texts, asked))
    hits = [
        (
            a["topic"].choice == b["topic"],
            (a["sports"].probability > 0.5) == b["sports"],
            a["level"].level == b["level"],
        )
        for a, b in zip(found, right, strict=True)
    ]
    return np.mean(hits, axis=0)


@pytest.mark.parametrize("way", ["letters", pytest.param("words", marks=pytest.mark.long)])
def test_one_model_learns_all_types_from_answers_with_gaps(word_pair, tmp_path, way):
    texts, asked, _, gaps = labelled(160, seed=1)
    decider = Decider(word_pair, answer=way)
    decider.fit(texts, asked, gaps, validation_share=0.1, **FAST)
    test = labelled(40, seed=2)
    assert (accuracy(decider, test[0], asked, test[2]) >= 0.9).all()
    assert decider.history_[-1]["loss"] < decider.history_[0]["loss"]
    assert decider.history_[-1]["validation_accuracy"] > 0.9
    decider.save_pretrained(tmp_path / "saved")
    again = Decider.from_pretrained(tmp_path / "saved")
    assert again.settings == decider.settings
    assert again.decide(texts[0], asked) == decider.decide(texts[0], asked)


def test_what_cannot_be_held_out_is_an_error(word_pair):
    asked = {"topic": Choice("text", list(WORDS))}
    right = [{"topic": name} for name in WORDS]
    with pytest.raises(InputError, match="no answer is there twice to hold one out"):
        Decider(word_pair).fit(["a goal", "a bank"], asked, right, validation_share=0.5, patience=1)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"normalize": "labels"}, marks=pytest.mark.long),
        {"ordered": True},
    ],
)
def test_a_fit_learns_distributions(word_pair, recipe):
    """The answers to each question go to the distributions that were given."""
    texts, asked, right, _ = labelled(160, seed=5)
    shares = {"sports": 0.9, "money": 0.3}
    soft = [
        {
            "topic": {"sports": shares[one["topic"]], "money": 1 - shares[one["topic"]]},
            "sports": {True: shares[one["topic"]], False: 1 - shares[one["topic"]]},
            "level": [shares[one["topic"]], 1 - shares[one["topic"]]],
        }
        for one in right
    ]
    if "ordered" in recipe:
        with pytest.raises(InputError, match="ordered is for levels, and there is a choice"):
            Decider(word_pair).fit(texts, asked, soft, **FAST, **recipe)
        asked, soft = {"level": asked["level"]}, [{"level": one["level"]} for one in soft]
    decider = Decider(word_pair)
    decider.fit(texts, asked, soft, **FAST, **recipe)
    wanted = [shares[one["topic"]] for one in right]
    found = list(decider.decide_many(texts, asked))
    first = {
        "topic": lambda one: one.probabilities["sports"],
        "sports": lambda one: one.probability,
        "level": lambda one: one.probabilities[0],
    }
    for key in asked:
        share = [first[key](one[key]) for one in found]
        assert np.abs(np.array(share) - wanted).mean() < 0.1
    with pytest.raises(InputError, match="the answer is a distribution; expected one right answer"):
        decider.conform(texts, asked, soft)
    decider.calibrate(texts, asked, soft)
    assert 0.5 < decider.calibrations["score/2"].temperature < 2  # little is left to mend


def test_other_orders_of_options_are_those_of_other_questions(decider):
    letters = ["a", "b", "c", "d", "e"]
    states = ["some text", {"key": "value"}]
    scores = decider.in_orders(states, Choice("Which?", letters), 4)
    assert scores.shape == (2, 4, 5)
    for state, found in zip(states, scores, strict=True):
        for place, shift in enumerate(option_orders.shifts(5, 4)):
            turned = Choice("Which?", letters[shift:] + letters[:shift])
            probabilities = decider.decide(state, {"q": turned})["q"].probabilities
            expected = [probabilities[name] for name in letters]
            assert np.exp(found[place]) == pytest.approx(expected, rel=1e-5)
    assert decider.in_orders(states, QUESTIONS["many"], 4) is None  # in rounds
    all_orders = Decider((decider.model, decider.tokenizer), orders="all")
    assert all_orders.in_orders(states, YesNo("Is it?"), 4) is None


def test_calibration_is_by_kind_and_saved(word_decider, tmp_path):
    texts, asked, right, _ = labelled(60, seed=3)
    decider = word_decider.calibrate(texts, asked, right)
    assert set(decider.calibrations) == {"choice/2", "noul/2", "score/2"}
    plain = Decider((decider.model, decider.tokenizer))
    before, after = plain.decide(texts[0], asked), decider.decide(texts[0], asked)
    assert before["topic"].choice == after["topic"].choice
    assert before["topic"].probabilities != after["topic"].probabilities
    other = {"three": Choice("text", ["a", "b", "c"])}
    assert plain.decide(texts[0], other) == decider.decide(texts[0], other)
    decider.conform(texts, asked, right)
    decider.save_pretrained(tmp_path / "saved")
    again = Decider(tmp_path / "saved", abstain_below=0.999)
    assert again.calibrations == decider.calibrations
    assert again.decide_sets(texts[0], asked, coverage=0.9) == decider.decide_sets(texts[0], asked)
    assert again.decide(texts[0], asked)["topic"].abstains
    # What was learned holds only for the prompts it was learned with.
    assert not Decider(tmp_path / "saved", answer="words").calibrations
    with pytest.raises(InputError, match="there are no sets for choice/3"):
        decider.decide_sets(texts[0], other)


def test_a_limit_for_abstaining_is_found_on_right_answers(word_decider):
    texts, asked, right, _ = labelled(60, seed=6)
    found = list(word_decider.decide_many(texts, asked))
    pairs = sorted(
        (max(a["topic"].probabilities.values()), a["topic"].choice == b["topic"])
        for a, b in zip(found, right, strict=True)
    )
    best = max(np.mean([hit for _, hit in pairs[at:]]) for at in range(51))
    topics = [{"topic": one["topic"]} for one in right]
    word_decider.abstain(texts, asked, topics, accuracy=best)
    kept = [
        a["topic"].choice == b["topic"]
        for a, b in zip(word_decider.decide_many(texts, asked), right, strict=True)
        if not a["topic"].abstains
    ]
    assert len(kept) >= 10
    assert np.mean(kept) >= best - 1e-9
    with pytest.raises(InputError, match="no threshold reaches"):
        word_decider.abstain(texts, asked, topics, accuracy=min(1.0, best + 0.01), least=60)


def test_a_kind_that_cannot_be_calibrated_is_left_alone(word_decider):
    texts, asked, _, _ = labelled(1, seed=4)
    best = word_decider.decide(texts[0], asked)["topic"].choice
    other = next(name for name in WORDS if name != best)
    for answer, reason in ((best, "all these 1 rows are right"), (other, "than guessing")):
        with pytest.warns(UserWarning, match=f"choice/2 is not calibrated.*{reason}"):
            word_decider.calibrate(texts, asked, [{"topic": answer}])
        assert not word_decider.calibrations


def test_a_decider_keeps_its_settings_on_the_way_to_orbax_and_back(word_pair, tmp_path):
    Decider(word_pair, answer="words").save_pretrained(tmp_path / "saved")
    convert.to_jax(tmp_path / "saved", tmp_path / "jax")
    convert.to_hf(tmp_path / "jax", tmp_path / "hf")
    assert Decider(tmp_path / "hf").settings.answer == "words"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"team": "sales"}], "row 1 (index 0): 'team': the answer is 'sales'; expected one of"),
        ([{"churn": "yes"}], "'churn': the answer is 'yes'; expected true or false"),
        ([{"urgency": 3}], "expected a level from 0 to 2"),
        ([{"urgency": True}], "expected a level from 0 to 2"),
        ([{"team": {"billing": 0.5, "sales": 0.5}}], "a probability to 'sales', which is not a"),
        ([{"team": [0.5, 0.4]}], "'team': the answer: its probabilities sum to 0.9; expected 1"),
        ([{"churn": [1.0]}], "has 1 probabilities; expected 2"),
        ([{"urgency": {"0": -1, "1": 2}}], "expected a number from 0 to 1"),
        ([{"other": 1}], "has an answer to 'other', which is not among the questions"),
        ([{"team": None}], "answers: there are none"),
        ([["billing"]], "expected a table from ids to answers"),
        ([], "there are 1 states and 0 answers"),
    ],
)
def test_wrong_answers_are_rejected_in_words(decider, answers, message):
    for learn in (decider.fit, decider.calibrate, decider.conform):
        with pytest.raises(InputError) as caught:
            learn([STATE], QUESTIONS, answers)
        assert message in str(caught.value)


OWN = {
    "words": (["sports", "money"], {"answer": "words"}),
    "letters": ({"sports": "a match", "money": ""}, {"answer": "letters"}),
    "windows": (["sports", "money"], {"long_text": "mean", "max_length": 64}),
}


@pytest.fixture(params=OWN)
def fitted(request, word_pair, tmp_path):
    """A saved classifier, and a warning-free decider made from it."""
    labels, options = OWN[request.param]
    source = noisy(word_pair[0], 0.05), word_pair[1]
    # Not by temperature: with these random weights it would multiply differences of one bit by 80.
    first = Classifier(source, labels, **options).calibrate(examples(20)[0], method="batch")
    first.save_pretrained(tmp_path / "first")
    classifier = Classifier(tmp_path / "first", abstain_below=0.55)
    classifier.save_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match="a choice among sports, money is asked as the classifier"):
        decider = Decider(tmp_path / "own")
    return classifier, decider, tmp_path


def test_the_labels_of_a_classifier_are_asked_as_it_was_fitted(fitted):
    classifier, decider, folder = fitted
    texts = [*examples(6, seed=3)[0], "a goal " * 300]
    expected = classifier.predict_proba(texts)
    settings = classifier.settings_
    assert settings.calibration is not None
    for name in ("answer", "orders", "long_text", "max_length"):
        wanted = classifier.answer_ if name == "answer" else getattr(settings, name)
        assert getattr(decider.settings, name) == wanted
    said = Choice("Which?", settings.labels)
    turned = Choice("Other words", ["money", "sports"])
    other = {"no": YesNo("sports"), "more": Choice("Which?", ["sports", "money", "rain"])}
    found = list(decider.decide_many(texts, {"a": said, **other, "b": turned}))
    assert sum(one["a"].shortened > 0 for one in found) == (settings.long_text == "shorten")
    for text, probabilities, answers in zip(texts, expected, found, strict=True):
        row = dict(zip(classifier.classes_, probabilities, strict=True))
        assert answers["a"].probabilities == pytest.approx(row, abs=1e-6)
        assert answers["a"].abstains == (max(row.values()) < 0.55)
        # The same bits alone, under another id, in another order.
        assert decider.decide(text, {"c": said}) == {"c": answers["a"]}
        assert decider.decide(text, {"d": turned})["d"] == answers["b"]
        assert answers["b"].probabilities == answers["a"].probabilities
    names = ("answer", "long_text", "max_length")
    own = {name: getattr(decider.settings, name) for name in names}
    plain = Decider((decider.model, decider.tokenizer), **own)
    decided = plain.decide(texts[0], {"a": said, **other})
    assert {key: decided[key] for key in other} == {key: found[0][key] for key in other}
    assert decided["a"].probabilities != found[0]["a"].probabilities
    decider.save_pretrained(folder / "saved")
    with pytest.warns(UserWarning, match="is asked as the classifier was fitted"):
        again = Decider(folder / "saved")
    assert again.settings == decider.settings
    assert again.decide(texts[-1], {"a": said}) == {"a": found[-1]["a"]}


def test_the_label_sets_of_a_classifier_are_those_of_its_question(word_pair, tmp_path):
    texts, labels = examples(60, seed=8)
    classifier = Classifier((noisy(word_pair[0], 0.05), word_pair[1]), list(WORDS))
    classifier.conform(texts, labels).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="as the classifier was fitted"):
        decider = Decider(tmp_path)
    expected = classifier.predict_set(texts[:9], coverage=0.75)
    turned = {"q": Choice("Which?", list(WORDS)[::-1])}
    for text, row in zip(texts, expected, strict=False):
        found = decider.decide_sets(text, turned, coverage=0.75)["q"]
        assert set(found) == set(classifier.classes_[row])
    with pytest.raises(InputError, match="there are no sets for noul/2"):
        decider.decide_sets("a goal", {"q": YesNo("sports")})
    decider.calibrate(texts, turned, [{"q": label} for label in labels])
    with pytest.raises(InputError, match="there are no sets for choice/2"):  # they no longer hold
        decider.decide_sets("a goal", turned)


def test_other_descriptions_and_options_are_other_questions(fitted):
    _, decider, _ = fitted
    own = decider._asker.own
    for criteria in (["sports", "rain"], {"sports": "other", "money": None}):
        assert not own.matches(Choice("", criteria))
    assert not own.matches(Score("", ["sports", "money"]))
    with pytest.raises(InputError, match=r"row 2 .*the state is blank"):
        list(decider.decide_many(["a goal", " "], {"q": Choice("", ["sports", "money"])}))
    with pytest.raises(InputError, match="the state is blank"):
        decider.cost(as_state({}), Choice("", ["sports", "money"]))


def test_a_long_table_keeps_its_keys_in_the_prompt_of_a_classifier(word_pair, tmp_path):
    Classifier(word_pair, list(WORDS), max_length=64).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="as the classifier was fitted"):
        decider = Decider(tmp_path)
    asked = {"q": Choice("", list(WORDS))}
    state = {"team": "goal " * 100, "price": "stock"}
    found = decider.decide(state, asked)["q"]
    assert 0 < found.shortened < 100
    assert found != decider.decide(state | {"price": "goal"}, asked)["q"]


def test_a_fit_asks_all_questions_in_the_words_of_the_decider(fitted):
    _, decider, folder = fitted
    texts, labels = examples(32)
    asked = {"q": Choice("text", list(WORDS))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearnedNothingWarning)
        decider.fit(texts, asked, [{"q": label} for label in labels], epochs=1)
    decider.save_pretrained(folder / "own")  # in the place of the classifier
    again = Decider(folder / "own")  # without a warning
    assert again.decide(texts[0], asked) == decider.decide(texts[0], asked)


@pytest.mark.parametrize(
    "options", [{"multi_label": True}, {"orders": "all"}, {"examples": [("a goal", "sports")]}]
)
def test_a_classifier_that_no_one_prompt_decides_is_asked_in_other_words(
    word_pair, tmp_path, options
):
    Classifier(word_pair, list(WORDS), **options).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the accuracy of the classifier does not carry over"):
        Decider(tmp_path)


def test_a_decider_needs_a_masked_language_model(word_pair, tmp_path):
    classifier = Classifier(word_pair, list(WORDS), head="classification", epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearnedNothingWarning)
        classifier.fit(*examples(8)).save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="does not carry over"),
        pytest.raises(InputError, match="no masked-language-model head"),
    ):
        Decider(tmp_path)


def test_settings_that_are_wrong_are_rejected(tmp_path, decider, tokenizer):
    for options in ({"answer": "head"}, {"orders": 0}, {"abstain_below": 2}, {"long_text": "cut"}):
        with pytest.raises(InputError, match="decider: "):
            Decider((decider.model, tokenizer), **options)
    decider.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / DECIDER
    path.write_text('{"calibrations": {"choice/1": {"method": "batch", "rows": 1}}}')
    with pytest.raises(InputError, match="'choice/1' is not a type of question"):
        Decider(tmp_path / "saved")
    with pytest.raises(InputError, match="source is 5"):
        Decider(5)
