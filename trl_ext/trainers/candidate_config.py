"""Settings shared by the configs of all methods here."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig

from .common_config import SharingConfig

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
class CandidateConfig(SharingConfig, DPOConfig):
    """
    Base of the configs in this package: [`~trl.DPOConfig`], less the fields that mean nothing here. A value other than
    TRL's default is refused there; TRL's default is accepted, and has no effect.

    Parameters:
        on_invalid_row, prefix_sharing, check_prefix_sharing:
            See [`SharingConfig`].
        max_completions_per_forward (`int`, *optional*):
            Most completions that go through the model at once; at least 1. A batch with more is run in parts, with the
            same results, so that the memory for activations depends on this number instead of on the number of
            completions per prompt. The price is a second forward through the backbone, since each part is run again
            for its backward pass (with `activation_checkpointing`, a third), and a prompt with more completions than
            this is computed once for each of its parts. With dropout (LoRA's, say) the results differ, as the noise is
            drawn for each part. `None`: the whole batch at once. Not for mixtures of experts with a balancing loss,
            and only with adapters that treat all tokens alike (LoRA and its kin). Under ZeRO-3 leave
            `activation_checkpointing` on: without it a part holds the trained weights of all layers at once.
    """

    # inherited field -> what to use instead; a subclass adds what its own fields replace
    unused_fields: ClassVar[dict[str, str]] = UNUSED_DPO_FIELDS

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

    def __post_init__(self):
        self.check_types()  # again, where a subclass has: comparisons of its own come before
        if self.max_completions_per_forward is not None:
            if self.max_completions_per_forward < 1:
                raise ValueError(
                    f"`max_completions_per_forward` must be at least 1, got {self.max_completions_per_forward}. "
                    "Remove it to run whole batches."
                )
            if self.torch_compile:
                raise ValueError(
                    "`torch_compile` must be False with `max_completions_per_forward`, got True: the number of parts "
                    "differs from batch to batch. Remove one of them."
                )
        super().__post_init__()
        self.refuse_reentrant_checkpointing()

    def refuse_reentrant_checkpointing(self) -> None:
        """Parts of a batch and 'use_reentrant': True do not go together."""
        if self.max_completions_per_forward is not None and (self.activation_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ValueError(
                "'use_reentrant' of `activation_checkpointing_kwargs` must be False with "
                "`max_completions_per_forward`, got True: each part would run a backward pass, and DDP and DeepSpeed "
                "take the gradients of the first alone. Set it to False, or remove it."
            )
