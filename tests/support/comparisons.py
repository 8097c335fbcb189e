"""Invented results of a comparison."""

import numpy as np

from trl_ext.comparison.results import ComparisonResults, MethodResult

# method -> label, invented: chance of a reward, of the judge's approval, tokens, KL, nats per token, chosen logp's way
INVENTED = {
    "sft": ("SFT", 0.42, 0.55, 14, 0.0, 0.9, None),
    "best_of_n": ("Best-of-n", 0.74, 0.66, 14, 1.6, 0.9, None),
    "slic_direct": ("SLiC-HF direct", 0.78, 0.68, 15, 4.0, 0.95, -2),
    "slic_sample_rank": ("SLiC-HF sample-rank", 0.80, 0.69, 15, 4.6, 0.95, -1),
    "rrhf": ("RRHF", 0.70, 0.63, 13, 3.0, 0.92, 1),
    "rrhf_two_rounds": ("RRHF, two rounds", 0.75, 0.64, 13, 4.4, 0.94, 1),
    "spin": ("SPIN", 0.52, 0.57, 16, 2.0, 0.9, 2),
    "click": ("CLICK", 0.66, 0.62, 14, 3.3, 0.93, 0),
    "dpo": ("DPO", 0.83, 0.60, 22, 9.0, 1.1, -14),
    "ipo": ("IPO", 0.72, 0.64, 17, 5.0, 1.0, -5),
    "orpo": ("ORPO", 0.61, 0.60, 14, 2.2, 0.9, 2),
    "kto": ("KTO", 0.69, 0.63, 16, 3.6, 0.96, -3),
    "rloo": ("RLOO with a reward model", 0.90, 0.41, 31, 24.0, 1.7, None),
}


def invented_comparison(prompts: int = 120, seeds: tuple[int, ...] = (0, 1), methods=INVENTED) -> ComparisonResults:
    """Made-up figures in the shape of real ones. Nothing in them was measured."""
    results = []
    for seed in seeds:
        difficulty = np.random.default_rng(seed).normal(size=prompts)
        for number, method in enumerate(methods):
            label, reward, judge, length, kl, nats, way = INVENTED[method]
            generator = np.random.default_rng([seed, number])
            level = generator.normal(0, 0.02) + 0.1 * difficulty
            lengths = generator.poisson(length, size=prompts) + 1
            shares = np.linspace(0, 1, 6)
            curve = [
                {
                    "share": float(share),
                    "updates": int(120 * share),
                    "reward": float(0.42 + (reward - 0.42) * share**0.5 + generator.normal(0, 0.01)),
                    "kl": float(kl * share),
                    "chosen_logps": None if way is None else -18 + way * float(share),
                    "rejected_logps": None if way is None else -19 + (2 * min(way, 0) - 6) * float(share),
                }
                for share in shares
            ]
            results.append(
                MethodResult(
                    method=method,
                    label=label,
                    seed=seed,
                    status="done",
                    scores={
                        "reward": (generator.random(prompts) < reward + level).astype(float).tolist(),
                        "judge": np.clip(generator.normal(judge + level, 0.2), 0, 1).tolist(),
                    },
                    measured={
                        "lengths": lengths.tolist(),
                        "kl": generator.normal(kl, 0.3 + kl / 4, size=prompts).tolist() if kl else [0.0] * prompts,
                        "nll": (lengths * generator.normal(nats, 0.1, size=prompts)).tolist(),
                        "distinct_2": 0.8 - 0.02 * number,
                        "updates": 0 if method == "sft" else 120,
                        "completions_sampled": 0 if method in ("sft", "dpo", "spin") else 8 * 320,
                        "seconds": 20 + 9.0 * number,
                        "sampling_seconds": 0.0 if method == "sft" else 11.5,
                        "tokens_per_second": None if method == "sft" else 5200 - 210.0 * number,
                        "peak_memory_mib": 410 + 35.0 * number,
                        "models_resident": "2" if method in ("dpo", "ipo", "kto", "rloo") else "1",
                    },
                    examples=[
                        {
                            "prompt": f"In words: {value}",
                            "answer": f"{value} is invented, says {label}.",
                            "reward": 1.0,
                        }
                        for value in (17, 204)
                    ],
                    curve=[] if method in ("sft", "best_of_n") else curve,
                    notes=["no training: of 8 answers per prompt the best is kept"] if method == "best_of_n" else [],
                )
            )
    return ComparisonResults(
        title="Invented figures for a test",
        base="sft",
        prompts=prompts,
        results=results,
        settings={"steps": 120, "learning_rate": 1e-4, "seeds": list(seeds)},
        notes=["All figures are made up by the test's generator."],
        command="python -m pytest tests/unit/comparison/test_page.py",
    )


HOSTILE = (
    "<script>document.title = 'owned'</script><img src=https://example.org/a.png onerror=alert(1)> "
    "\"'&\x00\ud800 $x_1$"
)


def hostile_comparison(**size) -> ComparisonResults:
    """Markup wherever a model, a data set or a user can put text."""
    comparison = invented_comparison(**size)
    comparison.title = comparison.command = HOSTILE
    comparison.notes.append(HOSTILE)
    comparison.settings[HOSTILE] = HOSTILE
    for number, result in enumerate(comparison.results[:3]):
        result.notes.append(HOSTILE)
        result.examples.append({"prompt": HOSTILE, "answer": HOSTILE, "reward": None})
        if number:
            result.measured["models_resident"] = HOSTILE
    label = comparison.results[1].label + HOSTILE
    for result in comparison.results:
        if result.method == comparison.results[1].method:
            result.label = label
        result.scores[HOSTILE] = result.scores.pop("judge")
    failed = MethodResult("grpo", "A method that has failed, with a long name", 0, "failed", f"Traceback:\n{HOSTILE}")
    comparison.results.append(failed)
    return comparison
