"""Figures in the README and in `docs/` are those of the committed rows."""

import csv
from statistics import fmean

import pytest
import scaling

from tests.support.data import REPOSITORY


def rows(path: str) -> list[dict]:
    with (REPOSITORY / "benchmarks" / path).open() as file:
        return list(csv.DictReader(file))


def text(path: str) -> str:
    return " ".join((REPOSITORY / path).read_text().split())


def thousands(value: str) -> str:
    return f"{int(value):,}".replace(",", " ")


def cells(page: str, start: str) -> list[str]:
    """Cells of the one table row that begins with `start`."""
    found = [line for line in (REPOSITORY / page).read_text().splitlines() if line.startswith(start)]
    assert len(found) == 1, start
    return [cell.strip().replace("*", "") for cell in found[0].strip("|").split("|")]


SHARING, MEMORY, ROUNDS = (f"docs/{name}.md" for name in ("prefix-sharing", "memory-and-scaling", "rounds"))
IN_THE_README = ("TL;DR-like", "UltraFeedback-like", "ranked 6", "short prompt, long answers")
SHAPES = {
    "TL;DR-like": "TL;DR", "long prompt, short answers": "long prompt", "multi-turn HH-like": "multi-turn HH",
    "medium": "medium", "even": "even", "UltraFeedback-like": "UltraFeedback",
    "short prompt, long answers": "short prompt", "nothing to gain": "nothing to gain", "ranked 4": "ranked 4",
    "ranked 6": "ranked 6", "ranked 8": "ranked 8",
}  # fmt: skip


@pytest.mark.parametrize("label", SHAPES)
def test_the_table_of_speeds(label):
    times = {
        (row["method"], row["way"]): float(row["times_padded"])
        for row in rows("results/prefix_sharing_speed.csv")
        if row["shape"] == SHAPES[label] and row["stage"] == "step"
    }
    expected = [
        f"{times[method, 'auto']:.1f} ({times[method, 'scored head']:.1f})" if (method, "auto") in times else ""
        for method in ("DPO", "SLiC-HF")
    ]
    expected.append(f"{times['SLiC-HF', 'CPO']:.1f}" if ("SLiC-HF", "CPO") in times else "")
    whole = cells(SHARING, f"| {label} |")
    assert whole[5:] == expected
    if label in IN_THE_README:
        assert cells("README.md", f"| {label} |") == whole[:4] + whole[5:7]


def test_how_far_sharing_is_from_a_plain_language_model():
    seconds = {
        (row["shape"], row["way"]): float(row["seconds"])
        for row in rows("results/prefix_sharing_speed.csv")
        if row["method"] == "SLiC-HF" and row["stage"] == "step"
    }
    # prompts of 150 tokens and more; "even", where answers are as long, is named apart
    shapes = ["TL;DR", "long prompt", "multi-turn HH", "medium", "ranked 4", "ranked 6", "ranked 8"]
    fused, plain = (
        {shape: 100 * seconds[shape, way] / seconds[shape, "auto"] for shape in [*shapes, "even"]}
        for way in ("LM, TRL head", "LM, scored")
    )
    even = plain.pop("even")
    page = text(SHARING)
    assert f"sharing reaches {min(fused.values()):.0f} to {max(fused.values()):.0f} % of its speed" in page
    assert (
        f"(HH {fused['multi-turn HH']:.0f} %, TL;DR {fused['TL;DR']:.0f} %, ranked 8 {fused['ranked 8']:.0f} %)"
        in page
    )
    assert f"{min(plain.values()):.0f} to {max(plain.values()):.0f} %, and {even:.0f} % where answers are" in page


def test_the_table_of_peak_memory():
    found = {
        (row["way"], row["k"]): row["above_model_mib"]
        for row in rows("results/prefix_sharing_memory.csv")
        if row["stage"] == "forward+backward"
    }
    ks = ("2", "4", "6", "8", "16")
    for label, way in (("padded", "padded"), ("shared", "always")):
        assert f"| {label} | {' | '.join(thousands(found[way, k]) + ' MiB' for k in ks)} |" in text(SHARING)
    shares = [int(found["always", k]) / int(found["padded", k]) for k in ks]
    assert cells(SHARING, "| shared / padded |")[1:] == [f"{share:.2f}" for share in shares]


