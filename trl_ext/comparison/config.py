"""The settings of a comparison."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..runs.config import RoundsConfig
from ..runtime.settings import did_you_mean
from ..trainers.common_config import CommonConfig
from .methods import METHODS, RESERVED, Method, refuse_equal_labels, settings_by_name


@dataclass
class ComparisonConfig(CommonConfig, TrainingArguments):
    """
    What is compared, and what all methods share: the fields of [`CommonConfig`], those of
    [`~transformers.TrainingArguments`], which are handed on to every method where they are given, and

    Parameters:
        methods (`list[str]`, *optional*): keys of `METHODS` and of `settings`; by default all for which the dataset
            has the columns. The SFT model is always among them.
        seeds (`list[int]`, *optional*, defaults to `[1]`): each is a whole comparison of its own.
        max_steps (`int`, *optional*, defaults to `50`): updates of each method. A method that trains twice has half
            of them each time.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`): prompts per update and process, times
            `gradient_accumulation_steps`.
        max_length (`int`, *optional*, defaults to `1024`): longest prompt with answer, in tokens.
        settings (`dict` or `str`, *optional*): options of methods: `{"dpo": {"beta": 0.3}}`; with `all` of every
            method that has them; with `reward_model` of the one that RLOO is trained towards; with `method` a further
            method: `{"dpo_low": {"method": "dpo", "label": "DPO, beta 0.01", "beta": 0.01}}`. JSON on the command
            line, where it is added to what a config file says and wins over it.
        click_threshold (`float`, *optional*, defaults to `0.5`): for CLICK: answers with a higher reward are positive.
        num_checkpoints (`int`, *optional*, defaults to `0`): how often during training reward and KL are looked at.
            Each costs a checkpoint on the disk, with the state of the optimiser.
        num_checkpoint_prompts (`int`, *optional*, defaults to `128`): of the held-out prompts, for these looks.
        model_init_kwargs (`dict` or `str`, *optional*): for loading the model, as in [`~trl.DPOConfig`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.

    Raises:
        ValueError: a method or an option that is not known, one that the comparison sets itself, or two methods with
            one label.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        "num_train_epochs": "set `max_steps`, which all methods have",
        "push_to_hub": "push the model that you choose: `hf upload NAME OUTPUT_DIR/seed-1/METHOD/model`",
    }

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    output_dir: str | None = field(default="runs/compare", metadata={"help": "Folder for everything."})
    methods: list[str] | None = field(
        default=None,
        metadata={"help": f"Of {', '.join(METHODS)} and those of `settings`; default: all that can be."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Seeds; each is a whole comparison of its own."}
    )
    max_steps: int = field(default=50, metadata={"help": "Updates of each method."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt with answer, in tokens."})
    settings: dict | str | None = field(
        default=None,
        metadata={"help": 'Options of methods, as JSON: \'{"dpo": {"beta": 0.3}}\'; `all` for every one.'},
    )
    click_threshold: float = field(
        default=0.5, metadata={"help": "For CLICK: answers with a higher reward are positive."}
    )
    num_checkpoints: int = field(
        default=0, metadata={"help": "How often during training reward and KL are looked at; costs checkpoints."}
    )
    num_checkpoint_prompts: int = field(
        default=128, metadata={"help": "Held-out prompts for the looks during training."}
    )
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the model, as JSON."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        self.check_types()
        if isinstance(self.seeds, int):
            self.seeds = [self.seeds]
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be at least one seed, each once, got {self.seeds}.")
        if self.max_steps < 2:
            raise ValueError(
                f"`max_steps` must be at least 2, got {self.max_steps}: methods that train twice need two updates."
            )
        if self.num_checkpoints < 0 or self.num_checkpoint_prompts < 1:
            raise ValueError(
                "`num_checkpoints` must be at least 0 and `num_checkpoint_prompts` at least 1, got "
                f"{self.num_checkpoints} and {self.num_checkpoint_prompts}."
            )
        self.settings = settings_by_name(self.settings)
        for name, values in self.settings.items():
            self._check_settings(name, values)
        if isinstance(self.methods, str):
            self.methods = [self.methods]
        known = [*METHODS, *self.variants]
        for name in self.methods or ():
            if name not in known:
                meant = did_you_mean(name, known, otherwise="")
                raise ValueError(f"`methods` must be some of {', '.join(known)}, got {name!r}. {meant}".rstrip())
        refuse_equal_labels(self.labels)
        super().__post_init__()

    def _check_settings(self, name: Any, values: dict[str, Any]) -> None:
        taken = [key for key in RESERVED if key in values]
        if taken:
            raise ValueError(
                f"`settings` of {name!r} must not set {', '.join(f'`{key}`' for key in taken)}: the comparison sets "
                "the same for all methods. Remove it. `max_steps`, `num_candidates`, `seeds` and so on are options "
                "of the comparison."
            )
        if name in METHODS or name in SHARED:
            if "method" in values or "label" in values:
                raise ValueError(
                    f"The name of a further method in `settings` must be new, got {name!r}. Choose another name."
                )
            return
        if values.get("method") not in METHODS or values["method"] == "sft":
            raise ValueError(
                f"A name in `settings` must be one of {', '.join(METHODS)}, got {name!r}. For a further method, set "
                "its `method` to the one of these that it is made of."
            )
        if not isinstance(name, str) or not name.isidentifier() or len(name) > 60 or name in FOLDERS:
            raise ValueError(
                "The name of a further method in `settings` must have letters, digits and underscores, and be none "
                f"of {', '.join(FOLDERS)}, got {name!r}: a folder has the same name."
            )
        if not isinstance(values.get("label", ""), str):
            raise ValueError(f"`label` of {name!r} in `settings` must be text, got {values['label']!r:.60}.")

    @property
    def labels(self) -> dict[str, str]:
        """What readers see of each method that is compared."""
        known = {**METHODS, **self.variants}
        return {name: known[name].label for name in ("sft", *(self.methods or known))}

    @property
    def variants(self) -> dict[str, Method]:
        """Further methods that `settings` defines."""
        return {
            name: dataclasses.replace(METHODS[values["method"]], label=values.get("label", name))
            for name, values in self.settings.items()
            if "method" in values
        }


# options of training that a comparison has no use for -> why
IDLE = {
    "report_to": "the report is `comparison.html`",
    "logging_steps": "every method logs ten times",
    **dict.fromkeys(("eval_strategy", "eval_steps", "do_eval"), "models are evaluated on held-out prompts"),
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit"), "set `num_checkpoints`"),
}


# names in `settings` that are no methods
SHARED = ("all", "reward_model")


# folders of a seed, beside those of the methods
FOLDERS = (*SHARED, "candidates", "prompts", "start", "sft", "pairs", "near")


@dataclass
class ComparedRoundsConfig(RoundsConfig):
    """What answers are scored by: the fields of [`RoundsConfig`], but for what the methods of a comparison decide."""

    num_rounds: int = field(default=1, metadata={"help": "Leave it at 1: the methods say how often they sample."})

    def __post_init__(self):
        if self.num_rounds != 1 or self.pair_rule is not None or self.pairs_per_prompt is not None:
            raise ValueError(
                "`num_rounds`, `pair_rule` and `pairs_per_prompt` must not be set: the methods of a comparison set "
                "them. Remove them."
            )
        if self.perplexity_model is not None:
            raise ValueError(
                "`perplexity_model` must not be set: the fixed model of a comparison is the one that all methods "
                "start from. Remove it."
            )
        super().__post_init__()
