"""What the claims of papers measure, by hand."""

import csv
import json
import math

import dpo_displacement
import ipo_bandit
import numpy as np
import on_playground
import pytest
import rrhf_best_of_n
import rrhf_online_refresh
import slic_beats_sft
import slic_regulariser
import spin_gains
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

from tests.support.data import REPOSITORY
from trl_ext.playground.model import save_byte_level_model
from trl_ext.playground.task import Playground
from trl_ext.runs.evaluation import answer_logps

FOLDER = REPOSITORY / "benchmarks" / "claims"


def by_brute_force(loss, data, tau, start, largest=None):
    """The policy where the mean loss over the pairs is least, logits within `largest` of 0."""
    pairs = [tuple("abc".index(action) for action in pair) for pair in ipo_bandit.DATA[data]]

    def mean_loss(logits):
        gaps = np.array([logits[winner] - logits[loser] for winner, loser in pairs])  # the reference is uniform
        return np.mean((gaps - 1 / (2 * tau)) ** 2 if loss == "IPO" else np.log1p(np.exp(-tau * gaps)))

    bounds = None if largest is None else [(-largest, largest)] * 3
    logits = minimize(mean_loss, start, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}).x
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("tau", ipo_bandit.TAUS)
@pytest.mark.parametrize("data", ipo_bandit.DATA)
def test_the_optimum_of_ipo_by_brute_force(data, tau):
    start = [0.7, -1.1, 0.4]
    found = by_brute_force("IPO", data, tau, start)
    assert ipo_bandit.optimum("IPO", data, tau, start) == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("data", ipo_bandit.DATA)
def test_the_optimum_or_limit_of_dpo_by_brute_force(data, tau):
    start = [0.7, -1.1, 0.4]
    found = by_brute_force("DPO", data, tau, start, largest=12)
    assert ipo_bandit.optimum("DPO", data, tau, start) == pytest.approx(found, abs=1e-4)


def test_the_losses_by_hand():
    tau = torch.tensor([[0.1], [1.0]])
    gaps = torch.tensor([[2.0, 5.0], [2.0, 0.5]])
    torch.testing.assert_close(ipo_bandit.ipo(gaps, tau), torch.tensor([[9.0, 0.0], [2.25, 0.0]]))
    assert ipo_bandit.dpo(gaps, tau)[0, 0].item() == pytest.approx(0.598139)


def test_training_reaches_the_optimum():
    settings = {**ipo_bandit.CLAIM.settings, "steps": 1200}
    result = ipo_bandit.run(0, settings)
    assert len(result["steps"]) == 5
    assert np.shape(result["curves"]) == (2, 4, 4, 5, 3)
    assert len(result["rows"]) == 2 * 4 * 4
    assert result["starts"]["sampled"] == [0, 0, 0]
    assert min(np.abs(result["starts"]["whole"])) > 0
    assert ipo_bandit.from_optimum("whole", "IPO", list(ipo_bandit.DATA))(result) < 1e-2
    assert ipo_bandit.from_optimum("sampled", "IPO", ["D1"])(result) < 0.1
    assert ipo_bandit.extreme(min, "DPO", "D1", "a", [0.1, 0.5])(result) > 0.99
    # curves and rows are of the same policies
    for row in result["rows"][:16]:
        place = list(ipo_bandit.DATA).index(row["data"]), ipo_bandit.TAUS.index(row["tau"])
        for number, loss in enumerate(ipo_bandit.LOSSES):
            last = result["curves"][number][place[0]][place[1]][-1]
            assert last == pytest.approx([row[f"{loss}_{action}"] for action in "abc"], abs=1e-6)


def test_seeds_differ_in_what_is_random_only():
    settings = {**ipo_bandit.CLAIM.settings, "steps": 300}
    first, again, other = (ipo_bandit.run(seed, settings) for seed in (0, 0, 1))
    assert first == again
    assert first["starts"]["whole"] != other["starts"]["whole"]
    for d in range(len(ipo_bandit.DATA)):  # other mini-batches of every data set
        assert first["curves"][0][d] != other["curves"][0][d]


