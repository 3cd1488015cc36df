"""Steps of one length along the gradient."""

import pytest
import torch

from stable_plugin.algorithm.normalized_descent import NormalizedDescent

GRADIENTS = torch.tensor([3.0, -1.0, 1e-3, 0.0])
LR = 0.01


def step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients.split([len(each) for each in parameters]), strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def test_a_step_is_along_the_gradients_of_all_parameters_of_a_group():
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


def test_each_group_has_its_own_length_and_parameters_without_a_gradient_stay():
    one, other, still = (torch.nn.Parameter(torch.zeros(4)) for _ in range(3))
    optimizer = NormalizedDescent([{"params": [one]}, {"params": [other], "lr": 0.1}, {"params": [still]}], lr=LR)
    step(optimizer, [one, other], torch.cat([GRADIENTS, 100.0 * GRADIENTS]))
    torch.testing.assert_close(other.detach(), 10.0 * one.detach())
    assert not still.any()
    resumed = NormalizedDescent([{"params": [one]}, {"params": [other]}, {"params": [still]}], lr=LR)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(resumed.state[other]["average"], optimizer.state[other]["average"])


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
