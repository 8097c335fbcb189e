"""Settings of SPIN."""

import dataclasses
import reprlib
from dataclasses import dataclass, field
from typing import ClassVar

from ...runtime.settings import check_field_types
from ...sampling.config import SamplingConfig, SamplingOptions
from ...scoring.config import ScorerConfig
from ...trainers.candidate_config import UNUSED_DPO_FIELDS, CandidateConfig

LOSSES = ("sigmoid", "hinge")
REFERENCES = ("previous", "initial")
# settings with one value for each iteration
BY_ITERATION = ("beta", "learning_rate")
EARLY_STOPS = ("none", "nll", "reward")
_OPPONENT = "the reference is the opponent, which is replaced after each iteration; set `reference`"


@dataclass
class SPINConfig(ScorerConfig, SamplingOptions, CandidateConfig):
    r"""
    Configuration of [`SPINTrainer`]: the fields below, and everything of [`~trl.DPOConfig`] that has a meaning in
    self-play (https://huggingface.co/papers/2401.01335). What belongs to the loop (history, early stop, generation)
    means nothing for a single iteration on pairs that were generated before, and is not looked at there.

    Parameters:
        > The loop

        num_iterations (`int`, *optional*, defaults to `3`):
            Iterations to play, at least 1. The paper plays 4 and calls them 0 to 3, as the folders are called here.
        history (`int`, *optional*, defaults to `1`):
            How many earlier iterations' generated answers are trained on together with this iteration's. 1 is the
            published setting: iteration t trains on D_{t-1} and D_t.
        reference (`str`, *optional*, defaults to `"previous"`):
            `"previous"`: the model that starts the iteration, which has also generated its answers (the paper).
            `"initial"`: the model that started the first one.
        early_stop (`str`, *optional*, defaults to `"none"`):
            End after an iteration that did not improve this held-out figure, and take the model before: `"nll"`, the
            negative log-likelihood per token of the real answers, or `"reward"`, the mean of `rewards`.
        num_watched_prompts (`int`, *optional*, defaults to `128`):
            Rows set apart, never trained on, to evaluate each model with; 0: no evaluation. Without effect if an eval
            dataset is given, which is then used as a whole.
        rewards (`list[str]`, *optional*):
            Scorers of the answers to watched prompts, in the notation of [`RankingConfig`], added up. They are watched
            and never trained on.
        first_turn_only (`bool`, *optional*, defaults to `False`):
            Of `messages`, use the first question with its answer and leave the rest out (the paper). If not, the last
            message is the answer and everything before it the prompt.

        > The loss: l(beta * h), with h the log-ratio of the real answer less that of the generated one

        beta (`float` or `list[float]`, *optional*, defaults to `0.1`):
            Above 0; the paper's lambda. One value, or one for each iteration: the paper's is 0.1, and 5.0 at the last.
        loss (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`: l(t) = log(1 + exp(-t)) (the paper). `"hinge"`: relu(1 - t).
        learning_rate (`float` or `list[float]`, *optional*, defaults to `1e-6`):
            At least 0. One value, or one for each iteration: the paper's is 5e-7, and 1e-7 from iteration 2 on.

        > Generation: the fields of [`SamplingOptions`], of which these have other defaults

        temperature (`float`, *optional*, defaults to `1.0`): the paper's.
        max_new_tokens (`int`, *optional*, defaults to `256`): the paper's.

        > Rows and memory

        on_invalid_row, prefix_sharing, check_prefix_sharing, max_completions_per_forward:
            See [`CandidateConfig`].
        precompute_ref_batch_size (`int`, *optional*):
            Pairs per forward while the reference's log-likelihoods are computed; by default
            `per_device_eval_batch_size`.

    Raises:
        ValueError: a value out of its range, a list without one value for each iteration, or a setting of `DPOConfig`
            that means nothing here, with what to set instead.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        **{name: why for name, why in UNUSED_DPO_FIELDS.items() if name not in ("beta", "precompute_ref_batch_size")},
        "loss_type": "set `loss`",
        "loss_weights": "there is one loss; set `loss`",
        "ld_alpha": "answers count with their summed log-likelihood",
        "f_divergence_type": "the loss is that of the paper; set `loss` and `beta`",
        "f_alpha_divergence_coef": "the loss is that of the paper; set `loss` and `beta`",
        "discopop_tau": "set `loss`",
        "label_smoothing_factor": "leave out the rows you do not trust",
        "precompute_ref_log_probs": "they always are, at the start of each iteration",
        "sync_ref_model": _OPPONENT,
        "ref_model_mixup_alpha": _OPPONENT,
        "ref_model_sync_steps": _OPPONENT,
        "disable_dropout": "the reference is the same model without dropout, and the first loss would not be ln 2",
    }

    beta: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "lambda of the paper, above 0: one value, or one for each iteration."},
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [1e-6], metadata={"help": "One value, or one for each iteration."}
    )
    num_iterations: int = field(default=3, metadata={"help": "Iterations of self-play."})
    loss: str = field(
        default="sigmoid",
        metadata={"help": "'sigmoid': log(1 + exp(-t)), the paper. 'hinge': relu(1 - t).", "choices": list(LOSSES)},
    )
    history: int = field(
        default=1,
        metadata={"help": "How many earlier iterations' generated answers are mixed in; the paper's is 1."},
    )
    reference: str = field(
        default="previous",
        metadata={
            "help": "'previous': the model that starts the iteration. 'initial': the one that started the first.",
            "choices": list(REFERENCES),
        },
    )
    early_stop: str = field(
        default="none",
        metadata={
            "help": "Held-out figure that has to improve for another iteration: 'nll' or 'reward'.",
            "choices": list(EARLY_STOPS),
        },
    )
    num_watched_prompts: int = field(
        default=128, metadata={"help": "Rows set apart to evaluate each model with; 0: no evaluation."}
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "Scorers of the watched answers: file.py:function, package.module:function, or a model."},
    )
    first_turn_only: bool = field(
        default=False, metadata={"help": "Of `messages`, use the first question with its answer alone."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 is greedy."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest generated answer in tokens."})

    def check_types(self) -> None:
        check_field_types(self, apart_from=("prefix_sharing", *BY_ITERATION))  # these are made of text, too

    def __post_init__(self):
        self.check_types()
        if self.num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {self.num_iterations}.")
        if self.history < 0:
            raise ValueError(
                f"`history` must be 0 (this iteration's answers alone) or more, got {self.history}. The paper's value "
                "is 1."
            )
        for name in ("loss", "reference", "early_stop"):
            allowed = {"loss": LOSSES, "reference": REFERENCES, "early_stop": EARLY_STOPS}[name]
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in BY_ITERATION:
            setattr(self, name, self._one_or_each(name))
        for beta in self.beta if isinstance(self.beta, list) else [self.beta]:
            if not 0 < beta < float("inf"):
                raise ValueError(f"`beta` must be above 0, got {self.beta}.")
        for rate in self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]:
            if not 0 <= rate < float("inf"):
                raise ValueError(f"`learning_rate` must be at least 0, got {self.learning_rate}.")
        if self.num_watched_prompts < 0:
            raise ValueError(
                f"`num_watched_prompts` must be 0 (no evaluation) or more, got {self.num_watched_prompts}."
            )
        if self.early_stop == "reward" and not self.rewards:
            raise ValueError(
                "`rewards` must name at least one scorer with early_stop='reward', got none. Name scorers, or set "
                "early_stop='nll'."
            )
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(f"`precompute_ref_batch_size` must be at least 1, got {self.precompute_ref_batch_size}.")
        self.vllm_args = self.sampling().vllm_args  # checks them all
        super().__post_init__()

    def _one_or_each(self, name: str) -> float | list[float]:
        given = getattr(self, name)
        try:
            values = [float(value) for value in (given if isinstance(given, list | tuple) else [given])]
        except OverflowError:
            raise ValueError(f"`{name}` must be a number that a float can hold, got {reprlib.repr(given)}.") from None
        if len(values) == 1:
            return values[0]
        if len(values) != self.num_iterations:
            raise ValueError(
                f"`{name}` must be one value, or {self.num_iterations} values (`num_iterations`), got {given}: "
                f"{len(values)} values."
            )
        return values

    def sampling(self) -> SamplingConfig:
        """How the opponent answers: one answer to each prompt, whatever it says."""
        return SamplingConfig(
            num_candidates=1,
            keep_duplicates=True,
            role_markers=None,  # what the opponent says is the opponent's, and not to be mended
            **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SamplingOptions)},
        )

    def for_iteration(self, number: int, **changes) -> "SPINConfig":
        """
        The settings of one iteration: `beta` and `learning_rate` are one number each.

        Args:
            number (`int`): of the iteration, from 0 on.
            changes: further fields to set, such as `output_dir`.
        """
        for name in BY_ITERATION:
            value = getattr(self, name)
            changes.setdefault(name, value[number] if isinstance(value, list) else value)
        return dataclasses.replace(self, **changes)
