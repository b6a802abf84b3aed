"""Each loss against an independent computation: by hand, in NumPy, or as the paper's official code spells it out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distill.afd import AFD, BN_EPSILON, WIDTH, candidates, value_distances
from distill.at import at_loss
from distill.base import attention_map, channel_energy
from distill.crd import Bank, Negatives, contrastive_loss
from distill.ctkd import CTKD, reversal_factor
from distill.dist import dist_loss, pearson
from distill.dkd import decoupled_divergences, dkd_loss
from distill.fitnet import FitNet, Regressor
from distill.hap import hap_loss
from distill.kd import kd_loss
from distill.logits import standardized
from distill.nkd import nkd_loss
from distill.pkt import pkt_loss
from distill.reviewkd import ABF, ReviewKD, hcl_loss
from distill.rkd import rkd_loss
from distill.sp import sp_loss
from distill.wttm import wttm_loss
from models.outputs import Outputs


def random_maps(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def numpy_attention(feature_map):
    squares = (feature_map.numpy() ** 2).mean(axis=1).reshape(len(feature_map), -1)
    return squares / np.linalg.norm(squares, axis=1, keepdims=True)


def numpy_similarity(rows):
    similarity = rows @ rows.T
    return similarity / np.linalg.norm(similarity, axis=1, keepdims=True)


def test_kd_of_one_image_worked_by_hand():
    # At T = 2: softmax(ln 9 / 2, 0) = (3/4, 1/4) for the teacher, (1/2, 1/2) for the student.
    teacher, student = torch.tensor([[math.log(9), 0.0]]), torch.zeros(1, 2)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kd_loss(student, teacher, temperature=2.0).item() == pytest.approx(4 * divergence, rel=1e-6)


def test_kd_is_a_mean_over_images_not_classes():
    student, teacher = random_maps([(1, 5), (1, 5)])
    once = kd_loss(student, teacher, temperature=4.0)
    assert kd_loss(student.expand(7, 5), teacher.expand(7, 5), temperature=4.0).item() == pytest.approx(once.item())


def test_attention_map_worked_by_hand():
    feature_map = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]])  # two channels of 1x2: mean squares (5, 2)
    expected = torch.tensor([[5.0, 2.0]]) / math.sqrt(29)
    torch.testing.assert_close(attention_map(channel_energy(feature_map)), expected)


def test_attention_map_pools_the_squares():
    feature_map = torch.tensor([[[[1.0, 3.0], [2.0, 4.0]]]])
    pooled = attention_map(channel_energy(feature_map), (2, 1))  # row means of the squares: 5 and 10
    torch.testing.assert_close(pooled, torch.tensor([[1.0, 2.0]]) / math.sqrt(5))


@given(st.tuples(*[st.integers(1, 4)] * 4), st.booleans())
def test_gradient_of_the_channel_energy(shape, channels_last):
    (feature_map,) = random_maps([shape])
    if channels_last:
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(channel_energy, feature_map.requires_grad_())


def test_at_against_numpy():
    student, teacher = random_maps([(3, 4, 8, 8), (3, 6, 4, 4)]), random_maps([(3, 2, 8, 8), (3, 6, 4, 4)], seed=1)
    expected = sum(((numpy_attention(s) - numpy_attention(t)) ** 2).mean() for s, t in zip(student, teacher, strict=True))
    assert at_loss(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_at_pools_the_larger_map(larger):
    large, small = random_maps([(2, 3, 4, 4), (2, 5, 2, 2)])
    squares = (large.numpy() ** 2).mean(axis=1)
    pooled = squares.reshape(2, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(2, 4)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    expected = ((pooled - numpy_attention(small)) ** 2).mean()
    pair = ([large], [small]) if larger == "student" else ([small], [large])
    assert at_loss(*pair).item() == pytest.approx(expected)


def test_sp_against_numpy():
    student, teacher = random_maps([(5, 2, 3, 3), (5, 4, 2, 2)])
    difference = numpy_similarity(student.numpy().reshape(5, -1)) - numpy_similarity(teacher.numpy().reshape(5, -1))
    expected = np.linalg.norm(difference, "fro") ** 2 / 25
    assert sp_loss(student, teacher).item() == pytest.approx(expected)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_hap_equals_the_mean_over_all_pairs(student_blocks, teacher_blocks, batch, seed):
    sizes = [(batch, 1 + i % 3, 4 - i % 2, 4) for i in range(student_blocks)]
    student = random_maps(sizes, seed)
    teacher = random_maps([(batch, 2, 3, 2)] * teacher_blocks, seed + 1)
    similarities = [[numpy_similarity(numpy_attention(block)) for block in blocks] for blocks in (student, teacher)]
    expected = np.mean([((s - t) ** 2).mean() for s in similarities[0] for t in similarities[1]])
    assert hap_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_hap_gradient_equals_that_of_the_mean_over_all_pairs():
    student, teacher = random_maps([(4, 3, 4, 4), (4, 5, 2, 2)]), random_maps([(4, 2, 3, 3)] * 3, seed=1)
    for block in student:
        block.requires_grad_()

    def similarity(block):
        rows = F.normalize(block.pow(2).mean(1).flatten(1))
        return F.normalize(rows @ rows.T)

    pairs = [F.mse_loss(similarity(s), similarity(t)) for s in student for t in teacher]
    expected = torch.autograd.grad(torch.stack(pairs).mean(), student)
    torch.testing.assert_close(torch.autograd.grad(hap_loss(student, teacher), student), expected)


def official_afd_loss(distiller, student, teacher):
    """AFD as its official code computes it, batch norms and all, with the weights of `distiller`."""

    def batch_norm(rows, gain, bias):
        return F.batch_norm(rows, None, None, gain.flatten(), bias.flatten(), training=True, eps=BN_EPSILON)

    def project(projection, block, i):
        return batch_norm(F.linear(block.mean((2, 3)), projection.linears[i].weight), projection.gain[i], projection.bias[i])

    batch, n_t = len(student[0]), len(teacher)
    key = torch.stack([project(distiller.key, block, i).relu() for i, block in enumerate(student)], dim=1)
    query = torch.stack([project(distiller.query, block, i) for i, block in enumerate(teacher)], dim=1)
    bilinear = F.linear(key.flatten(0, 1), distiller.bilinear.flatten(0, 1))  # (b * s, t * q)
    bilinear = batch_norm(bilinear, distiller.bilinear_gain, torch.full((n_t * WIDTH,), 0.7, dtype=torch.float64))
    scores = torch.einsum("bstq,btq->bts", bilinear.view(batch, len(student), n_t, WIDTH), query)
    positions = distiller.teacher_position @ distiller.student_position.T
    attention = F.softmax((scores + positions) / math.sqrt(WIDTH), dim=2)

    loss = 0.0
    for t, block in enumerate(teacher):
        value_t = F.normalize(block.pow(2).mean(1).flatten(1), dim=1)
        pooled = [F.adaptive_avg_pool2d(s.pow(2).mean(1, keepdim=True), block.shape[2:]).flatten(1) for s in student]
        value_s = torch.stack([F.normalize(squares, dim=1) for squares in pooled], dim=1)
        loss += ((value_s - value_t.unsqueeze(1)).pow(2).mean(2) * attention[:, t]).sum(1).mean()
    return loss


def test_afd_equals_its_official_code():
    torch.manual_seed(0)
    student = random_maps([(6, 3, 8, 8), (6, 3, 8, 8), (6, 4, 5, 5), (6, 5, 4, 4), (6, 5, 2, 4)])
    teacher = random_maps([(6, 4, 8, 8), (6, 7, 2, 2)], seed=1)
    logits = torch.zeros(6, 2, dtype=torch.float64)
    outputs = [Outputs(logits, tuple(blocks), tuple(blocks), logits) for blocks in (student, teacher)]
    distiller = AFD(*outputs).double()
    for name, parameter in distiller.named_parameters():
        if "gain" in name or "bias" in name:
            nn.init.normal_(parameter, mean=1.0)
    for block in student:
        block.requires_grad_()
    assert distiller(*outputs).item() == pytest.approx(official_afd_loss(distiller, student, teacher).item(), rel=1e-9)
    expected = torch.autograd.grad(official_afd_loss(distiller, student, teacher), [*student, *distiller.parameters()])
    gradients = torch.autograd.grad(distiller(*outputs), [*student, *distiller.parameters()])
    torch.testing.assert_close(gradients, expected)


def test_afd_distances_worked_by_hand():
    student = [torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])]
    teacher = [torch.tensor([[[[3.0, 0.0]]]])]
    expected = torch.tensor([[[0.0, 1.0]]])  # the same map; (0, 1) against (1, 0): mean of 1 and 1
    torch.testing.assert_close(value_distances(student, teacher), expected)


def test_afd_takes_every_second_block_of_very_deep_networks_with_the_last():
    blocks = random_maps([(1, 1, 1, 1)] * 54)
    assert len(candidates(blocks)) == 27
    assert candidates(blocks)[-1] is blocks[-1]
    assert len(candidates(blocks[:50])) == 50


def test_standardized_logits_worked_by_hand():
    # mean 2, sample deviation sqrt((4 + 0 + 4) / 2) = 2
    torch.testing.assert_close(standardized(torch.tensor([[0.0, 2.0, 4.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))


@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_standardized_logits_know_neither_scale_nor_shift(scale, shift):
    (logits,) = random_maps([(3, 7)])
    torch.testing.assert_close(standardized(scale * logits + shift), standardized(logits), rtol=1e-5, atol=1e-5)


def test_dkd_of_one_image_worked_by_hand():
    # Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2), class 0: b (1/2, 1/2) against (1/4, 3/4), q (1/2, 1/2) against (1/3, 2/3).
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    pair = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    rest = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 3 / 2)
    loss = dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=8.0)
    assert loss.item() == pytest.approx(pair + 8 * rest, rel=1e-6)


@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.5, 8), st.integers(0, 99))
def test_dkd_whose_other_classes_weigh_what_the_teacher_leaves_them_is_kd(classes, batch, temperature, seed):
    student, teacher = random_maps([(batch, classes)] * 2, seed)
    labels = torch.arange(batch) % classes
    target, others = decoupled_divergences(student / temperature, teacher / temperature, labels)
    left = 1 - (teacher / temperature).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    summed = temperature**2 * (target + left * others).mean()
    assert summed.item() == pytest.approx(kd_loss(student, teacher, temperature=temperature).item(), rel=1e-9, abs=1e-12)


def test_dkd_against_numpy():
    student, teacher = random_maps([(4, 6)] * 2)
    labels = np.array([5, 0, 2, 2])

    def split(logits):
        probabilities = np.exp(logits.numpy() / 4)
        probabilities /= probabilities.sum(1, keepdims=True)
        target = probabilities[np.arange(4), labels]
        others = np.array([np.delete(row, label) for row, label in zip(probabilities, labels, strict=True)])
        return np.stack([target, 1 - target], 1), others / others.sum(1, keepdims=True)

    pairs = zip(split(student), split(teacher), strict=True)
    target, others = ((t * np.log(t / s)).sum(1).mean() for s, t in pairs)
    loss = dkd_loss(student, teacher, torch.tensor(labels), temperature=4.0, alpha=1.0, beta=8.0)
    assert loss.item() == pytest.approx(16 * (target + 8 * others))


def test_dkd_of_logits_that_are_far_apart_is_finite():
    student, teacher = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True), torch.tensor([[-500.0, 0.0, 500.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=8.0)
    loss.backward()
    # The pair: the teacher is sure of 'other', which the student gives exp(-500); the rest: sure of class 2, which it gives all.
    assert loss.item() == pytest.approx(500, rel=1e-5) and student.grad.isfinite().all()


def test_pearson_against_numpy_and_of_a_constant():
    a, b = random_maps([(3, 8)] * 2)
    expected = [np.corrcoef(*rows)[0, 1] for rows in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(pearson(a, b, dim=1), expected, rtol=1e-6)
    np.testing.assert_allclose(pearson(a.T, b.T, dim=0), expected, rtol=1e-6)
    assert pearson(torch.ones(1, 8), b[:1].float(), dim=1).item() == 0


def test_dist_against_numpy():
    student, teacher = random_maps([(5, 4)] * 2)
    s, t = (np.exp(logits.numpy() / 4) for logits in (student, teacher))
    s, t = s / s.sum(1, keepdims=True), t / t.sum(1, keepdims=True)
    classes = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(s, t, strict=True)])
    images = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(s.T, t.T, strict=True)])
    loss = dist_loss(student, teacher, temperature=4.0, beta=2.0, gamma=3.0)
    assert loss.item() == pytest.approx(16 * (2 * classes + 3 * images))


def test_dist_of_equal_logits_is_zero_up_to_its_epsilon():
    (logits,) = random_maps([(20, 6)])
    assert dist_loss(logits, logits, temperature=1.0, beta=2.0, gamma=2.0).item() == pytest.approx(0, abs=1e-5)


def test_the_epsilon_of_pearson_stands_beside_the_product_of_the_lengths():
    # rows of length 1e-4: a product of 1e-8, to which as much is added
    small = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64) / math.sqrt(2)
    assert pearson(small, small, dim=1).item() == pytest.approx(0.5)


def test_hierarchical_loss_worked_by_hand():
    # A difference of 2 at one of 4x4 pixels: 4 / 16; pooled to 2x2 it is 1/2 at one of four, to one pixel 1/8.
    student = torch.zeros(1, 1, 4, 4)
    student[0, 0, 0, 0] = 2
    terms = (4 / 16 + 1 / 2 * (1 / 4 / 4) + 1 / 4 * (1 / 64)) / (1 + 1 / 2 + 1 / 4)
    assert hcl_loss([student], [torch.zeros(1, 1, 4, 4)]).item() == pytest.approx(terms)


def official_fusion(fusion, x, behind, size):
    """ABF as its official code spells it out, with the weights of `fusion`."""

    def conv_norm(layers, maps, padding):
        maps = F.conv2d(maps, layers[0].weight, padding=padding)
        return F.batch_norm(maps, None, None, layers[1].weight, layers[1].bias, training=True)

    x = conv_norm(fusion.reduce, x, 0)
    if behind is not None:
        behind = F.interpolate(behind, x.shape[2:], mode="nearest")
        z = torch.sigmoid(F.conv2d(torch.cat([x, behind], 1), fusion.attention.weight, fusion.attention.bias))
        x = x * z[:, 0].view(len(x), 1, *x.shape[2:]) + behind * z[:, 1].view(len(x), 1, *x.shape[2:])
    x = F.interpolate(x, size, mode="nearest")
    return conv_norm(fusion.expand, x, 1), x


def test_fusion_equals_its_official_code():
    torch.manual_seed(0)
    fusion = ABF(3, 6, 5, fuses=True).double()
    x, behind = random_maps([(4, 3, 8, 8), (4, 6, 4, 4)])
    torch.testing.assert_close(fusion(x, behind, (16, 16)), official_fusion(fusion, x, behind, (16, 16)))


def test_reviewkd_fuses_from_the_embedding_to_the_first_stage():
    torch.manual_seed(0)
    stages = random_maps([(4, 3, 8, 8), (4, 5, 4, 4)]), random_maps([(4, 2, 8, 8), (4, 6, 2, 2)], seed=1)
    student, teacher = (Outputs(None, tuple(maps), tuple(maps), maps[-1].mean((2, 3))) for maps in stages)
    student, teacher = (outputs._replace(logits=torch.zeros(4, 2)) for outputs in (student, teacher))
    distiller = ReviewKD(student, teacher).double()
    fused, outputs = None, []
    for fusion, own, other in zip(
        reversed(distiller.fusions),
        [student.embedding[:, :, None, None], *reversed(student.stages)],
        [teacher.embedding[:, :, None, None], *reversed(teacher.stages)],
        strict=True,
    ):
        output, fused = official_fusion(fusion, own, fused, other.shape[2:])
        outputs.append(output)
    expected = hcl_loss(outputs, [teacher.embedding[:, :, None, None], *reversed(teacher.stages)])
    assert distiller(student, teacher).item() == pytest.approx(expected.item())


def test_rkd_worked_by_hand():
    # Corners of a right triangle with legs 3 and 4, and of one with three sides of 1 by its distances alone.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    distances = [3 / 4, 1, 5 / 4]  # over their mean, 4; the teacher's are all 1
    expected = 2 * sum((distance - 1) ** 2 / 2 for distance in distances) / 9
    assert rkd_loss(student, teacher, distance_weight=1.0, angle_weight=0.0).item() == pytest.approx(expected, rel=1e-5)
    cosines = [0, 3 / 5, 4 / 5]  # in the corners; the teacher's are all 1/2
    # of the 27 triples each corner has two between different images, and the others agree
    expected = 2 * sum((cosine - 1 / 2) ** 2 / 2 for cosine in cosines) / 27
    assert rkd_loss(student, teacher, distance_weight=0.0, angle_weight=1.0).item() == pytest.approx(expected, rel=1e-5)


def test_rkd_knows_no_scale():
    (student,) = random_maps([(5, 3)])
    assert rkd_loss(student, 7 * student, distance_weight=25.0, angle_weight=50.0).item() == pytest.approx(0, abs=1e-12)


def test_pkt_worked_by_hand():
    # Cosines (1, 0) make kernels (1, 1/2) and so probabilities (2/3, 1/3); opposite images have (1, 0).
    student, teacher = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    expected = 2 * math.log(1 / (2 / 3)) / 4
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_wttm_worked_by_hand():
    # p = (9/10, 1/10) to the power 1/2 is proportional to (3, 1): q = (3/4, 1/4), U = 4 / sqrt(10).
    teacher, student = torch.tensor([[math.log(9), 0.0]]), torch.zeros(1, 2)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert wttm_loss(student, teacher, gamma=0.5).item() == pytest.approx(4 / math.sqrt(10) * divergence, rel=1e-6)


def test_wttm_with_the_exponent_one_is_kd_at_temperature_one():
    student, teacher = random_maps([(6, 5), (6, 5)])
    expected = kd_loss(student, teacher, temperature=1.0).item()
    assert wttm_loss(student, teacher, gamma=1.0).item() == pytest.approx(expected)


def test_nkd_worked_by_hand():
    # Target 0 with p = 1/2 in the teacher, 1/4 in the student, and of the others (2/3, 1/3) and (1/2, 1/2) at T = 1.
    teacher = torch.tensor([[1 / 2, 1 / 3, 1 / 6]]).log()
    student = torch.tensor([[1 / 4, 3 / 8, 3 / 8]]).log()
    expected = -0.5 * math.log(1 / 4) - 2 * math.log(1 / 2)
    loss = nkd_loss(student, teacher, torch.tensor([0]), temperature=1.0, gamma=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_ctkd_is_kd_at_a_temperature_that_goes_where_kd_is_larger():
    student, teacher = ([logits * 3] for logits in random_maps([(8, 5), (8, 5)]))
    outputs = [Outputs(logits, (), (), logits) for (logits,) in (student, teacher)]
    distiller = CTKD(*outputs, ctkd_epochs=10).double()
    loss = distiller(*outputs, epochs=torch.tensor(99.0))
    temperature = 1 + 20 / (1 + math.exp(-1))
    assert loss.item() == pytest.approx(kd_loss(student[0], teacher[0], temperature=temperature).item())
    loss.backward()
    ahead, behind = (
        kd_loss(student[0], teacher[0], temperature=1 + 20 / (1 + math.exp(-1 - step))).item() for step in (1e-6, -1e-6)
    )
    assert distiller.theta.grad.item() == pytest.approx(-(ahead - behind) / 2e-6, rel=1e-5)


def test_ctkd_turns_the_gradient_round_more_and_more():
    factors = [reversal_factor(torch.tensor(epochs), rise_epochs=10).item() for epochs in (0.0, 0.9, 4.0, 9.5, 30.0)]
    assert factors == pytest.approx([0.0244717, 0.0244717, 0.5, 1.0, 1.0], abs=1e-6)


def test_contrastive_loss_worked_by_hand():
    # One positive with h = 3/4 and two negatives with h = 1/4 and 3/4, K / n = 2 / 8 = 1/4.
    scores = torch.tensor([[3 / 4, 1 / 4, 3 / 4]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4))
    assert contrastive_loss(scores, train_images=8).item() == pytest.approx(expected, rel=1e-5)


def test_crd_scores_have_the_mean_of_noise_at_first_and_rows_move_half_way():
    bank = Bank(6, 2).train()
    bank.rows.copy_(torch.tensor([[1.0, 0.0]]).expand(6, 2))
    anchors = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    picked = torch.tensor([[0, 1, 2], [3, 4, 5]])
    scores = bank.scores(anchors, picked, temperature=0.5)
    assert scores.mean().item() == pytest.approx(1 / 6)
    assert (scores[1] / scores[0]).tolist() == pytest.approx(3 * [math.exp(2)])
    bank.rows.zero_()
    assert bank.scores(anchors, picked, temperature=0.5).mean() < 1 / 6  # Z stays
    bank.rows.copy_(torch.tensor([[1.0, 0.0]]).expand(6, 2))
    bank.remember(torch.tensor([4]), torch.tensor([[0.0, 1.0]]), momentum=0.5)
    assert bank.rows[4].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert bank.rows[3].tolist() == [1.0, 0.0]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=20).filter(lambda labels: len(set(labels)) > 1), st.integers(0, 99))
def test_negatives_are_all_images_of_other_classes(labels, seed):
    labels = torch.tensor(labels)
    torch.manual_seed(seed)
    drawn = Negatives(labels)(torch.arange(len(labels)), count=400)
    for row, picked in enumerate(drawn.tolist()):
        assert set(picked) == set((labels != labels[row]).nonzero().flatten().tolist())


@pytest.mark.parametrize("own, other", [((8, 8), (8, 8)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((9, 7), (4, 4)), ((3, 3), (8, 8))])
def test_fitnets_regressor_has_the_teachers_shape(own, other):
    regressor = Regressor((2, 3, *own), (2, 5, *other))
    assert regressor(torch.randn(2, 3, *own)).shape == (2, 5, *other)


def test_fitnet_of_a_regressor_that_copies_worked_by_hand():
    feature_map = torch.tensor([[[[0.0]]], [[[2.0]]]])  # batch norm makes it (-1, 1), ReLU (0, 1)
    outputs = Outputs(torch.zeros(2, 3), (feature_map,), (feature_map,), torch.zeros(2, 1))
    distiller = FitNet(outputs, outputs, fitnet_stage=1)
    nn.init.ones_(distiller.regressor.conv.weight)
    assert distiller(outputs, outputs).item() == pytest.approx((0 + 1) / 2, rel=1e-4)
