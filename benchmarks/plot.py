"""
Draw the committed measurements.

    python benchmarks/plot.py FOLDER

Writes `prefix_sharing_speed.png` and `prefix_sharing_memory.png` into the folder. Of rows measured more than once, the
last ones are drawn.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    speed(folder)
    memory(folder)


if __name__ == "__main__":
    main()
