"""
Draw the committed measurements.

    python benchmarks/plot.py FOLDER

Writes `prefix_sharing_speed.png`, `prefix_sharing_memory.png` and `playground.svg`, the README's picture, into the
folder. Of rows measured more than once, the last ones are drawn.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from playground import LABELS, RECIPES, TUNED_WITH, last_model, read_rows

RESULTS = Path(__file__).parent / "results"
# what the reward is, where it is not half digits and half tone
OTHER_REWARDS = {"train_click": "share of polite answers", "spin": "share of right digits"}
COLOURS = {"CPO": "#b0b0b0", "scored head": "#9ecae1", "auto": "#3182bd", "always": "#08519c"}


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def speed(folder: Path) -> None:
    rows = read("prefix_sharing_speed.csv")
    panels = sorted({(row["method"], row["device"], row["model"], row["attention"]) for row in rows})
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 4.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        method, device, model, attention = panel
        found = {
            (row["shape"], row["way"]): row
            for row in rows
            if (row["method"], row["device"], row["model"], row["attention"]) == panel and row["stage"] == "step"
        }
        shapes = list(dict.fromkeys(shape for shape, _ in found))
        ways = [way for way in COLOURS if any((shape, way) in found for shape in shapes)]
        width = 0.8 / len(ways)
        for i, way in enumerate(ways):
            drawn = [(x, found[shape, way]) for x, shape in enumerate(shapes) if (shape, way) in found]
            bars = axis.bar(
                [x + (i - (len(ways) - 1) / 2) * width for x, _ in drawn],
                [float(row["times_padded"]) for _, row in drawn],
                width,
                label=way,
                color=COLOURS[way],
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        labels = []
        for shape in shapes:
            row = found[shape, "padded"]
            labels.append(f"{shape}\nP {row['prompt']}\nR {row['answer']}\nK {row['k']}")
        axis.set_xticks(range(len(shapes)), labels, fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("times as fast as padded")
        axis.set_title(f"{method}: whole training steps, {model} parameters, {device}, {attention}")
        axis.legend(fontsize=8)
    figure.savefig(folder / "prefix_sharing_speed.png", dpi=130)


def memory(folder: Path) -> None:
    rows = read("prefix_sharing_memory.csv")
    circumstances = ("model", "device", "prompt", "answer", "prompts", "checkpointing")
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in circumstances)]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = plt.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.8), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages, strict=True):
        for way, label, colour in (("padded", "padded", "#b0b0b0"), ("always", "shared", COLOURS["always"])):
            of_way = [row for row in rows if row["stage"] == stage and row["way"] == way]
            peaks = dict(sorted((int(row["k"]), float(row["above_model_mib"])) for row in of_way))
            axis.plot(list(peaks), list(peaks.values()), "o-", color=colour, label=label)
        axis.set_xlabel("answers per prompt (K)")
        axis.set_ylabel("peak memory above what was held before, MiB")
        axis.set_ylim(bottom=0)
        axis.set_title(stage)
        axis.legend()
    figure.savefig(folder / "prefix_sharing_memory.png", dpi=130)


def rewards_by_recipe() -> dict[str, list[tuple[float, float]]]:
    """Label of each recipe with rows: for every seed that tuned nothing, the reward before and after training."""
    found: dict[str, list[tuple[float, float]]] = {}
    rows = sorted(read_rows().items())
    for recipe in RECIPES:
        label = LABELS[recipe] + (f"\n({OTHER_REWARDS[recipe]})" if recipe in OTHER_REWARDS else "")
        for (name, seed), of_run in rows:
            if name == recipe and seed != TUNED_WITH and of_run[0]["model"] == "start":
                found.setdefault(label, []).append((of_run[0]["reward"], last_model(of_run)["reward"]))
    return found


def description(rewards: dict[str, list[tuple[float, float]]]) -> str:
    """The values of the picture in words."""
    seeds = {label: ", ".join(f"{a} to {b}" for a, b in of_seeds) for label, of_seeds in rewards.items()}
    return "; ".join(f"{label}: {values}" for label, values in seeds.items()).replace("\n", " ")


def playground(folder: Path) -> None:
    """Draw the reward before and after training, a point for each seed; the values stand in the file's description."""
    rewards = rewards_by_recipe()
    with plt.rc_context({"svg.hashsalt": "playground", "svg.fonttype": "none"}):
        figure, axis = plt.subplots(figsize=(8, 0.9 + 0.5 * len(rewards)), layout="constrained")
        for place, seeds in enumerate(rewards.values()):
            before, after = ([pair[side] for pair in seeds] for side in (0, 1))
            start, end = sum(before) / len(before), sum(after) / len(after)
            axis.annotate(
                "", (end, place), (start, place), arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkB": 7}
            )
            named = {} if place else {"label": "SFT model"}, {} if place else {"label": "after training"}
            axis.plot(before, [place] * len(before), "o", color="#b0b0b0", **named[0])
            axis.plot(after, [place] * len(after), "o", color=COLOURS["auto"], **named[1])
        axis.set_yticks(range(len(rewards)), rewards)
        axis.set_ylim(len(rewards) - 0.5, -0.5)
        axis.set_xlabel("mean reward of 1000 held-out answers, a point for each seed")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e0e0e0")
        axis.set_axisbelow(True)
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        metadata = {"Date": None, "Description": description(rewards)}
        figure.savefig(folder / "playground.svg", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    speed(folder)
    memory(folder)
    playground(folder)


if __name__ == "__main__":
    main()
