"""What holds for every registered loss, and what is refused."""

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from distill import DISTILLERS, DistillerEntry, Option, build_distiller, distiller_options
from distill.base import Distiller, keywords
from distill.flags import add_distillation_flags, distillation_settings
from distill.registry import RUN_FACTS, STEP_FACTS
from models import build_model
from models.outputs import Outputs
from utils import cli
from utils.errors import UserError

SIZES = ((4, 8), (6, 4), (8, 2))  # channels and width of each stage


def make_outputs(batch=4, *, seed=0, extra_channels=0, classes=5, blocks_per_stage=2):
    generator = torch.Generator().manual_seed(seed)

    def feature_map(channels, width):
        return torch.randn(batch, channels + extra_channels, width, width, generator=generator).relu()

    blocks = tuple(feature_map(*size) for size in SIZES for _ in range(blocks_per_stage))
    logits = torch.randn(batch, classes, generator=generator)
    return Outputs(logits, blocks[blocks_per_stage - 1 :: blocks_per_stage], blocks, blocks[-1].mean((2, 3)))


def build(name, *, student, teacher, **options):
    """As `build_distiller`, with what a loss has to know of a training."""
    facts = {"train_labels": torch.arange(20) % 5} if "train_labels" in DISTILLERS[name].needs else {}
    return build_distiller(name, student=student, teacher=teacher, **facts, **options)


def loss_of(distiller, student, teacher):
    """Of a first step with the first images of the set, drawn alike whenever something is drawn."""
    torch.manual_seed(0)
    return distiller(student, teacher, indices=torch.arange(len(student.logits)), epochs=torch.tensor(0.0))


