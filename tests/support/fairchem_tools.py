"""Small fairchem models and native fairchem trainings, through fairchem's own command line."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ase.db
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

FAIRCHEM = shutil.which("fairchem", path=str(Path(sys.executable).parent)) or "fairchem"
MODELS = "fairchem.core.models"
UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
DATASETS = ["omat", "omol"]
PER_DATASET = ("uma", "allscaip")
"""Models whose heads name their outputs by data set."""


def escn(**changes):
    return {
        "model": f"{MODELS}.uma.escn_md.eSCNMDBackbone",
        "sphere_channels": 16,
        "hidden_channels": 16,
        "edge_channels": 16,
        "num_distance_basis": 16,
        "lmax": 1,
        "mmax": 1,
        "num_layers": 2,
        "cutoff": 4.5,
        "max_neighbors": 300,
        "otf_graph": True,
        "always_use_pbc": False,
        "direct_forces": False,
        "regress_forces": True,
        "chg_spin_emb_type": "rand_emb",
        "dataset_mapping": {name: name for name in DATASETS},
        **changes,
    }


def network(kind):
    """Return the configuration of a network: esen, uma (with experts), allscaip, or direct (eSEN with direct forces)."""
    head = {"module": f"{MODELS}.uma.escn_md.MLP_EFS_Head"}
    if kind == "esen":
        backbone, heads = escn(), {"efs": head}
    elif kind == "uma":
        backbone = escn(model=f"{MODELS}.uma.escn_moe.eSCNMDMoeBackbone", num_experts=4, use_composition_embedding=True)
        wrapper = f"{MODELS}.uma.escn_moe.DatasetSpecificMoEWrapper"
        kwargs = {"wrap_property": False}
        mapping = {name: name for name in DATASETS}
        heads = {
            "efs": {
                "module": wrapper, "dataset_mapping": mapping, "head_cls": head["module"], "head_kwargs": kwargs,
            }
        }  # fmt: skip
    elif kind == "allscaip":
        backbone = {
            "model": f"{MODELS}.allscaip.AllScAIP.AllScAIPBackbone",
            "regress_forces": True, "direct_forces": False, "hidden_size": 16, "num_layers": 1, "use_compile": False,
            "use_padding": False, "dataset_list": DATASETS, "max_num_elements": 100, "max_atoms": 100,
            "max_batch_size": 64, "max_radius": 5.0, "knn_k": 20, "atten_name": "math", "atten_num_heads": 2,
            "freequency_list": [4, 3, 1],
        }  # fmt: skip
        heads = {
            "efs": {
                "module": f"{MODELS}.uma.escn_moe.DatasetSpecificSingleHeadWrapper", "dataset_names": DATASETS,
                "head_cls": f"{MODELS}.allscaip.AllScAIP.AllScAIPGradientEnergyForceStressHead",
                "head_kwargs": {"wrap_property": False},
            }
        }  # fmt: skip
    else:
        backbone = escn(direct_forces=True)
        heads = {
            "energy": {"module": f"{MODELS}.uma.escn_md.MLP_Energy_Head"},
            "forces": {"module": f"{MODELS}.uma.escn_md.Linear_Force_Head"},
        }
    # fairchem requires it of every model with experts.
    identity = {"model_id": "UMA-S-1.2.1"} if kind == "uma" else {}
    return {
        "_target_": f"{MODELS}.base.HydraModel",
        "backbone": backbone,
        "heads": heads,
        "pass_through_head_outputs": kind != "direct",
        **identity,
    }


def tasks(kind):
    """Return one energy and one force task for all data sets, or one of each per data set, as UMA has them."""
    if kind not in PER_DATASET:
        return [task(name, name, DATASETS) for name in ("energy", "forces")]
    return [task(f"{dataset}_{name}", name, [dataset]) for dataset in DATASETS for name in ("energy", "forces")]


def task(name, prop, datasets):
    norm = "fairchem.core.modules.normalization"
    loss = {"energy": "PerAtomMAELoss", "forces": "L2NormLoss"}[prop]
    references = {
        "element_references": {
            "_target_": f"{norm}.element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [[-0.5 * z for z in range(101)]]},
        }
    }
    return {
        "_target_": f"{UNIT}.Task",
        "name": name,
        "level": "system" if prop == "energy" else "atom",
        "property": prop,
        "out_spec": {"dim": [1] if prop == "energy" else [3], "dtype": "float32"},
        "normalizer": {"_target_": f"{norm}.normalizer.Normalizer", "mean": 0.0, "rmsd": 1.7},
        "datasets": datasets,
        "loss_fn": {
            "_target_": "fairchem.core.modules.loss.DDPMTLoss",
            "loss_fn": {"_target_": f"fairchem.core.modules.loss.{loss}"},
            "reduction": "mean",
            "coefficient": 2.0,
        },
        "metrics": ["mae"],
        **(references if prop == "energy" else {}),
    }


def write_aselmdb(path, frames, energy_key="REF_energy", forces_key="REF_forces"):
    with ase.db.connect(str(path), type="aselmdb") as database:
        for frame in frames:
            labeled = frame.copy()
            energy, forces = labeled.info.pop(energy_key), labeled.arrays.pop(forces_key)
            labeled.calc = SinglePointCalculator(labeled, energy=energy, forces=forces)
            database.write(labeled, data={"charge": 0, "spin": 1})


def native_config(folder, kind, *, epochs=1, callbacks=(), checkpoint_every=1000, **unit):
    """Return the configuration of a native fairchem training on the aselmdb files in a folder."""
    config = {
        "job": {
            "device_type": "CPU",
            "scheduler": {"mode": "LOCAL", "ranks_per_node": 1, "num_nodes": 1},
            "debug": True,
            "deterministic": True,
            "run_dir": str(folder / "runs"),
            "seed": 0,
        },
        "tasks": tasks(kind),
        "runner": {
            "_target_": "fairchem.core.components.train.train_runner.TrainEvalRunner",
            "train_dataloader": _dataloader(folder, "train", kind, shuffle=True),
            "eval_dataloader": _dataloader(folder, "val", kind, shuffle=False),
            "train_eval_unit": {
                "_target_": f"{UNIT}.MLIPTrainEvalUnit",
                "job_config": "${job}",
                "tasks": "${tasks}",
                "model": network(kind),
                "optimizer_fn": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.004},
                "cosine_lr_scheduler_fn": {
                    "_target_": f"{UNIT}._get_consine_lr_scheduler",
                    "_partial_": True,
                    "warmup_factor": 0.2,
                    "warmup_epochs": 0.01,
                    "lr_min_factor": 0.01,
                    "epochs": epochs,
                },
                "print_every": 100,
                "clip_grad_norm": 100.0,
                **unit,
            },
            "max_epochs": epochs,
            "evaluate_every_n_steps": 1000,
            "callbacks": [
                {
                    "_target_": "fairchem.core.components.callbacks.TrainCheckpointCallback",
                    "checkpoint_every_n_steps": checkpoint_every,
                    "max_saved_checkpoints": 20,
                },
                *callbacks,
            ],
        },
    }
    return config


class SignalAtStep:
    """Sends SIGTERM to its process at the step ``$SIGNAL_AT_STEP``; an entry of ``runner.callbacks``."""

    def __new__(cls):
        from torchtnt.framework.callback import Callback

        class Attached(Callback):
            def on_train_step_start(self, state, unit):
                if unit.train_progress.num_steps_completed == int(os.environ["SIGNAL_AT_STEP"]):
                    os.kill(os.getpid(), signal.SIGTERM)

        return Attached()


class SignalInSystem:
    """Sends SIGTERM in a learning window: at a call of the detector of a system, ``$SIGNAL_IN_SYSTEM=NAME:CALL``, if it is set."""

    def __new__(cls):
        from torchtnt.framework.callback import Callback

        class Attached(Callback):
            def on_train_start(self, state, unit):
                name, at_call = os.environ.get("SIGNAL_IN_SYSTEM", ":0").split(":")
                loop = unit.stable_session.loop.loops.get(name)
                if loop is not None:
                    self.signal_at(loop.replicas.learning_simulator.detector, int(at_call))

            def signal_at(self, detector, at_call):
                measure, calls = detector.measure, []

                def counted(*arguments):
                    calls.append(arguments)
                    if len(calls) == at_call:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return measure(*arguments)

                detector.measure = counted

        return Attached()


def run_fairchem(folder, config, *overrides):
    """Run a configuration, and return its run folder; what it logs is in ``log.txt``."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [FAIRCHEM, "-c", str(path), *overrides], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return max((folder / "runs").iterdir(), key=lambda run: run.stat().st_mtime)


