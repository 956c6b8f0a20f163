"""Read run files: one type for each table."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mlmjax.config.data import (
    DataConfig,
    Name,
    NonNegativeFloat,
    OpenShare,
    Place,
    PositiveFloat,
    Share,
)
from mlmjax.config.tables import StrictTable, decode, override, read_toml
from mlmjax.errors import InputError, suggest_keywords, suggest_name

# TPU kernels process a sequence in tiles of 128 tokens.
Tiles = Annotated[int, Field(gt=0, le=8192, multiple_of=128)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Head = Literal["mlm", "classification"]
# The model imports these names; it knows nothing else of a run.
AttentionName = Literal["auto", "dense", "banded", "cudnn", "splash"]
TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
Remat = Literal["none", "dots", "layer"]
SPLASH_BLOCKS = (512, 256)


MASKINGS = ("token", "whole_word", "span", "weights", "phrases", "loss")
LOSSES = ("cross_entropy", "replaced_tokens")
_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_code(name: str) -> bool:
    """Tell whether a name is that of code, as in `package.module:function`."""
    return _CODE.fullmatch(name) is not None


def _one_of_or_code(known: tuple[str, ...]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name in known or is_code(name):
            return name
        raise ValueError(
            f"is {name!r:.60}; {suggest_name(name, known)}expected {', '.join(known)}, or code of "
            "your own as package.module:function"
        )

    return check


class DrawnRate(StrictTable):
    """Draw the mask rate of each example, from one of two distributions.

    `beta` are the two parameters of a beta distribution. `uniform` are the lowest and the highest
    rate.
    """

    beta: tuple[PositiveFloat, PositiveFloat] | None = None
    uniform: tuple[Share, Share] | None = None

    @model_validator(mode="after")
    def _one_distribution(self) -> "DrawnRate":
        if (self.beta is None) == (self.uniform is None):
            raise ValueError("give exactly one of beta = [a, b] and uniform = [lowest, highest]")
        if self.uniform is not None and self.uniform[0] >= self.uniform[1]:
            raise ValueError(f"uniform is {list(self.uniform)}; expected the lowest rate first")
        return self

    def draw(self, rng: Any) -> float:
        """Draw one rate; `rng` is a generator of numpy."""
        draw, values = (rng.beta, self.beta) if self.beta else (rng.uniform, self.uniform or ())
        return float(draw(*values))

    @property
    def mean(self) -> float:
        """Return the mean of the distribution."""
        return self.beta[0] / sum(self.beta) if self.beta else sum(self.uniform or ()) / 2

    @property
    def highest(self) -> float:
        """Return the highest rate."""
        return 1.0 if self.uniform is None else self.uniform[1]

    def __str__(self) -> str:
        return f"drawn from beta{self.beta}" if self.beta else f"drawn from uniform{self.uniform}"


class ObjectiveConfig(StrictTable):
    """Set the shares of the objectives, drawn per example; the rest is answer token prediction.

    The share of tokens masked at random is `mlm_rate`, or goes from it at the first update to
    `mlm_rate_end` at the last, or is drawn for each example. `masking` is the unit that is drawn
    until that share is reached; the table `mask_table` has its weights or phrases. MLM replaces
    the shares `random_tokens` and `kept_tokens` of the masked tokens by random tokens and by
    themselves. `target_weight` says what a target that is masked at random weighs in the loss:
    1, or the inverse of the rate of its example.

    `loss` is the loss of the targets. It and `masking` may name code, as `package.module:function`.

    `normalize` says over what the probabilities of the loss of a label sum to 1: all tokens, or the
    labels of its source. With `ordered` the labels are levels from low to high, and the loss is the
    ranked probability score. `label_smoothing` is the share of the right probability that all
    labels divide equally.
    """

    dummy_mlm_share: Share = 0.0
    mlm_share: Share = 0.0
    masking: Annotated[str, AfterValidator(_one_of_or_code(MASKINGS))] = "token"
    mask_table: Place | None = None
    mlm_rate: OpenShare | DrawnRate = 0.3
    mlm_rate_end: OpenShare | None = None
    random_tokens: Share = 0.0
    kept_tokens: Share = 0.0
    target_weight: Literal["one", "inverse_rate"] = "one"
    loss: Annotated[str, AfterValidator(_one_of_or_code(LOSSES))] = "cross_entropy"
    normalize: Literal["vocabulary", "labels"] = "vocabulary"
    ordered: bool = False
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @property
    def kind(self) -> Literal["vocabulary", "labels", "ranked"]:
        """Return the loss of an answer with options."""
        return "ranked" if self.ordered else self.normalize

    @property
    def mean_rate(self) -> float:
        """Return the mean mask rate of an example at the first update."""
        return self.mlm_rate.mean if isinstance(self.mlm_rate, DrawnRate) else self.mlm_rate

    @property
    def highest_rate(self) -> float:
        """Return the highest mask rate of any example."""
        if isinstance(self.mlm_rate, DrawnRate):
            return self.mlm_rate.highest
        return max(self.mlm_rate, self.mlm_rate_end or 0.0)

    @property
    def code(self) -> tuple[str, ...]:
        """Return the names of code in it, each as `package.module:function`."""
        return tuple(filter(is_code, (self.masking, self.loss)))

    @property
    def needs_labels(self) -> bool:
        """Tell whether the loss of every answer needs all labels of its source."""
        return self.kind != "vocabulary" or self.label_smoothing > 0

    @model_validator(mode="after")
    def _at_most_one(self) -> "ObjectiveConfig":
        if self.dummy_mlm_share + self.mlm_share > 1.0:
            raise ValueError(
                f"dummy_mlm_share {self.dummy_mlm_share} + mlm_share {self.mlm_share} is above 1; "
                "lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _masks(self) -> "ObjectiveConfig":
        has_table = self.masking in ("weights", "phrases")
        if has_table != (self.mask_table is not None):
            found = "no mask_table" if has_table else f"mask_table = {self.mask_table!r}"
            raise ValueError(
                f"masking is {self.masking!r}, and there is {found}; a table (mlmjax mask-table "
                "writes one) belongs to masking = 'weights' and 'phrases'"
            )
        if isinstance(self.mlm_rate, DrawnRate) and self.mlm_rate_end is not None:
            raise ValueError("mlm_rate is drawn for each example; leave mlm_rate_end out")
        if self.random_tokens + self.kept_tokens > 1.0:
            raise ValueError(
                f"random_tokens {self.random_tokens} + kept_tokens {self.kept_tokens} is above 1; "
                "lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _own_loss(self) -> "ObjectiveConfig":
        if self.loss != "cross_entropy" and self.needs_labels:
            raise ValueError(
                f"loss is {self.loss!r}; leave normalize, ordered and label_smoothing out"
            )
        if self.loss == "replaced_tokens" and (self.mlm_share, self.random_tokens) != (1.0, 1.0):
            raise ValueError(
                "loss = 'replaced_tokens' finds random tokens; set mlm_share = 1.0 and "
                "random_tokens = 1.0"
            )
        return self


class OptimizerConfig(StrictTable):
    """Configure the optimizer; weight decay applies to matrices only.

    `layer_decay` multiplies the learning rate once for each layer above a parameter (1: no decay).
    `ema` is the decay of the averaged parameters that are validated and exported (0: no average).
    An update whose gradient norm exceeds `skip_spikes` times the usual one is skipped (None: no
    update is skipped, and a norm that is not finite ends the run). `train` are patterns of the
    parameters to train, such as `["*bias", "*norm*"]` (None: all).
    """

    name: Literal["adamw", "stable_adamw"] = "adamw"
    learning_rate: PositiveFloat = 3e-5
    weight_decay: NonNegativeFloat = 0.01
    b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    eps: PositiveFloat = 1e-6
    clip: NonNegativeFloat = 1.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    skip_spikes: Annotated[float, Field(gt=1.0, le=3e38)] | None = None
    train: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _depth_of_all(self) -> "OptimizerConfig":
        if self.train is not None and self.layer_decay != 1:
            raise ValueError(
                "layer_decay counts the layers of a whole model, and train chooses parameters; "
                "leave one of them out"
            )
        return self


ADAPTED = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
"""The products of a layer that an adapter can change."""


class AdapterConfig(StrictTable):
    """Train two small matrices for each target, and keep the model frozen.

    LoRA (Hu et al. 2021, arXiv 2106.09685): a weight W acts as W + (alpha / rank) A B, where A maps
    to `rank` values and B from them. `targets` are names of `ADAPTED`, or their endings. `dropout`
    is there for files of others; training has none.
    """

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = ("Wqkv", "Wo", "Wi")
    dropout: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0

    @model_validator(mode="after")
    def _known_targets(self) -> "AdapterConfig":
        endings = {*ADAPTED, *(name.partition(".")[2] for name in ADAPTED)}
        for target in self.targets or ("",):
            if target not in endings:
                hint = suggest_name(target, sorted(endings))
                raise ValueError(
                    f"targets: found {target!r}; {hint}expected names of {', '.join(ADAPTED)}, or "
                    "their endings"
                )
        return self

    @property
    def scale(self) -> float:
        """Return the factor of the product of the two matrices."""
        return self.alpha / self.rank

    def is_same(self, other: "AdapterConfig") -> bool:
        """Tell whether another one computes the same; names of targets may be long or short.

        >>> AdapterConfig().is_same(AdapterConfig(targets=ADAPTED))
        True
        """
        alike = (self.rank, self.alpha) == (other.rank, other.alpha)
        return alike and all(self.changes(name) == other.changes(name) for name in ADAPTED)

    def changes(self, name: str) -> bool:
        """Tell whether this product of a layer is a target.

        >>> [AdapterConfig(targets=("Wo",)).changes(name) for name in ADAPTED]
        [False, True, False, True]
        """
        return any(f".{name}".endswith(f".{target}") for target in self.targets)


class ScheduleConfig(StrictTable):
    """Set the learning rate over the run.

    `warmup` and `decay` are fractions (< 1) or steps (>= 1).
    """

    name: Literal["wsd", "cosine", "linear"] = "wsd"
    warmup: NonNegativeFloat = 0.05
    decay: NonNegativeFloat = 0.1


class CheckpointConfig(StrictTable):
    """Say where and how often to write checkpoints, and which to keep.

    `path` defaults to `checkpoints` in the run folder; `every = 0` means only at the end.
    """

    path: Place | None = None
    every: Annotated[int, Field(ge=0, lt=2**31)] = 500
    keep_last: Count = 2
    keep_best: Annotated[int, Field(ge=0, lt=2**31)] = 1


class EvaluationConfig(StrictTable):
    """Say how often to validate; 0 means only at the end.

    The run stops early after `patience` validations in a row without a lower loss (None: it runs
    to its end), and the parameters of the lowest loss are exported.
    """

    every: Annotated[int, Field(ge=0, lt=2**31)] = 500
    patience: Count | None = None


class LogConfig(StrictTable):
    """Say how often to write a line of metrics, and which trackers get it under which project."""

    every: Count = 10
    to: tuple[TrackerName, ...] = ("tensorboard",)
    project: Name = "mlmjax"


class MeshConfig(StrictTable):
    """Set the devices along each mesh axis; `data = -1` takes the remaining ones."""

    data: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    fsdp: Count = 1
    tensor: Count = 1

    @model_validator(mode="after")
    def _data_axis(self) -> "MeshConfig":
        if self.data < 1 and self.data != -1:
            raise ValueError(f"data is {self.data}; expected -1 (the remaining devices) or >= 1")
        return self


class RunConfig(StrictTable):
    """Describe one training run, decoded from one TOML file.

    Its length is `steps` updates, or `epochs` passes over the prepared training rows.
    `head = "classification"` trains a linear layer over the pooled text instead of the MLM head:
    on the labels of the sources, or, without labels, on the answer as a number. `anchor` names the
    token before the mask of a prompt ("none": no token; default: that of the tokenizer).
    """

    out: Place
    # Without a value it is counted from `epochs` once the rows are there; see `with_steps`.
    steps: Count = 1
    epochs: PositiveFloat | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    init_from: Place | None = None
    revision: Name | None = None
    model: Mapping[str, Any] | None = None
    tokenizer: Place | None = None
    anchor: Name | None = None
    head: Head = "mlm"
    parallel: Literal["pjit", "pmap"] = "pjit"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: AttentionName = "auto"
    splash_blocks: tuple[Tiles, Tiles] = SPLASH_BLOCKS
    remat: Remat = "none"
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _one_length(self) -> "RunConfig":
        has_steps = "steps" in self.model_fields_set
        if has_steps == (self.epochs is not None):
            found = "both steps and epochs" if has_steps else "steps: is missing, and so is epochs"
            raise ValueError(
                f"{found}; give either steps (updates) or epochs (passes over the training rows)"
            )
        if self.epochs is not None and self.data.batch_start is not None:
            raise ValueError(
                "epochs cannot be counted while batches grow (data.batch_start); give steps"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unknown_steps(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if self.epochs is not None:
            values.pop("steps", None)
        return values

    def with_steps(self, steps: int) -> "RunConfig":
        """Return the configuration with this length in place of `epochs`."""
        return self.model_copy(update={"steps": steps, "epochs": None})

    @model_validator(mode="after")
    def _one_start(self) -> "RunConfig":
        # An empty [model] describes nothing, so `model={}` as an override removes the table.
        if self.model is None if self.init_from is None else self.model:
            found = "neither init_from nor" if self.init_from is None else "both init_from and"
            raise ValueError(
                f"found {found} [model]; give exactly one of init_from (a folder or hub id) and "
                "[model] (HF config keys)"
            )
        if self.adapter is not None and self.init_from is None:
            raise ValueError("[adapter] changes a model that has learned; give init_from")
        if self.adapter is not None and self.optimizer.train is not None:
            raise ValueError(
                "[adapter] trains its own parameters; leave out either it or optimizer.train"
            )
        if self.evaluation.patience is not None:
            self._check_validated("evaluation.patience counts validations")
        if self.objective.masking == "loss":
            self._check_validated("objective.masking = 'loss' follows the losses of validations")
        if self.head == "classification":
            self._check_classification()
        if self.objective.needs_labels:
            self._check_labels()
        return self

    def _check_validated(self, why: str) -> None:
        if not self.evaluation.every:
            raise ValueError(f"{why}; set evaluation.every above 0")
        if not self.data.validation_rows and not self.data.validation_sources:
            raise ValueError(
                f"{why}, which need held-out rows; set data.validation_rows or "
                "data.validation_sources"
            )

    def _check_labels(self) -> None:
        objective = self.objective
        key = "ordered" if objective.ordered else "label_smoothing"
        key = "normalize" if objective.normalize == "labels" else key
        if objective.kind != "vocabulary" and objective.dummy_mlm_share + objective.mlm_share > 0:
            raise ValueError(
                f"objective.{key} is for answers alone; leave dummy_mlm_share and mlm_share out"
            )
        for source in (*self.data.sources, *self.data.validation_sources):
            if not source.labels:
                raise ValueError(
                    f"objective.{key} needs the labels of every source; {source.title} has none"
                )

    def _check_classification(self) -> None:
        sources = (*self.data.sources, *self.data.validation_sources)
        if self.data.pack:
            raise ValueError(
                "head = 'classification' reads one text per row; set data.pack = false (the "
                "default is true)"
            )
        taken = {"num_labels", "id2label", "label2id", "problem_type"} & set(self.model or {})
        if taken:
            raise ValueError(
                f"[model] has {', '.join(sorted(taken))}, which the labels of the sources set; "
                "leave them out"
            )
        own: Any = {"ordered": False, "label_smoothing": 0.0}
        if self.objective.model_copy(update=own) != ObjectiveConfig():
            raise ValueError(
                "[objective] is for the MLM head; for classification it has only ordered and "
                "label_smoothing"
            )
        if any(source.text is not None for source in sources):
            raise ValueError("head = 'classification' needs prompt and answer for every source")
        if any(source.label_names != self.label_names for source in sources):
            raise ValueError("every source needs the same labels, in the same order")
        names = self.label_names
        if names and (len(names) < 2 or not all(map(str.strip, names))):
            raise ValueError(
                f"labels are {', '.join(map(repr, names))}; expected two or more that are not "
                "blank (or leave labels out to predict a number)"
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the labels of a classification run, those of its first source."""
        return self.data.sources[0].label_names if self.data.sources else ()


