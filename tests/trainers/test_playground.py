"""Training on the playground."""

from types import SimpleNamespace

from trl import SFTTrainer

from tests.support.data import TINY
from trl_ext.playground.model import save_byte_level_model
from trl_ext.playground.stages import continue_sft
from trl_ext.playground.task import Playground
from trl_ext.runs.evaluation import answer_logps


def test_a_model_learns_the_task(tmp_path):
    playground = Playground(**TINY)
    sft = playground.train_sft(tmp_path / "sft")
    untrained = save_byte_level_model(tmp_path / "fresh", max_position_embeddings=256, seed=playground.seed)
    rows = [{"prompt": r["prompt"], "completions": [f"{r['answer']} ugh"]} for r in playground.rows("held_out")]
    before, after = ([one[0][0] for one in answer_logps(path, rows)] for path in (untrained, sft))
    assert sum(after) > sum(before) + 5 * len(rows), "unseen right answers are more likely"


def test_sft_beside_spin_goes_on_in_the_data(model_dir, tmp_path, monkeypatch):
    """Each stage begins with the examples where the one before stopped, and trains on each once."""
    seen, train = [], SFTTrainer.train

    def keep(trainer, *args, **kwargs):
        result = train(trainer, *args, **kwargs)
        seen.append((trainer.train_dataset["prompt"][:], trainer.state.epoch, trainer.state.global_step))
        return result

    def stage(name, function, *, inputs, shards_models, title, **arguments):
        function(tmp_path / name, **inputs, **arguments)

    monkeypatch.setattr(SFTTrainer, "train", keep)
    run = SimpleNamespace(
        stage=stage, path=lambda *parts: tmp_path.joinpath(*parts), state=SimpleNamespace(num_processes=1)
    )
    config = SimpleNamespace(seed=42, train_batch_size=4, gradient_accumulation_steps=2)
    training, evaluated = {f"iteration-{number}": {"steps": number + 1} for number in range(3)}, []
    game = SimpleNamespace(config=config, run=run, model=model_dir, training=training)
    game.evaluate = lambda name, model: evaluated.append(name)
    controls = continue_sft(game, learning_rate=1e-3)
    assert controls == {f"control-{number}": f"iteration-{number}" for number in range(3)}
    assert evaluated == list(controls)
    assert [(len(prompts), epoch, steps) for prompts, epoch, steps in seen] == [(8, 1, 1), (16, 1, 2), (24, 1, 3)]
    assert len({prompt for prompts, *_ in seen for prompt in prompts}) == 48, "none comes twice"
