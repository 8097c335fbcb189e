import torch

from trl_ext import CandidateCollator

EXAMPLES = [
    {"prompt_ids": [1, 2], "completion_ids": [[3, 4], [5]], "scores": [1.0, 0.0], "target_index": 0},
    {"prompt_ids": [6], "completion_ids": [[7], [8], [9, 10]], "scores": [0.0, 2.0], "target_index": 2},
    {"prompt_ids": [], "completion_ids": [[1], [2, 3], [4]], "scores": [0.0, 2.0, 1.0], "target_index": 1},
]


def test_batch_is_prompt_major_with_targets_behind_their_candidates():
    batch = CandidateCollator(pad_token_id=0)(EXAMPLES)
    assert list(batch)[0] == "prompt_weights", "transformers reads the batch size off the first tensor"
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert batch["candidate_index"].tolist() == [[0, 1, -1], [2, 3, -1], [5, 6, 7]]
    assert batch["target_index"].tolist() == [0, 4, 6]
    assert batch["scores"].tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 1.0]]
    assert batch["input_ids"].tolist()[:5] == [[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0], [6, 8, 0, 0], [6, 9, 10, 0]]
    assert batch["completion_mask"].tolist()[4:6] == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert "position_ids" not in batch


def test_left_padding_moves_tokens_and_keeps_positions():
    batch = CandidateCollator(pad_token_id=0, padding_side="left", pad_to_multiple_of=3)(EXAMPLES[:1])
    assert batch["input_ids"].tolist() == [[0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 5]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 1, 2]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]


def test_scores_keep_their_values_as_float32():
    batch = CandidateCollator(pad_token_id=0)(EXAMPLES)
    assert batch["scores"].dtype == torch.float32 and batch["input_ids"].dtype == torch.int64
