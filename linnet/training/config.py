"""What a run is made of: one YAML file, or a recipe by name, plus dotted overrides. Unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent / "recipes"

# TrainingArguments that a run sets itself, and where the user sets what they mean.
_MANAGED = {
    "output_dir": "--out",
    "max_steps": "budget.steps",
    "num_train_epochs": "budget.tokens",
    "per_device_train_batch_size": "data.tokens_per_batch",
    "save_total_limit": "checkpoints.keep",
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "nothing (batches are packed)",
    "disable_tqdm": "--quiet",
    "load_best_model_at_end": "nothing (the last model is kept)",
}


@dataclass
class Data:
    """Where the text comes from and how it becomes batches. Sizes in tokens unless the name says bytes."""

    source: str = "stdlib"  # stdlib | a text file or folder | datasets:NAME[:split]
    tokenizer: str = "bytes"  # bytes | bpe:N | a Hugging Face tokenizer
    context: int = 512  # longest piece of a document in a batch
    tokens_per_batch: int = 8192  # tokens of one packed row
    validation_fraction: float = 0.05  # share of the documents held out
    glob: str = "**/*"  # documents of a folder
    subset: str | None = None  # configuration of a `datasets` source
    text_column: str = "text"  # column of a `datasets` source
    max_bytes: int | None = None  # stop reading once there is this much text
    seed: int = 0  # order of the pieces


@dataclass
class Budget:
    """How long to train: exactly one of the three."""

    minutes: float | None = None  # time in training steps; the schedule follows the elapsed fraction
    steps: int | None = None  # optimizer steps
    tokens: int | None = None  # training tokens


@dataclass
class Evaluation:
    """Held-out bits per byte: `points` times during training on `during_bytes` of text, at the end on `max_bytes`."""

    points: int = 8
    during_bytes: int = 32768
    max_bytes: int | None = None  # all of the validation set
    context: int | None = None  # longest window, data.context if None
    stride: int | None = None  # new tokens per window, half of the context if None


@dataclass
class Checkpoints:
    """`points` checkpoints evenly over the budget, the newest `keep` complete ones are kept."""

    points: int = 4
    keep: int = 2


@dataclass
class RunConfig:
    """`model` holds arguments of LinnetConfig, `training` fields of transformers.TrainingArguments."""

    model: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    budget: Budget = field(default_factory=Budget)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def validate(self) -> RunConfig:
        """Check budget and numbers; ValueError naming the key."""
        given = {k: v for k, v in dataclasses.asdict(self.budget).items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"budget must be exactly one of minutes, steps, tokens; got {given or 'none of them'}")
        for section, keys, least in (
            ("budget", ("minutes", "steps", "tokens"), 0),
            ("data", ("context", "tokens_per_batch"), 1),
            ("evaluation", ("max_bytes", "during_bytes"), 0),
            ("checkpoints", ("keep",), 0),
        ):
            for key in keys:
                value = getattr(getattr(self, section), key)
                if value is not None and value <= least:
                    raise ValueError(f"{section}.{key} must be more than {least}; got {value!r}")
        for section in ("evaluation", "checkpoints"):
            if getattr(self, section).points < 0:
                raise ValueError(f"{section}.points must be at least 0; got {getattr(self, section).points!r}")
        return self


_SECTIONS: dict[str, type] = {"data": Data, "budget": Budget, "evaluation": Evaluation, "checkpoints": Checkpoints}


class _Loader(yaml.SafeLoader):
    """YAML with the floats people write: 1e-3 is a number, not a text."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def list_recipes() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(path: str | Path | None = None, *, recipe: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file or a recipe and apply overrides such as `training.learning_rate=1e-3`.

    Without both, the defaults of this module. Raises ValueError naming the file or key; unknown keys come with the nearest
    known one.
    """
    if path is not None and recipe is not None:
        raise ValueError("give either a configuration file or a recipe, not both")
    if recipe is not None:
        _known(recipe, list_recipes(), "recipe")
        path = RECIPES / f"{recipe}.yaml"
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.load(Path(path).read_text(), _Loader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"configuration file {str(path)!r} must be readable YAML; got {str(error).splitlines()[0]}") from error
    config = from_dict(values, str(path or "configuration"))
    for override in overrides:
        apply_override(config, override)
    return config


def from_dict(values: Any, where: str = "configuration") -> RunConfig:
    """A RunConfig from nested dictionaries, as `RunConfig.to_dict` writes them."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping with sections {', '.join(_section_names())}; got {type(values).__name__}")
    config = RunConfig()
    for section, content in values.items():
        _known(section, _section_names(), "section")
        if not isinstance(content, dict):
            raise ValueError(f"{where}: section {section!r} must be a mapping; got {content!r}")
        for key, value in content.items():
            set_value(config, section, key, value)
    return config


def apply_override(config: RunConfig, text: str) -> None:
    """Apply `section.key=value`; the value is read as YAML."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ValueError(f"override must look like section.key=value, e.g. training.learning_rate=1e-3; got {text!r}")
    _known(section, _section_names(), "section")
    try:
        value = yaml.load(raw, _Loader)
    except yaml.YAMLError:
        value = raw  # e.g. a pattern that begins with '*' or '('
    set_value(config, section, key, value)


def set_value(config: RunConfig, section: str, key: str, value: Any) -> None:
    """Set one key of one section, its name and (in the sections of this module) its type checked."""
    if section == "budget" and value is not None:
        config.budget = Budget()  # the last one given counts
    if section in _SECTIONS:
        fields = {f.name: f for f in dataclasses.fields(_SECTIONS[section])}
        _known(key, fields, f"{section} key")
        setattr(getattr(config, section), key, _typed(f"{section}.{key}", value, str(fields[key].type)))
        return
    if section == "training" and key in _MANAGED:
        raise ValueError(f"training.{key} is set by the run itself; use {_MANAGED[key]}")
    _known(key, _free_keys(section), f"{section} key")
    getattr(config, section)[key] = value


def _free_keys(section: str) -> list[str]:
    """Keys of the sections that are passed on: LinnetConfig's and TrainingArguments' own fields."""
    if section == "model":
        from linnet.models import LinnetConfig

        own = LinnetConfig.__annotations__
        managed = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "attribute_map"}
        return [name for name in own if name not in managed]
    from transformers import TrainingArguments

    return [f.name for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in _MANAGED]


def _typed(name: str, value: Any, annotation: str) -> Any:
    """Check a value against annotations such as `int`, `float | None`."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None and "None" in kinds:
        return None
    if "str" in kinds and isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if "float" in kinds:
            return float(value)
        if "int" in kinds and value == int(value):
            return int(value)
    raise ValueError(f"{name} must be {annotation.replace(' | ', ' or ')}; got {value!r}")


def _section_names() -> list[str]:
    return [f.name for f in dataclasses.fields(RunConfig)]


def _known(name: Any, names: Iterable[str], what: str) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(names)[:40])}"
        raise ValueError(f"unknown {what} {name!r} ({hint})")
