"""
The slow, obvious versions: one prompt, one sequence, one token at a time, from plain logits.

Nothing here calls the package. Tests and benchmarks compare against these.
"""

import torch


def sequence_logp(model, prompt_ids, completion_ids):
    """S(y): the sum over completion tokens of log P(token | everything before), from the model's own logits."""
    ids = torch.tensor([list(prompt_ids) + list(completion_ids)])
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    total = torch.zeros(())
    for position in range(max(len(prompt_ids), 1), ids.size(1)):
        total = total + logps[position - 1, ids[0, position]]
    return total


def token_logps(model, prompt_ids, completion_ids):
    """log P(token | everything before) for each completion token that something precedes."""
    ids = torch.tensor([list(prompt_ids) + list(completion_ids)])
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    positions = range(max(len(prompt_ids), 1), ids.size(1))
    return (
        torch.stack([logps[position - 1, ids[0, position]] for position in positions]) if positions else logps[:0, 0]
    )


def sequence_kl(model, reference_model, prompt_ids, completion_ids):
    """Sum over completion tokens of KL(model || reference) between the next-token distributions."""
    ids = torch.tensor([list(prompt_ids) + list(completion_ids)])
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    with torch.no_grad():
        reference_logps = reference_model(input_ids=ids).logits[0].float().log_softmax(-1)
    total = torch.zeros(())
    for position in range(max(len(prompt_ids), 1), ids.size(1)):
        p, q = logps[position - 1], reference_logps[position - 1]
        total = total + (p.exp() * (p - q)).sum()
    return total


def rank_loss(logps, scores, delta):
    """Mean over strictly ordered pairs of relu(delta - S+ + S-)."""
    hinges = [
        torch.relu(delta - logps[i] + logps[j])
        for i in range(len(scores))
        for j in range(len(scores))
        if scores[i] > scores[j]
    ]
    return sum(hinges) / len(hinges) if hinges else torch.zeros(())


def margin_loss(logps, scores, delta):
    """Mean over strictly ordered pairs of relu(delta * (s+ - s-) - S+ + S-)."""
    hinges = [
        torch.relu(delta * (scores[i] - scores[j]) - logps[i] + logps[j])
        for i in range(len(scores))
        for j in range(len(scores))
        if scores[i] > scores[j]
    ]
    return sum(hinges) / len(hinges) if hinges else torch.zeros(())


def list_rank_loss(logps, scores, delta):
    """Sum over pairs of relu(delta * (places apart) - S_i + S_j); equal scores share a place."""
    places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True))}
    total = torch.zeros(())
    for i in range(len(scores)):
        for j in range(len(scores)):
            apart = places[scores[j]] - places[scores[i]]
            if apart > 0:
                total = total + torch.relu(delta * apart - logps[i] + logps[j])
    return total


def expected_reward_loss(logps, scores, delta=None):
    """- sum_i s_i P_i / sum_j P_j, in double precision."""
    probabilities = [torch.exp(logp.double() - max(other.double() for other in logps)) for logp in logps]
    return (-sum(s * p for s, p in zip(scores, probabilities, strict=True)) / sum(probabilities)).float()


CALIBRATION_LOSSES = {
    "rank": rank_loss,
    "margin": margin_loss,
    "list_rank": list_rank_loss,
    "expected_reward": expected_reward_loss,
}


def slic_loss(model, rows, *, calibration, delta, reg_weight, reduction="sum", reference_model=None):
    """
    Mean SLiC loss over prepared rows (`prompt_ids`, `completion_ids`, `scores`, `target_index`).

    With `reference_model` the regulariser is the KL to it, else cross-entropy.
    """
    losses = []
    for row in rows:

        def likelihood(completion_ids, row=row):
            logp = sequence_logp(model, row["prompt_ids"], completion_ids)
            scored = len(completion_ids) - (0 if row["prompt_ids"] else 1)
            return logp if reduction == "sum" else logp / scored

        candidates = [likelihood(ids) for ids in row["completion_ids"][: len(row["scores"])]]
        target = row["completion_ids"][row["target_index"]]
        if reference_model is None:
            regularization = -likelihood(target)
        else:
            regularization = sequence_kl(model, reference_model, row["prompt_ids"], target)
            if reduction == "mean":
                regularization = regularization / len(target)
        losses.append(CALIBRATION_LOSSES[calibration](candidates, row["scores"], delta) + reg_weight * regularization)
    return sum(losses) / len(losses)


