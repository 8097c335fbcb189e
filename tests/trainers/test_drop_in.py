"""What `DPOTrainer` takes and gives, every trainer here does too, or refuses by name for a reason of its method."""

from dataclasses import dataclass

import pytest
from trl import DPOConfig, DPOTrainer

from tests.support.methods import CONFIGS as ALL_CONFIGS
from trl_ext import IPOConfig, IPOTrainer, SLiCConfig, SLiCTrainer, SPINConfig
from trl_ext.methods import METHODS

CONFIGS = [ALL_CONFIGS[name] for name, method in METHODS.items() if method.is_public]


@dataclass
class OwnSLiCConfig(SLiCConfig):
    """Of a user whose loss has settings with names of DPO's."""

    beta: float = 0.5
    loss_type: str = "exo_pair"
    loss_weights: float = 2.0
    sync_ref_model: bool = True
    precompute_ref_log_probs: bool = True


class OwnSLiCTrainer(SLiCTrainer):
    config_class = OwnSLiCConfig

    def loss_from_logps(self, logps, inputs, outputs):
        losses, metrics = super().loss_from_logps(logps, inputs, outputs)
        return self.args.beta * self.args.loss_weights * losses, metrics


def test_fields_that_a_subclass_declares_are_its_own(model_dir, pairs, config_kwargs):
    with pytest.raises(ValueError, match="OwnSLiCConfig does not read these settings .*\n  ld_alpha=0.5"):
        OwnSLiCConfig(**config_kwargs, ld_alpha=0.5)
    losses = []
    own, plain = OwnSLiCConfig(**config_kwargs, beta=0.25), SLiCConfig(**config_kwargs)
    for trainer_class, args in ((OwnSLiCTrainer, own), (SLiCTrainer, plain)):
        trainer = trainer_class(model_dir, args=args, train_dataset=pairs)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        if args is own:
            assert trainer.beta == 0.25
    assert losses[0] == pytest.approx(0.5 * losses[1])
    assert (own.beta, own.loss_type, own.loss_weights, own.sync_ref_model) == (0.25, "exo_pair", 2.0, True)


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_of_dpo_are_accepted_at_their_default_alone(config, config_kwargs):
    given = {} if config in (SPINConfig, IPOConfig) else {"beta": 0.1}
    config(**config_kwargs, loss_type="sigmoid", label_smoothing=0.0, **given)
    with pytest.raises(ValueError, match="loss_type='hinge'"):
        config(**config_kwargs, loss_type="hinge")


def test_last_log_entry_has_what_trls_has(model_dir, pairs, config_kwargs):
    kept = []
    for trainer_class, config in ((DPOTrainer, DPOConfig), (SLiCTrainer, SLiCConfig), (IPOTrainer, IPOConfig)):
        args = config(**{**config_kwargs, "logging_steps": 100})
        trainer = trainer_class(model_dir, args=args, train_dataset=pairs)
        trainer.train()
        kept.append(set(trainer.state.log_history[-1]))
    assert {"mean_token_accuracy", "entropy", "num_tokens", "rewards/accuracies", "train_loss"} <= kept[0]
    assert kept[0] <= kept[2]
    assert kept[0] - kept[1] == {"rewards/chosen", "rewards/rejected"}  # without a reference these are `logps/...`