def updates_of(amount: float, steps: int) -> int:
    """Turn a duration into updates: below 1 it is a fraction of the run.

    >>> updates_of(0.05, 200), updates_of(25, 200)
    (10, 25)
    """
    return round(amount * steps) if amount < 1 else math.ceil(amount)


@suggest_keywords
def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = lambda line: None,
) -> RunConfig:
    """Read one TOML file, apply `key=value` overrides, and check everything at once.

    `overrides` are dotted keys with TOML values (`data.batch_size=64`, `out=runs/b`); a value that
    is not TOML is a string. One of `steps` and `epochs` replaces the other of the file, and `say`
    gets a line about it. Raises `InputError` that names the dotted key, the value found and the
    nearest known key.
    """
    table = read_toml(path)
    if {"prompt", "answer"} <= table.keys():
        raise InputError(
            f"{path}: is a task file, as `mlmjax evaluate --task` reads it; give a run file, such "
            "as `mlmjax init` writes"
        )
    changed = {change.partition("=")[0] for change in overrides}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in changed and other not in changed and other in table:
            say(f"{path}: {key} of the command replaces {other} = {table.pop(other)}")
    for change in overrides:
        override(table, change)
    return parse_config(table, where=str(path))


def parse_config(table: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Decode a table of plain values into a `RunConfig`; `where` begins the error message."""
    return decode(RunConfig, table, where)