def _dataloader(folder, split, kind, *, shuffle):
    dataset = {
        "splits": {split: {"src": str(folder / f"{split}.aselmdb")}},
        "format": "ase_db",
        "a2g_args": {"r_data_keys": ["charge", "spin"]},
        "transforms": {"common_transform": {"dataset_name": "omol"}},
    }
    if kind in PER_DATASET:
        dataset["key_mapping"] = {"energy": "omol_energy", "forces": "omol_forces"}
    return {
        "_target_": "fairchem.core.components.common.dataloader_builder.get_dataloader",
        "dataset": {
            "_target_": "fairchem.core.datasets.mt_concat_dataset.create_concat_dataset",
            "dataset_configs": {"omol": dataset},
            "combined_dataset_config": {"sampling": {"type": "temperature", "temperature": 1.0}},
        },
        "batch_sampler_fn": {
            "_target_": "fairchem.core.datasets.samplers.max_atom_distributed_sampler.MaxAtomDistributedBatchSampler",
            "_partial_": True,
            "max_atoms": 84,
            "min_atoms": 0,
            "shuffle": shuffle,
            "seed": 0,
        },
        "num_workers": 0,
        "collate_fn": {"_target_": f"{UNIT}.mt_collater_adapter", "tasks": "${tasks}"},
    }
