"""A mistyped keyword or label is answered with the nearest name, wherever it is given."""

import inspect
import pickle

import pytest
from flax import nnx
from labelled_texts import word_model, word_tokenizer
from row_files import read

import mlmjax
from mlmjax import InputError, data
from mlmjax.config.data import SourceConfig
from mlmjax.config.task import Task
from mlmjax.data.reading.labelled import read_labelled
from mlmjax.errors import UnknownKeywordError
from mlmjax.evaluation.questions import read_questions

RECORDS = ("Batch", "RunConfig", "TrainState", "InputError", "RunError", "Example")
"""Records, whose constructors are those of their libraries."""


def callables():
    """Yield every public function and method that takes keywords, with its name."""
    named = {name: getattr(mlmjax, name) for name in mlmjax.__all__ if name not in RECORDS}
    named |= {name: getattr(data, name) for name in data.__all__ if name not in RECORDS}
    for name, one in named.items():
        if isinstance(one, type):
            methods = inspect.getmembers(one, inspect.isroutine)
            yield from (
                (f"{name}.{key}", method)
                for key, method in methods
                if str(getattr(method, "__module__", "")).startswith("mlmjax.")
                and not key.startswith("_")
            )
        if callable(one):
            yield name, one


CALLABLES = dict(callables())


def test_the_contract_is_among_them():
    assert {"Classifier", "Classifier.fit", "run_evaluation", "pack", "Scorer.log_probs"} <= {
        *CALLABLES
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")
    return word_model(tokenizer), tokenizer


def keywords_of(function):
    """Return the names of a function's arguments; None if it takes any keyword."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.kind in named and one.name != "self"]


FREE = {name for name, function in CALLABLES.items() if keywords_of(function) is None}


def test_those_that_take_any_keyword_check_it_later(pair):
    models = {name for name in CALLABLES if name.startswith("ModernBert") and "." not in name}
    methods = {f"Classifier.{name}" for name in ("fit", "set_params", "from_pretrained")}
    assert methods | models | {"mask_dummy"} <= FREE
    config = pair[0].config
    calls = [
        lambda: mlmjax.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0), atention="dense"),
        lambda: mlmjax.Classifier(pair, ["a", "b"]).fit(["x"], ["a"], epoch=3),
        lambda: mlmjax.Classifier(pair, ["a", "b"]).set_params(epoch=3),
        lambda: mlmjax.Classifier.from_pretrained(pair, lables=["a", "b"]),
        lambda: mlmjax.Decider.from_pretrained(pair, batchsize=3),
        lambda: data.mask_dummy([1], 0.3, None, mask_id=2, special_id=[]),
    ]
    nearest = ["attention", "epochs", "epochs", "labels", "batch_size", "special_ids"]
    for call, meant in zip(calls, nearest, strict=True):
        with pytest.raises(InputError, match=f"did you mean '{meant}'"):
            call()


@pytest.mark.parametrize(
    "name", [name for name, function in CALLABLES.items() if keywords_of(function)]
)
def test_a_mistyped_keyword_is_answered_with_the_nearest(name):
    function = CALLABLES[name]
    for keyword in keywords_of(function):
        with pytest.raises(UnknownKeywordError) as caught:
            function(**{f"{keyword}x": None})
        assert f"has no argument '{keyword}x'; did you mean '{keyword}'" in caught.value.message
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), TypeError)


LABELS = ["Login", "Payment"]


def test_a_mistyped_label_is_answered_with_the_nearest(pair, tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,Logn\ntwo,Login\nthree,Login\nfour,Logn\n")
    classifier = mlmjax.Classifier(pair, LABELS)
    shared = {"labels": LABELS, "answer": "label", "prompt": "{text} {options}"}
    calls = [
        lambda: classifier.fit(["one", "two"], ["Logn", "Payment"]),
        lambda: classifier.fit(["a", "b"], LABELS, validation=(["c"], ["Logn"])),
        lambda: classifier.abstain(["one"], ["Logn"], accuracy=0.5),
        lambda: classifier.calibrate(["one"], ["Logn"]),
        lambda: classifier.conform(["one"], ["Logn"]),
        lambda: mlmjax.Classifier(pair, LABELS, examples=[("x", "Logn")]).predict(["one"]),
        lambda: read(SourceConfig.from_dict({"path": str(path), **shared}), tokenizer, 64),
        lambda: read_questions(Task.from_dict({"name": "t", **shared}), path, None),
    ]
    for call in calls:
        with pytest.raises(InputError, match="did you mean 'Login'"):
            call()
    said = read_labelled(path, drop_labels=["Lgin"]).said
    assert "warning: --drop-label 'Lgin': no row has this label; did you mean 'Login'?" in said
