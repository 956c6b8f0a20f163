"""What the demo's model is measured against: a classification head, and TF-IDF with regression."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from mlmjax.architecture import ModelConfig
from mlmjax.config import RunConfig
from mlmjax.data.batch import LabelBatch
from mlmjax.engine import bucket_lengths
from mlmjax.finetune import label_batch
from mlmjax.heads import label_loss, labelled_config
from mlmjax.log import Talk
from mlmjax.modernbert import ModernBertForSequenceClassification
from mlmjax.optim import make_optimizer
from mlmjax.prompts import Prompt
from mlmjax.step import create_train_state, make_train_step
from mlmjax.tokenizer import Tokenizer

Rows = Sequence[Mapping[str, str]]


def tfidf_regression(train: Rows, test: Rows) -> list[str]:
    """Fit TF-IDF and logistic regression on `text` and `label`; return the labels of `test`."""
    words = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    words.fit([row["text"] for row in train], [row["label"] for row in train])
    return [str(label) for label in words.predict([row["text"] for row in test])]


def classification_head(
    run: RunConfig,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    train: Rows,
    test: Rows,
    *,
    batch_size: int,
) -> list[str]:
    """Train a classification model of the same size from scratch; return the labels of `test`.

    It gets the run's seed, optimizer, schedule and number of updates, with `batch_size` texts in
    each. It reads the text alone, between [CLS] and [SEP], one text per row, and pools by the mean
    over its tokens, as the published ModernBERT configurations do.
    """
    labels = sorted({row["label"] for row in train})
    config = replace(labelled_config(model_config, labels), classifier_pooling="mean")
    model = ModernBertForSequenceClassification(config, rngs=nnx.Rngs(run.seed))
    optimizer = make_optimizer(run.optimizer, run.schedule, run.steps)
    graphdef, state = create_train_state(model, optimizer)
    step = make_train_step(graphdef, optimizer, loss=label_loss)
    answers = np.array([labels.index(row["label"]) for row in train])
    texts, unseen = _tokenize(tokenizer, train), _tokenize(tokenizer, test)
    buckets = bucket_lengths(max(len(text.ids) for text in (*texts, *unseen)))

    def layout(chosen: Sequence[Prompt], numbers: np.ndarray) -> LabelBatch:
        return label_batch(
            chosen, numbers, rows=batch_size, buckets=buckets, pad_id=tokenizer.pad_id
        )

    with Talk(run.steps) as talk:
        for number, members in enumerate(_draw(len(texts), batch_size, run), start=1):
            batch = layout([texts[i] for i in members], answers[members])
            state, metrics = step(state, batch)
            talk.step(number)
            if number == run.steps or (run.evaluation.every and not number % run.evaluation.every):
                values = jax.device_get(metrics)
                loss = float(values["loss_sum"] / values["loss_count"])
                talk.figures(number, "train", {"loss": loss})

    logits_of = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    predicted: list[str] = []
    for start in range(0, len(unseen), batch_size):
        chosen = unseen[start : start + batch_size]
        batch = layout(chosen, np.zeros(len(chosen), np.int32))
        logits = logits_of(state.params, batch.input_ids, batch.segment_ids)
        predicted += [labels[best] for best in np.asarray(logits).argmax(axis=1)[: len(chosen)]]
    return predicted


def _tokenize(tokenizer: Tokenizer, rows: Rows) -> list[Prompt]:
    """Put each text between [CLS] and [SEP]; the slot of these prompts means nothing."""
    encoded = tokenizer.encode_plain_batch([row["text"] for row in rows])
    return [Prompt([tokenizer.cls_id, *ids, tokenizer.sep_id], 0, {}) for ids in encoded]


def _draw(count: int, batch_size: int, run: RunConfig) -> Iterator[np.ndarray]:
    """Yield the texts of each update: every text once per epoch, epochs running on in batches."""
    epochs = -(-run.steps * batch_size // count)
    order = np.concatenate(
        [np.random.default_rng([run.seed, epoch]).permutation(count) for epoch in range(epochs)]
    )
    for update in range(run.steps):
        yield order[update * batch_size : (update + 1) * batch_size]
