"""The objective of a distilled training step, and the teacher that no step changes."""

import argparse
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import nn

from distill import DISTILLERS, build_distiller
from distill.flags import check_distillation
from distill.objective import DistillationObjective, FrozenTeacher, build_objective, sample_outputs
from distill.registry import default_alpha
from models import build_model
from models.batch_norm import UnevenBatchNorm2d
from models.cifar_resnet import CifarResNet
from models.outputs import Outputs
from utils.errors import UserError

LOSSES = sorted(set(DISTILLERS) - {"kd"})
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])
ROWS = torch.tensor([0, 4, 8, 9])
FACTS = {"train_labels": torch.arange(12) % 3}


def small_network(seed):
    torch.manual_seed(seed)
    return CifarResNet(depth=8, num_classes=3)


def make_objective(*names, alpha=0.9, beta=10.0):
    student, teacher = small_network(0), small_network(1)
    samples = {"student": sample_outputs(student, IMAGES), "teacher": sample_outputs(teacher, IMAGES)}
    facts = {name: FACTS if DISTILLERS[name].needs & FACTS.keys() else {} for name in names}
    losses = [(name, build_distiller(name, **samples, **facts[name]), beta) for name in names]
    kd = build_distiller("kd", **samples)
    return DistillationObjective(student, teacher=FrozenTeacher(teacher), losses=losses, kd=kd, alpha=alpha)


def state_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_same_state(network, state):
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


def test_loss_is_cross_entropy_and_the_weighted_terms():
    objective = make_objective("at", "hap", alpha=0.5, beta=20.0)
    loss, logits, terms = objective(IMAGES, LABELS)
    assert list(terms) == ["ce", "kd", "at", "hap"]
    expected = terms["ce"] + 0.5 * terms["kd"] + 20 * terms["at"] + 20 * terms["hap"]
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, LABELS))
    assert not logits.requires_grad and not any(term.requires_grad for term in terms.values())


def test_it_is_built_from_names_weights_and_the_options_of_all_losses():
    options = {"kd_t": 16.0, "hap_ts": None, "gamma": 0.5}
    build = partial(build_objective, small_network(0), small_network(1), images=IMAGES, options=options, seed=3)
    random_state = torch.get_rng_state()
    objective = build(["hap", "kd", "afd"], alpha=0.5, betas=[7, 50])
    assert objective.weights == {"kd": 0.5, "hap": 7, "afd": 50}
    assert objective.distillers["kd"].temperature == 16
    assert build(["hap"], alpha=0).weights == {"hap": DISTILLERS["hap"].beta}
    assert build(["none"], alpha=0.9).weights == {}
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("names", [["afd", "reviewkd"], ["reviewkd", "afd"]], ids=" ".join)
def test_parameters_of_losses_are_drawn_in_the_order_of_their_names(names):
    build = partial(build_objective, small_network(0), small_network(1), images=IMAGES, alpha=0.9, seed=3)
    both, first = build(names).distillers, build(names[:1]).distillers
    assert_same_state(both[names[0]], state_of(first[names[0]]))


def test_a_weight_rises_over_its_epochs_and_is_part_of_the_state():
    objective = build_objective(
        small_network(0), small_network(1), ["reviewkd"], images=IMAGES, alpha=0.0, betas=[6.0], n_epochs=36
    )
    assert objective.formula() == "CE + (6, rising over 3 epochs) REVIEWKD"
    for epoch, step, weight in ((0, 0, 0.5), (0, 3, 2.0), (1, 1, 3.0), (2, 3, 6.0), (30, 0, 6.0)):
        objective.begin_step(epoch, step, steps=4)
        loss, _, terms = objective(IMAGES, LABELS)
        torch.testing.assert_close(loss.detach(), terms["ce"] + weight * terms["reviewkd"])
    longer = build_objective(small_network(0), small_network(1), ["reviewkd"], images=IMAGES, alpha=0.0, n_epochs=360)
    longer.load_state_dict(objective.state_dict())  # as of a run whose epochs were raised
    longer.begin_step(1, 3, steps=4)
    assert longer.rises["reviewkd"].share.item() == pytest.approx(2 / 3)


