"""Random sequences of training, saving, dying and resuming on one process: never a difference to an undisturbed run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from adaloader.checkpoint.inspecting import check
from tests.resuming import OPTIMIZERS, Script, assert_identical


class Run(RuleBasedStateMachine):
    """A run that dies and comes back, and beside it one that nothing happens to."""

    @initialize(
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        samples=st.sampled_from([3, 12, 29]),
        options=st.fixed_dictionaries({"lookahead": st.sampled_from([0, 1, 5]), "shuffle": st.booleans()}),
        seed=st.integers(0, 2**20),
    )
    def begin(self, optimizer, samples, options, seed):
        self.arguments = {"optimizer": optimizer, "samples": samples, "options": options, "seed": seed}
        self.folder = Path(tempfile.mkdtemp(prefix="adaloader-sequence-"))
        self.script = Script(None, dropout=0.2, **self.arguments).start()
        self.random = torch.get_rng_state()
        self.calls = self.saved_calls = 0
        self.losses, self.saved_losses, self.is_saved = [], [], False

    def alone(self, call):
        """Run `call` with the generators as this run left them: hypothesis draws in between."""
        torch.set_rng_state(self.random)
        call()
        self.random = torch.get_rng_state()

    @rule(batches=st.integers(1, 9))
    def train(self, batches):
        before = len(self.script.losses)
        self.alone(lambda: self.script.run(batches))
        self.losses += self.script.losses[before:]
        self.calls += batches

    @rule()
    def save(self):
        self.alone(lambda: self.script.save(self.folder / "saved"))
        self.saved_calls, self.saved_losses, self.is_saved = self.calls, list(self.losses), True

    @precondition(lambda self: self.is_saved)
    @rule(model_seed=st.integers(0, 99))
    def die_and_resume(self, model_seed):
        self.script.loader.close()
        check(self.folder / "saved")
        self.script = Script(None, dropout=0.2, **self.arguments).start(model_seed)
        self.alone(lambda: self.script.load(self.folder / "saved"))
        self.calls, self.losses = self.saved_calls, list(self.saved_losses)

    def teardown(self):
        if not hasattr(self, "script"):
            return
        states = []
        self.alone(lambda: states.append(self.script.state()))
        self.script.loader.close()
        whole = Script(None, dropout=0.2, **self.arguments).start().run(self.calls)
        np.testing.assert_array_equal(whole.losses, self.losses)  # a run that diverges has losses that are no numbers
        expected = whole.state()
        for state in (states[0], expected):
            del state["numpy"]
        assert_identical(states[0], expected)
        whole.loader.close()
        shutil.rmtree(self.folder)


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=8, stateful_step_count=10, deadline=None)
