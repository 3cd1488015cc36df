"""Evaluation without arguments, for every kind of system, and errors on frames of several compositions."""

import json

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from observable_tools import water_grid
from torch import nn
from toys import as_potential, tiny_mace

from stable_plugin import Langevin, System, cli
from stable_plugin.evaluation import Evaluation, Evaluator, evaluate
from stable_plugin.evaluation.label_errors import mean_absolute_errors
from stable_plugin.md.labels import ENERGY_KEY, FORCES_KEY
from stable_plugin.md.neighbors import edges_within
from stable_plugin.models import Potential, find_potential
from stable_plugin.models.mace.files import save_mace


class Tethers(nn.Module):
    """Holds every atom near its place, in any system."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(20.0, dtype=torch.float64))

    def stable_potential(self, system):
        return _Tethered(self, system)


class _Tethered(Potential):
    @property
    def cutoff(self):
        return 1.0

    def edges(self, positions, cell=None):
        return edges_within(positions, self.cutoff, self.system, cell)

    def atomic_energies(self, positions, edges):
        if not hasattr(self, "places"):
            self.places = positions.detach()[:1].clone()
        # Oscillators of one frequency would all be at rest at the same time.
        k = self.module.k * torch.linspace(1.0, 5.0, positions.shape[1], dtype=positions.dtype)
        return 0.5 * k * (positions - self.places).square().sum(-1)


def slab():
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0)
    add_adsorbate(atoms, molecule("H2O"), 2.6, (0.0, 0.0))
    return atoms


def argon():
    return bulk("Ar", "fcc", 5.3, cubic=True) * (2, 2, 2)


SYSTEMS = {
    "diatomic": lambda: molecule("N2"),
    "molecule": lambda: molecule("CH3CH2OH"),
    "argon": argon,
    "copper": lambda: bulk("Cu", "fcc", 3.6, cubic=True) * (2, 2, 2),
    "slab with a molecule": slab,
    "water": water_grid,
}


def frames_of(name, n_frames=3):
    frames = []
    for seed in range(n_frames):
        atoms = SYSTEMS[name]()
        atoms.rattle(0.01, seed=seed)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_evaluator_without_arguments(name):
    evaluator = Evaluator(
        frames_of(name)[:1] * 2, n_replicas=2, horizons_ps=[0.1], integrator=Langevin(20.0, 0.5, 10.0)
    )
    evaluation = evaluator.evaluate(Tethers())
    summary = evaluation.summaries[0]
    assert summary["unstable"] == 0
    assert evaluator.others == {}
    assert summary["observables"]
    for value in summary["observables"].values():
        assert value is None or np.isfinite(value)


def test_evaluator_of_several_compositions_has_one_for_each(caplog):
    caplog.set_level("INFO", "stable_plugin")
    starts = [*frames_of("molecule"), *frames_of("diatomic", 2), molecule("CH4")]
    evaluator = Evaluator(starts, n_replicas=2, horizons_ps=[0.05])
    assert (evaluator.name, list(evaluator.others)) == ("C2H6O", ["N2"])
    assert "starts have 3 systems; simulated: C2H6O, N2" in caplog.text
    assert "CH4 is not evaluated: 1 reference frame, two are needed: pass more in reference=" in caplog.text
    assert evaluator.failed == list(evaluator.not_evaluated) == ["CH4"]
    assert evaluator.others["N2"].system.n_atoms == 2
    with pytest.raises(
        ValueError, match=r"starts have 2 compositions \(.*\), none with two reference frames: pass reference="
    ):
        Evaluator([molecule("CH4"), molecule("N2")])


def test_evaluator_matches_references_by_atoms():
    """The same formula in another order of the atoms is another system, however its frames are counted."""
    ethanol, ether = frames_of("molecule", 3), []
    for seed in range(2):
        atoms = molecule("CH3OCH3")
        atoms.rattle(0.01, seed=seed)
        ether.append(atoms)
    evaluator = Evaluator([*ethanol, *ether], [*ether, *ether, *ethanol], n_replicas=2, horizons_ps=[0.05])
    assert evaluator.system.symbols == tuple(ethanol[0].get_chemical_symbols())
    assert evaluator.others["C2H6O_2"].system.symbols == tuple(ether[0].get_chemical_symbols())
    assert Evaluator(ether, [*ethanol, *ether], n_replicas=2, horizons_ps=[0.05]).system.n_atoms == 9
    with pytest.raises(ValueError, match=r"bonds= and dynamics= belong to one system, but starts have several"):
        Evaluator([*ethanol, *ether], bonds=[(0, 1)])


def labeled(shifts, n_each=2):
    model, frames = tiny_mace([1, 6, 8]), []
    for name in ("CH3CH2OH", "H2O", "CH4"):
        for seed in range(n_each):
            atoms = molecule(name)
            atoms.rattle(0.05, seed=seed)
            potential = as_potential(model, System.from_atoms(atoms))
            at = torch.tensor(atoms.positions)[None]
            energies, forces = potential.energies_and_forces(at, potential.edges(at))
            shift = sum(shifts[int(number)] for number in atoms.numbers)
            atoms.info[ENERGY_KEY] = energies.item() + potential.constant_energy + shift
            atoms.arrays[FORCES_KEY] = forces[0].numpy() + 0.01
            frames.append(atoms)
    return model, frames


def test_errors_are_those_of_all_compositions():
    model, frames = labeled({1: 0.001, 6: 0.001, 8: 0.001})
    errors = mean_absolute_errors(model, frames)
    assert errors == {
        "force_mae_mev_per_A": pytest.approx(10.0),
        "energy_mae_mev_per_atom": pytest.approx(1.0, rel=1e-5),
        "force_mae_by_element_mev_per_A": pytest.approx({"C": 10.0, "H": 10.0, "O": 10.0}),
    }


def test_errors_of_another_code_have_a_fitted_zero():
    shifts = {1: -13.6, 6: -1030.0, 8: -2041.0}
    model, frames = labeled(shifts)
    frames[0].info[ENERGY_KEY] += 0.09
    frames[1].info[ENERGY_KEY] -= 0.09
    errors = mean_absolute_errors(model, frames)
    means = [abs(np.mean([shifts[int(number)] for number in frame.numbers])) for frame in frames]
    assert errors["energy_mae_mev_per_atom"] == pytest.approx(1000.0 * np.mean(means), rel=1e-4)
    # Two of six frames are off by 90 meV in nine atoms.
    assert errors["energy_mae_fitted_zero_mev_per_atom"] == pytest.approx(10.0 * 2 / 6, rel=1e-3)


def test_errors_of_frames_with_different_charges():
    _, frames = labeled({1: 0.0, 6: 0.0, 8: 0.0})
    frames[0].info["charge"], frames[1].info["charge"] = 0, 1
    model, _ = labeled({1: 0.0, 6: 0.0, 8: 0.0})
    assert mean_absolute_errors(model, frames)["force_mae_mev_per_A"] == pytest.approx(10.0)


def test_errors_by_head():
    heads = {"heads": ["a", "Default"], "atomic_inter_scale": [1.0, 2.0], "atomic_inter_shift": [0.0, 0.0]}
    model = tiny_mace([1, 8], atomic_energies=np.zeros((2, 2)), **heads)
    frames = []
    for head in ("a", "Default"):
        atoms = molecule("H2O")
        atoms.info["head"] = head
        potential = as_potential(model, System.from_atoms(atoms))
        at = torch.tensor(atoms.positions)[None]
        energies, forces = potential.energies_and_forces(at, potential.edges(at))
        atoms.info[ENERGY_KEY] = energies.item() + potential.constant_energy + (0.0 if head == "a" else 0.006)
        atoms.arrays[FORCES_KEY] = forces[0].numpy() + (0.02 if head == "a" else 0.0)
        frames.append(atoms)
    errors = mean_absolute_errors(model, frames)
    assert errors["force_mae_by_head_mev_per_A"] == pytest.approx({"a": 20.0, "Default": 0.0}, abs=1e-6)
    assert errors["energy_mae_by_head_mev_per_atom"] == pytest.approx({"a": 0.0, "Default": 2.0}, abs=1e-6)


def test_command_evaluates_several_compositions(tmp_path, capsys):
    model, frames = labeled({1: 0.0, 6: 0.0, 8: 0.0})
    save_mace(model, tmp_path / "x.model")
    for frame in frames:
        del frame.info[ENERGY_KEY], frame.arrays[FORCES_KEY]
    ase.io.write(tmp_path / "starts.extxyz", [*frames, Atoms("H")])
    out = tmp_path / "out"
    code = cli.main([
        "evaluate", str(tmp_path / "x.model"), str(tmp_path / "starts.extxyz"), "--replicas", "2", "--ps", "0.05", "--out",
        str(out), "--temperature-K", "20",
    ])  # fmt: skip
    assert not code
    pages = sorted(path.relative_to(out).as_posix() for path in out.rglob("report.html"))
    assert len(pages) == 3
    assert "report.html" in pages
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["replicas"] == 2
    assert sorted(each["page"] for each in report["systems"].values()) == pages
    assert report["total"]["evaluation"]["replicas"] == 6
    assert report["not_evaluated"] == {"H": "isolated atom, which feels no force"}
    assert report["failed_systems"] == []
    page = (out / "report.html").read_text()
    for name, each in report["systems"].items():
        if each["page"] != "report.html":
            assert f'<a href="{each["page"]}">{name}</a>' in page
            assert '<a href="../../report.html">all systems</a>' in (out / each["page"]).read_text()


def test_a_cell_of_one_atom_does_not_end_the_evaluation_of_others(tmp_path, capsys):
    model, frames = labeled({1: 0.0, 6: 0.0, 8: 0.0})
    save_mace(model, tmp_path / "x.model")
    cell = Atoms("H", cell=[3.0] * 3, pbc=True)
    ase.io.write(tmp_path / "starts.extxyz", [*frames[:2], cell, cell])
    out = tmp_path / "out"
    code = cli.main([
        "evaluate", str(tmp_path / "x.model"), str(tmp_path / "starts.extxyz"), "--replicas", "2", "--ps", "0.05", "--out",
        str(out), "--temperature-K", "20",
    ])  # fmt: skip
    assert code == cli.SYSTEMS_FAILED
    reason = "one atom per cell, on which no force acts: repeat the cell, atoms.repeat((3, 3, 3))"
    assert json.loads((out / "report.json").read_text())["not_evaluated"] == {"H": reason}
    assert f"H was not evaluated: {reason}" in (out / "report.html").read_text()
    assert f"Warning: H was not evaluated: {reason}" in capsys.readouterr().out


class TethersOfSome(Tethers):
    """Is not defined for nitrogen."""

    def stable_potential(self, system):
        if 7 in system.numbers:
            raise ValueError("the model does not know nitrogen")
        return super().stable_potential(system)


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_system_that_the_potential_does_not_know_is_named_and_the_others_evaluated(order, caplog, tmp_path):
    nitrogen = frames_of("diatomic", 4 if order == "first" else 2)
    evaluator = Evaluator([*frames_of("molecule"), *nitrogen], n_replicas=2, horizons_ps=[0.05])
    assert evaluator.name == ("N2" if order == "first" else "C2H6O")
    evaluation = evaluator.evaluate(TethersOfSome(), tmp_path)
    assert list(evaluation.systems) == ["C2H6O"] == [evaluation.name]
    assert evaluation.not_evaluated == {"N2": "the model does not know nitrogen"}
    assert evaluation.failed == ["N2"]
    assert "N2 is not evaluated, the other systems are: the model does not know nitrogen" in caplog.text
    with pytest.raises(ValueError, match="the model does not know nitrogen"):
        Evaluator(nitrogen, n_replicas=2, horizons_ps=[0.05]).evaluate(TethersOfSome())


def test_evaluate_returns_all_systems():
    starts = [*frames_of("molecule"), *frames_of("diatomic", 2)]
    settings = {"n_replicas": 2, "horizons_ps": [0.05]}
    evaluation = evaluate(Tethers(), starts, **settings)
    assert list(evaluation.systems) == ["C2H6O", "N2"]
    alone = evaluate(Tethers(), starts[3:], **settings)
    assert evaluation.others["N2"].summaries[0]["observables"] == alone.summaries[0]["observables"]
    assert (
        Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))).systems.keys() == evaluation.systems.keys()
    )
    limited = Evaluator(starts, max_systems=1, **settings)
    assert limited.not_evaluated == {"N2": "beyond the first 1 systems: raise max_systems"}
    assert limited.failed == []


def test_evaluator_simulates_with_an_ase_calculator():
    frames = []
    for seed in range(2):
        atoms = bulk("Cu", "fcc", 3.6, cubic=True) * (2, 2, 2)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        atoms.info[ENERGY_KEY], atoms.arrays[FORCES_KEY] = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        frames.append(atoms)
    evaluator = Evaluator(frames, labeled=frames, n_replicas=2, horizons_ps=[0.1], integrator=Langevin(300.0, 2.0, 5.0),
                          check_every_fs=10.0)  # fmt: skip
    summary = evaluator.evaluate(EMT()).summaries[0]
    assert summary["unstable"] == 0
    assert summary["force_mae_mev_per_A"] < 1e-6
    assert summary["energy_mae_mev_per_atom"] < 1e-6
    potential = find_potential(EMT(), evaluator.system)
    positions = evaluator.starts
    with pytest.raises(TypeError, match="EMT is an ASE calculator, which has no weights to train: evaluate it"):
        potential.atomic_energies(positions, potential.edges(positions))


def test_calculators_see_the_cell_of_each_frame():
    frames = [bulk("Cu", cubic=True), bulk("Cu", cubic=True)]
    frames[1].set_cell(frames[1].cell.array * [[1.05], [0.98], [1.0]], scale_atoms=True)
    for frame in frames:
        frame.rattle(0.1, seed=1)
    potential = find_potential(EMT(), System.from_atoms(frames[0], bonds=[]))
    positions = torch.tensor(np.stack([frame.positions for frame in frames]))
    edges = potential.edges(positions, torch.tensor(np.stack([frame.cell.array for frame in frames])))
    energies, forces = potential.energies_and_forces(positions, edges)
    for frame, energy, own in zip(frames, energies, forces, strict=True):
        frame.calc = EMT()
        assert energy.item() == pytest.approx(frame.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(own.numpy(), frame.get_forces(), atol=1e-9)
