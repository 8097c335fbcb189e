import torch

from trl_ext.logps import by_prompt, completion_logps


def test_sums_and_lengths_skip_prompt_and_padding():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    logps = torch.tensor([[-1.0, -2.0, -50.0], [-60.0, -70.0, -3.0]], requires_grad=True)
    result = completion_logps(logps, mask)
    assert result.sums.tolist() == [-3.0, -3.0] and result.lengths.tolist() == [2, 1]
    assert result.means.tolist() == [-1.5, -3.0]
    result.sums.sum().backward()
    assert logps.grad.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_real_log_probability_of_zero_is_counted():
    assert completion_logps(torch.zeros(1, 2), torch.tensor([[0, 1, 1]])).lengths.tolist() == [2]


def test_without_a_prompt_the_first_token_is_neither_scored_nor_counted():
    result = completion_logps(torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 1, 1]]))
    assert result.sums.tolist() == [-3.0] and result.lengths.tolist() == [2]


def test_no_scored_token_gives_zero_not_nan():
    result = completion_logps(torch.tensor([[-1.0]]), torch.tensor([[0, 0]]))
    assert result.sums.tolist() == [0.0] and result.means.tolist() == [0.0]


def test_infinite_values_outside_the_completion_do_not_leak():
    result = completion_logps(torch.tensor([[float("-inf"), -1.0]]), torch.tensor([[0, 0, 1]]))
    assert result.sums.tolist() == [-1.0]


def test_long_sums_are_taken_in_float32():
    # 4096 times -0.01 in bfloat16 would stall long before -40
    logps = torch.full((1, 4096), -0.01, dtype=torch.bfloat16)
    total = completion_logps(logps, torch.ones(1, 4097)).sums
    assert total.dtype == torch.float32
    assert abs(total.item() - logps[0, 0].float().item() * 4096) < 1e-2


def test_by_prompt_fills_missing_candidates_without_gradient():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = by_prompt(values, torch.tensor([[0, -1], [1, 2]]))
    assert grid.tolist() == [[1.0, 0.0], [2.0, 3.0]]
    grid.sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 1.0]
