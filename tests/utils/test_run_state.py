"""Which saved state a run goes on from, and what makes it the state of another."""

import pytest

from utils.errors import UserError
from utils.run_state import check_state

DEFAULTS = {"lr": 0.1, "compile": False, "hint_stage": 3, "betas": None, "workers": 8, "n_epochs": 200}


class TestFlagsOfTheState:
    def check(self, saved: dict, **flags) -> None:
        check_state({"config": saved}, {**DEFAULTS, **flags}, defaults=DEFAULTS, folder="run")

    def test_what_it_does_not_know_has_its_default(self):
        self.check({"lr": 0.2}, lr=0.2)
        self.check({"lr": 0.2, "compile": None, "betas": None, "gone": 1}, lr=0.2)

    def test_may_be_computed_elsewhere_and_for_longer(self):
        self.check({"workers": 1, "n_epochs": 2}, workers=2, n_epochs=3)

    @pytest.mark.parametrize(("name", "value"), [("lr", 0.3), ("compile", True), ("hint_stage", 2), ("betas", [1.0])])
    def test_another_value_is_refused(self, name, value):
        with pytest.raises(UserError, match=f"--resume run: its saved state is of a run with {name} "):
            self.check({"lr": 0.1}, **{name: value})
