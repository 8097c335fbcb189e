"""A reward model."""

import pytest

from tests.support.scoring import save_reward_model


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory):
    return str(save_reward_model(tmp_path_factory.mktemp("rewards") / "tiny-rm"))
