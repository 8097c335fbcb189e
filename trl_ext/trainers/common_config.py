"""Settings shared by the configs of all recipes, those of TRL's trainers too."""

import contextlib
import os
import reprlib
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

import torch

from ..runtime.settings import check_field_types

# why TRL's settings about the text of rows have no effect here
TOKENISED = "rows are tokenised before; prepare the tokenizer of the model instead"


@dataclass
class CommonConfig:
    """
    A base to put before a config of TRL's in the list of bases.

    Parameters:
        on_invalid_row (`str`, *optional*, defaults to `"error"`):
            What to do with rows that cannot be used (empty or missing answers, `chosen` equal to `rejected`, a prompt
            that fills `max_length`, ...). `"error"` stops before any weight is loaded and lists them; `"drop"` leaves
            them out, counts them and says so.

    On a machine without accelerator two defaults differ from TRL's: `bf16`, if not set, is `False`, where TRL would
    stop and ask for `use_cpu`; and of several processes each has `use_cpu=True`, without which Accelerate would not
    let them see each other.

    A subclass may declare a field of `unused_fields` as its own: it is then read, checked and set by that class alone.

    Raises:
        TypeError, ValueError: an invalid setting, by its name.
    """

    # field of TRL's config that means nothing here -> what to use instead
    unused_fields: ClassVar[dict[str, str]] = {}

    on_invalid_row: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be used: 'error' stops before any weight is loaded and lists "
            "them, 'drop' leaves them out and counts them.",
            "choices": ["error", "drop"],
        },
    )

    def check_types(self) -> None:
        """Raise a `TypeError` that names a field whose value is not of its type."""
        check_field_types(self)

    def __post_init__(self):
        self.check_types()  # again, where a subclass has: comparisons of its own come before
        if self.on_invalid_row not in ("error", "drop"):
            raise ValueError(f"`on_invalid_row` must be 'error' or 'drop', got {self.on_invalid_row!r}.")
        if isinstance(self.deepspeed, str) and self.deepspeed and not self.deepspeed.lstrip().startswith("{"):
            if not os.path.isfile(self.deepspeed):
                raise FileNotFoundError(
                    f"`deepspeed` must be the JSON file of a DeepSpeed config, got {self.deepspeed!r:.80}, which is "
                    "not a file. Correct it, or remove it and launch with one of `accelerate_configs`."
                )
        self._refuse_unused_fields()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        try:
            with self.hidden_from_trl():
                super().__post_init__()
        except (ArithmeticError, AttributeError, LookupError, OSError, UnicodeError) as error:
            raise ValueError(
                f"These settings are invalid ({type(error).__name__}: {str(error)[:200]}): {self._shown_settings()}. "
                "Correct or remove the one that the error is about."
            ) from error

    @classmethod
    def _trl_class(cls) -> type:
        """The config class of TRL or transformers that this one extends."""
        return next(one for one in cls.__mro__ if one.__module__.partition(".")[0] in ("trl", "transformers"))

    @classmethod
    def redeclared_fields(cls) -> list[str]:
        """Names in `unused_fields` that a subclass has declared again, as fields of its own."""
        own = cls.__mro__[: cls.__mro__.index(cls._trl_class())]
        return [name for name in cls.unused_fields if any(name in vars(one).get("__annotations__", {}) for one in own)]

    @contextlib.contextmanager
    def hidden_from_trl(self) -> Iterator[None]:
        """Within, [`~CommonConfig.redeclared_fields`] hold TRL's defaults: what they mean here, TRL does not know."""
        defaults = {entry.name: default_of(entry) for entry in fields(self._trl_class())}
        values = {name: getattr(self, name) for name in self.redeclared_fields()}
        for name in values:
            setattr(self, name, defaults[name])
        try:
            yield
        finally:
            for name, value in values.items():
                setattr(self, name, value)

    def _refuse_unused_fields(self) -> None:
        parent, own = self._trl_class(), self.redeclared_fields()
        changed = []
        for config_field in fields(parent):  # its defaults, whatever a subclass makes of them
            if config_field.name not in self.unused_fields or config_field.name in own:
                continue
            default = default_of(config_field)
            value = getattr(self, config_field.name)
            if value != default and [value] != default:  # `loss_type` may be given as a string
                instead = self.unused_fields[config_field.name]
                changed.append(f"  {config_field.name}={value!r}: {instead}.")
        if changed:
            raise ValueError(
                f"{type(self).__name__} does not read these settings of {parent.__name__}; leave them at their "
                "default:\n" + "\n".join(changed)
            )

    def _shown_settings(self) -> str:
        """Those that are not at their default, cut short."""
        given = ((entry.name, getattr(self, entry.name), default_of(entry)) for entry in fields(self) if entry.init)
        return ", ".join(f"{name}={reprlib.repr(value)}" for name, value, default in given if value != default)


@dataclass
class SharingConfig(CommonConfig):
    """
    [`CommonConfig`], for trainers whose batches hold several completions of a prompt.

    Parameters:
        prefix_sharing (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether each prompt is computed once for all its completions, which changes no result. `"auto"`: for the
            batches where that is expected to be faster. `True`: always; a model that cannot is an error. `False`:
            never, TRL's padded forward is used as it is.
        check_prefix_sharing (`bool`, *optional*, defaults to `False`):
            Whether to run two sequences of the first batch that shares anything both ways and stop if
            log-probabilities or gradients disagree. Not under FSDP.
    """

    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Compute each prompt once for all its completions: 'auto' where that is expected to be faster, "
            "true always, false never. The results are the same."
        },
    )
    check_prefix_sharing: bool = field(
        default=False,
        metadata={"help": "Run two sequences of the first batch both ways and stop if the results disagree."},
    )

    def check_types(self) -> None:
        check_field_types(self, apart_from=("prefix_sharing",))  # text and booleans

    def __post_init__(self):
        self.check_types()
        by_word = {"true": True, "false": False, "auto": "auto"}  # from the command line everything is text
        if str(self.prefix_sharing).lower() not in by_word:
            raise ValueError(f"`prefix_sharing` must be 'auto', True or False, got {self.prefix_sharing!r}.")
        self.prefix_sharing = by_word[str(self.prefix_sharing).lower()]
        if self.check_prefix_sharing and self.prefix_sharing is False:
            raise ValueError(
                "`check_prefix_sharing` must be False with prefix_sharing=False, got True: nothing is shared. Remove "
                "one of them."
            )
        super().__post_init__()


def default_of(config_field: Field) -> Any:
    """The default of a dataclass's field."""
    return config_field.default if config_field.default_factory is MISSING else config_field.default_factory()
