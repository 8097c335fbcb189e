"""
The losses, as pure functions of tensors.

Conventions, the same for every function here:

- B prompts, K candidate completions per prompt (the largest K of the batch; `candidate_mask` marks the real ones).
- `logps` (B, K), float: S(y), the log-likelihood of each candidate in nats, summed over its scored tokens unless the
  caller averaged it. `scores` (B, K), float: how good each candidate is, higher is better. Only where a loss says so
  does the size of a score enter; otherwise scores merely order.
- Equal scores order nothing: such a pair of candidates contributes nothing.
- Every function returns one loss per prompt, (B,). The mean over prompts is taken by the caller, once.
- Masked candidates never enter a sum, whatever value they hold, and receive zero gradient.

Papers: SLiC-HF (https://huggingface.co/papers/2305.10425); its predecessor SLiC
(https://huggingface.co/papers/2210.00045), from which the other calibration losses come; RRHF
(https://huggingface.co/papers/2304.05302); CLICK (https://huggingface.co/papers/2306.03350); SPIN
(https://huggingface.co/papers/2401.01335); IPO (https://huggingface.co/papers/2310.12036).
"""

import torch
from torch.nn.functional import logsigmoid


def ordered_pairs(scores: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """
    Which candidate beats which.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Score of each candidate.
        candidate_mask (`torch.Tensor` of shape `(B, K)`, bool):
            True where there is a candidate.

    Returns:
        `torch.Tensor` of shape `(B, K, K)`, bool: True at `[b, i, j]` where candidates i and j of prompt b exist and
        `scores[b, i] > scores[b, j]`, strictly.
    """
    both = candidate_mask.unsqueeze(2) & candidate_mask.unsqueeze(1)
    return both & (scores.unsqueeze(2) > scores.unsqueeze(1))


def pair_gaps(logps: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """All differences `S_i - S_j`, `(B, K, K)`; zero wherever a candidate is missing."""
    logps = logps.masked_fill(~candidate_mask, 0.0)
    return logps.unsqueeze(2) - logps.unsqueeze(1)


def rank_margins(scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float) -> torch.Tensor:
    """The same margin for every pair: `delta`, as `(B, K, K)`."""
    return torch.full_like(pair_gaps(scores, candidate_mask), delta)


def score_margins(scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float) -> torch.Tensor:
    """A margin in proportion to the difference in score: `delta * (s_i - s_j)`, `(B, K, K)`."""
    return delta * pair_gaps(scores, candidate_mask)


def place_margins(scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float) -> torch.Tensor:
    """
    A margin in proportion to the distance in the ranking: `delta * (place_j - place_i)`, `(B, K, K)`.

    A candidate's place is the number of distinct better scores above it, so equals share a place and the margins do
    not depend on the order of the list.
    """
    pairs = ordered_pairs(scores, candidate_mask)
    # of candidates with equal scores only the first in the list counts as a place
    equal = (scores.unsqueeze(2) == scores.unsqueeze(1)) & candidate_mask.unsqueeze(1)
    earlier = torch.ones_like(equal[0]).tril(-1)
    first_of_its_score = candidate_mask & ~(equal & earlier).any(dim=2)
    places = (pairs & first_of_its_score.unsqueeze(2)).sum(dim=1)  # (B, K)
    return delta * (places.unsqueeze(1) - places.unsqueeze(2)).to(scores.dtype)


def pairwise_hinges(
    logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, margins: torch.Tensor
) -> torch.Tensor:
    """`relu(margins[i, j] - S_i + S_j)` where candidate i beats candidate j, zero elsewhere; `(B, K, K)`."""
    hinges = torch.relu(margins - pair_gaps(logps, candidate_mask))
    return hinges.masked_fill(~ordered_pairs(scores, candidate_mask), 0.0)


def _mean_over_pairs(hinges: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    num_pairs = ordered_pairs(scores, candidate_mask).sum(dim=(1, 2))
    return hinges.sum(dim=(1, 2)) / num_pairs.clamp(min=1)


def slic_rank_loss(
    logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float
) -> torch.Tensor:
    """
    Rank calibration: `relu(delta - S(y+) + S(y-))` (SLiC-HF eq. 4, first term; SLiC's "rank").

    Both papers draw one pair (y+, y-) at random from the strictly ordered pairs of a prompt. With K = 2 there is only
    one. With more candidates we take the mean over all of them, which is the expectation of the paper's sampled loss
    and has no sampling noise.

    Args:
        logps, scores, candidate_mask:
            See the module docstring.
        delta (`float`):
            Margin in nats of log-likelihood. A pair whose gap reaches it contributes neither loss nor gradient.

    Returns:
        `torch.Tensor` of shape `(B,)`; zero for a prompt without a strictly ordered pair.
    """
    margins = rank_margins(scores, candidate_mask, delta=delta)
    return _mean_over_pairs(pairwise_hinges(logps, scores, candidate_mask, margins), scores, candidate_mask)


def slic_margin_loss(
    logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float
) -> torch.Tensor:
    """
    Margin calibration: `relu(delta * (s(y+) - s(y-)) - S(y+) + S(y-))` (SLiC, "margin").

    The wanted gap grows with the difference in score, so here the size of the scores matters. As in
    [`slic_rank_loss`], the mean over all strictly ordered pairs stands for the paper's random pair.

    Args:
        logps, scores, candidate_mask:
            See the module docstring.
        delta (`float`):
            Nats of log-likelihood per unit of score.

    Returns:
        `torch.Tensor` of shape `(B,)`; zero for a prompt without a strictly ordered pair.
    """
    margins = score_margins(scores, candidate_mask, delta=delta)
    return _mean_over_pairs(pairwise_hinges(logps, scores, candidate_mask, margins), scores, candidate_mask)


def slic_list_rank_loss(
    logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, *, delta: float
) -> torch.Tensor:
    """
    List-wise rank calibration: `sum_{i<j} relu(delta * (j - i) - S(y_i) + S(y_j))`, candidates sorted best first
    (SLiC, "list-wise rank", after BRIO's contrastive loss). A sum over pairs, not a mean.

    The paper does not say what equal scores do; see [`place_margins`] for what they do here.

    Args:
        logps, scores, candidate_mask:
            See the module docstring.
        delta (`float`):
            Nats of log-likelihood per place in the ranking.

    Returns:
        `torch.Tensor` of shape `(B,)`; zero for a prompt without a strictly ordered pair.
    """
    margins = place_margins(scores, candidate_mask, delta=delta)
    return pairwise_hinges(logps, scores, candidate_mask, margins).sum(dim=(1, 2))


def slic_expected_reward_loss(logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """
    Expected-reward calibration: `-sum_i s(y_i) P(y_i) / sum_j P(y_j)` (SLiC, "expected reward").

    The normalisation over the candidate list is how we read the paper; we found no second source that confirms it.
    The size of the scores matters and there is no margin.

    Args:
        logps, scores, candidate_mask:
            See the module docstring.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    # a finite floor instead of -inf keeps the gradient defined for a prompt without candidates
    floor = torch.finfo(logps.dtype).min
    probabilities = torch.softmax(logps.masked_fill(~candidate_mask, floor), dim=1)
    return -(probabilities * scores.masked_fill(~candidate_mask, 0.0)).sum(dim=1)


def slic_loss(
    calibration_losses: torch.Tensor, regularization_losses: torch.Tensor, *, reg_weight: float
) -> torch.Tensor:
    """
    `calibration + lambda * regularisation`, per prompt (SLiC-HF eq. 4).

    With the cross-entropy regulariser `regularization_losses = -S(y_ref)`, so this is `- lambda * log P(y_ref | x)`
    added to the hinge. Nothing is detached: the gradient flows through both terms.

    Args:
        calibration_losses (`torch.Tensor` of shape `(B,)`):
            Output of one of the calibration losses above.
        regularization_losses (`torch.Tensor` of shape `(B,)`):
            Negative log-likelihood of y_ref, or its KL to the fine-tuned model.
        reg_weight (`float`):
            The paper's lambda.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return calibration_losses + reg_weight * regularization_losses


def rrhf_likelihoods(logps: torch.Tensor, lengths: torch.Tensor, *, length_penalty: float) -> torch.Tensor:
    """
    What RRHF compares: `p_i = S_i / |y_i| ** length_penalty` (RRHF eq. 1, with a penalty of 1).

    Args:
        logps (`torch.Tensor` of shape `(B, K)`):
            Summed log-likelihood of each candidate.
        lengths (`torch.Tensor` of shape `(B, K)`):
            |y| in scored tokens, or what [`rrhf_official_lengths`] puts in its place.
        length_penalty (`float`):
            1 is the average per token, 0 the sum.

    Returns:
        `torch.Tensor` of shape `(B, K)`.
    """
    return logps / lengths.clamp(min=1) ** length_penalty


def rrhf_official_lengths(widths: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """
    What the authors' code divides by instead of |y|: the width W of the prompt's batch, for all its candidates alike.

    The code gathers log-probabilities with labels whose masked positions it has overwritten, and reads lengths off the
    same labels afterwards, so that prompt and padding count too. Its second term is a mean over the same W positions:
    [`rrhf_sft_loss`] of these lengths with the reduction `"mean"`.

    Args:
        widths (`torch.Tensor` of shape `(B, K)`):
            Tokens of prompt + completion of each candidate.
        candidate_mask (`torch.Tensor` of shape `(B, K)`, bool):
            See the module docstring.

    Returns:
        `torch.Tensor` of shape `(B, K)`: the largest width of each prompt.
    """
    return widths.masked_fill(~candidate_mask, 0).amax(dim=1, keepdim=True).expand_as(widths)


def rrhf_sft_loss(
    logps: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, *, reduction: str
) -> torch.Tensor:
    """
    RRHF's second term: the negative log-likelihood of the best candidate, of equals the first (RRHF eq. 3 and 4).

    Args:
        logps (`torch.Tensor` of shape `(B, K)`):
            Summed log-likelihood of each candidate.
        lengths (`torch.Tensor` of shape `(B, K)`):
            As in [`rrhf_likelihoods`].
        scores, candidate_mask:
            See the module docstring.
        reduction (`str`):
            `"sum"`, as in the paper, or `"mean"`: divided by the candidate's length.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    best = scores.masked_fill(~candidate_mask, float("-inf")).argmax(dim=1, keepdim=True)  # of equals the first
    losses = -logps.gather(1, best).squeeze(1)
    return losses if reduction == "sum" else losses / lengths.gather(1, best).squeeze(1).clamp(min=1)


def rrhf_rank_loss(logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """
    RRHF's ranking loss: `sum over s_i < s_j of relu(p_i - p_j)` (RRHF eq. 2). A sum over pairs, not a mean, and no
    margin: a pair in the right order, however narrowly, contributes neither loss nor gradient.

    Args:
        logps (`torch.Tensor` of shape `(B, K)`):
            p of each candidate: output of [`rrhf_likelihoods`], or whatever else is to be brought into the order of
            the scores.
        scores, candidate_mask:
            See the module docstring.

    Returns:
        `torch.Tensor` of shape `(B,)`; zero for a prompt without a strictly ordered pair.
    """
    no_margins = rank_margins(scores, candidate_mask, delta=0.0)
    return pairwise_hinges(logps, scores, candidate_mask, no_margins).sum(dim=(1, 2))


def rrhf_loss(
    rank_losses: torch.Tensor, sft_losses: torch.Tensor, *, rank_weight: float, sft_weight: float
) -> torch.Tensor:
    """
    `rank_weight * rank + sft_weight * sft`, per prompt (RRHF eq. 5, with both weights 1).

    Args:
        rank_losses (`torch.Tensor` of shape `(B,)`):
            Output of [`rrhf_rank_loss`].
        sft_losses (`torch.Tensor` of shape `(B,)`):
            Output of [`rrhf_sft_loss`].
        rank_weight, sft_weight (`float`):
            The paper found weights of 10 and 100 on the rank term worse than 1.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return rank_weight * rank_losses + sft_weight * sft_losses


def click_loss(pair_losses: torch.Tensor, lm_losses: torch.Tensor, *, pair_weight: float) -> torch.Tensor:
    """
    `L_LM + pair_weight * pair`, per prompt (CLICK).

    The pair term is [`slic_rank_loss`] with a large margin, 15 to 20 nats, over positives and negatives.

    Args:
        pair_losses (`torch.Tensor` of shape `(B,)`):
            Mean hinge over the prompt's pairs; times prompts per prompt with a pair, for a mean over the latter.
        lm_losses (`torch.Tensor` of shape `(B,)`):
            Negative log-likelihood per token of the task's own target.
        pair_weight (`float`):
            0.1 to 0.5 in the authors' code, which calls the margin alpha and the weight gamma.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return lm_losses + pair_weight * pair_losses


def spin_loss(real: torch.Tensor, generated: torch.Tensor, *, beta: float, loss: str = "sigmoid") -> torch.Tensor:
    """
    SPIN, eq. 4.7 of https://huggingface.co/papers/2401.01335, whose lambda is `beta` here: l(beta * h) with
    h = `real - generated`, and l(t) = log(1 + exp(-t)) for `"sigmoid"`, relu(1 - t) for `"hinge"`.

    Args:
        real, generated (`torch.Tensor` of shape `(B,)`):
            Log-ratio in nats of the real and of the generated answer: S under the model less S under the opponent.
        beta (`float`):
            Above 0; the smaller, the further the optimum is from the opponent.
        loss (`str`, defaults to `"sigmoid"`):
            `"sigmoid"` or `"hinge"`.

    Returns:
        `torch.Tensor` of shape `(B,)`: ln 2 or 1 where the model is the opponent.
    """
    margins = beta * (real - generated)
    return -logsigmoid(margins) if loss == "sigmoid" else torch.relu(1 - margins)


def ipo_loss(
    log_ratios: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """
    IPO: `(h - 1 / (2 beta))^2` with `h = r(y+) - r(y-)` (IPO eq. 17, whose tau is `beta` here as in TRL).

    The loss has a finite target and pulls back beyond it. With more than two candidates it is the mean over all
    strictly ordered pairs, as in [`slic_rank_loss`]; the paper has pairs.

    Args:
        log_ratios (`torch.Tensor` of shape `(B, K)`):
            r of each candidate in nats: S under the model less S under the reference, as in the paper, or both
            averaged per token, as in TRL.
        scores, candidate_mask:
            See the module docstring.
        beta (`float`):
            Above 0. The larger, the closer the optimum is to the reference.

    Returns:
        `torch.Tensor` of shape `(B,)`; zero for a prompt without a strictly ordered pair.
    """
    errors = (pair_gaps(log_ratios, candidate_mask) - 1 / (2 * beta)).square()
    return _mean_over_pairs(errors.masked_fill(~ordered_pairs(scores, candidate_mask), 0.0), scores, candidate_mask)


def bradley_terry_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margins: torch.Tensor | float = 0.0,
    *,
    difference_penalty: float = 0.0,
    max_difference: float | None = None,
) -> torch.Tensor:
    """
    Negative log-likelihood of a preference under Bradley-Terry: `-log sigmoid(d - margin) + difference_penalty * d^2`
    with `d = r(y+) - r(y-)`.

    A pair that is seen once is certain to the model, which then pushes d without bound. The penalty gives d a finite
    optimum; the clamp ends the gradient once d has reached `max_difference`.

    Args:
        chosen_rewards, rejected_rewards (`torch.Tensor` of shape `(B,)`):
            Rewards of the two answers.
        margins (`torch.Tensor` of shape `(B,)` or `float`, defaults to 0):
            By how much the better answer should be better.
        difference_penalty (`float`, defaults to 0):
            Weight of the squared difference, at least 0.
        max_difference (`float`, *optional*):
            Above 0: d is clamped to at most this in the first term.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    differences = chosen_rewards - rejected_rewards
    clamped = differences if max_difference is None else differences.clamp(max=max_difference)
    return -logsigmoid(clamped - margins) + difference_penalty * differences.square()
