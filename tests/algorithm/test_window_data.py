"""Frames of a window as samples: their state, their observed loss, and the sampling of sites."""

import pytest
import torch
from observable_tools import noisy_frames, water_grid
from torch import nn

from stable_plugin import LocalBondLengths, Molecules, StABlEConfig, System
from stable_plugin.algorithm.estimator import BoltzmannEstimator
from stable_plugin.algorithm.window_data import WindowData, WindowEstimator
from stable_plugin.models import ModulePotential


class Harmonic(nn.Module):
    """Atomic energies k r²."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, positions):
        return self.k * positions.square().sum(dim=-1)


def window_estimator(even_sampling=None, local=True):
    """Return the estimator of O-H bond lengths in eight water molecules."""
    water = water_grid()
    system = System.from_atoms(water)
    observable = LocalBondLengths()
    observable.bind(system, noisy_frames(water, 6))
    estimator = BoltzmannEstimator(ModulePotential(Harmonic(), system), 300.0)
    return WindowEstimator(estimator, [observable], local=Molecules() if local else None, even_sampling=even_sampling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"even_sampling": (4, 2), "local": False}, r"even_sampling=\(4, 2\) needs the local estimator: set local="),
        ({"even_sampling": 4}, r"even_sampling=4 is not a pair of integers"),
        (
            {"even_sampling": (4,)},
            r"even_sampling=\(4,\) is not a pair of integers: pass \(bins, samples per bin and replica\)",
        ),
        ({"even_sampling": (0, 2)}, r"even_sampling=0 is out of range"),
    ],
)
def test_even_sampling_rejects_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        local = settings.pop("local", True)
        window_estimator(StABlEConfig(objective="both", **settings).even_sampling, local=local)


def test_even_sampling_includes_rare_sites():
    frames = noisy_frames(water_grid(), 10, seed=3)
    frames[4, 0] += torch.tensor([0.8, 0.0, 0.0])  # one molecule of eighty is broken
    drawn, all_samples = (
        window_estimator(even).collect(frames, 1, torch.Generator().manual_seed(0)) for even in ((2, 3), None)
    )
    (part,), (whole,) = drawn.groups, all_samples.groups
    assert len(whole.sites) == 80
    assert len(part.sites) < 10
    broken = 4 * 8
    assert broken in part.sites.tolist(), "it is the only one in its bin"
    # The energy of a site is that of its molecule, k Σ r².
    for site, energy in zip(part.sites.tolist(), part.energies.tolist(), strict=True):
        frame, of = divmod(site, 8)
        assert energy == pytest.approx(frames[frame, 3 * of : 3 * of + 3].square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("local", [True, False])
def test_state_dict_restores_the_estimate(local):
    estimator = window_estimator(local=local)
    data = estimator.collect(noisy_frames(water_grid(), 5, seed=4), 1, torch.Generator())
    with torch.no_grad():
        estimator.estimator.potential.module.k.mul_(1.01)
    restored = WindowData.from_state_dict(data.state_dict(), torch.device("cpu"))
    assert torch.equal(restored.positions, data.positions)
    weights, fraction = estimator.reweight(data)
    again, same_fraction = estimator.reweight(restored)
    assert same_fraction == fraction < 1.0
    assert all(torch.equal(one, other) for one, other in zip(again, weights, strict=True))
    assert estimator.estimate(restored, again).loss == estimator.estimate(data, weights).loss


@pytest.mark.parametrize("local", [True, False])
def test_observed_loss_is_of_the_mean_over_frames(local):
    estimator = window_estimator(local=local)
    frames = noisy_frames(water_grid(), 5, seed=4)
    (observable,) = estimator.observables
    mean = sum(observable.per_frame(frame[None])[0] for frame in frames) / len(frames)
    expected = (mean - observable.known_target).square().mean().item()
    assert estimator.observed_loss(frames) == pytest.approx(expected, rel=1e-9)


def test_collect_without_frames_has_no_samples():
    estimator = window_estimator()
    data = estimator.collect(noisy_frames(water_grid(), 5)[:0], 1, torch.Generator())
    (group,) = data.groups
    assert len(group.energies) == len(group.sites) == 0
    assert group.values[0].shape == (0, len(estimator.observables[0].known_target))


@pytest.mark.parametrize("local", [True, False])
def test_scale_divides_deviations_in_the_loss(local):
    frames = noisy_frames(water_grid(), 8, seed=4)
    plain, scaled = window_estimator(local=local), window_estimator(local=local)
    scaled.observables[0].scale = torch.tensor(0.1, dtype=torch.float64)
    found = []
    for each in (plain, scaled):
        each.observables[0].target += 0.02
        estimate = each.estimate(each.collect(frames, 1, torch.Generator()))
        found.append((estimate.loss, estimate.gradients[0].item(), each.observed_loss(frames)))
    assert found[1] == pytest.approx([100 * value for value in found[0]], rel=1e-9)
    assert found[0][1] != 0.0
