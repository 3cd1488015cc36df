"""How the observable's gradient joins the user's own: factor, sum, and learning rate of single steps."""

import pytest
import torch
from torch import nn

from stable_plugin.algorithm.gradients import (
    MAX_WEIGHT_RATIO,
    MarginWeight,
    ObservableWeight,
    TemporaryLearningRate,
    add_gradients,
    norm,
)


def gradient(*values):
    """One tensor per value: a gradient whose norm is the root of the sum of squares."""
    return [torch.tensor([float(value)]) for value in values]


def test_fixed_weight_ignores_the_gradients():
    weight = ObservableWeight(7, ratio=2.0)
    for new_window in (True, False):
        assert weight(gradient(3, 4), gradient(1), new_window=new_window) == 7.0
    assert weight.state_dict() == {"first": None, "latest": 1.0}


def test_auto_weight_sets_the_ratio_of_norms():
    weight = ObservableWeight(ratio=15.0)
    observable, other = gradient(3, 4), gradient(0, 6, 8)
    factor = weight(observable, other, new_window=True)
    assert factor == pytest.approx(15.0 * 10.0 / 5.0)
    scaled = [factor * each for each in observable]
    assert norm(scaled) == pytest.approx(15.0 * norm(other))


def test_auto_weight_is_constant_within_a_window():
    weight = ObservableWeight(ratio=1.0)
    first = weight(gradient(2), gradient(8), new_window=True)
    assert first == pytest.approx(4.0)
    assert weight(gradient(0.01), gradient(8), new_window=False) == first
    assert weight(gradient(0.5), gradient(8), new_window=True) == pytest.approx(16.0)


def test_auto_weight_is_bounded_by_the_first():
    weight = ObservableWeight(ratio=1.0, max_ratio=10.0)
    assert weight(gradient(1), gradient(2), new_window=True) == pytest.approx(2.0)
    assert weight(gradient(1e-6), gradient(2), new_window=True) == pytest.approx(20.0)
    assert weight(gradient(100), gradient(2), new_window=True) == pytest.approx(0.02), "not bounded from below"
    assert ObservableWeight().max_ratio == MAX_WEIGHT_RATIO


@pytest.mark.parametrize(("observable", "other"), [((0,), (2,)), ((2,), (0,)), ((2,), ())])
def test_auto_weight_skips_gradients_of_zero(observable, other):
    weight = ObservableWeight(ratio=3.0)
    assert weight(gradient(*observable), gradient(*other), new_window=True) == 1.0
    assert weight(gradient(1), gradient(2), new_window=True) == pytest.approx(6.0)
    assert weight(gradient(*observable), gradient(*other), new_window=True) == pytest.approx(6.0)


def test_weight_state_dict_restores_bound_and_factor():
    weight = ObservableWeight(ratio=1.0, max_ratio=10.0)
    weight(gradient(1), gradient(2), new_window=True)
    weight(gradient(1), gradient(6), new_window=True)
    resumed = ObservableWeight(ratio=1.0, max_ratio=10.0)
    resumed.load_state_dict(weight.state_dict())
    assert resumed(gradient(1), gradient(9), new_window=False) == pytest.approx(6.0)
    assert resumed(gradient(1), gradient(1e6), new_window=True) == pytest.approx(20.0)
    assert repr(resumed) == "ObservableWeight(weight='auto', ratio=1, max_ratio=10)"


def test_norm_is_over_all_tensors():
    assert norm([torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor(12.0)]) == pytest.approx(13.0)
    assert norm([]) == 0.0


def test_add_gradients_adds_in_the_parameters_dtype():
    held, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    held.grad = torch.tensor([1.0, -1.0])
    add_gradients([held, without], [torch.tensor([2.0, 4.0]).double(), torch.tensor([3.0]).double()], 0.5)
    assert held.grad.tolist() == [2.0, 1.0]
    assert held.grad.dtype == torch.float32
    assert without.grad.tolist() == [1.5]


def test_add_gradients_rejects_another_number():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        add_gradients([nn.Parameter(torch.zeros(1))], [], 1.0)


def two_groups():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.02}])


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("rate", "expected"), [(None, [0.05, 0.01]), (0.4, [0.2, 0.2])])
def test_temporary_rate_is_set_and_restored(rate, expected):
    optimizer, temporary = two_groups(), TemporaryLearningRate()
    assert temporary.set(optimizer, rate, 0.5) == pytest.approx(expected[0])
    assert rates(optimizer) == pytest.approx(expected)
    temporary.restore(optimizer)
    assert rates(optimizer) == [0.1, 0.02]


def test_temporary_rate_is_restored_once():
    optimizer, temporary = two_groups(), TemporaryLearningRate()
    temporary.restore(optimizer)
    assert rates(optimizer) == [0.1, 0.02]
    temporary.set(optimizer, 1.0, 1.0)
    temporary.restore(optimizer)
    optimizer.param_groups[0]["lr"] = 0.05  # as a scheduler does
    temporary.restore(optimizer)
    assert rates(optimizer) == [0.05, 0.02]


def test_temporary_rate_rejects_an_ended_schedule():
    optimizer, temporary = two_groups(), TemporaryLearningRate()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(ValueError, match=r"learning rate is zero .*: set StABlECallback\(learning_rate=\.\.\.\)"):
        temporary.set(optimizer, None, 1.0)
    assert temporary.set(optimizer, 0.3, 0.5) == pytest.approx(0.15)


def test_margin_weight_follows_the_users_mean_loss():
    weight = MarginWeight()
    assert weight(None) == 0.0, "no loss is known yet"
    assert [weight(loss) for loss in (4.0, 2.0, float("nan"))] == pytest.approx([0.3 * 4.0, 0.3 * 3.0, 0.3 * 3.0])
    resumed = MarginWeight()
    resumed.load_state_dict(weight.state_dict())
    assert resumed(9.0) == pytest.approx(0.3 * 5.0)


def test_margin_weight_may_be_fixed():
    assert MarginWeight(3.0)(100.0) == 3.0


def test_a_vanishing_loss_is_warned_of_once(caplog):
    weight = MarginWeight()
    assert [weight(loss) for loss in (0.0, 0.0, 3.0)] == pytest.approx([0.0, 0.0, 0.3])
    assert [record.message for record in caplog.records] == [
        "margin_weight='auto' is 0.3 times your loss, which is 0: failures have next to no weight. Pass a number, for instance "
        "margin_weight=1 with labels of the potential itself."
    ]
