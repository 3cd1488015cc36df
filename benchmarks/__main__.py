"""Time this package against comparable programs: ``make bench``.

All variants of a comparison are measured in turn in one process, so that changes of the machine's speed affect all of
them alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from benchmarks.cases import aspirin, peptide, peptide_mace, water
from benchmarks.estimator import estimator
from benchmarks.md import compiled_and_captured, growth, md, neighbor_fraction
from benchmarks.memory import memory
from benchmarks.table import Row, show, write
from benchmarks.windows import rounds, windows


def md_rows(device: str, repeats: int) -> Iterator[list[Row]]:
    """Time MD steps for each system and number of replicas."""
    # On a GPU a step takes as long for one replica as for many.
    n_steps = {n: 20 if device == "cuda" else max(10, 640 // n) for n in (1, 8, 32, 128)}
    cases = {
        **{f"aspirin {n}": (lambda n=n: aspirin(n, device), steps) for n, steps in n_steps.items()},
        "peptide": (lambda: peptide_mace(32, device), 10),
        "water": (lambda: water(4, device), 10),
        "large water": (lambda: water(1, device, repeat=2), 10),
    }
    if device == "cpu":
        cases["eSEN"] = (lambda: peptide(8), 10)
    for make, steps in cases.values():
        yield md(make(), repeats, steps)


def growth_rows(device: str, repeats: int) -> Iterator[list[Row]]:
    """Measure how the cost grows with replicas and atoms, and the fraction of neighbor lists in it."""
    small, large = water(1, device), water(1, device, repeat=2)
    yield growth({8: aspirin(8, device), 128: aspirin(128, device)}, "replicas of aspirin", repeats, 20)
    yield growth({192: small, 1536: large}, "atoms of water", repeats, 20)
    yield neighbor_fraction(small, repeats, 40)
    yield neighbor_fraction(large, repeats, 20)


def compiled_rows(device: str, repeats: int) -> Iterator[list[Row]]:
    """Measure what compiling adds to capturing; on a CUDA device alone."""
    for case in (aspirin(32, device), aspirin(128, device), water(4, device)):
        yield compiled_and_captured(case, repeats)


GROUPS: dict[str, Callable[[str, int], Iterator[list[Row]]]] = {
    "md": md_rows,
    "growth": growth_rows,
    "compiled": compiled_rows,
    "memory": lambda device, repeats: iter([memory(device, min(repeats, 3))]),
    "estimator": lambda device, repeats: estimator(min(repeats, 3)),
    "windows": lambda device, repeats: iter([windows(3)]),
    "rounds": lambda device, repeats: iter([rounds(3)]),
}


def main() -> None:
    """Measure the groups named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "groups",
        nargs="*",
        default=["md", "growth", "memory", "estimator"],
        help=f"groups to measure, from {', '.join(GROUPS)}",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.groups) - set(GROUPS))
    if unknown:
        parser.error(f"groups={', '.join(unknown)} unknown: choose from {', '.join(GROUPS)}")
    for group in arguments.groups:
        for rows in GROUPS[group](arguments.device, arguments.repeats):
            show(rows)
            print(f"written to {write(rows, arguments.device, {'repeats': arguments.repeats})}", flush=True)


if __name__ == "__main__":
    main()