def test_a_weight_rises_in_a_run_of_two_epochs_as_well():
    build = partial(build_objective, small_network(0), small_network(1), ["dkd"], images=IMAGES, alpha=0.0, n_epochs=2)
    objective = build()
    assert objective.formula() == "CE + (1, rising over 1 epochs) DKD (T 4, alpha 1, beta 8)"
    shares = []
    for step in range(12):
        objective.begin_step(0, step, steps=12)
        shares.append(objective.rises["dkd"].share.item())
    assert shares == pytest.approx([(step + 1) / 12 for step in range(12)])
    assert build(rise_epochs=0).formula() == "CE + 1 DKD (T 4, alpha 1, beta 8)"
    slow = build(rise_epochs=20)
    slow.begin_step(0, 11, steps=12)
    assert slow.rises["dkd"].share.item() == pytest.approx(1 / 20)


def test_a_rise_of_no_epochs_has_the_full_weight_at_the_first_step():
    objective = build_objective(small_network(0), small_network(1), ["dkd"], images=IMAGES, alpha=0.0, rise_epochs=0)
    objective.begin_step(0, 0, steps=4)
    assert objective.rises["dkd"].share == 1


def test_the_cross_entropy_has_a_weight():
    build = partial(build_objective, small_network(0), small_network(1), ["kd"], images=IMAGES, alpha=0.9)
    objective = build(ce_weight=0.1)
    loss, _, terms = objective(IMAGES, LABELS)
    torch.testing.assert_close(loss.detach(), 0.1 * terms["ce"] + 0.9 * terms["kd"])
    assert objective.formula() == "0.1 CE + 0.9 KD (T 4)"
    assert build(ce_weight=0.0).formula() == "0.9 KD (T 4)"
    assert build().formula() == "CE + 0.9 KD (T 4)"


def test_crd_remembers_in_its_state_and_goes_on_from_it():
    def build():
        return build_objective(small_network(0), small_network(1), ["crd"], images=IMAGES, alpha=0.0, facts=FACTS, options=few)

    few = {"crd_negatives": 5}
    begun = build()
    before = begun.distillers["crd"].student_bank.rows.clone()
    begun(IMAGES, LABELS, ROWS)
    changed = (begun.distillers["crd"].student_bank.rows != before).any(1)
    assert changed.nonzero().flatten().tolist() == ROWS.tolist()
    again = build()
    again.load_state_dict(begun.state_dict())
    losses = []
    for objective in (begun, again):
        torch.manual_seed(0)
        losses.append(objective(IMAGES, LABELS, ROWS.flip(0))[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("names", "alpha"), [(["kd"], 0.9), (["hap"], 0.9), (["dkd"], 0.0), (["hap", "dist"], 0.0), (["kd", "reviewkd"], 0.9)]
)
def test_a_loss_that_takes_the_place_of_kd_leaves_it_out_unless_it_is_named(names, alpha):
    assert default_alpha(names) == alpha


def test_a_run_that_began_with_a_loss_without_weight_may_go_on():
    flags = {"distill": ["dkd", "kd"], "alpha": 0.0, "betas": None, "t_path": "t.pt", "dkd_alpha": 1.0, "dkd_beta": 8.0}
    with pytest.raises(UserError, match="--alpha 0: leaves kd"):
        check_distillation(argparse.Namespace(**flags, resume=None))
    check_distillation(argparse.Namespace(**flags, resume="run"))


def test_formula_names_every_weight():
    objective = build_objective(
        small_network(0), small_network(1), ["hap", "at"], images=IMAGES, alpha=0.9, betas=[700, 0.5], label_smoothing=0.1
    )
    assert objective.formula() == "CE (labels smoothed by 0.1) + 0.9 KD (T 4) + 700 HAP (ts 3) + 0.5 AT"
    assert build_objective(small_network(0), None, ["none"], images=IMAGES, alpha=0.9).formula() == "CE"


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, entry in DISTILLERS.items() for option in entry.options])
def test_formula_shows_every_option(name, option):
    default = DISTILLERS[name].options[option].default
    build = partial(build_objective, small_network(0), small_network(1), [name], images=IMAGES, alpha=0.9, facts=FACTS)
    other = (
        1 if default is None else True if default is False else max(default - 1, 1) if isinstance(default, int) else default / 2
    )
    assert build().formula() == build(options={option: default}).formula() != build(options={option: other}).formula()


