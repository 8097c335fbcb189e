"""
The narrow waist between "tokens in some layout" and "loss": one log-likelihood and one length per completion.

Everything before this point may rearrange tokens; everything after it sees only `CompletionLogps` in canonical order.
"""

from dataclasses import dataclass

import torch


@dataclass
class CompletionLogps:
    """
    Log-likelihood of each of the N completions of a batch, in the batch's row order.

    Attributes:
        sums (`torch.Tensor` of shape `(N,)`, float32):
            Sum of the log-probabilities of the scored tokens, in nats.
        lengths (`torch.Tensor` of shape `(N,)`, int64):
            Number of scored tokens.
    """

    sums: torch.Tensor
    lengths: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """Average log-probability per scored token, `(N,)`; 0 for a completion without scored tokens."""
        return self.sums / self.lengths.clamp(min=1)


def completion_logps(per_token_logps: torch.Tensor, completion_mask: torch.Tensor) -> CompletionLogps:
    """
    Reduce per-token log-probabilities to one sum and one length per completion.

    Args:
        per_token_logps (`torch.Tensor` of shape `(N, L - 1)`):
            Log-probability of token t + 1 given the tokens up to t. What it holds outside the completion is ignored.
        completion_mask (`torch.Tensor` of shape `(N, L)`):
            Non-zero on completion tokens. Its first column has no prediction and is not counted, so a completion
            without any prompt loses its first token from the sum and from the length alike.

    Returns:
        [`CompletionLogps`]: summed in float32 whatever the input's dtype.
    """
    scored = completion_mask[:, 1:].bool()
    return CompletionLogps(
        sums=per_token_logps.float().masked_fill(~scored, 0.0).sum(dim=1),
        lengths=scored.sum(dim=1),
    )


def by_prompt(values: torch.Tensor, candidate_index: torch.Tensor) -> torch.Tensor:
    """
    Arrange per-completion values by prompt.

    Args:
        values (`torch.Tensor` of shape `(N,)`):
            One value per row of the batch.
        candidate_index (`torch.Tensor` of shape `(B, K)`, int64):
            Row of each candidate, -1 where a prompt has fewer than K.

    Returns:
        `torch.Tensor` of shape `(B, K)`; zero, with zero gradient, where there is no candidate.
    """
    return values[candidate_index.clamp(min=0)].masked_fill(candidate_index < 0, 0)
