"""Run the pieces that have no result yet, and write docs/evidence.md: ``make evidence``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from omegaconf import OmegaConf

from benchmarks.evidence import page
from benchmarks.evidence.pieces import PIECES, Piece
from benchmarks.evidence.results import RESULTS, keep
from benchmarks.recipes import ROOT

RUNS = ROOT / "build" / "evidence"
"""Folders of the runs, with their potentials and pages."""


def run(piece: Piece, device: str = "cpu") -> None:
    """Run a piece in a process of its own, or go on with it, and keep its result; a piece that fails keeps its log.

    Args:
        piece: The piece.
        device: ``cpu`` or ``cuda``; a piece can go on on another one.
    """
    folder = RUNS / piece.name
    recipe = OmegaConf.to_yaml(piece.recipe())
    written = folder / "recipe.yaml"
    resumed = written.is_file() and written.read_text() == recipe
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written.write_text(recipe)
    print(f"{piece.name}: {'resumed' if resumed else 'started'}, log in {folder / 'log.txt'}", flush=True)
    began = time.time()
    command = [sys.executable, "-m", "stable_plugin.cli", "train", written]
    command += [f"job.run_dir={folder}", "+job.timestamp_id=run", f"job.device_type={device.upper()}"]
    # One thread a piece: as many pieces at a time as there are cores.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with (folder / "log.txt").open("a") as log:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        print(f"{piece.name}: failed, see {folder / 'log.txt'}", flush=True)
        return
    print(f"{piece.name}: {keep(piece, folder / 'run', device)}, {(time.time() - began) / 60:.0f} min", flush=True)


def main() -> None:
    """Run the pieces named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("pieces", nargs="*", default=["*"], help="names or patterns of pieces, such as 'aspirin-*'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pieces at a time")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="a GPU takes several pieces at a time with MPS"
    )
    parser.add_argument("--list", action="store_true", help="list the pieces and whether they are done")
    arguments = parser.parse_args()
    chosen = [name for name in PIECES if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.pieces)]
    if not chosen:
        parser.error(f"pieces={' '.join(arguments.pieces)} matches none: see --list")
    if arguments.list:
        for name in chosen:
            print(f"{name:36} {'done' if (RESULTS / f'{name}.json').is_file() else ''}".rstrip())
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pieces = [PIECES[name] for name in chosen if not (RESULTS / f"{name}.json").is_file()]
        list(pool.map(partial(run, device=arguments.device), pieces))
    page.write()


if __name__ == "__main__":
    main()
