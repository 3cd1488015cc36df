"""Velocity autocorrelation, its spectrum, mean square displacement and diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.observables.series import TimeCorrelation
from stable_plugin.runtime import checks

LIGHT_CM_PER_FS = 2.99792458e-5

A2_PER_PS = 10.0
"""One Å²/ps in units of 1e-9 m²/s."""


class VelocityAutocorrelation(TimeCorrelation):
    """Mass-weighted velocity autocorrelation, one at lag zero.

    Args:
        interval_fs: Time between two frames; a tenth of the fastest vibration's period shows it.
        max_lag_ps: Longest lag.
        symbols: Elements that are looked at; all if not given.
        remove_drift: Whether to subtract the velocity of the centre of mass.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import System, VelocityAutocorrelation
        >>> time = torch.arange(400) * 1.0
        >>> velocities = torch.zeros(400, 1, 2, 3)
        >>> velocities[:, 0, 0, 0] = torch.cos(time * 2 * torch.pi / 40)  # a period of 40 fs
        >>> velocities[:, 0, 1] = -velocities[:, 0, 0]
        >>> vacf = VelocityAutocorrelation(interval_fs=1.0, max_lag_ps=0.04)
        >>> vacf.bind(System.from_atoms(molecule("N2")))
        >>> vacf.update(torch.zeros_like(velocities), velocities)
        >>> [round(value, 2) for value in vacf.compute()[::20].tolist()]
        [1.0, -1.0, 1.0]
    """

    def _signal(self, positions: Tensor, velocities: Tensor | None) -> Tensor:
        if velocities is None:
            raise ValueError(
                f"velocities=None, but {type(self).__name__} is of velocities: give them, or write trajectories with "
                "momenta."
            )
        return velocities

    def _compare(self, before: Tensor, later: Tensor) -> Tensor:
        assert self._masses is not None
        masses = self._masses[self._chosen].to(later)
        return torch.einsum("frnx,frnx,n->fr", before, later, masses) / len(masses)

    def _from_correlation(self, curves: Tensor) -> Tensor:
        return curves / curves[:, :1]

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.lags_ps.tolist(),
            "xlabel": "time / ps",
            "ylabel": "velocity autocorrelation",
        }


class PowerSpectrum(VelocityAutocorrelation):
    """Vibrational density of states: the Fourier transform of the velocity autocorrelation, of unit area.

    A Hann window takes the correlation to zero at the longest lag; peaks are about 1/``max_lag_ps`` wide.

    Args:
        interval_fs: Time between two frames; half a period of the fastest vibration at most, or it is folded back.
        max_lag_ps: Longest lag.
        symbols: Elements that are looked at; all if not given.
        remove_drift: Whether to subtract the velocity of the centre of mass.
    """

    @property
    def wavenumbers(self) -> Tensor:
        """Where the spectrum is given, (n_lags,) in 1/cm."""
        step = 1.0 / (2.0 * (self.n_lags - 1) * self.interval_fs * LIGHT_CM_PER_FS)
        return torch.arange(self.n_lags, dtype=torch.float64) * step

    def _from_correlation(self, curves: Tensor) -> Tensor:
        window = torch.cos(0.5 * torch.pi * torch.arange(self.n_lags).to(curves) / self.n_lags).square()
        spectra: Tensor = torch.fft.hfft(super()._from_correlation(curves) * window)[:, : self.n_lags]
        step = (self.wavenumbers[1] - self.wavenumbers[0]).item()
        return spectra / (spectra.sum(dim=1, keepdim=True) * step)

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.wavenumbers.tolist(),
            "xlabel": "wavenumber / 1/cm",
            "ylabel": "power spectrum / cm",
        }


class MeanSquaredDisplacement(TimeCorrelation):
    """Mean square displacement of the atoms, in Å².

    Args:
        interval_fs: Time between two frames.
        max_lag_ps: Longest lag.
        symbols: Elements that are looked at; all if not given.
        remove_drift: Whether to subtract the displacement of the centre of mass.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import MeanSquaredDisplacement, System
        >>> positions = 0.1 * torch.arange(20.0)[:, None, None, None].expand(20, 1, 2, 3)
        >>> msd = MeanSquaredDisplacement(interval_fs=1.0, max_lag_ps=0.003, remove_drift=False)
        >>> msd.bind(System.from_atoms(molecule("N2")))
        >>> msd.update(positions)
        >>> [round(value, 2) for value in msd.compute().tolist()]
        [0.0, 0.03, 0.12, 0.27]
    """

    def _signal(self, positions: Tensor, velocities: Tensor | None) -> Tensor:
        return positions

    def _compare(self, before: Tensor, later: Tensor) -> Tensor:
        return (later - before).square().sum(dim=-1).mean(dim=-1)

    def axis(self) -> dict[str, Any]:
        return {
            "kind": "curve",
            "x": self.lags_ps.tolist(),
            "xlabel": "time / ps",
            "ylabel": "mean square displacement / Å²",
        }


class DiffusionCoefficient(MeanSquaredDisplacement):
    """Self-diffusion coefficient in 1e-9 m²/s: the slope of the mean square displacement over six.

    No correction for the size of the cell is made.

    Args:
        interval_fs: Time between two frames.
        max_lag_ps: Longest lag of the fit.
        symbols: Elements that are looked at; all if not given.
        remove_drift: Whether to subtract the displacement of the centre of mass.
        fit_from_ps: Shortest lag of the fit, past the ballistic part; half the longest if not given.
    """

    def __init__(
        self,
        interval_fs: float,
        max_lag_ps: float = 1.0,
        symbols: Sequence[str] | None = None,
        remove_drift: bool = True,
        fit_from_ps: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(interval_fs, max_lag_ps, symbols, remove_drift, **kwargs)
        most = max_lag_ps - interval_fs / 1000.0
        self.fit_from_ps = checks.number(
            "fit_from_ps",
            0.5 * max_lag_ps if fit_from_ps is None else fit_from_ps,
            at_least=0,
            at_most=most,
            hint="A line needs two lags, of max_lag_ps at most.",
        )

    def _from_correlation(self, curves: Tensor) -> Tensor:
        lags = self.lags_ps.to(curves)
        fitted = lags >= self.fit_from_ps - 1e-9
        centred = lags[fitted] - lags[fitted].mean()
        slopes = (curves[:, fitted] @ centred) / centred.square().sum()
        return slopes[:, None] * (A2_PER_PS / 6.0)

    def axis(self) -> dict[str, Any]:
        elements = "all atoms" if self.symbols is None else ", ".join(self.symbols)
        return {
            "kind": "bars",
            "x": [elements],
            "xlabel": "atoms",
            "ylabel": "diffusion coefficient / 1e-9 m²/s",
        }
