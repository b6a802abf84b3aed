import numpy as np
import pytest
import torch

import prune.criteria
from prune.criteria import CRITERIA, Criterion, criterion
from utils.errors import UserError


def points(*coordinates):
    """Filters (F, 2, 1, 1) that are points of the plane, so that distances can be worked out by hand."""
    return torch.tensor(coordinates, dtype=torch.float32).reshape(len(coordinates), 2, 1, 1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpy_geometric_median(weight, *, power=1):
    flat = weight.double().numpy().reshape(len(weight), -1)
    return (np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(2)) ** power).sum(1)


def test_every_named_method_is_registered():
    names = ("r", "a", "l2", "gm", "nggm", "taylor", "taylor-weight", "bn", "group", "hrank", "chip", "error")
    assert list(CRITERIA) == [f"filter-{name}" for name in names]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 3, 3)])
def test_one_float32_score_a_filter_with_the_same_keywords(name, shape):
    weight = draw(*shape).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    each = torch.ones(len(weight))
    options = {"gamma": 0.3, "generator": generator, "gm_distance": "sqeuclidean"}
    options |= dict.fromkeys(("bn_weight", "feature_maps", "importance", "group_squares", "removal_order"), each)
    scores = CRITERIA[name](weight, torch.ones(shape), **options)
    assert scores.shape == shape[:1] and scores.dtype == torch.float32
    assert not scores.requires_grad and scores.isfinite().all()


@pytest.mark.parametrize("name", CRITERIA)
def test_half_precision_weights_are_scored_in_float32(name):
    weight = draw(6, 2, 3, 3).bfloat16()
    grad = draw(6, 2, 3, 3, seed=1).bfloat16()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    read = {"bn_weight": draw(6, seed=2).bfloat16(), "feature_maps": draw(6, seed=3).bfloat16()}
    read["importance"] = read["group_squares"] = read["removal_order"] = read["feature_maps"]
    scores = CRITERIA[name](weight, grad, generator=generators[0], **read)
    widened = {key: tensor.float() for key, tensor in read.items()}
    assert torch.equal(scores, CRITERIA[name](weight.float(), grad.float(), generator=generators[1], **widened))


def test_norms_by_hand():
    weight = points((3, -4), (-1, 0), (0, 0))
    assert CRITERIA["filter-a"](weight).tolist() == [7, 1, 0]
    assert CRITERIA["filter-l2"](weight).tolist() == [5, 1, 0]


def test_geometric_median_by_hand():
    weight = points((0, 0), (3, 4), (6, 8), (0, 8))
    diagonal = 5.0  # of a 3 x 4 rectangle
    expected = [5 + 10 + 8, 5 + 5 + diagonal, 10 + 5 + 6, 8 + diagonal + 6]
    assert CRITERIA["filter-gm"](weight).tolist() == expected
    squares = [25 + 100 + 64, 25 + 25 + 25, 100 + 25 + 36, 64 + 25 + 36]
    assert CRITERIA["filter-gm"](weight, gm_distance="sqeuclidean").tolist() == squares


def test_distances_are_not_squared_by_default():
    # On a line, the median of these five is 0.5, while their mean, 1.82, is nearest to 0.6: the two methods disagree.
    weight = points((-1, 0), (0, 0), (0.5, 0), (0.6, 0), (9, 0))
    assert CRITERIA["filter-gm"](weight).argmin() == 2
    assert CRITERIA["filter-gm"](weight, gm_distance="sqeuclidean").argmin() == 3


@pytest.mark.parametrize(("gm_distance", "power"), [("euclidean", 1), ("sqeuclidean", 2)])
def test_geometric_median_equals_numpy(gm_distance, power):
    weight = draw(16, 8, 3, 3)
    scores = CRITERIA["filter-gm"](weight, gm_distance=gm_distance)
    np.testing.assert_allclose(scores.numpy(), numpy_geometric_median(weight, power=power), rtol=1e-6)


def test_equal_filters_are_at_distance_zero_and_score_alike():
    one = draw(1, 16, 3, 3) * 1000
    assert CRITERIA["filter-gm"](one.expand(40, -1, -1, -1)).eq(0).all()
    weight = torch.cat([one, draw(30, 16, 3, 3, seed=1), one])
    scores = CRITERIA["filter-gm"](weight)
    assert scores[0] == scores[-1]


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_nggm_equals_numpy(gamma):
    weight, grad = draw(12, 4, 3, 3), draw(12, 4, 3, 3, seed=1)
    median, gradient = numpy_geometric_median(weight), np.abs(grad.numpy()).sum((1, 2, 3))
    median, gradient = ((x - x.min()) / (x.max() - x.min()) for x in (median, gradient))
    scores = CRITERIA["filter-nggm"](weight, grad, gamma=gamma)
    np.testing.assert_allclose(scores.numpy(), gamma * median + (1 - gamma) * gradient, rtol=1e-5, atol=1e-7)


def test_nggm_by_hand():
    weight = points((0, 0), (3, 4), (6, 8))  # GM sums 15, 10, 15: brought to 1, 0, 1
    grad = points((1, -1), (2, 2), (-3, 3))  # 2, 4, 6: brought to 0, 0.5, 1
    assert CRITERIA["filter-nggm"](weight, grad).tolist() == [0.5, 0.25, 1.0]


