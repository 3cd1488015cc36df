"""Recipes with random mistakes: each ends in one error that names the mistake at once, or runs.

Every run is started as ``stable-plugin train`` and ``fairchem -c`` start it, in turn, in a fork of one process that has
imported everything. Figures are not drawn, which would take most of the time and has tests of its own; nothing is compiled.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import re
from collections import Counter

import pytest
import recipe_tools
import torch._dynamo
from toys import tiny_mace

from stable_plugin.algorithm.replica_pool import UnusablePotentialError
from stable_plugin.models.mace import save_mace

SECONDS = 5.0
"""Errors have to appear within this time; runs that are still running then are stopped, and count as running."""

PATIENCE = 4.0
"""Factor of that time on a busy machine."""

VALUES = [
    None, True, False, "", "abc", "größe 🔥", "1.0", -1, 0, 1, 2, -0.5, 0.0, 0.5, 1e-30, 1e30, 10**9, 10**30, -(10**9),
    math.nan, math.inf, -math.inf, [], [1, 2], [None], ["a", "b"], [math.nan], {}, {"a": 1}, "${missing}", "???", "../..",
    "recipes", {"_target_": "os.system", "command": "touch hacked"}, {"_target_": "builtins.eval"},
    {"_target_": "stable_plugin.Nothing"}, {"_target_": "stable_plugin.BondLengths"},
    {"_target_": "stable_plugin.integrations.fairchem.runner.os.system", "command": "touch hacked"},
    {"_target_": "torch.load", "f": "hacked"}, {"_target_": 7}, {"_partial_": True},
]  # fmt: skip

TARGETS = [
    "os.system", "builtins.eval", "subprocess.run", "stable_plugin", "stable_plugin.Shedule", "stable_plugin.Schedule",
    "torch.hub.load", "", "größe", ".", "a.b", "stable_plugin.evaluation.Evaluator", "torch.nn.Linear",
    "importlib.import_module", "pickle.loads",
]  # fmt: skip

NAMES = ["extra", "größe", "n_replica", "_target", "seeds", "Threshold", "a b", "discard"]

JUDGED = (UnusablePotentialError.__name__, FloatingPointError.__name__)
"""Errors that may end a run of a valid recipe."""

RECIPES = {"aspirin_mace": 0.4, "peptide_esen": 0.25, "water_mace": 0.1, "evaluate": 0.25}


def paths(node, at=()):
    """Yield the paths of all entries of plain data."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*at, key)
        yield from paths(value, (*at, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def mutated(recipe, chance):
    """Return a recipe with one mistake, and the mistake: kind, path, and value."""
    recipe = copy.deepcopy(recipe)
    # Mistakes in the job section and in the table of sizes are tried less often.
    known = [path for path in paths(recipe) if path[0] not in ("job", "sizes") or chance.random() < 0.1]
    path = chance.choice(known)
    holder, key = at(recipe, path[:-1]), path[-1]
    kind = chance.choice(["value"] * 6 + ["delete", "rename", "extra", "swap"])
    if key == "_target_" and kind == "value":
        holder[key] = value = chance.choice(TARGETS)
    elif kind == "value":
        holder[key] = value = copy.deepcopy(chance.choice(VALUES))
    elif kind == "delete":
        value = holder.pop(key)
    elif kind == "rename" and isinstance(holder, dict):
        value = holder.pop(key)
        holder[f"{key}s" if chance.random() < 0.5 else str(key)[:-1] or "x"] = value
    elif kind == "swap":
        other = chance.choice([path for path in known if path[0] != "job"])
        value = copy.deepcopy(at(recipe, other))
        holder[key] = value
    else:
        kind, value = "extra", copy.deepcopy(chance.choice(VALUES))
        mapping = holder if isinstance(holder, dict) else recipe["runner"]
        key = chance.choice(NAMES)
        path = (*(path[:-1] if mapping is holder else ("runner",)), key)
        mapping[key] = value
    return recipe, (kind, path, value)


def leaves(value):
    """Return the plain values in a value."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for entry in entries for leaf in ([entry] if not isinstance(entry, dict | list) else leaves(entry))]


def verdict(outcome, mistake):
    """Return how a run ended: runs, judged, refused, or a complaint about the way it ended."""
    kind, path, value = mistake
    if outcome.folder is not None and (outcome.folder / "../../hacked").exists():
        return "hacked"
    if outcome.error is None:
        return "runs" if outcome.stage == "done" else "still running" if outcome.stage == "run" else "hangs"
    if outcome.kind in JUDGED:
        return "judged"
    if outcome.left:
        return "half a folder"
    if outcome.seconds > SECONDS * PATIENCE:
        return "slow"
    if outcome.stage in ("config", "seeds"):
        return "refused by the loader"
    message = outcome.message.replace("\\", "")
    names = [str(key) for key in path if isinstance(key, str)]
    named = re.search(r"(runner|job)[.:\[]|full_key: runner", message) or f"{names[-1]}=" in message
    values = [value, *leaves(value)]
    if names[-1] == "_recursive_":  # hydra's own error names the type
        values.append(type(value).__name__)
    if kind == "extra" and path[:-1] == ("runner",):  # Python's own error names the argument
        values.append(names[-1])
    texts = {text[:40] for each in values for text in (repr(each), str(each), str(each).rpartition(".")[2]) if text}
    # Errors of references and of missing values name those instead.
    shown = (
        kind in ("delete", "rename")
        or "${" in str(value)
        or "???" in str(value)
        or any(text in message for text in texts)
    )
    if not named:
        return "unnamed"
    return "refused" if shown else "without its value"


FINE = {"runs", "still running", "judged", "refused", "refused by the loader"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_tools.small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a potential to evaluate."""
    path = tmp_path_factory.mktemp("model") / "some.model"
    save_mace(tiny_mace([1, 6, 8]).float(), path)
    return path


@pytest.fixture(autouse=True)
def no_figures_and_no_compiler(monkeypatch):
    monkeypatch.setattr("stable_plugin.evaluation.report.draw", lambda report, curves: [])
    logging.disable(logging.WARNING)
    with torch._dynamo.config.patch(disable=True):
        yield
    logging.disable(logging.NOTSET)


def fuzz(name, number, data, model, folder, seed=0, patience=PATIENCE):
    """Run a recipe with a number of mistakes, and return counts of verdicts and a line for each failure."""
    recipe = recipe_tools.tiny(name, data)
    if name == "evaluate":
        recipe["model"] = str(model)
    chance = random.Random(f"{name} {seed}")
    counts, bad = Counter(), []
    for index in range(number):
        mistaken, mistake = mutated(recipe, chance)
        front = recipe_tools.FRONTS[index % len(recipe_tools.FRONTS)]
        outcome = recipe_tools.run_apart(mistaken, folder / f"{name}_{index}", SECONDS * patience, front)
        found = verdict(outcome, mistake)
        counts[found] += 1
        if found not in FINE:
            kind, path, value = mistake
            where = ".".join(map(str, path))
            bad.append(
                f"{found}: {front}: {kind} {where} {value!r} -> [{outcome.stage}, {outcome.seconds:.1f} s] "
                f"{outcome.message}"
            )
    return counts, bad


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_mistakes(name, data, model, tmp_path):
    _, bad = fuzz(name, round(40 * RECIPES[name]), data, model, tmp_path, seed=1, patience=2.0)
    assert not bad, "\n".join(bad)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_a_thousand_mistakes(name, data, model, tmp_path):
    counts, bad = fuzz(name, round(1000 * RECIPES[name]), data, model, tmp_path)
    print(name, dict(counts))
    assert not bad, "\n".join(bad)
