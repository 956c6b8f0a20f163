"""Read and write what sentence_transformers keeps beside a model: pooling, length, prompts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mlmjax.errors import InputError, named_place, suggest_keywords, suggest_name
from mlmjax.storage import (
    EMBEDDING_LENGTH,
    EMBEDDING_MODULES,
    EMBEDDING_POOLING,
    EMBEDDING_PROMPTS,
    MAX_JSON_BYTES,
    parse_object,
    plain_file,
    read_bounded,
    read_json,
)
from mlmjax.text.tokenizer import Tokenizer

Pooling = Literal["mean", "cls", "max"]
_KEYS: dict[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
}
_POOLING = EMBEDDING_POOLING.partition("/")[0]
_KINDS = ("Transformer", "Pooling", "Normalize")


@suggest_keywords
@dataclass(frozen=True)
class EmbeddingSettings:
    """How the vectors of tokens become the vector of a text.

    `prompts` are texts by their names, one of which may be put before each text; `default_prompt`
    is the name of the one that is used where none is given. Raises `InputError` for bad values.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def __post_init__(self) -> None:
        known = get_args(Pooling)
        if self.pooling not in known:
            raise InputError(
                f"pooling is {self.pooling!r:.60}; expected one of {', '.join(map(repr, known))}"
            )
        is_number = isinstance(self.max_length, int) and not isinstance(self.max_length, bool)
        if self.max_length is not None and not is_number:
            raise InputError(f"max_length is {self.max_length!r:.60}; expected a number of tokens")
        if not isinstance(self.prompts, Mapping) or not all(
            isinstance(text, str) for pair in self.prompts.items() for text in pair
        ):
            raise InputError(f"prompts are {self.prompts!r:.200}; expected {{name: text}}")
        self.prompt(self.default_prompt)

    def prompt(self, name: str | None) -> str:
        """Return the text of a prompt, or of the default one for None; "" if there is none.

        >>> EmbeddingSettings(prompts={"query": "Q: "}).prompt("query")
        'Q: '
        """
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise InputError(
                f"prompt {name!r:.60}: the model has no prompt of this name; "
                f"{suggest_name(name, list(self.prompts))}its prompts: {known}"
            )
        return self.prompts[name]


def read_settings(folder: Path, tokenizer: Tokenizer, longest: int) -> EmbeddingSettings:
    """Return the settings of a model folder, or the default ones if it has none.

    `longest` is the number of positions of the model. Raises `InputError` for a folder whose
    vectors take more than this package computes.
    """
    if not (folder / EMBEDDING_MODULES).exists():
        return EmbeddingSettings()
    kinds = _read_modules(folder)
    pooling, length = _read_pooling(folder), _read_length(folder, tokenizer, longest)
    prompts = read_json(folder, EMBEDDING_PROMPTS) if _has(folder, EMBEDDING_PROMPTS) else {}
    with named_place(str(folder / EMBEDDING_PROMPTS)):
        return EmbeddingSettings(
            pooling,
            "Normalize" in kinds,
            length,
            prompts.get("prompts") or {},
            prompts.get("default_prompt_name"),
        )


def settings_files(
    settings: EmbeddingSettings, hidden_size: int, max_length: int
) -> dict[str, str]:
    """Return the files that sentence_transformers reads, by their names in the model's folder."""
    modules = [("", "Transformer"), (_POOLING, "Pooling")]
    modules += [("2_Normalize", "Normalize")] if settings.normalize else []
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": hidden_size, "include_prompt": True}
    pooling |= {key: mode == settings.pooling for mode, key in _KEYS.items()}
    prompts = {
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt,
        "similarity_fn_name": "cosine",
    }
    values: dict[str, Any] = {
        EMBEDDING_MODULES: listed,
        EMBEDDING_POOLING: pooling,
        EMBEDDING_LENGTH: {"max_seq_length": max_length, "do_lower_case": False},
        EMBEDDING_PROMPTS: prompts,
    }
    return {
        name: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for name, value in values.items()
    }


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def _read_modules(folder: Path) -> dict[str, str]:
    """Return the paths of the modules by their kinds."""
    where = folder / EMBEDDING_MODULES
    content = read_bounded(plain_file(folder, EMBEDDING_MODULES), MAX_JSON_BYTES)
    # The file holds a list, which is wrapped to be parsed as an object.
    modules = parse_object(b'{"modules": ' + content + b"}", str(where))["modules"]
    if not isinstance(modules, list) or not all(
        isinstance(one, dict) and isinstance(one.get("type"), str) for one in modules
    ):
        raise InputError(f"{where}: expected a list of modules with their types")
    kinds = {one["type"].rpartition(".")[2]: str(one.get("path", "")) for one in modules}
    if tuple(kinds) not in (_KINDS, _KINDS[:2]) or len(kinds) < len(modules):
        found = ", ".join(one["type"] for one in modules)
        raise InputError(
            f"{where}: has the modules {found:.300}; expected {', '.join(_KINDS[:2])} and at most "
            f"{_KINDS[2]}; the others cannot be computed here"
        )
    if (paths := (kinds["Transformer"], kinds["Pooling"])) != ("", _POOLING):
        raise InputError(
            f"{where}: the model and its pooling are in the folders {paths!r:.120}; expected the "
            f"model beside this file, and {_POOLING}"
        )
    return kinds


def _read_pooling(folder: Path) -> Pooling:
    where = folder / EMBEDDING_POOLING
    values = read_json(where.parent, where.name)
    modes = values.get("pooling_mode")
    if modes is None:
        chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value]
        names: dict[str, str] = {key: mode for mode, key in _KEYS.items()}
        modes = [names.get(key, key) for key in chosen] or ["mean"]
    (found,) = modes if isinstance(modes, list) and len(modes) == 1 else (modes,)
    if not isinstance(found, str) or found not in _KEYS:
        raise InputError(f"{where}: pools by {found!r:.200}; expected one of {', '.join(_KEYS)}")
    if values.get("include_prompt") is False:
        raise InputError(f"{where}: include_prompt is false, which is not supported")
    return found


def _read_length(folder: Path, tokenizer: Tokenizer, longest: int) -> int:
    """Return the most tokens of a text, as sentence_transformers finds it."""
    values = read_json(folder, EMBEDDING_LENGTH) if _has(folder, EMBEDDING_LENGTH) else {}
    if values.get("do_lower_case"):
        raise InputError(
            f"{folder / EMBEDDING_LENGTH}: do_lower_case is true; expected false, because texts "
            "are given to the tokenizer unchanged"
        )
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    given = [values.get("max_seq_length"), settings.get("model_max_length")]
    found = next((length for length in given if length is not None), longest)
    if not isinstance(found, int | float) or isinstance(found, bool) or found < 1:
        raise InputError(f"{folder}: the longest text has {found!r:.60} tokens; expected a number")
    return int(min(found, longest))
