"""
Make `README.md` of the outcomes in `results/`.

    python benchmarks/claims/summary.py
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CAME_TRUE, DID_NOT, OPEN = "came true", "did not come true", "open"

HEAD = """\
# The papers' claims, tried small

Made by `python benchmarks/claims/summary.py` from `results/`; a test holds it to that.

Each script of this folder tries what a paper says at a size that takes minutes on a CPU. What should be seen, and
within which bounds, stands in the script before it is run (of what was known by then, each says so). Each figure is
measured on every seed: an expectation **came true** if the 95 % interval of the mean over the seeds (Student's t)
lies within its bounds, **did not come true** if it lies outside, and is **open** if a bound cuts it. `--seeds 1 2 3`
runs other seeds than the committed ones; what is finished is kept in `runs/claims/`, and an interrupted run goes on
from there.

- **Settings.** The playground's values were chosen with seed 42, which is in no table here. Under "what decided" each
  claim says which of them its outcome hangs on. ORPO, in dpo_displacement, ran with λ = 50.
- **Win rates.** A tie is half a win.
- **Chance.** A 95 % interval misses the true mean once in twenty. Of the {count} expectations here chance alone would
  miss about {missed:.0f}, half of them to either side. Expectations of one claim share their runs, and miss together.
"""


def bounds(expectation: dict[str, Any]) -> str:
    """ "above 0.99", "above 0 and below 1", ..."""
    return " and ".join(
        f"{side} {expectation[side]:g}" for side in ("above", "below") if expectation[side] is not None
    )


def measured(expectation: dict[str, Any]) -> str:
    """The mean and its interval, to four digits."""
    mean, interval = f"{expectation['mean']:.4g}", expectation["interval"]
    return f"{mean} (one seed)" if interval is None else f"{mean} [{interval[0]:.4g}, {interval[1]:.4g}]"


def listed(outcomes: dict[str, dict[str, Any]], wanted: str) -> list[str]:
    """The expectations with an outcome, one line each."""
    return [
        f"- [{name}](#{name}): {expectation['text']}: {measured(expectation)}, expected {bounds(expectation)}"
        for name, outcome in outcomes.items()
        for expectation in outcome["expectations"]
        if expectation["outcome"] == wanted
    ]


def section(name: str, outcome: dict[str, Any]) -> list[str]:
    """What there is to say about one claim."""
    made, seeds = outcome["made"], outcome["seeds"]
    lines = [
        f"## {name}",
        "",
        f"**{outcome['title']}.** {outcome['source']}.",
        "",
        f"The paper: {outcome['paper']}",
        "",
    ]
    if outcome["known_beforehand"]:
        lines += [f"**Known beforehand.** {outcome['known_beforehand']}", ""]
    if outcome["rows_are_older"]:
        lines += [f"**Rows older than the code.** {outcome['rows_are_older']}", ""]
    lines += ["| expectation | bounds | each seed | mean [95 % interval] | outcome |", "|---|---|---|---|---|"]
    for expectation in outcome["expectations"]:
        result = expectation["outcome"] if expectation["outcome"] == CAME_TRUE else f"**{expectation['outcome']}**"
        of_seeds = ", ".join(f"{value:.3g}" for value in expectation["values"])
        text = expectation["text"].replace("|", "\\|")
        cells = [text, bounds(expectation), of_seeds, measured(expectation), result]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"![{outcome['title']}](results/{name}.png)", ""]
    lines += [f"**What decided.** {outcome['decided_by']}", ""]
    if outcome["remarks"]:
        lines += [outcome["remarks"], ""]
    lines += [
        f"`{made['command']}`: {len(seeds)} seeds ({', '.join(map(str, seeds))}), {outcome['seconds']:.0f} s in all, "
        f"{made['device']}, {made['versions']}. Rows: [{name}.csv](results/{name}.csv); figures of each seed: "
        f"[{name}.json](results/{name}.json).",
        "",
    ]
    return lines


def readme(results: Path) -> str:
    """The text of README.md for a folder of outcomes."""
    outcomes = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    count = sum(len(outcome["expectations"]) for outcome in outcomes.values())
    lines = [HEAD.format(count=count, missed=0.05 * count)]
    for wanted, heading in ((DID_NOT, "Did not come true"), (OPEN, "Open")):
        found = listed(outcomes, wanted)
        lines += [f"**{heading}**" + ("" if found else ": nothing."), "", *found, *([""] if found else [])]
    lines += ["| claim | came true | did not | open | |", "|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        found = [expectation["outcome"] for expectation in outcome["expectations"]]
        note = "known beforehand" if outcome["known_beforehand"] else ""
        counts = " | ".join(str(found.count(kind)) for kind in (CAME_TRUE, DID_NOT, OPEN))
        lines.append(f"| [{name}](#{name}): {outcome['title']} | {counts} | {note} |")
    lines.append("")
    for name, outcome in outcomes.items():
        lines += section(name, outcome)
    return "\n".join(lines)


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(readme(FOLDER / "results"))
