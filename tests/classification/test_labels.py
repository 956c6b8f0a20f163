"""Mistyped names of options and labels are answered with the nearest one."""

import pytest

from mlmjax.classification.classifier import Classifier
from mlmjax.classification.labels import label_numbers
from mlmjax.classification.predictor import Predictor
from mlmjax.errors import InputError


@pytest.mark.parametrize("kind", [Classifier, Predictor])
def test_a_mistyped_option_is_answered_with_the_nearest(kind):
    message = f"{kind.__name__}: has no argument 'lables'; did you mean 'labels'?"
    with pytest.raises(InputError) as caught:
        kind.from_pretrained("mlmjax-small", lables=["a", "b"])
    assert caught.value.message.startswith(message)
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        kind.from_pretrained("mlmjax-small", ["a", "b"], batchsize=3)


def test_a_mistyped_label_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"label 'Logn' is not one of .*; did you mean 'Login'"):
        label_numbers(["Login", "Logn"], ["Login", "Billing"], False)
