import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import SIZES
from flax import nnx

from mlmjax.data.batch import LabelBatch
from mlmjax.errors import InputError
from mlmjax.model.architecture import ModelConfig
from mlmjax.model.modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    labelled_config,
    parameters,
    with_classifier,
)
from mlmjax.parallel.sharding import make_mesh
from mlmjax.training.loss import label_evaluation, label_loss
from mlmjax.training.step import (
    create_train_state,
    make_eval_step,
    make_replicated_step,
    make_train_step,
)
from mlmjax.weights import pretrained
from mlmjax.weights.tensors import layout

NAMES = ["bad", "fair", "good"]


def make_model(labels=NAMES, **options):
    config = labelled_config(
        ModelConfig.from_hf(SIZES | {"num_hidden_layers": 1} | options), labels
    )
    return ModernBertForSequenceClassification(config, rngs=nnx.Rngs(0), attention="dense")


def make_batch(rows=8, labels=3, seed=0):
    """Texts of many lengths; the last row is only padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 64, (rows, 16)).astype(np.int32)
    lengths = rng.integers(3, 17, rows)
    lengths[-1] = 0
    segments = (np.arange(16) < lengths[:, None]).astype(np.int32)
    values = rng.integers(0, labels, rows) if labels > 1 else rng.normal(2.0, 3.0, rows)
    values = values.astype(np.float32)
    values[-1] = np.nan
    return LabelBatch(ids, segments, values)


@pytest.mark.parametrize(
    ("labels", "pooling"), [(NAMES, "cls"), ([], "mean")], ids=["classes", "regression"]
)
def test_loss_and_gradients_are_those_of_transformers(tmp_path, labels, pooling):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_model(labels, classifier_pooling=pooling, classifier_bias=True)
    batch = make_batch(labels=len(labels) or 1)
    pretrained.save_pretrained(model, None, tmp_path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    )
    used = ~np.isnan(batch.labels)
    truth = torch.tensor(batch.labels[used])
    loss = theirs(
        input_ids=torch.tensor(batch.input_ids[used]).long(),
        attention_mask=torch.tensor(batch.segment_ids[used]),
        labels=truth.long() if labels else truth[:, None],
    ).loss
    loss.backward()
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        loss_sum, metrics = label_loss(nnx.merge(graphdef, params), batch)
        return loss_sum / metrics["loss_count"]

    value, grads = mean_loss(params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    nnx.update(model, grads)
    found = dict(layout.to_hf_tensors(model))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, atol=1e-4 * abs(grad).max(), err_msg=name)


def take_steps(mesh, make=make_train_step, **options):
    optimizer = optax.adamw(1e-3)
    graphdef, state = create_train_state(make_model(), optimizer, mesh=mesh)
    step = make(graphdef, optimizer, loss=label_loss, **options)
    found = []
    for number in range(3):
        state, metrics = step(state, make_batch(16, seed=number))
        found.append([float(metrics[key]) for key in ("loss_sum", "loss_count", "grad_norm")])
    return found


@pytest.mark.parametrize(
    ("sizes", "make", "options"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, make_train_step, {}),
        # By default only a run of this head takes this step.
        pytest.param({"data": 8}, make_replicated_step, {"accumulate": 2}, marks=pytest.mark.long),
    ],
    ids=["pjit", "pmap"],
)
def test_eight_devices_are_one_device(sizes, make, options):
    found, expected = take_steps(make_mesh(sizes), make, **options), take_steps(None, accumulate=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_evaluation_counts_only_labelled_rows():
    model, batch = make_model(), make_batch()
    found = make_eval_step(nnx.split(model)[0], label_evaluation)(nnx.state(model), batch)
    assert found["loss_count"] == found["label_count"] == 7
    right = np.asarray(found["logits"]).argmax(axis=1)[:7] == batch.labels[:7]
    assert found["label_correct"] == right.sum()
    number = jax.eval_shape(lambda: label_evaluation(make_model([]), make_batch(labels=1)))
    assert "label_count" not in number


def test_a_masked_language_model_keeps_all_but_its_decoder():
    config = ModelConfig.from_hf(SIZES)
    masked = ModernBertForMaskedLM(config, rngs=nnx.Rngs(3), dtype=jnp.bfloat16)
    model = with_classifier(masked, NAMES, seed=5)
    assert model.dtype == jnp.bfloat16
    assert model.config.problem_type == "single_label_classification"
    kept, own = parameters(masked), parameters(model)
    assert own.keys() - kept.keys() == {"classifier.weight", "classifier.bias"}
    assert kept.keys() - own.keys() == {"decoder.bias"}
    for name in kept.keys() & own.keys():
        np.testing.assert_array_equal(own[name], kept[name])
    again = with_classifier(ModernBertForMaskedLM(config, rngs=nnx.Rngs(3)), NAMES, seed=5)
    weight = again.classifier.weight[...]
    np.testing.assert_array_equal(weight, model.classifier.weight[...])
    assert with_classifier(model, NAMES, seed=9).classifier.weight[...] is not None
    np.testing.assert_array_equal(weight, model.classifier.weight[...])
    with pytest.raises(InputError, match="of the labels 'bad', 'fair', 'good'; the sources name"):
        with_classifier(model, ["good", "bad"], seed=5)
