"""What the configs of all trainers here share."""

import os
import reprlib
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import DPOConfig

from .safety import check_field_types

# Fields of DPOConfig that no trainer of this package reads, and what to use instead.
_NOT_A_DPO_LOSS = "this trainer has a loss of its own"
UNUSED_DPO_FIELDS = {
    "loss_type": _NOT_A_DPO_LOSS,
    "loss_weights": _NOT_A_DPO_LOSS,
    "beta": _NOT_A_DPO_LOSS,
    "ld_alpha": _NOT_A_DPO_LOSS,
    "f_divergence_type": "there is no divergence to a reference model in this loss",
    "f_alpha_divergence_coef": "there is no divergence to a reference model in this loss",
    "label_smoothing": "leave out the pairs you do not trust",
    "use_weighting": "there is no weighting of pairs in this loss",
    "discopop_tau": _NOT_A_DPO_LOSS,
    "sync_ref_model": "no reference model is trained along",
    "ref_model_mixup_alpha": "no reference model is trained along",
    "ref_model_sync_steps": "no reference model is trained along",
    "precompute_ref_log_probs": "no reference log-probabilities enter this loss",
    "precompute_ref_batch_size": "no reference log-probabilities enter this loss",
    "label_smoothing_factor": _NOT_A_DPO_LOSS,
    "padding_free": "TRL itself switches it off",
    "truncation_mode": "cut prompts before training; completions are cut at the end",
}


