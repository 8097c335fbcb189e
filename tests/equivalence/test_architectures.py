"""Every architecture that is said to share prefixes gives the padded path's numbers, and really shares."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from tests.equivalence.compare import FIELDS, assert_same, batch_of, random_sequences, two_of
from tests.equivalence.small_models import SHARING, WINDOW, make
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution.cost import CostModel
from trl_ext.execution.sharing import PrefixSharing
from trl_ext.execution.support import VERIFIED, inspect_model


def test_the_list_of_verified_architectures_is_this_one():
    assert set(SHARING) == VERIFIED


@pytest.mark.parametrize("model_type", SHARING)
def test_architecture(model_type):
    padded, shared, prefix_sharing = two_of(model_type)
    # prompts and answers longer than the windows, so that windows cut into both
    batch = batch_of(random_sequences(3, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW)))
    assert_same(padded, shared, batch)
    assert prefix_sharing.statistics.batches_shared == 1
    assert prefix_sharing.statistics.positions_computed < 0.7 * prefix_sharing.statistics.positions_padded


@pytest.mark.parametrize("model_type", SHARING)
def test_padding_on_the_left_without_positions(model_type):
    """
    Prompts are padded on the left, answers on the right, as RLOO and GRPO have them. Each model then uses positions of
    its own, the columns or the tokens' numbers, which learned positions show.
    """
    padded, shared, prefix_sharing = two_of(model_type)
    sequences = random_sequences(3, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW))
    batch = batch_of(sequences)
    length = max(len(prompt) for prompt, _ in sequences)
    rows = {name: torch.full((len(sequences), length + 2 * WINDOW), 0) for name in ("input_ids", "attention_mask")}
    rows["labels"] = torch.full_like(rows["input_ids"], -100)
    for n, (prompt, answer) in enumerate(sequences):
        both = len(prompt) + len(answer)
        for name in rows:
            rows[name][n, length - len(prompt) :][:both] = batch[name][n, :both]
    assert_same(padded, shared, rows)
    statistics = prefix_sharing.statistics
    assert statistics.batches_shared == 1 and statistics.positions_computed < 0.7 * statistics.positions_padded


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(model_type, use_reentrant):
    padded, shared, _ = two_of(model_type, attention_dropout=0.0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    recomputed = []
    for model in (padded, shared):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
    attention = next(m for m in shared.modules() if "Attention" in type(m).__name__)
    attention.register_forward_hook(lambda *_: recomputed.append(1))
    assert_same(padded, shared, batch_of(random_sequences(2, 3, (8, 20), (1, 12))))
    assert len(recomputed) == 2  # once on the way forward, once again on the way back


@pytest.mark.parametrize("model_type", SHARING)
def test_eager_attention(model_type):
    padded, shared, prefix_sharing = two_of(model_type, attn_implementation="eager")
    assert shared.config._attn_implementation == "eager"
    assert_same(padded, shared, batch_of(random_sequences(2, 3, (8, 20), (1, 12))))
    assert prefix_sharing.statistics.batches_shared == 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_lora(model_type):
    models = []
    for _ in range(2):
        model = make(model_type)
        add_fused_lm_head(model, outputs=FIELDS)
        torch.manual_seed(0)
        models.append(get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)))
    prefix_sharing = PrefixSharing(True)
    prefix_sharing.install(models[1])
    assert_same(*models, batch_of(random_sequences(2, 3, (8, 20), (1, 12))))
    assert prefix_sharing.statistics.batches_shared == 1


@pytest.mark.slow
def test_every_architecture_of_transformers_is_inspected_without_an_error():
    """With the default config of each; nothing is computed."""
    seen = 0
    for model_type, config_class in CONFIG_MAPPING.items():
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config_class())
        except Exception:  # a config without usable defaults, or an extra that is not installed
            continue
        seen += 1
        support = inspect_model(model)
        assert support.reason is None or type(model).__name__ in support.reason or "attention impl" in support.reason
        assert 0 <= CostModel.of(model).attention_per_pair < 1, model_type
    assert seen > 100