def test_formula_shows_the_weights_inside_of_losses():
    options = {"kd_t": 2.0, "kd_standardize": True, "dkd_alpha": 0.0, "dist_beta": 1.5}
    objective = build_objective(
        small_network(0), small_network(1), ["dkd", "dist", "kd"], images=IMAGES, alpha=9.0, options=options, rise_epochs=0
    )
    dkd, dist = "1 DKD (T 2, logits standardised, alpha 0, beta 8)", "1 DIST (T 2, beta 1.5, gamma 2)"
    assert objective.formula() == f"CE + 9 KD (T 2, logits standardised) + {dkd} + {dist}"


def test_smoothed_labels_are_those_of_the_cross_entropy_alone():
    objective = build_objective(small_network(0), small_network(1), ["kd"], images=IMAGES, alpha=0.5, label_smoothing=0.2)
    loss, logits, terms = objective(IMAGES, LABELS)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, LABELS, label_smoothing=0.2))
    torch.testing.assert_close(loss.detach(), terms["ce"] + 0.5 * terms["kd"])


def test_without_a_teacher_it_is_the_cross_entropy():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))  # has no `outputs`: none are needed
    loss, logits, terms = DistillationObjective(network)(IMAGES, LABELS)
    torch.testing.assert_close(loss, F.cross_entropy(network(IMAGES), LABELS))
    torch.testing.assert_close(logits, network(IMAGES).detach())
    assert list(terms) == ["ce"]


def test_a_teacher_without_a_loss_and_a_loss_without_a_teacher_are_refused():
    objective = make_objective()
    with pytest.raises(ValueError, match="belong together"):
        DistillationObjective(objective.student, teacher=objective.teacher)
    with pytest.raises(ValueError, match="belong together"):
        DistillationObjective(objective.student, kd=objective.distillers["kd"])


LOGIT_LOSSES = {"kd", "dkd", "dist", "wttm", "nkd", "ctkd"}


def test_a_loss_says_whether_it_reads_feature_maps():
    assert {name for name, entry in DISTILLERS.items() if not entry.reads_maps} == LOGIT_LOSSES


