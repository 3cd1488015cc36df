"""A repair on frames of several systems is reported for all of them."""

import json

import ase.io
import torch
from ase.build import molecule
from test_repair import QUICK
from toys import as_potential, tiny_mace

from stable_plugin import System
from stable_plugin.cli import main
from stable_plugin.models.mace.files import save_mace


def labeled(model, name):
    frames = []
    for seed in range(3):
        atoms = molecule(name)
        atoms.rattle(0.03, seed=seed)
        potential = as_potential(model, System.from_atoms(atoms))
        at = torch.tensor(atoms.positions)[None]
        energies, forces = potential.energies_and_forces(at, potential.edges(at))
        atoms.info["REF_energy"] = energies.item() + potential.constant_energy
        atoms.arrays["REF_forces"] = forces[0].numpy()
        frames.append(atoms)
    return frames


def test_repair_reports_all_systems(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_mace([1, 6, 8])
    save_mace(model, tmp_path / "x.model")
    ase.io.write("data.xyz", [*labeled(model, "CH3CH2OH"), *labeled(model, "H2O")])
    assert main(["repair", "x.model", "data.xyz", "-o", "new.model", *QUICK]) == 0
    (folder,) = (tmp_path / "runs" / "repair").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert list(report["systems"]) == ["C2H6O", "H2O"]
    for stage in ("before", "after"):
        assert report["total"][stage]["replicas"] == 4
        assert report["systems"]["H2O"][stage]["replicas"] == 2
        assert (folder / "trajectories" / stage / "H2O").is_dir()
    assert '<a href="systems/H2O/report.html">H2O</a>' in (folder / "report.html").read_text()
    assert (folder / "systems" / "H2O" / "report.html").is_file()
    assert "H2O: Before: " in capsys.readouterr().out
