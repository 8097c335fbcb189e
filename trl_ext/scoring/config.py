"""The settings of scoring."""

from dataclasses import dataclass, field
from typing import Any

DEFAULT_TEMPLATE = (
    "Which of two responses to a prompt is better, A or B?\n\n"
    "[PROMPT]\n{prompt}\n\n[RESPONSE A]\n{first}\n\n[RESPONSE B]\n{second}\n\n[BETTER]\n"
)


DEFAULT_LABELS = ("A", "B")


@dataclass
class ScorerConfig:
    """
    How models that score, and judges that are models, are run. A recipe's config can inherit from it.

    Parameters:
        reward_batch_size (`int`, *optional*, defaults to `16`): completions, or comparisons, at a time.
        reward_dtype (`str`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        reward_max_length (`int`, *optional*): longest text in tokens, cut on the left; by default what the model can
            take.
        reward_trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.
    """

    reward_batch_size: int = field(
        default=16, metadata={"help": "Completions a reward model or judge reads at a time."}
    )
    reward_dtype: str = field(default="auto", metadata={"help": "Of reward models; 'auto' is the checkpoint's."})
    reward_max_length: int | None = field(
        default=None, metadata={"help": "Longest text a reward model reads, in tokens; default: what it can take."}
    )
    reward_trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a reward model."}
    )

    def scorer_options(self) -> dict[str, Any]:
        """Keyword arguments for [`build_scorers`] and [`check_scorers`]."""
        return {
            "batch_size": self.reward_batch_size,
            "dtype": self.reward_dtype,
            "max_length": self.reward_max_length,
            "trust_remote_code": self.reward_trust_remote_code,
        }
