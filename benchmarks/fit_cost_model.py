"""
Fit the constants of `trl_ext/execution/cost.py` to this machine.

    python benchmarks/fit_cost_model.py

Times forward + backward of a model's layers over R rows of T slots with a dense mask, as the shared layouts have, and
with plain causal attention, as a padded batch without padding has. The time per token is fitted as a straight line in
T; what the slope says about attention, relative to what FLOPs say, is `ATTENTION_SLOWDOWN`. Each timing goes to
`benchmarks/results/fit_cost_model.csv`, and the constants are printed.
"""

import argparse
import statistics
import time

import torch
from common import MODELS, RESULTS, append, circumstances, make_model
from scipy.stats import linregress

from trl_ext.execution.cost import ATTENTION_SLOWDOWN, CostModel

GRID = [(16, 64), (8, 128), (4, 256), (2, 512), (1, 1024), (1, 1536), (1, 2048)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["30M", "166M"], choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in options.models:
        model = make_model(name).to(device, dtype)
        times = {(kind, *size): [] for kind in ("masked", "causal") for size in GRID}
        for repeat in range(options.repeats + 1):
            for kind, rows, length in times:
                ids = torch.randint(0, 32000, (rows, length), device=device)
                mask = None
                if kind == "masked":
                    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    times[kind, rows, length].append(time.perf_counter() - start)
        per_flop = CostModel.of(model).attention_per_pair / ATTENTION_SLOWDOWN
        slopes = {}
        for kind in ("masked", "causal"):
            seconds = [statistics.median(times[kind, *size]) / (size[0] * size[1]) for size in GRID]
            line = linregress([length for _, length in GRID], seconds)
            slopes[kind] = line.slope / line.intercept / per_flop
            print(
                f"{name} {kind}: {line.intercept * 1e6:.1f} us per token + {line.slope * 1e9:.2f} ns per pair "
                f"(r2 {line.rvalue**2:.3f}); an attention FLOP takes as long as {slopes[kind]:.2f} others"
            )
            append(
                RESULTS / "fit_cost_model.csv",
                [
                    {
                        "model": name,
                        "attention": kind,
                        "rows": rows,
                        "length": length,
                        "seconds": round(statistics.median(times[kind, rows, length]), 4),
                        "repeats": options.repeats,
                        **circumstances(),
                    }
                    for rows, length in GRID
                ],
            )
        print(
            f"{name}: ATTENTION_SLOWDOWN {slopes['masked']:.2f}, CAUSAL_PART {slopes['causal'] / slopes['masked']:.2f}"
        )


if __name__ == "__main__":
    main()
