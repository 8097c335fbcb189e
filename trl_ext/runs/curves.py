"""Training curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# panel title -> {metric: label}
SLIC_PANELS = {
    "loss": {"loss": "total", "loss/calibration": "calibration", "loss/regularization": "regularisation (unweighted)"},
    "log-likelihood, nats per answer": {
        "logps/chosen": "chosen",
        "logps/rejected": "rejected",
        "logps/reference": "y_ref",
    },
    "share of pairs": {"rewards/accuracies": "ordered rightly", "hinge/active": "inside the margin"},
    "margin S(y+) - S(y-), nats": {"rewards/margins": "mean margin"},
    "length, tokens": {"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
    "learning rate": {"learning_rate": "learning rate"},
}

RRHF_PANELS = {
    "loss": {"loss": "total", "loss/rank": "rank (unweighted)", "loss/sft": "SFT (unweighted)"},
    "log-likelihood, nats per answer": {"logps/chosen": "best", "logps/rejected": "worst"},
    "share of pairs": {"rewards/accuracies": "ordered rightly", "rank/violations": "ordered wrongly"},
    "Kendall's tau, likelihood and score": {"rank/kendall_tau": "tau"},
    "length, tokens": {"lengths/chosen": "best", "lengths/rejected": "worst"},
    "learning rate": {"learning_rate": "learning rate"},
}

CLICK_PANELS = {
    "loss": {"loss": "total", "loss/lm": "language modelling", "loss/pair": "pairs (unweighted)"},
    "log-likelihood, nats per answer": {
        "logps/chosen": "positive",
        "logps/rejected": "negative",
        "logps/reference": "target",
    },
    "share of pairs": {"rewards/accuracies": "ordered rightly", "hinge/active": "inside the margin"},
    "margin S(y+) - S(y-), nats": {"rewards/margins": "mean margin"},
    "length, tokens": {"lengths/chosen": "positive", "lengths/rejected": "negative"},
    "learning rate": {"learning_rate": "learning rate"},
}

SPIN_PANELS = {
    "loss": {"loss": "loss"},
    "log-likelihood, nats per answer": {"logps/chosen": "real", "logps/rejected": "generated"},
    "reward, beta times the log-ratio": {"rewards/chosen": "real", "rewards/rejected": "generated"},
    "share of pairs": {"rewards/accuracies": "real above generated", "hinge/active": "inside the margin"},
    "length, tokens": {"lengths/chosen": "real", "lengths/rejected": "generated"},
    "learning rate": {"learning_rate": "learning rate"},
}

DPO_PANELS = {
    "loss": {"loss": "loss"},
    "log-likelihood, nats per answer": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "reward, beta times the log-ratio": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "share of pairs": {"rewards/accuracies": "ordered rightly"},
    "difference of the rewards": {"rewards/margins": "mean"},
    "learning rate": {"learning_rate": "learning rate"},
}

KTO_PANELS = {
    **{title: lines for title, lines in DPO_PANELS.items() if title != "share of pairs"},
    "log-likelihood, nats per answer": {"logps/chosen": "good", "logps/rejected": "bad"},
    "reward, beta times the log-ratio": {"rewards/chosen": "good", "rewards/rejected": "bad"},
    "reference point, nats": {"kl": "KL"},
}

ORPO_PANELS = {
    "loss": {"loss": "total", "nll_loss": "likelihood"},
    "log-likelihood, nats per token": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "share of pairs": {"rewards/accuracies": "ordered rightly"},
    "log of the odds ratio": {"log_odds_chosen": "mean"},
    "learning rate": {"learning_rate": "learning rate"},
}

SFT_PANELS = {
    "loss, nats per token": {"loss": "loss"},
    "share of tokens": {"mean_token_accuracy": "predicted rightly"},
    "entropy, nats per token": {"entropy": "entropy"},
    "learning rate": {"learning_rate": "learning rate"},
}

REWARD_PANELS = {
    "loss": {"loss": "loss"},
    "share of pairs": {"accuracy": "ordered rightly"},
    "difference of the rewards": {"margin": "mean"},
    "reward": {"min_reward": "lowest", "mean_reward": "mean", "max_reward": "highest"},
    "learning rate": {"learning_rate": "learning rate"},
}

RL_PANELS = {
    "reward of sampled answers": {"reward": "mean", "reward_std": "standard deviation"},
    "KL to the reference, nats per token": {"kl": "KL"},
    "loss": {"loss": "loss"},
    "tokens per answer": {"completions/mean_length": "mean", "completions/max_length": "longest"},
    "entropy, nats per token": {"entropy": "entropy"},
    "learning rate": {"learning_rate": "learning rate"},
}


def plot_training_curves(
    log_history: Sequence[dict], path: str | Path, *, title: str, panels: dict[str, dict[str, str]] = SLIC_PANELS
) -> Path:
    """
    Draw what a trainer logged, train solid and eval dotted, one panel per question.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): picture to write; the ending sets the format.
        title (`str`): above everything.
        panels (`dict`, *optional*): panel title to `{metric: label}`. Panels and lines without data are left out.

    Returns:
        `Path`: `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    def series(metric):
        return [(entry["step"], entry[metric]) for entry in log_history if metric in entry and "step" in entry]

    drawn = {}
    for panel, metrics in panels.items():
        lines = [
            (label, series(prefix + metric), style)
            for metric, label in metrics.items()
            for prefix, style in (("", "-"), ("eval_", ":"))
        ]
        merged: list[tuple[str, list, str]] = []
        for label, points, style in lines:
            twin = next((index for index, line in enumerate(merged) if line[1:] == (points, style)), None)
            if twin is not None:  # one line would hide the other
                merged[twin] = (f"{merged[twin][0]} = {label}", points, style)
            elif points:
                merged.append((label, points, style))
        if merged:
            drawn[panel] = merged
    columns = min(len(drawn), 3) or 1
    rows = -(-len(drawn) // columns) or 1
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.0 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (panel, lines) in zip(axes.flat, drawn.items(), strict=False):
        colors = {}
        for label, points, style in lines:
            color = colors.setdefault(label, f"C{len(colors)}")
            steps, values = zip(*points, strict=True)
            marker = "o" if style == ":" or len(points) == 1 else None
            name = f"{label} (eval)" if style == ":" else label
            axis.plot(steps, values, style, color=color, label=name, marker=marker, markersize=3)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)


ROUND_PANELS = {
    "reward of watched prompts": {"reward": "reward", "judge": "judge"},
    "perplexity under the fixed model": {"perplexity": "perplexity"},
    "share of different n-grams": {"distinct_1": "distinct-1", "distinct_2": "distinct-2"},
    "KL to the fixed model, nats per answer": {"kl": "KL"},
    "tokens per answer": {"length": "length"},
}


def plot_rounds(
    models: dict[str, dict[str, float]], candidates: dict[str, dict[str, float]], path: str | Path
) -> Path:
    """
    Draw what became of a model over rounds: each watched figure by model, and the reward of the candidates it was
    trained on.

    Args:
        models (`dict`): figures of each model, in order.
        candidates (`dict`): figures of each round's candidates.
        path (`str` or `Path`): picture to write.

    Returns:
        `Path`: `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13.8, 6.4), layout="constrained")
    names, line = list(models), [number for number, name in enumerate(models) if name != "best-of-n"]
    for axis, (title, metrics) in zip(axes.flat, ROUND_PANELS.items(), strict=False):
        shown = {key: label for key, label in metrics.items() if any(key in models[name] for name in names)}
        for key, label in shown.items():
            values = np.array([models[name][key] for name in names], dtype=float)  # NaN for `None`
            (drawn,) = axis.plot(line, values[line], "o-", label=label)
            others = [number for number in range(len(names)) if number not in line]  # beside the rounds
            axis.plot(others, values[others], "D", color=drawn.get_color(), markersize=5)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.grid(alpha=0.3)
        if len(shown) > 1:
            axis.legend(fontsize=8)
    axis, rounds = axes.flat[-1], list(candidates)
    for key, label in (("reward_best", "best of a prompt"), ("reward", "mean"), ("reward_worst", "worst of a prompt")):
        axis.plot(range(len(rounds)), [candidates[name][key] for name in rounds], "o-", label=label)
    axis.set_title("reward of the candidates", fontsize=10)
    axis.set_xticks(range(len(rounds)), rounds, fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)


