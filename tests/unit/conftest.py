"""No test here builds a trainer or starts a process."""

import multiprocessing
import subprocess

import pytest
import transformers


@pytest.fixture(autouse=True)
def no_trainer_and_no_process(monkeypatch):
    started = subprocess.Popen.__init__

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"A {type(self).__name__} in a unit test. Move the test to tests/trainers or tests/runs.")

    def start(self, words, *args, **kwargs):
        if "trl_ext.cli.options" not in words:  # which reads options where the shipped file is of another TRL
            refuse(self)
        started(self, words, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "__init__", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
