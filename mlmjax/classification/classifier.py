"""The scikit-learn estimator: a text classifier, zero-shot or fine-tuned."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score

from mlmjax.classification.fitting import (
    MEASURED_PROMPTS,
    FitData,
    FitRecipe,
    Recipe,
    Texts,
    learn,
    split_rows,
    start_of,
)
from mlmjax.classification.labels import (
    check_lengths,
    label_numbers,
    list_answers,
    pair_targets,
    read_validation,
    read_weights,
    target_rows,
)
from mlmjax.classification.predictor import Predictor
from mlmjax.classification.prompter import Prompter
from mlmjax.classification.settings import Settings
from mlmjax.config.tables import decode
from mlmjax.errors import InputError, suggest_keywords, suggest_name
from mlmjax.model.modernbert import Model, merged, with_classifier
from mlmjax.reporting.markdown import number
from mlmjax.reporting.terminal import Progress, progress_bar
from mlmjax.statistics.learning import label_frequencies
from mlmjax.storage import CLASSIFIER, TRAINING
from mlmjax.text.checks import check_list, check_texts
from mlmjax.training.loss import LossKind
from mlmjax.weights.adapters import save_adapter
from mlmjax.weights.cards import add_run, model_card
from mlmjax.weights.pretrained import save_pretrained


@suggest_keywords
class Classifier(Predictor, ClassifierMixin, BaseEstimator):
    """Classify texts by labels, zero-shot or fine-tuned.

    This is a scikit-learn estimator: X is a list of texts, y a list of label names. Without `fit`
    the answers are zero-shot. The constructor only stores its arguments; the model is loaded when
    it is first needed. Of the arguments whose default is None, those of a saved classifier keep
    their saved value; otherwise the value named here applies.

    Parameters
    ----------
    source : str, Path or (model, tokenizer)
        A folder, a hub id, or a model with its tokenizer.
    labels : list or dict, default=None
        At least two names, or a table `{name: description}`; the prompt shows the descriptions.
        None: the labels that `fit` sees, sorted.
    head : {"mlm", "classification"}, default=None
        "mlm" answers at the slot of a prompt. "classification" reads the text with a new last
        layer, which `fit` trains. None: the head of the model.
    answer : {"letters", "words", "continuation"}, default=None
        "letters" names the options A, B, ..., and more than 457 options 1, 2, ... "words" scores
        the labels themselves, which must be one token each. "continuation" scores labels of any
        length, at one forward pass for each token. None: "words" if each label is one token of its
        own and has no description, otherwise "letters". With a `template`, its `{options}` decide.
    template : str or Template, default=None
        The whole prompt. It has the field `{text}`, and `{options}`, `{examples}` and `{label}`
        where they are used. None: a general prompt.
    instruction : str, default=None
        The first sentence of the prompt. None: a general instruction.
    anchor : str, default=None
        The token before the mask of a prompt, which templates call `[unused0]`; "none" for no
        token. None: the one that the tokenizer names, else `[unused0]` if it has it, else none.
    examples : list of (text, label), default=None
        Few-shot examples. Each prompt shows as many as fit, in turns of their labels. None: no
        examples.
    orders : int or "all", default=None
        The number of cyclic orders of the options to average over, at one forward pass each.
        There are as many as labels; a higher number and "all" use each once. `fit` trains on these
        orders, so use the same ones afterwards. None: 1.
    shortlist : int, default=None
        With letters: a prompt lists only this many labels, those whose vectors are nearest to that
        of the text. The other labels share a probability of 1e-6. None: all labels are asked.
    shortlist_model : str, default=None
        The folder or hub id of the embedding model for the shortlist. None: the model that answers.
    long_text : {"shorten", "mean", "max"}, default=None
        "shorten" truncates a text that is too long at its end. "mean" and "max" score overlapping
        windows of it, and take the mean or the maximum of each probability. None: "shorten".
    multi_label : bool, default=None
        True: several labels may apply to a text, and each is a question of yes or no. Right answers
        are then lists of names, predictions are columns of 0 and 1, and probabilities do not sum to
        1. None: False.
    ordered : bool, default=None
        True: the labels are levels from low to high, and `fit` minimises the ranked probability
        score, which punishes a far level more than a near one. None: False.
    abstain_below : float, default=None
        A text whose best probability is lower is answered by the empty string. None: 0.
    dtype : {"float32", "bfloat16"}, default="float32"
        The type to compute in. "bfloat16" is faster and needs less memory.
    batch_size : int, default=None
        The number of prompts in a batch. None: as many as fill a budget of tokens.
    max_length : int, default=None
        The most tokens in a prompt. None: as many as the model reads.
    revision : str, default=None
        The revision of a hub id. None: the newest.
    local_files_only : bool, default=False
        True: read a hub id only from the local cache.
    epochs : int, default=3
        Passes of `fit` over the training texts.
    learning_rate : float or "auto", default=None
        The highest learning rate of `fit`, from which it falls linearly. "auto" spends a quarter as
        many updates again on finding one. None: 1e-3, or 3e-5 from 100 M parameters on.
    train_batch_size : int, default=32
        The number of prompts in an update of `fit`.
    weight_decay : float, default=0.01
        The weight decay of AdamW in `fit`.
    warmup : float, default=0.05
        The share of updates during which the learning rate rises.
    seed : int, default=0
        The seed of all that `fit` draws at random. Equal seeds give equal weights.
    accumulate : int, default=1
        The parts of an update of `fit` that are computed one after another, to save memory. The
        result is that of the whole.
    layer_decay : float, default=1.0
        The factor on the learning rate of `fit` for each layer above a parameter. 1: none.
    ema : float, default=0.0
        The decay of averaged parameters, which `fit` then measures and keeps. 0: no average.
    validation_share : float, default=0.0
        The share of the training texts that `fit` holds out, label by label, to measure accuracy
        and loss.
    patience : int, default=None
        The number of epochs without improvement on held-out texts after which `fit` stops and
        keeps the best epoch's weights. None: all epochs run, and the last weights are kept.
    restarts : int, default=0
        The number of further trainings of `fit`, each with another seed and a longer warm-up, that
        are tried until one has learned something. It needs held-out texts, which choose.
    label_smoothing : float, default=0.0
        The share of the right probability that `fit` divides equally over all labels.
    mask_share : float, default=0.0
        The probability with which `fit` masks each word of a training text. It draws the masks
        once. Masked words are then nothing new to the classifier, as `mlmjax.explain` needs.
    normalize : {"vocabulary", "labels"}, default="vocabulary"
        Over what the probabilities of the loss of `fit` sum to 1: all tokens, or the labels.
    adapter : "lora", dict or AdapterConfig, default=None
        Freeze the model and train an adapter: `{"rank": 8, "alpha": 16.0, "targets": ["Wqkv",
        "Wo", "Wi"]}` are the defaults of "lora". With a classification head, its last layer is
        trained, too. None: no adapter.
    train : list of str, default=None
        Patterns of the parameters that `fit` trains, such as `["*bias", "*norm*"]`; the others are
        frozen. None: all.
    progress : bool, default=None
        True shows progress, False does not. None: a bar on a terminal if the work takes long.

    Attributes
    ----------
    classes_ : array of str
        The labels, in the order of the columns of `predict_proba`.
    history_ : list of dict
        Loss and accuracy of each epoch of `fit`, the loss of always giving the label frequencies,
        and accuracy and loss on held-out texts next to the commonest label's accuracy.
    fit_summary_ : FitSummary
        What `fit` came to, on training and on held-out texts, with all attempts and the warning.
    answer_, answer_reason_ : str
        How it answers ("words", "letters", "continuation" or "head"), and why.
    calibration_, conformal_, threshold_
        What `calibrate`, `conform` and `abstain` found, or None.
    """

    def set_params(self, **params: Any) -> "Classifier":
        """Set constructor arguments, and drop what was loaded or fitted with others."""
        known = self._get_param_names()
        for name in params:
            if "__" not in name and name not in known:
                hint = suggest_name(name, known)
                raise InputError(f"set_params: has no parameter {name!r:.60}; {hint}see get_params")
        super().set_params(**params)
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        return self

    def __sklearn_tags__(self) -> Any:
        """Return the tags of an estimator for lists of texts."""
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        tags.classifier_tags.multi_label = bool(self.multi_label)
        return tags

    def score(
        self, texts: Iterable[str], labels: Iterable[Any], sample_weight: Any = None
    ) -> float:
        """Return the accuracy on labelled texts; of several labels all must be right."""
        predicted = self.predict(texts)
        multi_label, names = self.settings_.multi_label, [*self.classes_, ""]
        truth = label_numbers(labels, names[:-1], multi_label, known=False)
        right = truth if multi_label else [names[number] for number in truth]
        return float(accuracy_score(right, predicted, sample_weight=sample_weight))

    def fit(
        self,
        texts: Iterable[str],
        labels: Iterable[Any],
        *,
        validation: tuple[Iterable[str], Iterable[Any]] | None = None,
        sample_weight: Iterable[float] | None = None,
        progress: Progress | None = None,
        **recipe: Any,
    ) -> "Classifier":
        """Fine-tune on labelled texts, always from the source's weights.

        A label is a name, a table `{name: probability}`, or a list of probabilities in the order of
        `classes_`. `sample_weight` weighs the texts, in the loss and in all figures; a text of
        weight 0 is left out.

        `recipe` replaces the constructor's `epochs`, `learning_rate`, `batch_size` (there
        `train_batch_size`), `weight_decay`, `warmup`, `seed`, `accumulate`, `layer_decay`, `ema`,
        `validation_share`, `patience`, `restarts`, `label_smoothing`, `mask_share`, `normalize`,
        `adapter` and `train`. `validation` is a pair of texts and labels;
        without it `validation_share` of the rows is held out. `history_` has their accuracy and
        loss after each epoch, `fit_summary_` what was learned in the end. `progress` is called with
        the number of updates done and their total. Warns with `LearnedNothingWarning` if the fit
        ends no better than an answer that reads no text.

        Raises `InputError` for blank texts, labels that are not in `classes_`, numbers that are no
        distribution, fewer than two distinct labels, and lengths that differ; `RunError` if the
        loss is no longer finite.
        """
        own = {name: getattr(self, name) for name in FitRecipe.model_fields}
        given = {**own, "batch_size": self.train_batch_size, **recipe}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
        chosen = decode(FitRecipe, plain, "fit")
        texts, labels = list(check_list(texts, "texts")), list_answers(labels)
        check_lengths(texts, labels)
        settings, model, tokenizer, _ = self._read(seen=labels)
        for name, use in (("patience", "measure improvement"), ("restarts", "choose by")):
            if getattr(chosen, name) and validation is None and not chosen.validation_share:
                raise InputError(
                    f"fit: {name} is {getattr(chosen, name)}, but no texts are held out to {use}; "
                    f"give validation or validation_share, or leave {name} out"
                )
        truth = pair_targets(texts, labels, list(settings.labels), settings.multi_label)
        check_texts(texts)
        weights = None if sample_weight is None else read_weights(sample_weight, texts)
        used = [i for i in range(len(texts)) if weights is None or weights[i]]
        if len({str(truth[i]) for i in used}) < 2:
            found = ", ".join(sorted({repr(labels[i]) for i in used})) or "none"
            raise InputError(f"fit: the distinct labels are {found}; expected at least two")
        manifest = model.config.provenance.files.get(TRAINING)
        if manifest is not None:  # a broken one is an error before the training
            manifest = add_run(manifest, "the texts given to Classifier.fit", self.source)
        if settings.head == "classification":
            model = with_classifier(model, list(settings.labels), seed=chosen.seed)
        model = start_of(model, chosen)
        # What was learned about the probabilities of other weights does not hold for these.
        fresh = {"calibration": None, "conformal": None, "abstain_below": self.abstain_below}
        settings = settings.model_copy(update=fresh)
        prompter = Prompter(settings, model, tokenizer, self.batch_size)
        data = _prepare(prompter, texts, truth, weights, used, chosen, validation=validation)
        with progress_bar("fine-tuning", self.progress, "testing") as show:
            summary = learn(prompter, data, chosen, progress=progress or show)
        self._keep(settings, prompter)
        self.manifest_ = manifest.decode() if manifest is not None else None
        self.fit_summary_ = summary
        self.history_ = [dict(epoch) for epoch in summary.attempts[summary.kept].history]
        return self

    def save_pretrained(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        merge: bool = False,
        push_to: str | None = None,
        private: bool = True,
    ) -> None:
        """Write the model as a Hugging Face folder, with the settings of the classifier.

        `Classifier.from_pretrained(path)` restores all of it. A model with an adapter is saved as
        the adapter, in PEFT's files, with a pointer to its base; with `merge` as a whole model.
        `push_to` ("organisation/name") uploads the folder to the hub, too.
        Raises what `mlmjax.save_pretrained` and `mlmjax.save_adapter` raise.
        """
        scorer = self._load().scorer
        is_adapter = scorer.model.config.adapter is not None and not merge
        values = self.settings_.model_dump(mode="json", exclude_none=True)
        files = {CLASSIFIER: json.dumps(values, ensure_ascii=False, indent=2) + "\n"}
        if self.manifest_ is not None:
            files[TRAINING] = self.manifest_
        way = self.answer_, self.answer_reason_
        model = scorer.model if is_adapter else merged(scorer.model)
        card = classifier_card(model, self.settings_, self._load().recipe(), way)
        saved = scorer.model, scorer.tokenizer, path
        save = save_adapter if is_adapter else save_pretrained
        options: Any = {"dtype": dtype, "push_to": push_to, "private": private}
        save(*saved, card=card, more_files=files, **options)


LEAST_MEASURED = 32
"""The fewest training texts that a fit is measured on, if there are as many."""


def _prepare(
    prompter: Prompter,
    texts: Sequence[str],
    truth: Sequence[Any],
    weights: np.ndarray | None,
    used: Sequence[int],
    recipe: FitRecipe,
    *,
    validation: Any,
) -> FitData:
    """Return what a fit learns from, and the texts that it is measured on.

    `used` are the numbers of the texts that count.
    """
    settings = prompter.settings
    groups = len(settings.labels) if settings.multi_label else 1

    def measured(texts: Sequence[str], truth: Sequence[Any], own: np.ndarray | None) -> Texts:
        targets = target_rows(truth, len(prompter.names), settings.multi_label)
        return Texts(texts, targets, None if own is None else np.repeat(own, groups))

    def at(rows: Sequence[int]) -> Texts:
        own = None if weights is None else weights[rows]
        return measured([texts[i] for i in rows], [truth[i] for i in rows], own)

    train, held_out = used, None
    if validation is not None:
        held_out = measured(
            *read_validation(validation, settings.labels, settings.multi_label), None
        )
    elif recipe.validation_share:
        train, out = _split(used, truth, recipe)
        held_out = at(out)
    if held_out is not None and not held_out.texts:
        raise InputError("validation: there is no text to hold out; give more rows")
    trained = at(train)
    each = max(1, len(prompter.rows(prompter.queries(texts[0])[0]))) * groups
    count = min(len(train), max(LEAST_MEASURED, MEASURED_PROMPTS // each))
    sample = np.random.default_rng([recipe.seed, 2]).permutation(train)[:count].tolist()
    examples = prompter.examples(train, texts, truth, recipe.seed, recipe.mask_share)
    kind: LossKind = "ranked" if settings.ordered else recipe.normalize
    answers = prompter.answers(
        examples, spread=kind != "vocabulary", smoothing=recipe.label_smoothing, weights=weights
    )
    return FitData(
        examples.prompts,
        answers,
        kind,
        at(sample),
        held_out,
        label_frequencies(trained.targets, groups, trained.weights),
    )


def _split(
    used: Sequence[int], truth: Sequence[Any], recipe: Recipe
) -> tuple[Sequence[int], Sequence[int]]:
    """Divide the numbers of texts into training and held-out ones, label by label."""
    best = [int(np.argmax(truth[i])) if isinstance(truth[i], list) else truth[i] for i in used]
    train, out = split_rows(list(map(str, best)), recipe.validation_share, recipe.seed)
    return [used[i] for i in train], [used[i] for i in out]


def _base_of(model: Model) -> str | None:
    """Return the name of the model that an adapter points to; None without an adapter."""
    origin = model.config.provenance.origin
    return origin.name if origin is not None and model.config.adapter is not None else None


LABELS = 100
"""The most labels that a card shows; the settings have all of them."""


def classifier_card(
    model: Model,
    settings: Settings,
    recipe: tuple[list[str], dict[str, str]] | None = None,
    way: tuple[str, str] = ("", ""),
) -> str:
    """Return the README.md of a classifier's folder; `recipe` is that of its prompter.

    `way` says how it answers and why.

    Labels and prompt may come from strangers, so they are put in code blocks that they cannot end.
    """
    # With its line ends written out, one label cannot look like two.
    shown = [label.replace("\n", "⟨U+000A⟩") for label in settings.shown[:LABELS]]
    if more := len(settings.shown) - len(shown):
        shown.append(f"... and {number(more)} more")
    return model_card(
        model,
        template="classifier_card.md",
        library="mlmjax",
        pipeline="text-classification",
        labels=shown,
        multi_label=settings.multi_label,
        prompt=settings.template,
        anchor=settings.anchor,
        head=settings.head == "classification",
        recipe=recipe,
        base=_base_of(model),
        way=way,
        most=settings.max_length or model.config.max_position_embeddings,
        calibration=settings.calibration,
    )