def test_the_committed_rows_repeat_the_outcome():
    """What the outcome says of the optima, computed again from the rows by other means."""
    written = json.loads((FOLDER / "results" / "ipo_bandit.json").read_text())
    values = {expectation["text"]: expectation["values"] for expectation in written["expectations"]}
    with (FOLDER / "results" / "ipo_bandit.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["way"] == "sampled"]
    greedy = [text for text in values if text.startswith("D1, DPO: deterministic. ")]
    unseen = [text for text in values if text.startswith("D3, DPO: ")]
    for seed in written["seeds"]:
        of_seed = [row for row in rows if int(row["seed"]) == seed]
        assert len(of_seed) == 16
        least = min(float(row["DPO_a"]) for row in of_seed if row["data"] == "D1" and float(row["tau"]) < 10)
        most = max(float(row["DPO_c"]) for row in of_seed if row["data"] == "D3")
        assert values[greedy[0]][seed] == pytest.approx(least, abs=1e-6)
        assert values[unseen[0]][seed] == pytest.approx(most, abs=1e-6)


def test_shares_of_wins_by_hand():
    shares = on_playground.compared([1.0, 0.5, 0.5, 0.0, 0.9], [0.0, 0.5, 0.6, 0.0, 0.8])
    assert shares == pytest.approx({"won": 0.4, "tied": 0.4, "lost": 0.2, "win_rate": 0.6})
    assert on_playground.compared([0.5], [0.5])["win_rate"] == 0.5
    with pytest.raises(ValueError, match="one value for every prompt"):
        on_playground.compared([1.0, 0.5], [1.0])


def test_the_tasks_own_answers_are_to_the_held_out_prompts():
    prompts = Playground(seed=1).prompts("held_out")
    rewards = slic_beats_sft.reference_rewards(1, prompts)
    assert len(rewards) == 1000
    assert min(rewards) == 0.5  # right digits, and the unfriendliest tone
    assert max(rewards) == 1.0
    with pytest.raises(RuntimeError, match="Seed 2"):
        slic_beats_sft.reference_rewards(2, prompts)


def test_broken_words_by_hand():
    assert slic_beats_sft.broken(["42 meh", "41 hooray", "42 glay", "42 okay okay", "42", ""]) == pytest.approx(2 / 3)


def test_measures_of_slic_by_hand():
    rewards = {"sft": 0.4, "best_of_n": 0.5, "slic_direct": 0.8, "slic_sample_rank": 0.7}
    result = {"rows": [{"method": method, "win_rate_reference": share} for method, share in rewards.items()]}
    assert slic_beats_sft.worse_slic_over_best_of_n(result) == pytest.approx(0.2)
    assert slic_beats_sft.difference("slic_direct", "sft")(result) == pytest.approx(0.4)

    figures = {"SFT": 0.5, 0.0: 0.9, 0.01: 0.7, 0.1: 0.95, 1.0: 0.8, 10.0: 0.6}
    result = {"rows": [{"reg_weight": weight, "reward": reward} for weight, reward in figures.items()]}
    assert slic_regulariser.spread("reward")(result) == pytest.approx(0.35)  # without SFT
    assert slic_regulariser.smallest_fall("reward", 0.1, 1.0, 10.0)(result) == pytest.approx(0.15)
    assert slic_regulariser.smallest_fall("reward", 0.0, 0.01, 0.1)(result) == pytest.approx(-0.25)
    assert slic_regulariser.zero_over_the_best_other(result) == pytest.approx(-0.05)
    assert slic_regulariser.gain_left(result) == pytest.approx(0.1 / 0.45)


def test_the_gain_left_is_defined_where_lambda_0_loses_reward():
    figures = {"SFT": 0.5, 0.0: 0.3, 0.01: 0.5, 0.1: 0.9, 1.0: 0.8, 10.0: 0.6}
    rows = [{"reg_weight": weight, "reward": reward} for weight, reward in figures.items()]
    assert slic_regulariser.gain_left({"rows": rows}) == pytest.approx(0.25)
    rows = [{"reg_weight": weight, "reward": 0.9} for weight in figures]
    assert math.isnan(slic_regulariser.gain_left({"rows": rows}))  # none gains: `main` refuses to judge it


def test_answers_and_their_first_tokens_are_added_up():
    logps = torch.tensor([[-9.0, -1.0, -2.0, -4.0, -8.0], [-1.0, -2.0, -4.0, -9.0, -9.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    whole, first = dpo_displacement.answer_sums(logps, mask, torch.tensor([2, 7]))
    assert whole.tolist() == [-15, -7]
    assert first.tolist() == [-3, -7]  # an answer shorter than its first tokens counts as a whole


def test_watched_log_likelihoods_are_those_of_an_evaluation(tmp_path):
    """The digits too, which have no end token; other weights, the same answers, other figures."""
    models = [save_byte_level_model(tmp_path / str(seed), hidden_size=32, num_layers=1, seed=seed) for seed in (1, 2)]
    pairs = [
        {"prompt": "seven = ", "chosen": "7 gladly", "rejected": "7 ugh"},
        {"prompt": "forty-two = ", "chosen": "42 yes", "rejected": "24"},
        {"prompt": "one = ", "chosen": "1 meh", "rejected": "1 hooray"},
    ]
    rows = [
        {**pair, "completions": [pair["chosen"], pair["rejected"], digits], "are_cut": [False, False, True]}
        for pair, digits in zip(pairs, ("7 ", "42 ", "1 "), strict=True)
    ]
    watch = dpo_displacement.Watch(models[0], {"two": pairs[:2], "one": pairs[2:]})
    for model in models:
        found = watch(AutoModelForCausalLM.from_pretrained(model).state_dict())
        sums = [[one for one, _ in row] for row in answer_logps(model, rows)]
        for name, of_set in (("two", sums[:2]), ("one", sums[2:])):
            means = np.mean(of_set, axis=0)
            assert list(found[name]) == ["chosen", "rejected", "digits"]
            assert list(found[name].values()) == pytest.approx(means, rel=1e-5)
    assert watch(None) == found  # as it was last


def test_changes_of_log_likelihoods_by_hand():
    values = {  # training -> chosen, rejected; of pairs that are trained on and of others
        "dpo": {"trained": [(-4, -3), (-3, -6)], "apart": [(-4, -3), (-9, -9)]},
        "dpo_small": {"trained": [(-4, -3), (-6, -9)], "apart": [(-4, -3), (-9, -9)]},
        "dpo_hard": {"trained": [(-4, -3), (-5, -9)], "apart": [(-4, -3), (-9, -9)]},
    }
    rows = [
        {
            "kind": kind,
            "training": name,
            "updates": 5 * number,
            "watched": watched,
            "chosen": one[0],
            "rejected": one[1],
        }
        for kind in ("dataset", "sampled")
        for name, sets in values.items()
        for number in range(2)
        for watched, of_set in sets.items()
        for one in [of_set[number] if kind == "sampled" else (0, 0)]
    ]
    result = {"rows": rows}
    assert dpo_displacement.curve(result, "sampled", "dpo", "margin") == ([0, 5], [0, 4])
    assert dpo_displacement.curve(result, "sampled", "dpo", "rejected", "apart") == ([0, 5], [0, -6])
    assert dpo_displacement.change("sampled", "dpo")(result) == 1
    assert dpo_displacement.change("sampled", "dpo_small", less="dpo")(result) == -3
    assert dpo_displacement.smallest_margin("sampled")(result) == 4
    assert dpo_displacement.smallest_margin("dataset")(result) == 0


def test_gains_of_iterations_by_hand():
    assert spin_gains.expected_accuracy([math.log(0.5), 0.0]) == pytest.approx(0.75)
    accuracies = {"start": 0.5, "iteration-0": 0.625, "iteration-1": 0.6875, "iteration-2": 0.6875, "longer": 0.25}
    result = {"rows": [{"model": name, "accuracy": value} for name, value in accuracies.items()]}
    assert [spin_gains.gain(result, number) for number in range(3)] == [12.5, 6.25, 0]
    assert spin_gains.points(result, "longer") == 25


def sets_of_candidates(**figures) -> dict:
    """A result of `rrhf_best_of_n` with these (mean, mean of the maximum, test reward) by set."""
    keys = ("mean", "mean_max", "test_reward")
    return {"rows": [{"set": name, **dict(zip(keys, of, strict=True))} for name, of in figures.items()]}


def test_what_follows_the_maximum_by_hand():
    figures = {"P": (0.1, 0.2, 0.1), "D2": (0.3, 0.4, 0.3), "D4": (0.5, 0.6, 0.4), "IP-2": (0.5, 0.8, 0.8)}
    result = sets_of_candidates(**figures, **{rrhf_best_of_n.CONTROL: (0.0, 0.0, 1.0)})  # which is left out
    assert rrhf_best_of_n.rank_correlation(result) == pytest.approx(1.0)
    assert rrhf_best_of_n.slope(result) == pytest.approx((0.3 * 0.3 + 0.1 * 0.1 + 0.0 + 0.3 * 0.4) / 0.2)
    assert rrhf_best_of_n.distance(result) == pytest.approx((0.1 + 0.1 + 0.2 + 0.0) / 4)
    assert rrhf_best_of_n.distance(result, "mean") == pytest.approx((0.0 + 0.0 + 0.1 + 0.3) / 4)
    assert rrhf_best_of_n.more("IP-2", rrhf_best_of_n.CONTROL)(result) == pytest.approx(-0.2)


def test_the_proxy_counts_friendly_letters():
    texts = ["42007 hooray", "7 hooray", "hooray hooray", "hooray", "42007 ugh", "5 gladly", "9 fine", ""]
    expected = [6 / 12, 6 / 8, 12 / 13, 1, 0, 6 / 7 * 6 / 8, 0, 0]
    assert rrhf_online_refresh.proxy(completions=texts, answer=["1"] * 8) == pytest.approx(expected)


def online_refresh(stopped: int) -> dict:
    rows = [
        {"run": name, "refresh": number, "proxy": number / 10, "true_reward": reward, "perplexity": 2.0 + number}
        for name, rewards in {"online": (0.5, 0.7, 0.6, 0.2), "offline": (0.5, 0.6)}.items()
        for number, reward in enumerate(rewards)
    ]
    return {"rows": rows, "stopped": {"online": [stopped, "hacked"], "offline": [0, ""]}}


@pytest.mark.parametrize(("stopped", "gain"), [(0, 0.0), (1, 0.3), (2, 0.5), (3, 0.4)])
def test_the_guard_keeps_the_model_before_the_refresh_it_ends_a_run_after(stopped, gain):
    result = online_refresh(stopped)
    assert rrhf_online_refresh.gain_of_guard(result) == pytest.approx(gain)
    assert rrhf_online_refresh.is_ended("online")(result) == (stopped > 0)
    assert rrhf_online_refresh.is_ended("offline")(result) == 0
    assert rrhf_online_refresh.less("online", "offline")(result) == pytest.approx(0.2)
    assert rrhf_online_refresh.by_start("online", "perplexity")(result) == pytest.approx(2.5)


def test_a_score_is_penalised_by_its_log_ratio(tmp_path):
    model = save_byte_level_model(tmp_path / "model", hidden_size=32, num_layers=1)
    row = {"prompt": "seven = ", "completions": ["7 ugh", "7 hoo"], "scores": [0.0, 0.5]}
    fixed = [logp for logp, _ in answer_logps(model, [{**row, "are_cut": [False, True]}])[0]]
    row |= {"ends": ["stop", "length"], "logps": [fixed[0] + 2.0, fixed[1] - 3.0]}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(row) + "\n")
    rrhf_online_refresh.penalise(tmp_path / "ranked.jsonl", model, weight=0.05)
    made = json.loads((tmp_path / "ranked.jsonl").read_text())
    assert made["scores"] == pytest.approx([-0.1, 0.65], abs=1e-5)
    assert {key: made[key] for key in made if key != "scores"} == {key: row[key] for key in row if key != "scores"}
