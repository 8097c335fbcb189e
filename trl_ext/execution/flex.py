"""FlexAttention as a fused kernel or not at all."""

import functools

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

# Graphs that dynamo may compile of it. Rows and blocks of one and of many, training and evaluation, with and without
# gradients and windows are a graph each: 8 for a model in full, 16 with windows. Dynamo's own limit is 8.
MOST_GRAPHS = 64


def refuse_unfused_flex() -> None:
    """
    Make transformers' FlexAttention stop where dynamo would fall back to an unfused operator, which has all scores in
    memory and only warns once; and let it compile more graphs before.
    """
    attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    if getattr(attend, "refuses_unfused", False):
        return

    @functools.wraps(attend)
    def attention(*args, **kwargs):
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True):
                return attend(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"FlexAttention was compiled for {MOST_GRAPHS} kinds of batches, and would run unfused for another. "
                "Load the model with attn_implementation='sdpa' or 'flash_attention_2'."
            ) from error

    attention.refuses_unfused = True
    AttentionInterface.register("flex_attention", attention)