@dataclass
class CandidateConfig(DPOConfig):
    """
    Base of the configs in this package: [`~trl.DPOConfig`], less the fields that mean nothing here.

    Parameters:
        on_invalid_row (`str`, *optional*, defaults to `"error"`):
            What to do with rows that cannot be used (empty or missing answers, `chosen` equal to `rejected`, a prompt
            that fills `max_length`, ...). `"error"` stops before any weight is loaded and lists them; `"drop"` leaves
            them out, counts them and says so.

        prefix_sharing (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether each prompt is computed once for all its completions, which changes no result. `"auto"`: for the
            batches where that is expected to be faster. `True`: always; a model that cannot is an error. `False`:
            never, TRL's padded forward is used as it is.
        check_prefix_sharing (`bool`, *optional*, defaults to `False`):
            Whether to run two sequences of the first batch that shares anything both ways and stop if
            log-probabilities or gradients disagree. Not under FSDP.
        max_completions_per_forward (`int`, *optional*):
            Most completions that go through the model at once; at least 1. A batch with more is run in parts, with the
            same results, so that the memory for activations depends on this number instead of on the number of
            completions per prompt. The price is a second forward through the backbone, since each part is run again
            for its backward pass (with `activation_checkpointing`, a third), and a prompt with more completions than
            this is computed once for each of its parts. With dropout (LoRA's, say) the results differ, as the noise is
            drawn for each part. `None`: the whole batch at once. Not for mixtures of experts with a balancing loss,
            and only with adapters that treat all tokens alike (LoRA and its kin). Under ZeRO-3 leave
            `activation_checkpointing` on: without it a part holds the trained weights of all layers at once.

    On a machine without accelerator two defaults differ from `DPOConfig`: `bf16`, if not set, is `False`, where
    `DPOConfig` would stop and ask for `use_cpu`; and of several processes each has `use_cpu=True`, without which
    Accelerate would not let them see each other.
    """

    # inherited field -> what to use instead; a subclass adds what its own fields replace
    unused_fields: ClassVar[dict[str, str]] = UNUSED_DPO_FIELDS

    on_invalid_row: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be used: 'error' stops before any weight is loaded and lists "
            "them, 'drop' leaves them out and counts them.",
            "choices": ["error", "drop"],
        },
    )

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

    max_completions_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Most completions that go through the model at once, so that memory does not grow with their "
            "number. Costs a second forward where a batch has more. Default: all at once."
        },
    )

    @property
    def uses_reference_model(self) -> bool:
        """Whether training needs the log-probabilities of a second, frozen model."""
        return False

    def check_types(self) -> None:
        """Raise a `TypeError` that names a field whose value is not of its type."""
        check_field_types(self, apart_from=("prefix_sharing",))  # text and booleans

    def __post_init__(self):
        self.check_types()  # again, where a subclass has: comparisons of its own come before
        if self.on_invalid_row not in ("error", "drop"):
            raise ValueError(f"on_invalid_row={self.on_invalid_row!r} is not known. Set it to 'error' or 'drop'.")
        by_word = {"true": True, "false": False, "auto": "auto"}  # from the command line everything is text
        if str(self.prefix_sharing).lower() not in by_word:
            raise ValueError(f"prefix_sharing={self.prefix_sharing!r} is not known. Set it to 'auto', True or False.")
        self.prefix_sharing = by_word[str(self.prefix_sharing).lower()]
        if self.check_prefix_sharing and self.prefix_sharing is False:
            raise ValueError(
                "check_prefix_sharing=True compares shared with padded batches, and prefix_sharing=False shares none. "
                "Leave one of them out."
            )
        if self.max_completions_per_forward is not None:
            if self.max_completions_per_forward < 1:
                raise ValueError(
                    f"max_completions_per_forward={self.max_completions_per_forward} would run nothing. Set it to 1 "
                    "or more, or leave it out to run whole batches."
                )
            if self.torch_compile:
                raise ValueError(
                    "max_completions_per_forward runs a different number of parts from batch to batch, which "
                    "torch_compile=True, one program for the whole model, does not do. Leave one of them out."
                )
        if isinstance(self.deepspeed, str) and self.deepspeed and not self.deepspeed.lstrip().startswith("{"):
            if not os.path.isfile(self.deepspeed):
                raise FileNotFoundError(
                    f"deepspeed={self.deepspeed!r:.80} is no file. Set it to the JSON file of a DeepSpeed config, or "
                    "leave it out and launch with one of `accelerate_configs`."
                )
        self._refuse_unused_fields()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        try:
            super().__post_init__()
        except (ArithmeticError, AttributeError, LookupError, OSError, UnicodeError) as error:
            raise ValueError(
                f"Nothing can be made of these settings ({type(error).__name__}: {str(error)[:200]}): "
                f"{self._shown_settings()}. Mend the one that this is about, or leave it out."
            ) from error
        self.refuse_reentrant_checkpointing()

    def refuse_reentrant_checkpointing(self) -> None:
        """Parts of a batch and 'use_reentrant': True do not go together."""
        if self.max_completions_per_forward is not None and (self.activation_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ValueError(
                "max_completions_per_forward with 'use_reentrant': True in activation_checkpointing_kwargs would run "
                "a backward pass for each part, and DDP and DeepSpeed take the gradients of the first for all. Set "
                "'use_reentrant' to False, or leave it out."
            )

    def _shown_settings(self) -> str:
        """Those that are not at their default, cut short."""
        given = ((entry.name, getattr(self, entry.name), _default(entry)) for entry in fields(self) if entry.init)
        return ", ".join(f"{name}={reprlib.repr(value)}" for name, value, default in given if value != default)

    def _refuse_unused_fields(self) -> None:
        changed = []
        for config_field in fields(DPOConfig):  # its defaults, whatever a subclass makes of them
            if config_field.name not in self.unused_fields:
                continue
            default = _default(config_field)
            value = getattr(self, config_field.name)
            if value != default and [value] != default:  # `loss_type` may be given as a string
                instead = self.unused_fields[config_field.name]
                changed.append(f"  {config_field.name}={value!r}: {instead}.")
        if changed:
            raise ValueError(
                f"{type(self).__name__} does not read these settings of DPOConfig; leave them at their default:\n"
                + "\n".join(changed)
            )


def _default(config_field: Field) -> Any:
    return config_field.default if config_field.default_factory is MISSING else config_field.default_factory()