def test_the_table_of_memory_by_method():
    found = rows("results/slic_memory.csv")
    for shape, label in (("30M", "39 M"), ("160M", "166 M")):
        peaks = {row["trainer"]: row["peak_mib"] for row in found if row["shape"] == shape}
        numbers = [thousands(peaks[name]) + " MiB" for name in ("SLiC-HF", "DPO", "DPO, precomputed reference")]
        saved = int(peaks["DPO"]) - int(peaks["SLiC-HF"])
        assert f"| {label} | {' | '.join(numbers)} | {saved} MiB;" in text(MEMORY)


def test_the_table_of_two_processes():
    found = {(row["strategy"], row["way"]): row for row in rows("results/scaling_time.csv")}
    for label, strategy in (("DDP", "ddp"), ("ZeRO-2", "zero2"), ("ZeRO-3", "zero3")):
        numbers = [
            f"{float(found[strategy, way][column]):.2f}{' ×' if column == 'times_as_fast' else ''}"
            for way in ("padded", "shared")
            for column in ("seconds_1", "seconds_2", "times_as_fast")
        ]
        assert f"| {label} | {' | '.join(numbers)} |" in text(MEMORY)


def test_what_is_said_below_the_tables():
    times = {
        (row["method"], row["way"]): float(row["times_padded"])
        for row in rows("results/prefix_sharing_speed.csv")
        if row["shape"] == "ranked 6" and row["stage"] == "step"
    }
    said = 'RRHF on "ranked 6": {:.1f}, of which the head is {:.1f}.'
    assert said.format(times["RRHF", "auto"], times["RRHF", "scored head"]) in text(SHARING)
    seconds = {(row["strategy"], row["way"]): float(row["seconds_2"]) for row in rows("results/scaling_time.csv")}
    ratios = [seconds[strategy, "padded"] / seconds[strategy, "shared"] for strategy in ("ddp", "zero2", "zero3")]
    assert f"it is still {min(ratios):.1f} to {max(ratios):.1f} times as fast" in text(MEMORY)


@pytest.mark.parametrize("table", [scaling.memory_table, scaling.largest_on_a_node, scaling.activations_table])
def test_computed_tables(table):
    assert table() in (REPOSITORY / MEMORY).read_text()


def test_the_table_of_longest_prompts():
    found = {
        (row["k"], row["checkpointing"], row["way"]): row["longest_prompt"] for row in rows("results/long_context.csv")
    }
    for start, k, checkpointing in (
        ("| K = 2, SLiC-HF |", "2", "False"), ("| K = 6, RRHF |", "6", "False"),
        ("| K = 2, activation checkpointing |", "2", "True"), ("| K = 6, activation checkpointing |", "6", "True"),
    ):  # fmt: skip
        longest = [thousands(found[k, checkpointing, way]) for way in ("padded", "scored head", "shared")]
        assert cells(MEMORY, start)[1:] == longest


def test_the_speed_of_sampling():
    times = {row["way"]: float(row["ours_times_as_fast"]) for row in rows("results/sampling_speed.csv")}
    said = (
        "{:.1f} times as fast as a loop over `model.generate` with one answer at a time, {:.1f} times as one with all"
    )
    said = said.format(times["one candidate"], times["one prompt"])
    assert f"{said} six to a prompt (`num_return_sequences`), and {times['batches']:.1f} times as" in text(ROUNDS)


# What a method's page says beside the claims' pictures


def of_claim(name: str, key: str) -> dict[tuple[str, str], dict]:
    """Rows of a claim by seed and another column; the last of several."""
    return {(row["seed"], row[key]): row for row in rows(f"claims/results/{name}.csv")}


def test_what_is_said_of_displacement():
    changes: dict[tuple[str, str], list[float]] = {}
    for seed in "123":
        for kind in ("sampled", "dataset"):
            for name in ("dpo", "dpo_small", "dpo_hard", "dpo_small_nll", "dpo_hard_nll"):
                of_run = [
                    float(row["chosen"])
                    for row in rows("claims/results/dpo_displacement.csv")
                    if (row["seed"], row["kind"], row["training"], row["watched"]) == (seed, kind, name, "trained")
                ]
                changes.setdefault((kind, name), []).append(of_run[-1] - of_run[0])
    mean = {key: fmean(values) for key, values in changes.items()}
    losses = sorted(-mean["dataset", name] for name in ("dpo", "dpo_small", "dpo_hard"))
    assert f"the chosen answers lost {losses[0]:.0f} to {losses[-1]:.0f} nats" in text("docs/methods/dpo.md")
    assert (
        f"they gained {mean['sampled', 'dpo']:.1f} at β 1, and fell by {-mean['sampled', 'dpo_small']:.1f} at β 0.1, "
        f"by {-mean['sampled', 'dpo_hard']:.1f} with five times the learning rate"
    ) in text("docs/methods/dpo.md")
    with_nll = [one for (_, name), of_seeds in changes.items() for one in of_seeds if name.endswith("_nll")]
    assert min(with_nll) > 0  # "in each case"


