"""FineTuningModule: any torch module on labeled frames, of several systems in a batch."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from pytorch_lightning import Trainer
from torch import nn
from toys import TRIATOMIC, PairRepulsion, Springs, tiny_mace

from stable_plugin import BondDeviation, ExtxyzDataModule, Langevin, Schedule, StABlECallback
from stable_plugin.models import FineTuningModule, ModulePotential, load_potential

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def labeled(atoms, energy, forces):
    """Return a copy with labels."""
    frame = atoms.copy()
    frame.info["REF_energy"], frame.arrays["REF_forces"] = float(energy), np.array(forces)
    return frame


def stretched(n=6, stiffness=12.0, seed=0):
    """Return water-like frames labeled by springs of this stiffness."""
    random, frames = np.random.default_rng(seed), []
    for _ in range(n):
        atoms = TRIATOMIC.copy()
        atoms.positions += random.normal(scale=0.05, size=(3, 3))
        vectors = atoms.positions[1:] - atoms.positions[0]
        lengths = np.linalg.norm(vectors, axis=1)
        pulls = stiffness * ((lengths - 1.0) / lengths)[:, None] * vectors
        energy = 0.5 * stiffness * ((lengths - 1.0) ** 2).sum()
        frames.append(labeled(atoms, energy, [pulls.sum(axis=0), *-pulls]))
    return frames


def springs(stiffness=5.0):
    return Springs([(0, 1), (0, 2)], stiffness, torch.ones(2))


def repulsion(module, system):
    """Return soft spheres with the strength of a module."""
    potential = PairRepulsion(system)
    potential.module = module
    return potential


class Strength(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))


def pair_energy(atoms, strength=1.0, cutoff=2.5):
    """Return the energy and the forces of soft spheres by arithmetic, with the images of a periodic cell."""
    energy, forces, n = 0.0, np.zeros((len(atoms), 3)), len(atoms)
    images = [np.array(each) for each in np.ndindex(5, 5, 5)] if atoms.pbc.any() else [np.array([2, 2, 2])]
    for i in range(n):
        for j in range(n):
            for image in images:
                vector = atoms.positions[j] - atoms.positions[i] + (image - 2) @ atoms.cell.array
                length = np.linalg.norm(vector)
                if 0 < length < cutoff:
                    energy += strength * (1 - length / cutoff) ** 2
                    forces[i] -= 4 * strength * (1 - length / cutoff) / cutoff * vector / length
    return energy, forces


def mixed_frames(strength=1.0):
    """Return frames of different compositions, cells and charges, one of them a cell of one atom."""
    random = np.random.default_rng(1)
    crystal = Atoms("Ar4", np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 1.6, cell=[3.2] * 3, pbc=True)
    strained = crystal.copy()
    strained.set_cell([3.3, 3.1, 3.2], scale_atoms=True)
    ion, primitive = TRIATOMIC.copy(), Atoms("Ar", cell=2.2 * np.eye(3), pbc=True)
    ion.info["charge"] = 1
    frames = []
    for atoms in (crystal, TRIATOMIC, strained, ion, Atoms("He2", [[0, 0, 0], [0, 0, 1.5]]), primitive):
        atoms = atoms.copy()
        if len(atoms) > 1:
            atoms.positions += random.normal(scale=0.05, size=(len(atoms), 3))
        frames.append(labeled(atoms, *pair_energy(atoms, strength)))
    return frames


def test_loss_of_mixed_batches_is_that_of_the_formula():
    frames = mixed_frames(1.0)
    module = FineTuningModule(Strength(0.4), potential=repulsion, energy_weight=2.0, forces_weight=3.0)
    (batch,) = module.dataloader(frames, len(frames), shuffle=False)
    # Energies and forces are proportional to the strength.
    energies = [0.6 * frame.info["REF_energy"] / len(frame) for frame in frames]
    forces = np.concatenate([0.6 * frame.arrays["REF_forces"].ravel() for frame in frames])
    forces = np.concatenate([forces, np.zeros(3)])  # the cell of one atom is doubled
    expected = 2.0 * np.mean(np.square(energies)) + 3.0 * np.mean(forces**2)
    loss = module.training_loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert module.model.strength.grad.item() == pytest.approx(-2.0 * expected / 0.6, rel=1e-6)


def copper(n=6):
    """Return crystals with energies, forces and stresses of effective medium theory, the first one without a stress."""
    frames = []
    for seed in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell * (1 + 0.01 * (seed - 2)), scale_atoms=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        frame = labeled(atoms, atoms.get_potential_energy(), atoms.get_forces())
        frame.calc = None
        if seed:
            frame.info["REF_stress"] = atoms.get_stress()
        frames.append(frame)
    return frames


def test_loss_with_stresses_equals_that_of_mace():
    """Of frames with a stress; MACE counts one without as a zero."""
    from stable_plugin.models.mace import MACEModule

    frames = ExtxyzDataModule(copper()).train_frames[1:]
    model = tiny_mace([29])
    weights = {"energy_weight": 1e-6, "forces_weight": 30.0, "stress_weight": 5e4}
    ours, own = FineTuningModule(model, **weights), MACEModule(model, **weights)
    expected = own.training_loss(next(iter(own.dataloader(frames, len(frames), shuffle=False))))
    assert ours.training_loss(frames).item() == pytest.approx(expected.item(), rel=1e-9)
    without = FineTuningModule(model, **{**weights, "stress_weight": 0.0}).training_loss(frames)
    assert expected.item() > 1.001 * without.item()


def test_frames_without_a_stress_do_not_count_in_it():
    frames = ExtxyzDataModule(copper()).train_frames
    module = FineTuningModule(tiny_mace([29]), stress_weight=1.0)
    _, _, errors = module._errors(frames, create_graph=False)
    assert errors.shape == (5 * 9,)
    assert torch.equal(errors, module._errors(frames[1:], create_graph=False)[2])


@pytest.mark.parametrize("kind", ["any family", "MACE"])
def test_stresses_are_learned(kind, caplog):
    from stable_plugin.models.mace import MACEModule

    data = ExtxyzDataModule(copper(), copper(), batch_size=3)
    make = FineTuningModule if kind == "any family" else MACEModule

    def trained(stress_weight):
        module = make(tiny_mace([29]), lr=0.01, stress_weight=stress_weight)
        Trainer(max_epochs=15, **QUIET).fit(module, data)
        return module.model

    def stress_mae(model):
        (found,) = Trainer(**QUIET).validate(make(model, stress_weight=1.0), data, verbose=False)
        return found["valid/stress_mae"]

    without = trained(0.0)
    assert "the stresses in the training frames are not used: set stress_weight" in caplog.text
    assert stress_mae(trained(1e5)) < 0.5 * stress_mae(without)


def test_fit_finds_the_parameters_of_the_labels():
    module = FineTuningModule(springs(5.0), potential=ModulePotential, lr=0.2)
    frames = stretched(stiffness=12.0)
    trainer = Trainer(max_epochs=40, **QUIET)
    trainer.fit(module, ExtxyzDataModule(frames, stretched(3, seed=1), batch_size=3))
    assert module.model.stiffness == pytest.approx(12.0, rel=0.02)
    metrics = trainer.validate(module, ExtxyzDataModule(frames, stretched(3, 6.0, seed=1)), verbose=False)[0]
    others = stretched(3, module.model.stiffness, seed=1)
    errors = [
        a.arrays["REF_forces"] - b.arrays["REF_forces"] for a, b in zip(others, stretched(3, 6.0, seed=1), strict=True)
    ]
    assert metrics["valid/forces_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)


def test_validation_before_fit_leaves_metrics_usable():
    module, frames = FineTuningModule(springs(12.0), potential=ModulePotential), stretched(4)
    trainer, data = Trainer(max_epochs=1, **QUIET), ExtxyzDataModule(frames, frames, batch_size=2)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert metrics["valid/forces_mae"] < 0.01


def test_stable_training_repairs_a_fine_tuned_module(tmp_path):
    frames = stretched(8, stiffness=12.0)
    module = FineTuningModule(springs(1.0), potential=ModulePotential, lr=0.05)
    callback = StABlECallback(
        reference=frames,
        integrator=Langevin(300.0, 0.5, 20.0),
        detector=BondDeviation(0.15, 2.0),
        n_replicas=8,
        window_ps=0.05,
        record_every_fs=5.0,
        schedule=Schedule(max_failures_per_ns=1000.0, max_windows=1),
        steps_per_window=2,
    )
    Trainer(max_epochs=-1, callbacks=[callback], default_root_dir=tmp_path, **QUIET).fit(
        module, ExtxyzDataModule(frames, batch_size=4)
    )
    assert [window.phase for window in callback.windows] == ["probe", "learn", "probe"]
    assert module.model.stiffness > 1.0


def test_weights_of_a_plain_module_are_its_file(tmp_path):
    module = FineTuningModule(springs(7.0), potential=ModulePotential)
    assert module.potential_suffix == ".pt"
    module.save_potential(tmp_path / "springs.pt")
    other = FineTuningModule(springs(5.0), potential=ModulePotential)
    other.load_potential(tmp_path / "springs.pt")
    assert other.model.stiffness == pytest.approx(7.0)


def test_energies_that_a_model_cannot_shift_are_an_error():
    frames = [labeled(frame, frame.info["REF_energy"] - 1000.0, frame.arrays["REF_forces"]) for frame in stretched(8)]
    with pytest.raises(
        ValueError, match=r"Springs keeps no such energies: subtract them from the labels, or pass E0s="
    ):
        FineTuningModule(springs(12.0), potential=ModulePotential).prepare(frames)
    FineTuningModule(springs(12.0), potential=ModulePotential, E0s="model").prepare(frames)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr=0"),
        ({"E0s": "none"}, ValueError, "E0s='none'"),
        ({"family": "mace"}, ValueError, "family='mace': for a file, but a model was passed"),
        ({"arguments": {"modal": "PBE"}}, ValueError, "modal='PBE': for a file"),
        ({"model": 3}, TypeError, "model=3 is not a torch module"),
        ({"model": nn.Identity()}, ValueError, "Identity has no weights that require a gradient"),
        ({"model": "unheard-of"}, FileNotFoundError, "unheard-of"),
    ],
)
def test_fine_tuning_module_names_invalid_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        FineTuningModule(**{"model": springs(), "potential": ModulePotential, **changes})


def mace_frames(model, shift=0.0, n=4):
    """Return molecules with the labels of a MACE model, moved by a constant per atom of hydrogen."""
    random, frames = np.random.default_rng(2), []
    module = FineTuningModule(model)
    for _ in range(n):
        atoms = Atoms("OH2", TRIATOMIC.positions + random.normal(scale=0.05, size=(3, 3)))
        frames.append(labeled(atoms, 0.0, np.zeros((3, 3))))
        frames[-1].info["REF_energy"] = module.total_energies(frames[-1:])[0] + 2 * shift
    return frames


def test_module_of_a_family_has_its_loss_file_and_isolated_atoms(tmp_path):
    pytest.importorskip("mace")
    from stable_plugin.models.mace import MACEModule

    model = tiny_mace([1, 8])
    frames = mace_frames(model)
    own, general = MACEModule(model, E0s="model"), FineTuningModule(model, E0s={1: -3.0, 8: -70.0})
    losses = [
        module.training_loss(next(iter(module.dataloader(frames, 4, shuffle=False)))).item()
        for module in (own, general)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    general.prepare(frames)
    assert general.isolated_atoms() == pytest.approx({1: -3.0, 8: -70.0})
    assert own.isolated_atoms() == pytest.approx({1: -3.0, 8: -70.0})
    assert general.potential_suffix == ".model"
    general.save_potential(tmp_path / "tuned.model")
    again = FineTuningModule(load_potential(tmp_path / "tuned.model"))
    assert again.total_energies(frames) == pytest.approx(general.total_energies(frames), abs=1e-9)


def test_energies_of_another_code_move_the_isolated_atoms(caplog):
    pytest.importorskip("mace")
    model = tiny_mace([1, 8])
    frames = mace_frames(model, shift=-5.0, n=8)
    module = FineTuningModule(model)
    module.prepare(frames)
    assert module.total_energies(frames) == pytest.approx([frame.info["REF_energy"] for frame in frames], abs=1e-6)
    assert "as those of two codes do" in caplog.text


def test_only_the_named_parameters_are_trained_and_the_file_is_not_frozen(tmp_path):
    pytest.importorskip("mace")
    from stable_plugin.models.mace import MACEModule

    model = tiny_mace([1, 8])
    frames = mace_frames(model)
    for frame in frames:
        frame.arrays["REF_forces"][:] = 0.1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = MACEModule(model, E0s="model", lr=0.05, trainable="readouts.*")
    Trainer(max_epochs=2, **QUIET).fit(module, ExtxyzDataModule(frames, batch_size=2))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(name.startswith("readouts.") for name in moved)
    module.save_potential(tmp_path / "tuned.model")
    written = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert all(parameter.requires_grad for parameter in written.parameters())
    assert not all(parameter.requires_grad for parameter in module.model.parameters()), "training can go on"


def test_names_of_no_parameter_are_an_error():
    module = FineTuningModule(springs(), potential=ModulePotential, trainable=["log_k", "readout*"])
    with pytest.raises(ValueError, match=r"trainable='readout\*' matches no parameter of Springs: .* log_k"):
        module.prepare(stretched())
