"""Map each label to its token at the slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import compress, product
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal

from mlmjax.errors import InputError, suggest_keywords
from mlmjax.text.checks import check_text
from mlmjax.text.tokenizer import Tokenizer

OptionNames = Literal["letters", "numbers"]
_NUMBERS = 9999  # Tokenizers have one token for the first few hundred.


def option_names(
    n: int, kind: OptionNames = "letters", tokenizer: Tokenizer | None = None
) -> list[str]:
    """Return the first `n` option names of a tokenizer: A to Z, then AA on, or numbers.

    Each is one token. Numbers end at the first that is not. Without `tokenizer` they are those of
    ModernBERT, where each is one token after a space: 457 letters, and 1 to 557. Raises
    `InputError` if there are fewer.

    >>> option_names(4), option_names(3, "numbers")
    (['A', 'B', 'C', 'D'], ['1', '2', '3'])
    """
    if tokenizer is None and kind == "letters" and n <= len(ascii_uppercase):
        return list(ascii_uppercase[:n])  # Needs no tokenizer.
    if n > len(names := _names(kind, tokenizer or _packaged())):
        raise InputError(
            f"{n} options: this tokenizer has {len(names)} option names of one token ({kind}); "
            f"give at most {len(names)} options"
        )
    return names[:n]


def usable_option_names(kind: OptionNames, tokenizer: Tokenizer, most: int) -> list[str]:
    """Return up to `most` option names of a tokenizer, as many as it has."""
    if kind == "letters" and most <= len(ascii_uppercase):
        letters = list(ascii_uppercase[:most])
        if all(_are_tokens(letters, tokenizer)):  # which takes less than to try all names
            return letters
    return _names(kind, tokenizer)[:most]


def surface(name: str, tokenizer: Tokenizer) -> str:
    """Return how a name is written at the slot: after a space, if the vocabulary has such pieces.

    Vocabularies of characters have only the bare name.

    >>> surface("A", Tokenizer.from_pretrained())
    ' A'
    """
    return f" {name}" if _has_spaces(tokenizer) else name


@cache
def _packaged() -> Tokenizer:
    return Tokenizer.from_pretrained()


@lru_cache(maxsize=8)
def _has_spaces(tokenizer: Tokenizer) -> bool:
    letters = [*ascii_uppercase, *ascii_lowercase, *digits]
    if any(_are_one([f" {letter}" for letter in letters], tokenizer)):
        return True
    # Byte-level and SentencePiece vocabularies write a space so.
    return any(len(name) > 1 and name[0] in "Ġ▁" for name in tokenizer.backend.get_vocab())


@lru_cache(maxsize=8)
def _names(kind: OptionNames, tokenizer: Tokenizer) -> list[str]:
    if kind == "numbers":
        names = [str(n) for n in range(1, _NUMBERS + 1)]
        return names[: [*_are_tokens(names, tokenizer), False].index(False)]
    names = [*ascii_uppercase, *map("".join, product(ascii_uppercase, repeat=2))]
    return list(compress(names, _are_tokens(names, tokenizer)))


def _are_tokens(names: Sequence[str], tokenizer: Tokenizer) -> list[bool]:
    """Tell of each name whether it is one token of its own at the slot."""
    return _are_one([surface(name, tokenizer) for name in names], tokenizer)


def _are_one(forms: Sequence[str], tokenizer: Tokenizer) -> list[bool]:
    encoded = tokenizer.encode_plain_batch(forms)
    return [len(ids) == 1 and ids[0] not in tokenizer.special_ids for ids in encoded]


@suggest_keywords
@dataclass(frozen=True)
class Verbalizer:
    """Hold the surface forms of each label, each exactly one token.

    `forms` maps a label to its forms, a list or one string, with the leading space: `" A"` follows
    the anchor in training, `"A"` is another token. The probability of a label is the sum over its
    forms. Raises `InputError` for fewer than two labels and for blank ones.

    >>> Verbalizer({"yes": [" yes"], "no": " no"}).labels
    ('yes', 'no')
    """

    forms: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        if not isinstance(self.forms, Mapping):
            raise InputError(
                f"verbalizer is {type(self.forms).__name__}; expected label -> list of forms"
            )
        forms = {}
        for label, given in self.forms.items():
            check_text(label, f"label {label!r}")
            if not label.strip():
                raise InputError(f"label {label!r} is blank; expected some text")
            if not isinstance(given, str | list | tuple) or not given:
                raise InputError(f"label {label!r}: has no forms; expected a list such as [' yes']")
            forms[label] = (given,) if isinstance(given, str) else tuple(given)
            for form in forms[label]:
                check_text(form, f"label {label!r}: form {form!r}")
                if not form.strip():
                    raise InputError(f"label {label!r}: form {form!r} is blank; expected some text")
        if len(forms) < 2:
            count = "1 label" if len(forms) == 1 else "no label"
            raise InputError(f"found {count}; expected at least two")
        object.__setattr__(self, "forms", forms)

    @classmethod
    def letters(
        cls,
        labels: Sequence[str],
        bare: bool = False,
        names: OptionNames = "letters",
        tokenizer: Tokenizer | None = None,
    ) -> "Verbalizer":
        """Name the labels " A", " B", ...; `bare` adds "A", as published for MMLU.

        With `names="numbers"` they are named " 1", " 2", ... Names and their forms are those that
        `tokenizer` has as one token (default: those of ModernBERT).
        """
        _check_distinct(labels)
        chosen = option_names(len(labels), names, tokenizer)
        return cls(
            {
                label: _forms(name, bare, tokenizer)
                for label, name in zip(labels, chosen, strict=True)
            }
        )

    @classmethod
    def words(
        cls, labels: Sequence[str], bare: bool = False, tokenizer: Tokenizer | None = None
    ) -> "Verbalizer":
        """Name each label by itself, after a space; `bare` adds the label without it.

        With `tokenizer` the form is that which its words have (`surface`).
        """
        _check_distinct(labels)
        return cls({label: _forms(label, bare, tokenizer) for label in labels})

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in the given order."""
        return tuple(self.forms)

    def unusable(self, tokenizer: Tokenizer) -> list[str]:
        """Return the labels with a form that is not one token, or the token of an earlier form.

        >>> sizes = Verbalizer.words(["small", "extra large"])
        >>> sizes.unusable(Tokenizer.from_pretrained())
        ['extra large']
        """
        found, taken = [], set(tokenizer.special_ids)
        for label, forms in self.forms.items():
            tokens = tokenizer.encode_plain_batch(forms)
            if any(len(ids) != 1 for ids in tokens) or taken & {ids[0] for ids in tokens}:
                found.append(label)
            else:
                taken |= {ids[0] for ids in tokens}
        return found

    def ids(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """Return the token of every form, label by label.

        Raises `InputError` for a form that is not exactly one token, with its pieces, and for a
        token that two forms share.
        """
        pairs = [(label, form) for label, forms in self.forms.items() for form in forms]
        encoded = tokenizer.encode_plain_batch([form for _, form in pairs])
        owners: dict[int, str] = {}
        result: dict[str, tuple[int, ...]] = dict.fromkeys(self.forms, ())
        for (label, form), ids in zip(pairs, encoded, strict=True):
            where = f"label {label!r}: form {form!r}"
            if len(ids) != 1:
                pieces = " + ".join(repr(tokenizer.decode([i])) for i in ids)
                raise InputError(
                    f"{where} is {len(ids)} tokens ({pieces}); each form must be one token: "
                    "choose another word, or name the labels by letters"
                )
            if ids[0] in tokenizer.special_ids:
                raise InputError(
                    f"{where} is the special token {tokenizer.decode(ids)}; "
                    "choose a word the tokenizer knows"
                )
            if ids[0] in owners:
                raise InputError(
                    f"{where} is the same token as a form of label {owners[ids[0]]!r}; "
                    "each form needs another token"
                )
            owners[ids[0]] = label
            result[label] += (ids[0],)
        return list(result.values())


def _forms(name: str, bare: bool, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    first = f" {name}" if tokenizer is None else surface(name, tokenizer)
    return tuple(dict.fromkeys([first, name] if bare else [first]))


def _check_distinct(labels: Sequence[str]) -> None:
    if isinstance(labels, str):
        raise InputError(f"labels: is the text {labels!r:.60}; expected a list of labels")
    for number, label in enumerate(labels, 1):
        check_text(label, f"label {number}")
    if len(set(labels)) < len(labels):
        label = next(label for at, label in enumerate(labels) if label in labels[:at])
        raise InputError(f"label {label!r}: is repeated; list every label once")
