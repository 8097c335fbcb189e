"""Prefix sharing as one function for any model: the padded batch's numbers, without TRL."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tests.support.data import REPOSITORY
from trl_ext import per_token_logps, shared_prefixes
from trl_ext.execution import masks

BOUND = 1e-5  # of the norm; float32 has 6e-8
SIZE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=5),
    "gemma2, windows and soft caps": Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "cohere, scaled logits": CohereConfig(**GROUPED, logit_scale=0.3),
    "gpt_neox": GPTNeoXConfig(**SIZE),
}


def model_of(name, attention="eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).train()


def batch():
    """Two prompts, three and two completions of different lengths, and one row that shares nothing."""
    random = torch.Generator().manual_seed(1)
    draw = lambda number: torch.randint(3, 97, (number,), generator=random).tolist()  # noqa: E731
    first, second = draw(14), draw(9)
    rows = [(first, draw(3)), (first, draw(7)), (second, draw(5)), (first, draw(1)), (second, draw(2)), ([], draw(6))]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask, completion = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for n, (prompt, answer) in enumerate(rows):
        both = len(prompt) + len(answer)
        ids[n, :both], mask[n, :both], completion[n, len(prompt) : both] = torch.tensor(prompt + answer), 1, 1
    completion[:, 0] = 0
    return ids, mask, completion


def error(ours, theirs):
    """The norm of the difference over that of what is expected."""
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_states_and_gradients_are_those_of_the_padded_batch(name, attention):
    if attention == "sdpa" and name.startswith("gemma2"):
        pytest.skip("transformers computes its soft caps in eager and Flex attention alone")
    model, (ids, mask, _) = model_of(name, attention), batch()
    weights = torch.randn(*ids.shape, 97, generator=torch.Generator().manual_seed(2))
    weights *= mask.unsqueeze(-1)

    def run():
        model.zero_grad()
        output = model(ids, attention_mask=mask, output_hidden_states=True)
        (output.logits * weights).sum().backward()
        return output, gradients(model)

    padded, expected = run()
    with shared_prefixes(model, always=True) as sharing:
        shared, found = run()
    assert sharing.statistics.positions_padded == ids.numel()
    assert sharing.statistics.positions_computed < mask.sum()
    is_token = mask.bool()
    assert error(shared.logits[is_token], padded.logits[is_token]) < BOUND
    for ours, theirs in zip(shared.hidden_states, padded.hidden_states, strict=True):
        assert error(ours[is_token], theirs[is_token]) < BOUND
    assert max(error(found[name], expected[name]) for name in expected) < BOUND and found.keys() == expected.keys()
    again, _ = run()  # the hooks are gone
    assert torch.equal(again.logits, padded.logits)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora_and_checkpointing(checkpointed):
    """The backward pass is outside the block, and runs checkpointed layers again."""
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model, (ids, mask, completion) = get_peft_model(model_of("llama"), lora), batch()
    logps = per_token_logps(model, ids, mask, completion)
    logps.sum().backward()
    expected = gradients(model)
    model.zero_grad()
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with shared_prefixes(model, always=True):
        found = per_token_logps(model, ids, mask, completion)
    found.sum().backward()
    assert error(found, logps) < BOUND and gradients(model).keys() == expected.keys()
    assert max(error(gradients(model)[name], expected[name]) for name in expected) < BOUND


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_the_logits(name):
    model, (ids, mask, completion) = model_of(name), batch()
    logits = model(ids, attention_mask=mask).logits[:, :-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * completion[:, 1:]
    expected.sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    with shared_prefixes(model, always=True):
        found = per_token_logps(model, ids, mask, completion, temperature=0.7)
    assert found.dtype == torch.float32 and found.shape == (len(ids), ids.size(1) - 1)
    assert error(found, expected) < BOUND
    found.sum().backward()
    ours = gradients(model)
    assert max(error(ours[name], wanted[name]) for name in wanted) < BOUND and ours.keys() == wanted.keys()


def test_a_wrong_mask_is_seen(monkeypatch):
    visibility = masks.visibility

    def flip_one(*args):
        visible = visibility(*args)
        visible[0, 0, -1, 0] = ~visible[0, 0, -1, 0]
        return visible

    model, (ids, mask, _) = model_of("llama"), batch()
    padded = model(ids, attention_mask=mask).logits[mask.bool()]
    monkeypatch.setattr(masks, "visibility", flip_one)
    with shared_prefixes(model, always=True):
        shared = model(ids, attention_mask=mask).logits[mask.bool()]
    assert error(shared, padded) > 100 * BOUND


def test_what_cannot_be_rearranged_runs_padded():
    model, (ids, mask, _) = model_of("llama"), batch()
    with torch.no_grad(), shared_prefixes(model) as sharing:
        assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7
        model(ids, attention_mask=mask.index_fill(1, torch.tensor([1]), 0))  # a mask with holes
        embeddings = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeddings, attention_mask=mask)
        last = model(ids, attention_mask=mask, logits_to_keep=2).logits
    assert last.shape == (len(ids), 2, 97) and sharing.statistics.batches_padded > 0
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="`model` must be able to share prefixes: .* is an encoder-decoder"):
        with shared_prefixes(model):
            pass


def test_it_needs_no_trl():
    """In a process to which TRL, accelerate, PEFT and datasets are not there."""
    program = (
        "import sys, torch\nfrom importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        missing = name.split('.')[0] in ('trl', 'accelerate', 'peft', 'datasets', 'deepspeed')\n"
        "        return None if missing else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from trl_ext import per_token_logps, shared_prefixes\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "                                     num_attention_heads=2))\n"
        "ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])\n"
        "mask = torch.ones_like(ids)\n"
        "padded = per_token_logps(model, ids, mask, mask)\n"
        "with shared_prefixes(model, always=True) as sharing:\n"
        "    shared = per_token_logps(model, ids, mask, mask)\n"
        "torch.testing.assert_close(shared, padded)\n"
        "assert sharing.statistics.positions_computed == 5 and not {'trl', 'accelerate', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
