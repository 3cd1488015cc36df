"""Low-rank changes of weights: against autograd through the product, on layers of e3nn, and in a training run."""

import copy

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from test_fine_tuning import QUIET, mace_frames
from torch import nn
from toys import tiny_mace

from stable_plugin import ExtxyzDataModule
from stable_plugin.models import FineTuningModule
from stable_plugin.models.low_rank import LowRankOptimizer, matrices


def optimizer_of(module, rank, make, seed=0):
    return LowRankOptimizer([(weight, blocks) for _, weight, blocks in matrices(module)], rank, make, seed)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_steps_are_those_of_autograd_through_the_product(shape):
    torch.manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    target = torch.randn(*shape, dtype=torch.float64)
    ours = optimizer_of(module, 2, adam)
    start = module.weight.detach().clone()
    ((a, b),) = ours._factors
    own_a, own_b = (nn.Parameter(each.detach().clone()) for each in (a, b))
    theirs = adam([own_a, own_b])
    for _ in range(5):
        loss = ours.step(lambda: _backward(ours, (module.weight - target).pow(4).sum()))
        theirs.zero_grad()
        expected = (start + own_b @ own_a - target).pow(4).sum()
        expected.backward()
        theirs.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(module.weight.detach(), start + (own_b @ own_a).detach(), rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(module.weight.detach() - start).max() == 2


def _backward(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    return loss


def test_the_learning_rate_is_that_of_the_optimizer_seen_from_outside():
    module = nn.Linear(3, 3, bias=False)
    optimizer, before = optimizer_of(module, 1, adam), module.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        optimizer.step(lambda: _backward(optimizer, module.weight.sum()))
    assert torch.equal(module.weight, before)


def test_a_restored_optimizer_goes_on_alike():
    def run(module, optimizer, n):
        for _ in range(n):
            optimizer.step(lambda: _backward(optimizer, (module.weight - 1.0).square().sum()))

    torch.manual_seed(0)
    module = nn.Linear(5, 4, bias=False)
    optimizer = optimizer_of(module, 2, adam)
    run(module, optimizer, 3)
    other = nn.Linear(5, 4, bias=False)
    other.load_state_dict(module.state_dict())
    restored = optimizer_of(other, 2, adam, seed=7)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(module, optimizer, 3)
    run(other, restored, 3)
    assert torch.equal(module.weight, other.weight)


def test_layers_of_e3nn_stay_equivariant_and_change_by_this_rank():
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(0)
    layer = o3.Linear("6x0e + 5x1o", "4x0e + 3x1o")
    start = layer.weight.detach().clone()
    optimizer = optimizer_of(layer, 2, adam)
    x = layer.irreps_in.randn(7, -1)
    for _ in range(3):
        optimizer.step(lambda: _backward(optimizer, (layer(x) - 1.0).pow(4).sum()))
    change = layer.weight.detach() - start
    ranks = [
        torch.linalg.matrix_rank(part.view(n), tol=1e-5)
        for part, n in zip(change.split([24, 15]), [(6, 4), (5, 3)], strict=True)
    ]
    assert ranks == [2, 2]
    rotation = o3.rand_matrix()
    turned = layer(x @ layer.irreps_in.D_from_matrix(rotation).T)
    torch.testing.assert_close(turned, layer(x) @ layer.irreps_out.D_from_matrix(rotation).T, rtol=1e-4, atol=1e-4)


def test_a_module_without_matrices_is_an_error():
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no weight matrices to train"):
        optimizer_of(module, 2, adam)


@pytest.mark.parametrize("kind", ["MACEModule", "FineTuningModule"])
def test_a_run_with_low_rank_lowers_the_loss_and_writes_a_plain_file(kind, tmp_path):
    mace = pytest.importorskip("stable_plugin.models.mace")
    model = tiny_mace([1, 8])
    frames = mace_frames(model)
    for frame in frames:
        frame.arrays["REF_forces"][:] *= 1.2
        frame.arrays["REF_forces"][:] += 0.1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make = getattr(mace, kind, FineTuningModule)
    module = make(model, E0s="model", lr=0.02, lora_rank=1)
    data = ExtxyzDataModule(frames, frames, batch_size=2)
    trainer = Trainer(max_epochs=5, **QUIET)
    (first,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (last,) = trainer.validate(module, data, verbose=False)
    assert last["valid/loss"] < 0.9 * first["valid/loss"]
    blocks = {name: own for name, _, own in matrices(model)}
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if name not in blocks:
            assert torch.equal(change, torch.zeros_like(change)), name
        else:
            assert all(int(torch.linalg.matrix_rank(block.of(change), atol=1e-6).max()) <= 1 for block in blocks[name])
    module.save_potential(tmp_path / "tuned.model")
    written = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert all(parameter.requires_grad for parameter in written.parameters())
    assert {name for name, _ in written.named_parameters()} == set(before)
    np.testing.assert_allclose(
        make(written, E0s="model").total_energies(frames), module.total_energies(frames), atol=1e-6
    )


def test_a_rank_that_is_no_count_is_an_error():
    with pytest.raises(ValueError, match="lora_rank=0"):
        FineTuningModule(nn.Linear(2, 2), lora_rank=0)
