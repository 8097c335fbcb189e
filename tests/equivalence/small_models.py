"""Small random models of many architectures, all with the quirks (windows, experts, learned positions) switched on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": False}
WINDOW = 7
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# model_type -> what differs from COMMON
SHARING = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"layer_types": ALTERNATING, "sliding_window": WINDOW, "use_sliding_window": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": WINDOW, "layer_types": ALTERNATING, **EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": WINDOW},
    "stablelm": {},
    "glm": {},
    "glm4": {},
    "exaone4": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "ministral": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "apertus": {},
    "arcee": {},
    "seed_oss": {},
    "helium": {},
    "nemotron": {},
    "persimmon": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "head_dim": None},
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
}
# these must be recognised and left alone
NOT_SHARING = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "qwen3_next": {
        "num_experts": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **EXPERTS,
    },
    "lfm2": {"full_attn_idxs": [1]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "bloom": {"n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_heads": 4, "window_size": 8},
}


def make(model_type: str, **overrides):
    """A model with weights large enough that its distributions are far from uniform and mistakes show."""
    settings = {**COMMON, **SHARING.get(model_type, NOT_SHARING.get(model_type, {})), **overrides}
    attn_implementation = settings.pop("attn_implementation", None)
    settings = {name: value for name, value in settings.items() if value is not None or name == "sliding_window"}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, **({"attn_implementation": attn_implementation} if attn_implementation else {})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
    return model.float().eval()