def test_what_is_said_of_the_regulariser():
    found = of_claim("slic_regulariser", "reg_weight")
    broken = [100 * float(found[seed, "0.0"]["broken"]) for seed in "123"]
    assert f"without it {min(broken):.0f} to {max(broken):.0f} % of the answers had" in text("docs/methods/slic.md")
    rewards = {weight: [float(found[seed, weight]["reward"]) for seed in "123"] for seed, weight in found}
    assert sum(one < sft for one, sft in zip(rewards["0.0"], rewards["SFT"], strict=True)) == 2  # "two seeds of three"
    means = {weight: fmean(values) for weight, values in rewards.items()}
    assert set(sorted(means, key=means.get)[-2:]) == {"1.0", "10.0"}  # "alike and the highest"
    assert abs(means["1.0"] - means["10.0"]) < 0.005


def test_what_is_said_of_slic_against_sft():
    found = of_claim("slic_beats_sft", "method")
    slic = [found[seed, name] for seed in "123" for name in ("slic_direct", "slic_sample_rank")]
    rates = [100 * float(row["win_rate_sft"]) for row in slic]
    said = f"the win rate over SFT was {min(rates):.0f} to {max(rates):.0f} % (a tie is half a win)"
    assert said in text("docs/methods/slic.md")
    assert max(rates) < 100 * min(float(found[seed, "best_of_n"]["win_rate_sft"]) for seed in "123")
    assert min(float(row["broken"]) for row in slic) > 0.25  # "a quarter of the words or more"
    for seed in "123":
        tokens = [float(found[seed, name]["tokens"]) for name in ("sft", "slic_direct", "slic_sample_rank")]
        assert 0.5 < tokens[1] - tokens[0] < tokens[2] - tokens[0] < 1.5


def test_what_is_said_of_hacking():
    found = {(row["seed"], row["run"], row["refresh"]): row for row in rows("claims/results/rrhf_online_refresh.csv")}

    def mean(run, refresh, figure):
        return fmean(float(found[seed, run, refresh][figure]) for seed in "123")

    page = text("docs/methods/rrhf.md")
    assert f"from {mean('online', '0', 'proxy'):.1f} to {mean('online', '10', 'proxy'):.1f} and ended in one" in page
    best = fmean(max(float(found[seed, "online", str(n)]["true_reward"]) for n in range(11)) for seed in "123")
    start, end = (mean("online", refresh, "true_reward") for refresh in ("0", "10"))
    assert f"down from {best:.1f} ({start:.1f} before training) to {end:.1f}" in page
    gain = mean("offline", "10", "true_reward") - mean("offline", "0", "true_reward")
    digits = [100 * mean("offline", refresh, "accuracy") for refresh in ("0", "10")]
    assert f"the reward gained {gain:.2f} at the price of digits ({digits[0]:.0f} to {digits[1]:.0f} %)" in page
    perplexity = mean("offline", "10", "perplexity") / mean("offline", "0", "perplexity")
    assert f"and of {perplexity:.1f} times the perplexity" in page
    worse = [
        float(found[seed, "online", "10"]["perplexity"]) / float(found[seed, "online", "0"]["perplexity"])
        for seed in "123"
    ]
    assert f"no right digits, {min(worse):.0f} to {max(worse):.0f} times the perplexity" in page


def test_what_is_said_of_spin():
    found = {
        (row["seed"], row["model"]): 100 * float(row["accuracy"]) for row in rows("claims/results/spin_gains.csv")
    }
    names = ["start", "iteration-0", "iteration-1", "iteration-2"]
    gains = [
        fmean(found[seed, after] - found[seed, before] for seed in "123")
        for before, after in zip(names, names[1:], strict=False)
    ]
    assert "each iteration gained, {:.1f}, {:.1f} and {:.1f} points;".format(*gains) in text("docs/methods/spin.md")
    assert "continued SFT was ahead at the end on two seeds of three" in text("docs/methods/spin.md")
    assert sum(found[seed, "control-2"] > found[seed, "iteration-2"] for seed in "123") == 2