class WithoutMaps(nn.Module):
    """A network whose forward pass no graph can say, with an auxiliary head in training."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3 * 16 * 16, 3), nn.Linear(3 * 16 * 16, 3)

    def forward(self, x):
        x = x.flatten(1)
        with torch.no_grad():
            left = self.first(x)
        logits = left if x.sum() > 0 else left + self.second(x)
        return (logits, self.second(x)) if self.training else logits


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
def test_losses_of_logits_need_no_graph_and_train_what_the_forward_pass_trains(name):
    torch.manual_seed(0)
    student, teacher, images = WithoutMaps(), WithoutMaps(), -IMAGES.abs()
    objective = build_objective(student, teacher, [name], images=images, alpha=default_alpha([name])).train()
    loss, logits, terms = objective(images, LABELS)
    loss.backward()
    torch.testing.assert_close(logits, student(images)[0])
    assert terms[name].isfinite() and student.second.weight.grad.abs().sum() > 0
    assert student.first.weight.grad is None


@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
def test_losses_of_logits_are_what_they_are_beside_the_maps(name):
    student, teacher = small_network(0), small_network(1)
    samples = {"student": sample_outputs(student, IMAGES), "teacher": sample_outputs(teacher, IMAGES)}
    alone = build_objective(student, teacher, [name], images=IMAGES, alpha=0.9)
    assert not alone.reads_maps
    facts = {"labels": LABELS, "epochs": torch.tensor(0.0)}
    expected = build_distiller(name, **samples)(student.train().outputs(IMAGES), alone.teacher(IMAGES), **facts)
    torch.testing.assert_close(alone.train()(IMAGES, LABELS)[2][name], expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_trains_every_parameter_and_leaves_the_teacher(name):
    objective = make_objective(name).train()
    teacher_state, student_state = state_of(objective.teacher.network), state_of(objective.student)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    objective(IMAGES, LABELS, ROWS)[0].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())  # or DistributedDataParallel would wait
    optimizer.step()
    assert_same_state(objective.teacher.network, teacher_state)
    assert not any(parameter.requires_grad for parameter in objective.teacher.network.parameters())
    changed = [key for key, value in objective.student.state_dict().items() if not torch.equal(value, student_state[key])]
    assert "stage_1.0.conv_a.weight" in changed and "bn_1.running_mean" in changed


def test_the_teacher_is_no_part_of_the_objective():
    objective = make_objective("afd").train()
    assert {key.split(".")[0] for key in objective.state_dict()} == {"student", "distillers"}
    assert any(key.startswith("distillers.afd.") for key in objective.state_dict())
    assert not any(module.training for module in objective.teacher.network.modules())


def test_the_teacher_builds_no_graph_and_is_a_copy():
    network = small_network(0).train()
    state = state_of(network)
    outputs = FrozenTeacher(network)(IMAGES)
    assert not any(tensor.requires_grad for tensor in (outputs.logits, *outputs.stages, *outputs.blocks))
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert_same_state(network, state)
    torch.testing.assert_close(outputs, copy.deepcopy(network).eval().outputs(IMAGES))


def randomise_batch_norms(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return network


@pytest.mark.parametrize("name", ["resnet20", "alexnet", "resnet18", "resnet50"])
def test_folding_batch_norms_keeps_the_function(name):
    torch.manual_seed(0)
    network = randomise_batch_norms(build_model(name, num_classes=3))
    images = torch.randn(2, 3, 32, 32)
    folded = FrozenTeacher(network, fold_batch_norm=True, channels_last=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
    assert not any(parameter.requires_grad for parameter in folded.network.parameters())
    expected = FrozenTeacher(network)(images)
    for actual, exact in zip(folded(images).blocks, expected.blocks, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_a_compact_teacher_gives_what_it_gives_alone():
    torch.manual_seed(0)
    network = randomise_batch_norms(build_model("resnet20", num_classes=3))
    kept = {"conv_1_3x3": range(3, 11), "bn_1": range(3, 11), "stage_2.0.conv_a": [0, 5, 31], "stage_2.0.bn_a": [0, 5, 31]}
    small = narrow(network, kept).eval()
    images = torch.randn(2, 3, 32, 32)
    objective = build_objective(network, small, ["at"], images=images, alpha=0.9)
    teacher = objective.teacher.network
    assert small.relayout_count and not any(
        isinstance(module, (nn.BatchNorm2d, UnevenBatchNorm2d)) for module in teacher.modules()
    )
    torch.testing.assert_close(objective.teacher(images).logits, small(images), rtol=1e-4, atol=1e-4)


class SharedConvolution(nn.Module):
    """Only `alone` may be folded: `shared` feeds a sum too, `twice` runs under two norms."""

    def __init__(self):
        super().__init__()
        self.alone, self.shared, self.twice = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm_alone, self.norm_shared, self.norm_first, self.norm_second = (nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        return self.outputs(x).logits

    def outputs(self, x):
        x = self.norm_alone(self.alone(x))
        shared = self.shared(x)
        x = self.norm_shared(shared) + shared
        x = self.norm_second(self.twice(self.norm_first(self.twice(x))))
        return Outputs(x.mean((2, 3)), (x,), (x,), x.mean((2, 3)))


def test_folding_leaves_convolutions_that_others_read_too():
    torch.manual_seed(0)
    network = randomise_batch_norms(SharedConvolution())
    folded = FrozenTeacher(network, fold_batch_norm=True)
    assert {name for name, module in folded.network.named_modules() if isinstance(module, nn.Identity)} == {"norm_alone"}
    torch.testing.assert_close(folded(IMAGES), FrozenTeacher(network)(IMAGES))


def test_the_objective_with_every_loss_compiles_into_one_graph():
    objective = make_objective(*LOSSES).train()
    twin = copy.deepcopy(objective)
    torch.manual_seed(5)
    loss, _, terms = torch.compile(objective, backend="aot_eager", fullgraph=True)(IMAGES, LABELS, ROWS)
    loss.backward()
    torch.manual_seed(5)
    expected, _, expected_terms = twin(IMAGES, LABELS, ROWS)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms, expected_terms)
    gradients = [parameter.grad for parameter in objective.parameters()]
    torch.testing.assert_close(gradients, [parameter.grad for parameter in twin.parameters()], rtol=1e-3, atol=1e-5)


def test_under_autocast_the_terms_stay_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits, terms = make_objective(*LOSSES)(IMAGES, LABELS, ROWS)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert {term.dtype for term in terms.values()} == {torch.float32} and loss.isfinite()
