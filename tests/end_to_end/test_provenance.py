"""What says where weights come from is in the last folder, by whatever roads they went."""

import itertools
import json

import huggingface_hub
import pytest
from labelled_texts import examples, word_model, word_tokenizer

from mlmjax import Choice, Classifier, Decider, load_pretrained, resize_token_embeddings
from mlmjax.config.run import AdapterConfig, parse_config
from mlmjax.config.task import load_task
from mlmjax.data.contamination import contamination, read_training_manifest
from mlmjax.errors import InputError
from mlmjax.model.modernbert import with_adapter, with_classifier
from mlmjax.storage import CARD, TRAINING
from mlmjax.training.run.train import run_training
from mlmjax.weights import convert
from mlmjax.weights.adapters import save_adapter
from mlmjax.weights.pretrained import save_pretrained

LABELS = ["sports", "money"]
README = "---\nlicense: cc-by-4.0\nlanguage: en\n---\n# A model of others\n\nMade by Ada.\n"
SST2 = {"init_from": None, "tasks": ["sst2"], "sources": [], "excluded_tasks": [], "excluded": []}
FILES = {
    CARD: README,
    TRAINING: json.dumps({"format": 1, "runs": [SST2]}),
    "LICENSE": "Free.",
    "NOTICE": "By Ada.",
}
FAST = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8}


def through_orbax(source, target):
    convert.to_jax(str(source), target.with_name("orbax"))
    convert.to_hf(target.with_name("orbax"), target)


def saved(source, target):
    save_pretrained(*load_pretrained(source), target)


def resized(source, target):
    model, tokenizer = load_pretrained(source)
    size = model.config.vocab_size + 64
    save_pretrained(*resize_token_embeddings(model, tokenizer, [], size=size), target)


def with_head(source, target):
    model, tokenizer = load_pretrained(source)
    save_pretrained(with_classifier(model, LABELS, seed=0), tokenizer, target)


def with_new_adapter(source, target):
    model, tokenizer = load_pretrained(source)
    save_adapter(with_adapter(model, AdapterConfig()), tokenizer, target)


def as_classifier(source, target):
    Classifier(source, LABELS).save_pretrained(target)


def fitted(source, target):
    Classifier(source, LABELS).fit(*examples(16), **FAST).save_pretrained(target)


def fitted_with_adapter(source, target):
    Classifier(source, LABELS, adapter="lora").fit(*examples(16), **FAST).save_pretrained(target)


def fitted_and_merged(source, target):
    classifier = Classifier(source, LABELS, adapter="lora").fit(*examples(16), **FAST)
    classifier.save_pretrained(target, merge=True)


def as_decider(source, target):
    Decider(source).save_pretrained(target)


def fitted_decider(source, target):
    texts, labels = examples(16)
    answers = [{"kind": label} for label in labels]
    decider = Decider(source).fit(texts, {"kind": Choice("Which?", LABELS)}, answers, **FAST)
    decider.save_pretrained(target)


def trained(source, target, **more):
    path = target.with_name("rows.jsonl")
    path.write_text(
        "".join(
            json.dumps({"prompt": text, "answer": label}) + "\n"
            for text, label in zip(*examples(64), strict=True)
        )
    )
    source_of = {"path": str(path), "prompt": "{prompt}", "answer": "answer"}
    data = {"rows": str(target.with_name("rows")), "seq_length": 32, "batch_size": 8}
    table = {"out": str(target.with_name("run")), "init_from": str(source), "steps": 2, **more}
    run_training(parse_config({**table, "data": {**data, "sources": [source_of]}}))
    exported = "adapter" if "adapter" in more else "export"
    (target.with_name("run") / exported).rename(target)


def trained_with_adapter(source, target):
    trained(source, target, adapter={"kind": "lora"})


ROADS = {
    through_orbax: 0,
    saved: 0,
    resized: 0,
    with_head: 0,
    with_new_adapter: 1,
    as_classifier: 0,
    fitted: 1,
    fitted_with_adapter: 1,
    fitted_and_merged: 1,
    as_decider: 0,
    fitted_decider: 1,
    trained: 1,
    trained_with_adapter: 1,
}
"""Each road, and the number of runs that it adds to the training manifest."""

ADAPTERS = {with_new_adapter, fitted_with_adapter, trained_with_adapter}
CLOSED = {
    # A decider, and a run without a classification head, need a masked-language-model head.
    *((with_head, road) for road in (as_decider, fitted_decider, trained, trained_with_adapter)),
    # An adapter has no weights of its own to convert.
    *((road, through_orbax) for road in ADAPTERS),
}
OPEN = [pair for pair in itertools.product(ROADS, repeat=2) if pair not in CLOSED]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("provenance") / "model"
    tokenizer = word_tokenizer(folder.parent / "words")
    save_pretrained(word_model(tokenizer), tokenizer, folder)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


def check(folder, runs):
    assert (folder / "LICENSE").read_text() == "Free."
    assert (folder / "NOTICE").read_text() == "By Ada."
    card = huggingface_hub.ModelCard((folder / CARD).read_text(encoding="utf-8"))
    assert (card.data.license, card.data.language) == ("cc-by-4.0", "en")
    assert "Made by Ada." in card.text
    manifest = read_training_manifest(folder)
    assert len(manifest.runs) == 1 + runs
    (folder / "sst2.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    assert contamination(load_task("sst2"), folder / "sst2.jsonl", manifest).status == "found"


def go(road, source, folder):
    folder.mkdir()
    road(source, folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    "road",
    [
        pytest.param(road, marks=pytest.mark.long) if road is trained_with_adapter else road
        for road in ROADS
    ],
)
def test_every_road_keeps_licence_attribution_and_training_data(road, source, tmp_path):
    check(go(road, source, tmp_path / "first"), ROADS[road])


def test_an_adapter_is_converted_only_with_its_base(source, tmp_path):
    adapter = go(with_new_adapter, source, tmp_path / "first")
    with pytest.raises(InputError, match="is an adapter, which has no weights of its own; save it"):
        convert.to_jax(str(adapter), tmp_path / "orbax")
    check(go(through_orbax, go(saved, adapter, tmp_path / "second"), tmp_path / "third"), 1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*a choice among sports, money is asked as the classifier")
@pytest.mark.parametrize(("first", "second"), OPEN)
def test_every_pair_of_roads_keeps_them(first, second, source, tmp_path):
    middle = go(first, source, tmp_path / "first")
    runs = ROADS[first] + ROADS[second]
    if second is with_new_adapter and first in ADAPTERS:
        runs -= 1  # there is an adapter already
    check(go(second, middle, tmp_path / "second"), runs)
