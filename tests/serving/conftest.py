"""Servers over a model that is small and random, for all tests."""

import pytest
from servers import KEY, serving
from small_models import small_model

from mlmjax import Decider
from mlmjax.serving.protocol import Limits


@pytest.fixture(scope="session")
def decider(tokenizer):
    model = small_model(num_hidden_layers=1, max_position_embeddings=256)
    return Decider((model, tokenizer))


@pytest.fixture(scope="session")
def client(decider):
    with serving(decider, limits=Limits(body_bytes=6 * 2**20, body_seconds=1.0)) as one:
        yield one


@pytest.fixture(scope="session")
def locked(decider):
    with serving(decider, key=KEY) as one:
        yield one
