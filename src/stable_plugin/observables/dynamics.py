"""Velocity autocorrelation, power spectrum, mean square displacement and diffusion coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_plugin.observables.series import TimeCorrelation
from stable_plugin.runtime import checks

LIGHT_CM_PER_FS = 2.99792458e-5
"""Speed of light in cm/fs."""

A2_PER_PS = 10.0
"""One Å²/ps in 1e-9 m²/s."""


class VelocityAutocorrelation(TimeCorrelation):
    r"""Normalized mass-weighted velocity autocorrelation function.

    .. math:: C(\tau) = \frac{\sum_i m_i \langle \mathbf{v}_i(t) \cdot \mathbf{v}_i(t + \tau) \rangle_t}
        {\sum_i m_i \langle |\mathbf{v}_i(t)|^2 \rangle_t}

    Input of ``update``: ``positions`` and ``velocities``, (n_frames, n_replicas, n_atoms, 3) in Å and Å per ASE time.

    Output of ``compute``: (n_lags,), one at lag zero; the lags are the attribute ``lags_ps``, in ps.

    Args:
        interval_fs: Time between two frames in fs, at most about a tenth of the period of the fastest vibration.
        max_lag_ps: Longest lag τ in ps, a multiple of ``interval_fs``.
        symbols: Elements to include; all if None.
        remove_drift: Whether to subtract the velocity of the center of mass.
        kwargs: Passed to :class:`torchmetrics.Metric`.

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
                f"velocities=None, but {type(self).__name__} needs velocities: pass them, or write trajectories with "
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
    r"""Vibrational density of states: Fourier transform of the velocity autocorrelation, normalized to unit area.

    .. math:: S(\tilde\nu) \propto \int_0^{\tau_\mathrm{max}} w(\tau) C(\tau) \cos(2 \pi c \tilde\nu \tau) \, d\tau

    The Hann window w takes the correlation to zero at the longest lag; peaks are about 1/``max_lag_ps`` wide.

    Input of ``update``: ``positions`` and ``velocities``, (n_frames, n_replicas, n_atoms, 3) in Å and Å per ASE time.

    Output of ``compute``: (n_lags,) in cm; the wavenumbers are the attribute ``wavenumbers``, in 1/cm.

    Args:
        interval_fs: Time between two frames in fs, at most half the period of the fastest vibration, to avoid aliasing.
        max_lag_ps: Longest lag τ in ps, a multiple of ``interval_fs``.
        symbols: Elements to include; all if None.
        remove_drift: Whether to subtract the velocity of the center of mass.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import PowerSpectrum, System
        >>> time = torch.arange(2000) * 1.0
        >>> velocities = torch.zeros(2000, 1, 2, 3)
        >>> velocities[:, 0, 0, 0] = torch.cos(time * 2 * torch.pi / 40)  # a period of 40 fs is 834 per cm
        >>> velocities[:, 0, 1] = -velocities[:, 0, 0]
        >>> spectrum = PowerSpectrum(interval_fs=1.0, max_lag_ps=1.0)
        >>> spectrum.bind(System.from_atoms(molecule("N2")))
        >>> spectrum.update(torch.zeros_like(velocities), velocities)
        >>> round(spectrum.wavenumbers[spectrum.compute().argmax()].item())
        834
    """

    @property
    def wavenumbers(self) -> Tensor:
        """Wavenumbers of the spectrum, (n_lags,) in 1/cm."""
        step = 1.0 / (2.0 * (self.n_lags - 1) * self.interval_fs * LIGHT_CM_PER_FS)
        return torch.arange(self.n_lags, dtype=torch.float64) * step

    def _from_correlation(self, curves: Tensor) -> Tensor:
        window = torch.cos(0.5 * torch.pi * torch.arange(self.n_lags).to(curves) / self.n_lags).square()
        # hfft, because the correlation is real and even in the lag: its half determines a real spectrum.
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
    r"""Mean square displacement of the atoms, in Å².

    .. math:: \mathrm{MSD}(\tau) = \left\langle |\mathbf{r}_i(t + \tau) - \mathbf{r}_i(t)|^2 \right\rangle_{i, t}

    Input of ``update``: ``positions``, (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped.

    Output of ``compute``: (n_lags,) in Å²; the lags are the attribute ``lags_ps``, in ps.

    Args:
        interval_fs: Time between two frames in fs.
        max_lag_ps: Longest lag τ in ps, a multiple of ``interval_fs``.
        symbols: Elements to include; all if None.
        remove_drift: Whether to subtract the displacement of the center of mass.
        kwargs: Passed to :class:`torchmetrics.Metric`.

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
    r"""Self-diffusion coefficient in 1e-9 m²/s, from the Einstein relation.

    .. math:: D = \frac{1}{6} \frac{d}{d\tau} \mathrm{MSD}(\tau)

    The slope is that of a least-squares line. There is no correction for the finite size of the cell.

    Input of ``update``: ``positions``, (n_frames, n_replicas, n_atoms, 3) in Å, unwrapped.

    Output of ``compute``: (1,) in 1e-9 m²/s.

    Args:
        interval_fs: Time between two frames in fs.
        max_lag_ps: Longest lag τ of the fit in ps, a multiple of ``interval_fs``.
        symbols: Elements to include; all if None.
        remove_drift: Whether to subtract the displacement of the center of mass.
        fit_from_ps: Shortest lag of the fit in ps, beyond the ballistic regime; half of ``max_lag_ps`` if None.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of range, or the fit has less than two lags.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from stable_plugin import DiffusionCoefficient, System
        >>> steps = torch.randn(20000, 1, 2, 3, generator=torch.Generator().manual_seed(0))
        >>> positions = (0.6 * 0.01) ** 0.5 * steps.cumsum(dim=0)  # a random walk with D = 0.3 Å²/ps
        >>> diffusion = DiffusionCoefficient(interval_fs=10.0, max_lag_ps=0.1, remove_drift=False)
        >>> diffusion.bind(System.from_atoms(molecule("N2")))
        >>> diffusion.update(positions)
        >>> round(diffusion.compute().item(), 1)
        3.0
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
        self.fit_from_ps = checks.number(
            "fit_from_ps",
            0.5 * max_lag_ps if fit_from_ps is None else fit_from_ps,
            at_least=0,
            at_most=max_lag_ps - interval_fs / 1000.0,
            hint="The fit needs at least two lags up to max_lag_ps.",
        )

    def _from_correlation(self, curves: Tensor) -> Tensor:
        lags = self.lags_ps.to(curves)
        fitted = lags >= self.fit_from_ps - 1e-9
        centered = lags[fitted] - lags[fitted].mean()
        slopes = (curves[:, fitted] @ centered) / centered.square().sum()
        return slopes[:, None] * (A2_PER_PS / 6.0)

    def axis(self) -> dict[str, Any]:
        elements = "all atoms" if self.symbols is None else ", ".join(self.symbols)
        return {
            "kind": "bars",
            "x": [elements],
            "xlabel": "atoms",
            "ylabel": "diffusion coefficient / 1e-9 m²/s",
        }
