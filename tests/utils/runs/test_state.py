"""Which saved state a run goes on from, and what makes it the state of another."""

import pytest
import torch

from utils.checkpoints import save_checkpoint
from utils.errors import UserError
from utils.runs.folder import LAST
from utils.runs.state import check_state, read_state

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


# ---- states of strangers -----------------------------------------------------------------------------------------------

STATE = {"epoch": 1, "batch": 0, "best": None, "last": None, "sums": [{}]}
STATE |= {"objective": {}, "optimizer": {}, "hooks": {}, "random": []}
WRONG_ENTRIES = {
    "epoch": ["text", None, True, -1, [1], torch.zeros(2)],
    "batch": ["text", None, 1.0, {}],
    "best": ["text", 7, {}, {"epoch": "1", "top1": 1.0}, torch.zeros(2)],
    "last": [[1], {"epoch": 1}],
    "sums": ["text", [1], {}, [{"images": 1}], torch.zeros(2)],
    "objective": ["text", [1]],
    "optimizer": [None, torch.zeros(2)],
    "hooks": [7],
    "random": [{}, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_ENTRIES.items() for value in values])
def test_an_entry_of_another_form_is_named_in_one_line(tmp_path, name, value):
    save_checkpoint(tmp_path / LAST, {"format": 1, "resume": STATE})
    assert read_state(tmp_path)[0]["resume"] == STATE
    save_checkpoint(tmp_path / LAST, {"format": 1, "resume": {**STATE, name: value}})
    with pytest.raises(UserError, match=f"{LAST}: its saved state has {name} ") as error:
        read_state(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_state_within_an_epoch_needs_its_sums(tmp_path):
    save_checkpoint(tmp_path / LAST, {"format": 1, "resume": {**STATE, "batch": 3}})
    with pytest.raises(UserError, match="its saved state has sums"):
        read_state(tmp_path)