def in_dtype(outputs, dtype):
    blocks = tuple(block.to(dtype) for block in outputs.blocks)
    stages = blocks[len(blocks) // len(SIZES) - 1 :: len(blocks) // len(SIZES)]
    return Outputs(outputs.logits.to(dtype), stages, blocks, outputs.embedding.to(dtype))


def with_gradients(outputs):
    for tensor in (outputs.logits, *outputs.blocks, outputs.embedding):
        tensor.requires_grad_()
    return outputs


def gradients(outputs):
    return [tensor.grad for tensor in (outputs.logits, *outputs.blocks, outputs.embedding) if tensor.grad is not None]


@pytest.fixture(params=sorted(DISTILLERS))
def name(request):
    return request.param


def test_every_loss_is_a_scalar_that_teaches_the_student_alone(name):
    student, teacher = with_gradients(make_outputs()), make_outputs(seed=1, extra_channels=3)
    distiller = build(name, student=student, teacher=teacher)
    loss = loss_of(distiller, student, teacher)
    loss.backward()
    assert loss.shape == () and loss.item() > 0
    assert any(gradient.abs().sum() > 0 for gradient in gradients(student))
    assert not gradients(teacher)
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_no_loss_separates_a_network_from_itself_except_by_depth(name):
    outputs = make_outputs(blocks_per_stage=1)
    loss = loss_of(build(name, student=outputs, teacher=outputs), outputs, outputs)
    # across depth, by layers of its own, by a temperature of one side, or because it is no divergence
    differs_from_itself = name in ("hap", "afd", "reviewkd", "fitnet", "crd", "wttm", "nkd")
    assert (loss.item() > 1e-3) == differs_from_itself
    assert loss.item() > -1e-6


def test_dead_feature_maps_give_finite_losses_and_gradients(name):
    student, teacher = make_outputs(), make_outputs(seed=1)
    for block in student.blocks[:-1]:
        block.zero_()
    student.blocks[-1][0] = student.embedding[0] = 0
    with_gradients(student)
    loss = loss_of(build(name, student=student, teacher=teacher), student, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert gradients(student) and all(gradient.isfinite().all() for gradient in gradients(student))


def test_a_last_batch_of_one_image_is_no_special_case(name):
    student, teacher = with_gradients(make_outputs(1)), make_outputs(1, seed=1)
    distiller = build(name, student=student, teacher=teacher)
    loss = loss_of(distiller, student, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(gradient.isfinite().all() for gradient in gradients(student))
    assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())


def test_losses_are_computed_in_float32_under_autocast(name):
    student, teacher = in_dtype(make_outputs(), torch.bfloat16), in_dtype(make_outputs(seed=1), torch.bfloat16)
    widened = in_dtype(student, torch.float32), in_dtype(teacher, torch.float32)
    distiller = build(name, student=student, teacher=teacher).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(distiller, with_gradients(student), teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(distiller, *widened).item(), rel=1e-5)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(student))


@pytest.mark.parametrize(
    "student_model, teacher_model", [("resnet20", "resnet32"), ("alexnet", "resnet20"), ("resnet18", "resnet34")]
)
def test_every_loss_fits_the_networks_of_the_repository(name, student_model, teacher_model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student, teacher = (build_model(model, num_classes=4).outputs(images) for model in (student_model, teacher_model))
    assert math.isfinite(loss_of(build(name, student=student, teacher=teacher), student, teacher).item())


def test_at_compares_the_last_two_of_four_stages():
    student, teacher = (
        Outputs(outputs.logits, (outputs.blocks[0], *outputs.stages), outputs.blocks, outputs.embedding)
        for outputs in (make_outputs(), make_outputs(seed=1))
    )
    distiller = build_distiller("at", student=student, teacher=teacher)
    loss = loss_of(distiller, student, teacher)
    student.stages[1].zero_()
    assert distiller(student, teacher) == loss
    student.stages[2].zero_()
    assert distiller(student, teacher) != loss


def test_at_compares_as_many_stages_as_it_is_told():
    student, teacher = make_outputs(), make_outputs(seed=1)
    last = [outputs._replace(stages=outputs.stages[2:]) for outputs in (student, teacher)]
    expected = build_distiller("at", student=last[0], teacher=last[1])(*last)
    assert build_distiller("at", student=student, teacher=teacher, at_stages=1)(student, teacher) == expected


def test_at_compares_the_last_stages_where_one_network_has_more():
    student, teacher = make_outputs(), make_outputs(seed=1)
    last_two = [outputs._replace(stages=outputs.stages[1:]) for outputs in (student, teacher)]
    expected = build_distiller("at", student=last_two[0], teacher=last_two[1])(*last_two)
    assert build_distiller("at", student=student, teacher=last_two[1])(student, last_two[1]) == expected
    assert build_distiller("at", student=last_two[0], teacher=teacher)(last_two[0], teacher) == expected


OTHERS = Path(__file__).resolve().parent.parent / "support" / "networks_of_others.py"
FAMILIES = ["resnet20", "torchvision/densenet121", "timm/mobilenetv3_small_050", f"{OTHERS}:small"]


@pytest.fixture(scope="module")
def families():
    """A network of each family and its outputs in training: maps that differ in size, channels and number."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    networks = {name: build_model(name, num_classes=4) for name in FAMILIES}
    return {name: (network, network.outputs(images)) for name, network in networks.items()}


@pytest.mark.parametrize("pair", list(itertools.permutations(FAMILIES, 2)), ids=" from ".join)
def test_every_loss_teaches_a_network_of_any_family_by_any_other(name, pair, families):
    (network, student), (_, teacher) = (families[family] for family in pair)
    stem = next(network.parameters())
    if name == "reviewkd" and len(student.stages) != len(teacher.stages):
        with pytest.raises(UserError, match="the same number of stages"):
            build(name, student=student, teacher=teacher)
        return
    loss = loss_of(build(name, student=student, teacher=teacher), student, teacher)
    (gradient,) = torch.autograd.grad(loss, stem, retain_graph=True)
    assert math.isfinite(loss.item()) and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_hap_compares_the_last_blocks_of_the_teacher():
    student, teacher = make_outputs(), make_outputs(seed=1)
    distiller = build_distiller("hap", student=student, teacher=teacher, hap_ts=2)
    loss = loss_of(distiller, student, teacher)
    teacher.blocks[-3].zero_()
    assert distiller(student, teacher) == loss
    teacher.blocks[-2].zero_()
    assert distiller(student, teacher) != loss


@pytest.mark.parametrize(("blocks", "stages", "settings"), [(6, 3, ("ts 3", "stage 2")), (2, 1, ("ts 2", "stage 1"))])
def test_what_is_not_given_is_at_most_what_the_networks_have(blocks, stages, settings):
    outputs = make_outputs()
    few = outputs._replace(blocks=outputs.blocks[:blocks], stages=outputs.stages[:stages])
    assert (
        build("hap", student=outputs, teacher=few).setting(),
        build("fitnet", student=outputs, teacher=few).setting(),
    ) == settings


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("hop", {}, "loss hop: unknown, choose from afd, at, crd, ctkd, dist"),
        ("sp", {"kd_t": 4.0}, "loss sp: has no option 'kd_t', it has none"),
        ("at", {"at_stages": 4}, "at_stages 4: both networks have 3 stages"),
        ("kd", {"temperature": 4.0}, "loss kd: has no option 'temperature', it has kd_t, kd_standardize"),
        ("kd", {"kd_t": 0.0}, "kd_t 0: the temperature"),
        ("kd", {"kd_t": float("nan")}, "kd_t nan: the temperature"),
        ("dkd", {"dkd_alpha": 0.0, "dkd_beta": 0.0}, "dkd_alpha 0: with dkd_beta 0 leaves the loss without any part"),
        ("dist", {"dist_beta": 0.0, "dist_gamma": 0.0}, "dist_beta 0: with dist_gamma 0 leaves the loss without any part"),
        ("dist", {"dist_gamma": -1.0}, "dist_gamma -1: the weights of a loss's parts"),
        ("dkd", {"dkd_beta": float("inf")}, "dkd_beta inf: the weights of a loss's parts"),
        ("wttm", {"wttm_gamma": 1.5}, "wttm_gamma 1.5: must be above 0 and at most 1"),
        ("nkd", {"nkd_t": 0.0}, "nkd_t 0: the temperature"),
        ("ctkd", {"ctkd_epochs": 0}, "ctkd_epochs 0: must be 1 or more"),
        ("fitnet", {"fitnet_stage": 4}, "fitnet_stage 4: both networks have 3 stages"),
        ("crd", {}, "loss crd: needs train_labels (the classes of all training images)"),
        ("crd", {"train_labels": torch.zeros(4, dtype=torch.long)}, "loss crd: needs training images of two classes"),
        ("crd", {"train_labels": torch.arange(4), "crd_momentum": 1.0}, "crd_momentum 1: must be from 0 to below 1"),
        ("rkd", {"rkd_distance": 0.0, "rkd_angle": 0.0}, "rkd_distance 0: with rkd_angle 0 leaves the loss without any part"),
        ("hap", {"hap_ts": 0}, "hap_ts 0: the teacher has 6 blocks"),
        ("hap", {"hap_ts": 7}, "hap_ts 7: the teacher has 6 blocks"),
    ],
)
def test_bad_names_and_options_are_refused_in_one_line(name, options, words):
    with pytest.raises(UserError) as error:
        build_distiller(name, student=make_outputs(), teacher=make_outputs(), **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_networks_that_cannot_be_compared_are_refused():
    student, teacher = make_outputs(), make_outputs(classes=6)
    with pytest.raises(UserError, match="6 classes, the student 5"):
        build_distiller("kd", student=student, teacher=teacher)
    with pytest.raises(UserError, match=r"the student has 3 stages, the teacher 2: .* same number of stages"):
        build_distiller("reviewkd", student=student, teacher=make_outputs()._replace(stages=teacher.stages[1:]))
    one_class = make_outputs(classes=1)
    with pytest.raises(UserError, match="two classes or more"):
        build_distiller("dkd", student=one_class, teacher=one_class)


def test_losses_say_what_they_need_beside_outputs():
    needs = {name: set(entry.needs) for name, entry in DISTILLERS.items() if entry.needs}
    labels, crd = {"labels"}, {"train_labels", "indices"}
    assert needs == {"dkd": labels, "nkd": labels, "ctkd": {"epochs"}, "crd": crd}


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_without_labels_the_teachers_word_counts(name):
    student, teacher = make_outputs(), make_outputs(seed=1)
    distiller = build(name, student=student, teacher=teacher)
    word = teacher.logits.argmax(1)
    other = distiller(student, teacher, labels=(word + 1) % 5)
    assert distiller(student, teacher) == distiller(student, teacher, labels=word) != other


@pytest.mark.parametrize("name", [name for name, entry in DISTILLERS.items() if entry.weights])
def test_each_part_of_a_loss_can_be_left_out(name):
    student, teacher = make_outputs(), make_outputs(seed=1)

    def loss(**weights):
        return loss_of(build(name, student=student, teacher=teacher, **weights), student, teacher).item()

    weights = DISTILLERS[name].weights
    parts = [loss(**dict.fromkeys(weights, 0.0) | {weight: 1.0}) for weight in weights]
    assert all(parts) and loss(**dict.fromkeys(weights, 1.0)) == pytest.approx(sum(parts))


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_standardised_logits_know_no_scale(name):
    student, teacher = make_outputs(), make_outputs(seed=1)
    scaled = student._replace(logits=3 * student.logits + 1)
    distiller = build(name, student=student, teacher=teacher, kd_standardize=True)
    assert distiller(scaled, teacher).item() == pytest.approx(distiller(student, teacher).item(), rel=1e-4)


def test_the_options_of_all_losses():
    assert {key: option.default for key, option in distiller_options().items()} == {
        "kd_t": 4.0,
        "kd_standardize": False,
        "at_stages": 0,
        "hap_ts": None,
        "dkd_alpha": 1.0,
        "dkd_beta": 8.0,
        "dist_beta": 2.0,
        "dist_gamma": 2.0,
        "rkd_distance": 25.0,
        "rkd_angle": 50.0,
        "fitnet_stage": None,
        "crd_negatives": 16384,
        "crd_width": 128,
        "crd_t": 0.07,
        "crd_momentum": 0.5,
        "wttm_gamma": 0.2,
        "nkd_t": 3.0,
        "nkd_gamma": 3.5,
        "ctkd_epochs": 10,
    }


def test_usual_betas():
    assert {name: entry.beta for name, entry in DISTILLERS.items()} == {
        "kd": None,
        "at": 1000,
        "sp": 3000,
        "afd": 200,
        "hap": 700,
        "dkd": 1,
        "dist": 1,
        "reviewkd": 5,
        "fitnet": 100,
        "rkd": 1,
        "pkt": 30000,
        "crd": 0.8,
        "wttm": 4,
        "nkd": 1,
        "ctkd": 0.9,
    }
    assert {name for name, entry in DISTILLERS.items() if entry.replaces_kd} == {"dkd", "dist", "reviewkd", "wttm", "nkd", "ctkd"}


class Hint(Distiller):
    """A loss that is in no file of the package: the student's map of a stage, projected, beside the teacher's."""

    def __init__(self, student, teacher, *, hint_stage):
        super().__init__()
        self.stage = hint_stage
        self.regressor = nn.Conv2d(student.stages[hint_stage].shape[1], teacher.stages[hint_stage].shape[1], 1)

    def loss(self, student, teacher):
        return (self.regressor(student.stages[self.stage]) - teacher.stages[self.stage]).square().mean()


def test_a_new_loss_is_a_class_and_an_entry(monkeypatch):
    entry = DistillerEntry(f"{__name__}:Hint", beta=100.0, options={"hint_stage": Option(1, "stage to regress")})
    monkeypatch.setitem(DISTILLERS, "hint", entry)
    student, teacher = make_outputs(), make_outputs(seed=1, extra_channels=2)
    assert build_distiller("hint", student=student, teacher=teacher).stage == 1
    assert build_distiller("hint", student=student, teacher=teacher, hint_stage=0)(student, teacher).shape == ()
    args = cli.parse_flags(flags_of_distillation(), ["--distill", "hint", "--hint-stage", "2"])
    assert distillation_settings(args).options["hint_stage"] == 2
    with pytest.raises(UserError, match="--hint-stage 2: only with --distill hint"):
        cli.parse_flags(flags_of_distillation(), ["--distill", "at", "--hint-stage", "2"])


def flags_of_distillation():
    parser = cli.Parser(prog="train.py")
    add_distillation_flags(parser)
    cli.add_run_flags(parser, log_name="train.txt")
    return parser


def test_an_entry_says_what_its_class_takes(name):
    entry = DISTILLERS[name]
    assert {*keywords(entry.kind.__init__), *keywords(entry.kind.loss)} == entry.options.keys() | entry.needs
    parameters = inspect.signature(entry.kind.__init__).parameters
    assert all(parameters[option].default is inspect.Parameter.empty for option in entry.options), "the entry has the default"
    assert entry.needs <= {*STEP_FACTS, *RUN_FACTS}


def test_an_option_means_the_same_in_every_loss():
    shared = distiller_options()
    assert all(shared[key] == option for entry in DISTILLERS.values() for key, option in entry.options.items())