SELF_PLAY_PANELS = {
    "reward of held-out prompts": {"reward": "reward"},
    "NLL of held-out real answers, nats per token": {"nll": "NLL"},
    "margin over the opponent, nats per answer": {"margin": "margin"},
    "share of answers": {"equal": "generated = real", "margin_accuracy": "margin > 0"},
    "tokens per answer": {"length": "generated", "real_length": "real"},
}


def plot_self_play(
    models: dict[str, dict[str, float]], training: dict[str, dict[str, float]], path: str | Path
) -> Path:
    """
    Draw what became of a model over iterations of self-play: each held-out figure by model, with the models beside the
    iterations as diamonds, and the share of its opponent's answers that each iteration was trained on.

    Args:
        models (`dict`): figures of each model, in order.
        training (`dict`): figures of each iteration's answers and training.
        path (`str` or `Path`): picture to write.

    Returns:
        `Path`: `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13.8, 6.4), layout="constrained")
    names = [name for name in models if name == "start" or name in training]
    places = {name: number for number, name in enumerate(names)}
    # a model that stands beside an iteration is named after it: "control-1" stands beside "iteration-1"
    for name in models:
        beside = f"iteration-{name.rpartition('-')[2]}"
        places.setdefault(name, places.get(beside, len(places)))
    panels = list(SELF_PLAY_PANELS.items())
    for axis, (title, metrics) in zip(axes.flat, panels, strict=False):
        for key, label in metrics.items():
            points = [(places[name], models[name][key]) for name in names if key in models[name]]
            if not points:
                continue
            (line,) = axis.plot(*zip(*points, strict=True), "o-", label=label)
            others = [(places[n], models[n][key]) for n in models if n not in names and key in models[n]]
            if others:
                axis.plot(
                    *zip(*others, strict=True),
                    "D",
                    color=line.get_color(),
                    fillstyle="none",
                    label=f"{label}, control",
                )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(names)), [name.replace("iteration-", "it. ") for name in names], fontsize=8)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    axis, played = axes.flat[-1], list(training)
    for key, label in (("equal", "equal to the real one"), ("empty", "empty"), ("truncated", "truncated")):
        axis.plot(range(len(played)), [training[name][key] for name in played], "o-", label=label)
    axis.set_title("share of the opponent's answers", fontsize=10)
    axis.set_xticks(range(len(played)), [name.replace("iteration-", "it. ") for name in played], fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)
