"""The ``stable-plugin`` command: train a recipe, repair, check or evaluate a potential, copy the shipped recipes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stable_plugin.runtime.console import quiet_stdout, set_up_logging

DESCRIPTION = "StABlE training: repair neural network potentials that fail in molecular dynamics."

TRAIN = """\
Run a recipe: train a potential, measure how often it fails in molecular dynamics, repair it with
StABlE training, measure again, and write a report. The run folder is <job.run_dir>/<date and time>.

An interrupted run prints the command that resumes it."""

TRAIN_EXAMPLES = """\
examples:
  stable-plugin recipes aspirin_mace
  stable-plugin train recipes/aspirin_mace.yaml
  stable-plugin train recipes/aspirin_mace.yaml runner.control=true job.device_type=CUDA
  stable-plugin train runs/aspirin_mace/<run folder>      resume an interrupted run"""

REPAIR = """\
Repair a potential: train it with StABlE on its labeled frames until it is stable in molecular
dynamics, measure failures and errors before and after, and write a file of the same kind and a
report. A model file is a pickle, which can run code: load files you trust."""

REPAIR_EXAMPLES = """\
examples:
  stable-plugin repair mace.model train.xyz -o repaired.model --temperature-K 500
  stable-plugin repair mace.model train.xyz -o repaired.model --valid valid.xyz --reference md.xyz
  stable-plugin repair mace.model md.xyz -o repaired.model --unlabeled
  stable-plugin repair mace.model train.xyz -o repaired.model runner.stable.n_replicas=64
  stable-plugin repair esen.pt train.xyz -o repaired.pt +runner.model.task_name=omol"""

EVALUATE = """\
Simulate replicas with a potential, count how many fail, compare observables with a reference, and
write a report, for each of the systems in the start frames. A model file is a pickle, which can
run code: load files you trust. Exit code 3: some of several systems could not be evaluated; the
report names them and the reason."""

EVALUATE_EXAMPLES = """\
examples:
  stable-plugin evaluate after.model heldout.extxyz --reference reference.extxyz --temperature-K 500
  stable-plugin evaluate off-small start.xyz --ps 1 10
  stable-plugin evaluate uma-s-1p1 start.xyz --task-name omol --device cuda"""

SYSTEMS_FAILED = 3
"""Exit code of an evaluation in which some of several systems could not be evaluated."""

CHECK = """\
Look for faults of a potential in seconds, without simulating at temperature: holes around reference
frames (bonds, angles and contacts beyond their thermal range whose energy is too low), energies of
two atoms of each pair of elements, symmetries, smoothness at the cutoff, and conservation of energy.
A model file is a pickle, which can run code: load files you trust."""

CHECK_EXAMPLES = """\
examples:
  stable-plugin check mace.model train.xyz --temperature-K 500
  stable-plugin check off-small frames.xyz --json findings.json"""

RECIPES = """\
List the recipes that come with the package, or copy one and its data into ./recipes. Existing files
are not overwritten."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``stable-plugin`` command.

    Args:
        arguments: Command-line arguments; those of the process if not given.

    Returns:
        Exit code.
    """
    options = _parse(arguments)
    set_up_logging(debug=options.debug)
    from stable_plugin.algorithm.replica_pool import UnusablePotentialError
    from stable_plugin.integrations.session import NonFiniteGradientError

    expected = (ValueError, TypeError, OSError, ImportError, UnusablePotentialError, NonFiniteGradientError)
    try:
        code: int | None = options.run(options)
    except expected as error:
        if options.debug:
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        print(f"stable-plugin: {error}{notes}\n(--debug shows where the error was raised.)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes values only up to the first option, unless they follow it in a newer Python.
    if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
        return parser.parse_args(arguments)
    options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stable-plugin", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"stable-plugin {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_repair(commands)
    _add_check(commands)
    _add_evaluate(commands)
    _add_recipes(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, description: str, examples: str = "") -> Any:
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks, and the warnings of other packages")
    return command


def _add_train(commands: Any) -> None:
    command = _add_command(commands, "train", "run a recipe", TRAIN, TRAIN_EXAMPLES)
    command.add_argument("recipe", metavar="RECIPE", help="YAML file, or the folder of an interrupted run")
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replace a value of the recipe; +KEY=VALUE adds"
    )
    command.set_defaults(run=_train)


def _add_repair(commands: Any) -> None:
    command = _add_command(commands, "repair", "repair a potential, from file to file", REPAIR, REPAIR_EXAMPLES)
    command.add_argument("model", metavar="MODEL", help="MACE .model file or fairchem checkpoint")
    command.add_argument("data", metavar="DATA", help="frames with energies and forces, to keep in training")
    command.add_argument(
        "--unlabeled",
        action="store_true",
        help="DATA has no energies and forces: keep those that the potential itself has on its frames",
    )
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replace a value of the recipe; +KEY=VALUE adds"
    )
    command.add_argument("-o", "--output", metavar="NEW", required=True, help="file to write")
    command.add_argument(
        "--anchors", metavar="FILE", help="frames of other systems, on which the potential is to stay as it is"
    )
    command.add_argument("--valid", metavar="FILE", help="labeled frames to evaluate on (default: those of DATA)")
    command.add_argument(
        "--reference", metavar="FILE", help="frames that the observables are to reproduce (default: those of DATA)"
    )
    command.add_argument("--temperature-K", metavar="K", type=float, default=300.0, help="temperature (default: 300)")
    command.set_defaults(run=_repair)


def _add_check(commands: Any) -> None:
    command = _add_command(commands, "check", "look for faults of a potential in seconds", CHECK, CHECK_EXAMPLES)
    command.add_argument(
        "model", metavar="MODEL", help="MACE .model file, fairchem checkpoint, or foundation model's name"
    )
    command.add_argument(
        "frames", metavar="FRAMES", help="reference frames at this temperature, in a file that ASE reads"
    )
    command.add_argument("--temperature-K", metavar="K", type=float, default=300.0, help="temperature (default: 300)")
    command.add_argument(
        "--frames", metavar="N", type=int, default=8, dest="n_frames", help="frames to scan (default: 8)"
    )
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of rotations and velocities (default: 0)"
    )
    command.add_argument("--task-name", metavar="NAME", help="data set of a fairchem model that has several")
    command.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if torch finds a device")
    command.add_argument("--json", metavar="FILE", help="file to write all findings to")
    command.set_defaults(run=_check)


def _add_evaluate(commands: Any) -> None:
    command = _add_command(commands, "evaluate", "evaluate a potential as it is", EVALUATE, EVALUATE_EXAMPLES)
    command.add_argument(
        "model", metavar="MODEL", help="MACE .model file, fairchem checkpoint, or foundation model's name"
    )
    command.add_argument("starts", metavar="STARTS", help="start frames, in a file that ASE reads")
    command.add_argument(
        "--reference", metavar="FILE", help="frames to compare observables with (default: the start frames)"
    )
    command.add_argument(
        "--labeled", metavar="FILE", help="frames with energies and forces, to report the model's errors"
    )
    command.add_argument("--temperature-K", metavar="K", type=float, default=300.0, help="temperature (default: 300)")
    command.add_argument("--timestep-fs", metavar="FS", type=float, default=0.5, help="timestep (default: 0.5)")
    command.add_argument(
        "--friction-per-ps", metavar="F", type=float, default=1.0, help="Langevin friction (default: 1)"
    )
    command.add_argument(
        "--threshold",
        metavar="A",
        type=float,
        default=None,
        help="a replica has failed when a bond is this far from its mean length, in Å (default: --detector)",
    )
    command.add_argument(
        "--detector",
        choices=["mdsim", "stable", "mlipaudit", "spice"],
        default=None,
        help="published criterion of failure (default: limits from the reference frames)",
    )
    command.add_argument(
        "--method",
        choices=["direct", "splitting"],
        default="direct",
        help="splitting estimates failure rates far below one per simulated time (default: direct, by counting)",
    )
    command.add_argument("--replicas", metavar="N", type=int, default=32, help="replicas (default: 32)")
    command.add_argument(
        "--ps",
        metavar="PS",
        type=float,
        nargs="+",
        default=[1.0],
        help="simulated times to count failures up to (default: 1)",
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="seed of velocities and noise (default: 0)")
    command.add_argument("--task-name", metavar="NAME", help="data set of a fairchem model that has several")
    command.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if torch finds a device")
    command.add_argument("--out", metavar="FOLDER", help="run folder (default: a new one in runs/evaluate)")
    command.set_defaults(run=_evaluate)


def _add_recipes(commands: Any) -> None:
    command = _add_command(commands, "recipes", "list or copy the shipped recipes", RECIPES)
    command.add_argument("name", metavar="NAME", nargs="?", help="recipe to copy")
    command.set_defaults(run=_recipes)


def _train(options: argparse.Namespace) -> None:
    from stable_plugin.integrations.recipes.launch import prepare, start

    with quiet_stdout(options.debug):
        pipeline = prepare(options.recipe, options.overrides)
    start(pipeline)


def _repair(options: argparse.Namespace) -> None:
    from stable_plugin.integrations.recipes.launch import start
    from stable_plugin.integrations.recipes.repair import prepare_repair

    with quiet_stdout(options.debug):
        pipeline = prepare_repair(
            options.model,
            options.data,
            options.output,
            overrides=options.overrides,
            valid=options.valid,
            reference=options.reference,
            temperature_K=options.temperature_K,
            unlabeled=options.unlabeled,
            anchors=options.anchors,
        )
    start(pipeline)


def _check(options: argparse.Namespace) -> None:
    import json

    import torch

    from stable_plugin.evaluation.preflight import check_systems
    from stable_plugin.models import load_potential
    from stable_plugin.runtime.atomic_files import atomic_write

    if options.json and Path(options.json).exists():
        raise FileExistsError(f"{options.json} exists and is not overwritten: choose another path or remove it.")
    loader = {"task_name": options.task_name} if options.task_name else {}
    with quiet_stdout(options.debug):
        module = load_potential(options.model, **loader)
        module.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = check_systems(
            module, options.frames, options.temperature_K, n_frames=options.n_frames, seed=options.seed
        )
    print("\n".join(map(str, found.values())))
    if options.json:
        with atomic_write(Path(options.json), "findings") as partial:
            plain = {name: preflight.to_json() for name, preflight in found.items()}
            partial.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _evaluate(options: argparse.Namespace) -> int:
    import torch

    from stable_plugin import BondDeviation, Langevin
    from stable_plugin.evaluation import Evaluator
    from stable_plugin.integrations.recipes.evaluate import EvaluatePipeline
    from stable_plugin.integrations.recipes.launch import new_run_id, start
    from stable_plugin.integrations.recipes.run_folder import Job

    settings = {name: value for name, value in vars(options).items() if name not in ("run", "debug")}
    if options.threshold is not None and options.detector is not None:
        raise ValueError(
            f"--threshold={options.threshold:g} and --detector={options.detector} exclude each other: remove one."
        )
    evaluator = Evaluator(
        options.starts,
        options.reference,
        options.labeled,
        integrator=Langevin(options.temperature_K, options.timestep_fs, options.friction_per_ps),
        detector=options.detector if options.threshold is None else BondDeviation(threshold=options.threshold),
        n_replicas=options.replicas,
        horizons_ps=options.ps,
        method=options.method,
        seed=options.seed,
    )
    loader = {"task_name": options.task_name} if options.task_name else {}
    with quiet_stdout(options.debug):
        pipeline = EvaluatePipeline(options.model, evaluator, **loader)
    pipeline.job = Job(
        folder=Path(options.out or Path("runs", "evaluate", new_run_id())).absolute(),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        resume=f"stable-plugin {shlex.join(sys.argv[1:])}",
        settings=settings,
    )
    start(pipeline)
    return SYSTEMS_FAILED if pipeline.failed else 0


def _recipes(options: argparse.Namespace) -> None:
    from stable_plugin.integrations.recipes.shipped import copy_recipe, shipped_recipes

    if options.name is None:
        names = shipped_recipes()
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {summary}" for name, summary in names.items()))
        print("\nCopy one with: stable-plugin recipes NAME")
        return
    recipe, *data = copy_recipe(options.name)
    print("\n".join(str(path) for path in [recipe, *data]))
    print(f"\nRun it with: stable-plugin train {shlex.quote(str(recipe))}")


def _version() -> str:
    try:
        return version("stable-plugin")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