def rrhf_loss(model, rows, *, rank_weight=1.0, sft_weight=1.0, length_penalty=1.0, sft_reduction="sum"):
    """Mean RRHF loss over prepared rows (`prompt_ids`, `completion_ids`, `scores`)."""
    losses = []
    for row in rows:
        prompt_ids, scores = row["prompt_ids"], row["scores"]
        answers = row["completion_ids"][: len(scores)]
        sums = [sequence_logp(model, prompt_ids, ids) for ids in answers]
        lengths = [len(ids) - (0 if prompt_ids else 1) for ids in answers]
        compared = [s / n**length_penalty for s, n in zip(sums, lengths, strict=True)]
        best = scores.index(max(scores))
        sft = -sums[best] / (lengths[best] if sft_reduction == "mean" else 1)
        losses.append(rank_weight * rrhf_rank_loss(compared, scores) + sft_weight * sft)
    return sum(losses) / len(losses)


def official_rrhf_loss(model, rows, *, rank_weight=1.0, sft_weight=1.0, length_penalty=1.0):
    """
    RRHF as the authors' program goes about it, step by step: one prompt at a time, all its answers as one padded
    batch, and labels that are overwritten before lengths are read off them.
    """
    total = 0
    for row in rows:
        reward = torch.tensor(row["scores"])
        texts = [row["prompt_ids"] + ids for ids in row["completion_ids"][: len(reward)]]
        columns = max(map(len, texts))
        tokens = torch.zeros(len(texts), columns, dtype=torch.long)
        present = torch.zeros_like(tokens)
        targets = torch.full_like(tokens, -100)  # shifted: at each place the token to be predicted there
        for line, ids in enumerate(texts):
            tokens[line, : len(ids)] = torch.tensor(ids)
            present[line, : len(ids)] = 1
            first = len(row["prompt_ids"])
            targets[line, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
        log_probabilities = torch.log_softmax(model(input_ids=tokens, attention_mask=present).logits.float(), dim=-1)

        is_answer = (targets != -100).float()
        targets[targets == -100] = 0  # in place, to have something to gather with
        token_values = log_probabilities.gather(2, targets[:, :, None])[:, :, 0] * is_answer
        length = (targets != -100).float().sum(dim=1)  # by now every place counts
        assert (length == columns).all()
        value = token_values.sum(dim=1) / length**length_penalty

        ranking = torch.zeros(())
        for better in range(len(texts)):
            for worse in range(len(texts)):
                if reward[better] > reward[worse] and value[better] < value[worse]:
                    ranking = ranking + value[worse] - value[better]
        fine_tuning = -token_values[int(reward.argmax())].mean()  # over all places, most of which hold zeros
        total = total + rank_weight * ranking + sft_weight * fine_tuning
    return total / len(rows)


def rrhf_rank_loss(compared, scores):
    """Sum over pairs with s_i < s_j of relu(p_i - p_j)."""
    total = torch.zeros(())
    for i in range(len(scores)):
        for j in range(len(scores)):
            if scores[i] < scores[j]:
                total = total + torch.relu(compared[i] - compared[j])
    return total


def click_loss(model, rows, *, margin, pair_weight):
    """
    CLICK loss over prepared rows: mean NLL per token of the targets + pair_weight * mean hinge, over the prompts that
    have a pair, of its pairs.
    """
    lms, hinges = [], []
    for row in rows:
        candidates = [
            sequence_logp(model, row["prompt_ids"], ids) for ids in row["completion_ids"][: len(row["scores"])]
        ]
        target = row["completion_ids"][row["target_index"]]
        lms.append(-sequence_logp(model, row["prompt_ids"], target) / len(target))
        if len(set(row["scores"])) > 1:
            hinges.append(rank_loss(candidates, row["scores"], margin))
    return sum(lms) / len(lms) + pair_weight * (sum(hinges) / len(hinges) if hinges else 0)


def spin_loss(model, opponent, rows, *, beta, loss="sigmoid"):
    """Mean SPIN loss over prepared rows, the real answer first: l(beta * h), h the difference of the log-ratios."""
    losses = []
    for row in rows:
        ratios = []
        for ids in row["completion_ids"]:
            with torch.no_grad():
                opponents = sequence_logp(opponent, row["prompt_ids"], ids)
            ratios.append(sequence_logp(model, row["prompt_ids"], ids) - opponents)
        gap = beta * (ratios[0] - ratios[1])
        losses.append(torch.log(1 + torch.exp(-gap)) if loss == "sigmoid" else torch.relu(1 - gap))
    return sum(losses) / len(losses)
