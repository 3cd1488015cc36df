"""Steps of one length along the gradient."""

import pytest
import torch

from stable_plugin.algorithm.normalized_descent import DAMPING, NormalizedDescent

GRADIENTS = torch.tensor([3.0, -1.0, 1e-3, 0.0])
LR = 0.01


def step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients.split([len(each) for each in parameters]), strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def test_a_step_is_along_the_gradients_of_all_parameters():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1))]
    step(NormalizedDescent(parameters, lr=LR), parameters, GRADIENTS)
    change = torch.cat([parameter.detach() - 1.0 for parameter in parameters])
    assert change.square().mean().sqrt() == pytest.approx(LR, rel=1e-5)
    torch.testing.assert_close(change / change[0], GRADIENTS / GRADIENTS[0], rtol=1e-3, atol=1e-6)


def test_the_average_forgets_earlier_gradients():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = NormalizedDescent([parameter], lr=LR, momentum=0.75)
    step(optimizer, [parameter], torch.tensor([4.0, 0.0]))
    before = parameter.detach().clone()
    step(optimizer, [parameter], torch.tensor([0.0, 4.0]))
    change = parameter.detach() - before
    assert change[1] / change[0] == pytest.approx(1.0 / 0.75, rel=1e-6)


def test_a_metric_gives_the_step_that_lowers_the_loss_most_at_its_length():
    metric = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1e-4]], dtype=torch.float64)
    damped = metric + DAMPING * metric.diagonal().mean() * torch.eye(3)
    gradients = torch.tensor([1.0, -0.3, 0.2])
    parameters = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(1, 1))]
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    for parameter, own in zip(parameters, gradients.split([2, 1]), strict=True):
        parameter.grad = own.reshape(parameter.shape).to(parameter)
    NormalizedDescent([frozen, *parameters], lr=LR, metric=metric).step()
    change = torch.cat([parameter.detach().flatten().double() for parameter in parameters])
    assert (change @ damped @ change).sqrt() == pytest.approx(LR, rel=1e-6)
    # Among random changes of this length, none lowers the loss more.
    others = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others *= LR / torch.einsum("ni,ij,nj->n", others, damped, others).sqrt()[:, None]
    assert (others @ gradients.double()).min() > change @ gradients.double()


def test_parameters_without_a_gradient_stay_and_averages_are_resumed():
    moved, still = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = NormalizedDescent([moved, still], lr=LR)
    moved.grad = GRADIENTS.clone()
    optimizer.step()
    assert moved.any()
    assert not still.any()
    resumed = NormalizedDescent([moved, still], lr=LR)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(resumed.state[moved]["average"], optimizer.state[moved]["average"])


def test_a_metric_of_another_shape_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"metric of shape \(2, 2\) for 3 numbers: pass one of shape \(3, 3\)"):
        step(NormalizedDescent([parameter], lr=LR, metric=torch.eye(2)), [parameter], torch.ones(3))


def test_no_gradient_is_no_step():
    parameter = torch.nn.Parameter(torch.ones(2))
    step(NormalizedDescent([parameter], lr=LR), [parameter], torch.zeros(2))
    assert torch.equal(parameter, torch.ones(2))


def test_a_closure_computes_the_gradients():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert NormalizedDescent([parameter], lr=LR).step(closure) == 4.0
    assert parameter.item() == pytest.approx(2.0 - LR)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("momentum", 1.0)])
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        NormalizedDescent([torch.nn.Parameter(torch.zeros(1))], **{"lr": LR, name: value})
