"""The tables that `scaling.py` prints."""

import csv
from pathlib import Path

from common import MODELS
from scaling_model import ARCHITECTURES, BASE, BATCHES, GPU_MEMORY, HEADROOM, NAMES, communication, states


def expected(row: dict) -> float:
    """[`communication`] for a row of `scaling.csv`."""
    hidden, layers, _, _, mlp, _ = MODELS[BASE["model"]]
    embedding = 32000 * hidden
    most = row["max_completions_per_forward"]
    recomputed = layers * (4 * hidden**2 + 2 * hidden * mlp) if str(row["checkpointing"]) == "True" else 0
    if most:  # the layers; and of the head, as large as the embedding, one gathering less was counted
        recomputed += int(row["parameters"]) - 3 * embedding
    return communication(
        row["strategy"],
        int(row["parameters"]),
        int(row["trained"]),
        bytes_each=4,
        recomputed=recomputed,
        parts=-(-int(row["k"]) // int(most)) if most else 1,
        frozen_embedding=embedding if str(row["lora"]) == "True" else 0,
        keeps_weights=str(row["keeps_weights"]) == "True",
    )


# Tables


def tokens_of(batch: tuple[int, int, int], shared: bool) -> tuple[int, int]:
    """Tokens computed for a prompt with its answers, and the length of their rows."""
    prompt, answer, k = batch
    return (prompt + k * answer,) * 2 if shared else (k * (prompt + answer), prompt + answer)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gigabytes(value: float) -> str:
    text = f"{value / 1e9:,.1f}" if value < 99.5e9 else f"{value / 1e9:,.0f}"
    return f"**{text}**" if 0 <= value <= GPU_MEMORY - HEADROOM else text


def memory_table() -> str:
    head = ["computed, GB per GPU", *(f"{m.name}, {n} GPU{'s' * (n > 1)}" for m in ARCHITECTURES for n in (1, 8, 64))]
    rows = []
    for lora in (False, True):
        for strategy, name in NAMES.items():
            cells = []
            for model in ARCHITECTURES:
                adapters = model.lora if lora else 0
                for processes in (1, 8, 64):
                    held = states(strategy, model.parameters + adapters, adapters or model.parameters, processes)
                    held += model.gathered if strategy == "offload" or (strategy == "zero3" and processes > 1) else 0
                    tokens, length = tokens_of(BATCHES[0], shared=True)
                    held += model.activations(tokens, length, checkpointing=True, shared=True)
                    cells.append(gigabytes(held))
            rows.append([f"{'LoRA' if lora else 'full'}, {name}", *cells])
    for strategy in ("ddp", "zero3"):
        cells = [
            f"+ {2 * m.parameters / 1e9:.1f}" if strategy == "ddp" else f"+ {2 * m.parameters / n / 1e9:.1f}"
            for m in ARCHITECTURES
            for n in (1, 8, 64)
        ]
        names = "DDP, ZeRO-1, ZeRO-2" if strategy == "ddp" else "ZeRO-3, FSDP2"
        rows.append([f"a reference model (none here), {names}", *cells])
    return table(head, rows)


def largest_on_a_node() -> str:
    """The largest model whose states fit on 8 GPUs; the activations and gathered layers of the 7B scaled along."""
    rows = []
    model = ARCHITECTURES[0]
    tokens, length = tokens_of(BATCHES[0], shared=True)
    for strategy, name in NAMES.items():
        if strategy == "offload":
            continue
        cells = []
        for adapters in (0, model.lora / model.parameters):
            each = states(strategy, 1.0 + adapters, adapters or 1.0, 8)
            working = model.gathered if strategy == "zero3" else 0
            working += model.activations(tokens, length, checkpointing=True, shared=True)
            cells.append(f"{(GPU_MEMORY - HEADROOM) / (each + working / model.parameters) / 1e9:.0f} B")
        rows.append([name, *cells])
    return table(["computed, largest model on 8 GPUs of 80 GB", "full", "LoRA"], rows)


def activations_table() -> str:
    rows = []
    for batch in BATCHES:
        for checkpointing in (False, True):
            cells = []
            for model in ARCHITECTURES:
                for shared in (False, True):
                    tokens, length = tokens_of(batch, shared)
                    cells.append(
                        gigabytes(model.activations(tokens, length, checkpointing=checkpointing, shared=shared))
                    )
            padded, shared = (tokens_of(batch, way)[0] for way in (False, True))
            rows.append([f"K = {batch[2]}", "on" if checkpointing else "off", f"{padded} / {shared}", *cells])
    head = ["computed, GB of activations", "checkpointing", "tokens padded / shared"]
    return table(head + [f"{m.name}, {way}" for m in ARCHITECTURES for way in ("padded", "shared")], rows)


def communication_table() -> str:
    head = ["computed, GB per step", *(f"{m.name}, {t}" for m in ARCHITECTURES for t in ("full", "LoRA"))]
    rows = []
    for strategy, checkpointing, name in (
        ("ddp", False, "DDP"),
        ("zero2", False, "ZeRO-1, ZeRO-2"),
        ("zero3", False, "ZeRO-3, FSDP2"),
        ("zero3", True, "ZeRO-3, FSDP2, checkpointing"),
    ):
        cells = []
        for model in ARCHITECTURES:
            for adapters in (0, model.lora):
                sent = communication(
                    strategy,
                    model.parameters + adapters,
                    adapters or model.parameters,
                    recomputed=model.recomputed if checkpointing else 0,
                    frozen_embedding=model.vocabulary * model.hidden if adapters else 0,
                )
                cells.append(f"{sent / 1e9:,.1f}")
        rows.append([name, *cells])
    return table(head, rows)


def share_table(flops: float = 400e12, bandwidth: float = 50e9) -> str:
    """Communication's part of a step if nothing overlapped: 8 FLOPs per weight and token (with recomputing)."""
    model = ARCHITECTURES[0]
    rows = []
    for batch in BATCHES:
        cells = []
        for strategy in ("ddp", "zero3"):
            sent = communication(strategy, model.parameters, model.parameters, recomputed=model.recomputed) / bandwidth
            for shared in (False, True):
                computing = 8 * model.parameters * tokens_of(batch, shared)[0] / flops
                cells.append(f"{sent / (sent + computing):.0%}")
        rows.append([f"K = {batch[2]}", *cells])
    head = ["computed, communication / (communication + computing)"]
    return table(head + [f"{s}, {way}" for s in ("DDP", "ZeRO-3") for way in ("padded", "shared")], rows)


def measured_table(path: Path) -> str:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        is_spread = row["strategy"] == "zero3" and row["keeps_weights"] == "False"
        parts = [f"K = {row['k']}", row["way"]]
        parts += ["checkpointing"] * (row["checkpointing"] == "True")
        if row["max_completions_per_forward"]:
            parts.append(f"{row['max_completions_per_forward']} completions per forward")
        trained = float(row["trained"]) * 4
        whole = float(row["parameters"]) * 4
        unit = whole if row["strategy"] == "zero3" else trained
        lines.append(
            [
                {"zero3": "ZeRO-3"}.get(row["strategy"], NAMES[row["strategy"]]) + ", as a large model" * is_spread,
                "LoRA" if row["lora"] == "True" else "full",
                ", ".join(parts),
                row["collectives"],
                f"{float(row['volume_bytes']) / 1e6:,.1f}",
                f"{float(row['volume_bytes']) / unit:.2f} {'Ψ' if row['strategy'] == 'zero3' else 'Ψₜ'}",
                f"{expected(row) / unit:.2f}",
                f"{row['other_collectives']}, {float(row['other_bytes']) / 1e3:.1f} kB",
            ]
        )
    head = ["measured", "", "batch", "collectives", "MB", "in parameters", "model", "besides"]
    return table(head, lines)