def test_nggm_terms_that_are_all_equal_count_as_zero():
    weight, grad = points((1, 2), (1, 2)), points((1, 0), (-1, 0))
    assert CRITERIA["filter-nggm"](weight, grad).tolist() == [0, 0]
    assert CRITERIA["filter-nggm"](weight, points((0, 0), (5, 0))).tolist() == [0, 0.5]


@pytest.mark.parametrize("name", ["filter-taylor", "filter-taylor-weight"])
def test_taylor_needs_an_importance_of_each_filter(name):
    assert CRITERIA[name](points((9, 9), (1, 1)), importance=torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]
    with pytest.raises(UserError, match=f"{name} needs the importance of each filter"):
        CRITERIA[name](points((9, 9), (1, 1)), importance=torch.ones(3))


def test_batch_norm_weights_by_hand():
    assert CRITERIA["filter-bn"](points((9, 9), (1, 1)), bn_weight=torch.tensor([-0.5, 2.0])).tolist() == [0.5, 2.0]
    with pytest.raises(UserError, match="filter-bn needs a batch norm that alone reads the filters"):
        CRITERIA["filter-bn"](points((9, 9), (1, 1)))


def test_an_importance_of_nothing_known_is_refused():
    with pytest.raises(ValueError, match=r"filter-new.*'maps' is none of gates, weights"):
        criterion("filter-new", title="New", importance_of="maps")


def test_random_scores_come_from_the_given_generator_alone():
    weight = draw(50, 1, 1, 1)
    before = torch.get_rng_state()
    first, again, other = (CRITERIA["filter-r"](weight, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert ((first >= 0) & (first < 1)).all() and len(first.unique()) == 50


def test_a_new_criterion_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("prune.criteria.CRITERIA", dict(CRITERIA))
    from prune import criteria

    @criterion("filter-max", title="Max")
    def largest_weight(weight):
        return weight.abs().flatten(1).amax(1)

    assert criteria.CRITERIA["filter-max"](points((3, -4), (1, 0)), gamma=0.1).tolist() == [4, 1]
    assert not criteria.CRITERIA["filter-max"].needs_gradient
    assert [name for name, registered in CRITERIA.items() if registered.needs_gradient] == ["filter-nggm"]


def test_registering_twice_or_asking_for_the_unknown_is_refused():
    with pytest.raises(ValueError, match="filter-a"):
        criterion("filter-a", title="A")(lambda weight: weight)
    with pytest.raises(ValueError, match="filter-new"):
        criterion("filter-new", title="New")(lambda weight, *, activations: weight)
    assert "filter-new" not in CRITERIA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gm_distance": "cosine"}, "gm_distance cosine: choose from euclidean, sqeuclidean"),
        ({"gamma": 1.5}, "^gamma 1.5: "),
        ({"gamma": float("nan")}, "^gamma nan: "),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        CRITERIA["filter-nggm"](draw(3, 2, 1, 1), draw(3, 2, 1, 1), **options)


@pytest.mark.parametrize("grad", [None, torch.zeros(1, 2, 1, 1)])
def test_a_missing_or_misshapen_gradient_is_named(grad):
    with pytest.raises(UserError, match=r"filter-nggm needs a gradient of the weight's shape \(3, 2, 1, 1\)"):
        CRITERIA["filter-nggm"](draw(3, 2, 1, 1), grad)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda weight: weight.abs().sum(1), r"scores of shape \(4, 3, 3\), expected one finite number a filter, \(4,\)"),
        (lambda weight: weight.sum(), r"scores of shape \(\), expected one"),
        (lambda weight: weight.flatten(1).sum(1)[:3], r"scores of shape \(3,\), expected one"),
        (lambda weight: weight.flatten(1).sum(1, keepdim=True), r"scores of shape \(4, 1\), expected one"),
        (lambda weight: weight.flatten(1).sum(1).tolist(), "a list as scores, expected one"),
        (lambda weight: weight.flatten(1).sum(1) > 0, "scores of type torch.bool, expected one"),
        (lambda weight: torch.view_as_complex(weight.flatten(1)[:, :2].contiguous()), "scores of type torch.complex128"),
        (lambda weight: weight.flatten(1).sum(1).sub(100).log(), "scores that are not finite"),
        (lambda weight: weight.flatten(1).abs().sum(1) * 1e300, "scores that are not finite"),
    ],
)
def test_scores_that_are_not_one_finite_number_a_filter_are_refused_by_name(score, message, monkeypatch):
    monkeypatch.setattr("prune.criteria.CRITERIA", {})
    criterion("filter-new", title="New")(score)
    with pytest.raises(UserError, match=f"^filter-new gives {message}"):
        prune.criteria.CRITERIA["filter-new"](draw(4, 2, 3, 3))


def test_whole_numbers_are_scores():
    assert Criterion("filter-new", "New", lambda weight: torch.arange(4), frozenset())(draw(4, 2, 3, 3)).tolist() == [0, 1, 2, 3]
