"""A text classifier in the shape of scikit-learn: zero-shot through the mask, or fine-tuned."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score

from mlmjax.classification.fitting import Recipe, held_out, learn, shown_with
from mlmjax.classification.labels import label_numbers
from mlmjax.classification.predictor import Predictor
from mlmjax.classification.prompter import Question, make_asking
from mlmjax.classification.settings import Settings
from mlmjax.config.tables import decode
from mlmjax.errors import InputError
from mlmjax.model.modernbert import Model, parameters, with_classifier
from mlmjax.reporting.markdown import fenced, number
from mlmjax.reporting.terminal import bar
from mlmjax.storage import CLASSIFIER, TRAINING
from mlmjax.text.checks import check_list, check_texts
from mlmjax.weights.pretrained import save_pretrained


class Classifier(Predictor, ClassifierMixin, BaseEstimator):
    """Assigns each text one of the labels, or several, by the answer at the slot.

    `source` is a folder, a hub id, or a `(model, tokenizer)` pair. `labels` is a list of names or a
    table `{name: description}`, at least two; None takes those a saved classifier has, else those
    that `fit` sees, sorted. Without `fit` the answers are zero-shot. As in scikit-learn the
    constructor only stores its arguments, and nothing is read before it is needed.

    How it asks (None: as a saved classifier does, else the first named):

    - `head`: "mlm", the answer at the slot, or "classification", a last layer that `fit` trains.
    - `answer`: "letters", options in the prompt named A, B, ... (past 457 of them 1, 2, ...);
      "words", the label itself, which has to be one token; "continuation", a label of any number of
      tokens by its pseudo-log-likelihood at the slot, one forward pass for each of its tokens.
    - More labels than one prompt holds are asked in rounds (`shortlist.in_rounds`).
    - `instruction` replaces the first sentence of the prompt; `template` (a `Template`, or its
      text) the whole of it. It has the field `{text}`, as a rule `{options}`, and `{examples}`
      and `{label}` where these are used.
    - `examples`: pairs of text and label to stand in the prompt, as many as fit, by turns of label.
    - `orders`: 1, the options as given; k or "all" evenly spaced cyclic orders, their
      probabilities averaged, at that many forward passes. `fit` shows each example in one of these
      orders, and a fitted classifier is to be asked in those it was fitted in.
    - `long_text`: "shorten" a text that is too long at its end (counted in `shortened`), or ask
      windows of it and take the "mean" of their probabilities, or each label's "max".
    - `multi_label`: each label is a question of yes or no; labels are lists of names, answers
      columns of 0 and 1, probabilities do not sum to 1.
    - `abstain_below`: a text whose best probability is lower is answered by "".

    `epochs` to `patience` are those of `fit` (`learning.Recipe`). `progress` shows a bar: None on a
    terminal when it takes long. `classes_` has the labels in the order given, `history_` an entry
    per epoch of `fit`.
    """

    def set_params(self, **params: Any) -> "Classifier":
        """Set constructor arguments; what was loaded or fitted under others is dropped."""
        super().set_params(**params)
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        return self

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that this takes a list of texts."""
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        tags.classifier_tags.multi_label = bool(self.multi_label)
        return tags

    def score(
        self, texts: Iterable[str], labels: Iterable[Any], sample_weight: Any = None
    ) -> float:
        """Return the accuracy on labelled texts; of several labels all have to be right."""
        predicted = self.predict(texts)
        truth = label_numbers(labels, list(self.classes_), self.settings_.multi_label, known=False)
        if self.settings_.multi_label:
            return float(accuracy_score(truth, predicted, sample_weight=sample_weight))
        names = [*self.classes_, ""]
        right = [names[number] for number in truth]
        return float(accuracy_score(right, predicted, sample_weight=sample_weight))

    def fit(
        self,
        texts: Iterable[str],
        labels: Iterable[Any],
        *,
        validation: tuple[Iterable[str], Iterable[Any]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **recipe: Any,
    ) -> "Classifier":
        """Fine-tune on labelled texts, always from the source's weights.

        `recipe` replaces the constructor's `epochs`, `learning_rate`, `batch_size` (there
        `train_batch_size`), `weight_decay`, `warmup`, `seed`, `validation_share`, `patience`. Equal
        seeds give equal weights. `validation` is a pair of texts and labels, else
        `validation_share` of the rows is held out; their accuracy and loss after each epoch stand
        in `history_`. `progress` is called with updates done and updates in all.

        Raises `InputError` for blank texts, labels that are not among `classes_`, fewer than two
        distinct labels, and lengths that differ; `RunError` when the loss is no longer finite.
        """
        how = self._recipe(recipe)
        texts, labels = list(check_list(texts, "texts")), _rows(labels, "labels")
        settings, model, tokenizer, _ = self._read(seen=labels)
        several, names = settings.multi_label, list(settings.labels)
        if how.patience is not None and validation is None and not how.validation_share:
            raise InputError(
                f"fit: patience is {how.patience}, but no texts are held out to be patient about; "
                "give validation or validation_share, or leave patience out"
            )
        truth = label_numbers(labels, names, several)
        if len({str(one) for one in truth}) < 2:
            found = ", ".join(sorted({repr(one) for one in labels})) or "none"
            raise InputError(f"fit: the distinct labels are {found}; expected at least two")
        if len(texts) != len(truth):
            raise InputError(f"fit: {len(texts)} texts and {len(truth)} labels; give one per text")
        if settings.head == "classification":
            model = with_classifier(model, names, seed=how.seed)
        asking = make_asking(settings, model, tokenizer, batch_size=self.batch_size)
        # What was learned of the probabilities of other weights does not hold for these.
        fresh = {"calibration": None, "conformal": None, "abstain_below": self.abstain_below}
        other = type(self)(**self.get_params(deep=False))
        other._keep(settings.model_copy(update=fresh), asking)
        train: Sequence[int] = range(len(texts))
        out = None
        if validation is not None:
            if not isinstance(validation, Sequence) or len(validation) != 2:
                raise InputError("validation: expected a pair of texts and their labels")
            out = (
                list(check_list(validation[0], "validation texts")),
                _rows(validation[1], "validation labels"),
            )
        elif how.validation_share:
            train, rows = held_out([str(one) for one in truth], how.validation_share, how.seed)
            out = [texts[i] for i in rows], [labels[i] for i in rows]
        if out is not None and not out[0]:
            raise InputError("validation: there is no text to hold out; give more rows")
        examples = other._examples(train, texts, truth, how.seed)
        judge = None if out is None else other._judge(*out)
        with bar("fine-tuning", self.progress) as shown:
            model, history = learn(asking, examples, how, judge=judge, progress=progress or shown)
        asking.scorer.model = model
        self._keep(other.settings_, asking)
        self.history_ = history
        return self

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32") -> None:
        """Write the model as a Hugging Face folder, and all else of the classifier beside it.

        `Classifier.from_pretrained(path)` brings all of it back; raises as `hf.save_pretrained`.
        """
        scorer = self._ready().scorer
        values = self.settings_.model_dump(mode="json", exclude_none=True)
        files = {CLASSIFIER: json.dumps(values, ensure_ascii=False, indent=2) + "\n"}
        if self.manifest_ is not None and not hasattr(self, "history_"):
            files[TRAINING] = self.manifest_
        card = classifier_card(scorer.model, self.settings_)
        save_pretrained(
            scorer.model, scorer.tokenizer, path, dtype=dtype, card=card, more_files=files
        )

    def _recipe(self, given: Mapping[str, Any]) -> Recipe:
        own = {name: getattr(self, name) for name in Recipe.model_fields}
        own["batch_size"] = self.train_batch_size
        values = {**own, **given}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        return decode(Recipe, plain, "fit")

    def _examples(
        self, rows: Sequence[int], texts: Sequence[str], truth: Sequence[Any], seed: int
    ) -> tuple[list[Any], list[int]]:
        """Return prompts to learn from, and the columns of their answers."""
        names = check_texts(texts)
        questions: list[Question] = []
        answers: list[int] = []
        where: list[str] = []
        size, labels = self._size(), len(self.classes_)
        for row in rows:
            asked = self._questions(texts[row])
            if self.settings_.multi_label:
                golds = [0 if has else 1 for has in truth[row]]
            else:
                golds = [self._order()[truth[row]]]
                if self.settings_.head == "mlm":
                    drawn = shown_with(truth[row], labels, size, np.random.default_rng([seed, row]))
                    asked = [asked[0]._replace(choice=drawn)]
            questions += asked
            answers += golds
            where += [names[row]] * len(asked)
        return self.asking_.examples(questions, answers, where, seed=seed)

    def _judge(self, texts: Sequence[str], labels: Sequence[Any]) -> Callable[[Model], Any]:
        """Return the function from a model to its accuracy and loss on these texts."""
        check_texts(texts)
        truth = self._gold(labels, len(texts))

        def judge(model: Model) -> tuple[float, float]:
            self.asking_.scorer.model = model
            raw = np.concatenate(list(self._raw(texts)))
            right = raw.argmax(axis=1) == truth
            return float(right.mean()), float(-raw[np.arange(len(truth)), truth].mean())

        return judge


def _rows(labels: Any, what: str) -> list[Any]:
    """Return right answers as a list; raise `InputError` for anything but a list of rows."""
    return list(check_list(labels, what, "one per text", columns=2))


LABELS = 100
"""Labels shown; all of them stand in the settings beside the card."""


def classifier_card(model: Model, settings: Settings) -> str:
    """Return the text of README.md for a model and the settings of the classifier it belongs to.

    Labels and prompt may be a stranger's: they stand in code blocks that they cannot end.
    """
    text = (resources.files("mlmjax") / "assets" / "classifier_card.md").read_text(encoding="utf-8")
    shown = [_one_line(label) for label in settings.shown[:LABELS]]
    if more := len(settings.shown) - len(shown):
        shown.append(f"... and {number(more)} more")
    return Template(text).substitute(
        name=type(model).__name__,
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        parameters=number(sum(leaf.size for leaf in parameters(model).values())),
        labels=fenced("\n".join(shown)),
        applies=(
            "Several may apply to a text, or none."
            if settings.multi_label
            else "One of them applies to a text."
        ),
        prompt=fenced(settings.template),
    )


def _one_line(label: str) -> str:
    """Write out line ends, so that one label cannot look like two."""
    return label.replace("\n", "⟨U+000A⟩")
