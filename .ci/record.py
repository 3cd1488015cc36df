"""Write the result of a long check, with date and commit, into a page of the documentation.

``python record.py slow JUNIT_XML``, ``python record.py coverage JSON``, ``python record.py mutants LIST``. The last one
fails if fewer mutants of a file were noticed than :data:`NOTICED`.
"""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
NOTICED = 85.0
"""Share of a file's mutants in percent that some test has to notice."""

NOTICING = ("killed", "timeout")
"""What became of a mutant that was noticed; one that never ends is."""


def commit() -> str:
    """Return the present commit, and whether anything differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src", "tests"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "outside of a checkout"
    return f"commit `{name.stdout.strip()}`{', with changes' if changed.returncode else ''}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table in which all columns but the first are numbers."""
    rules = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rules, *rows])


def slow(path: Path) -> tuple[str, bool]:
    """Outcome and duration of every slow test; parametrised ones together."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}: {case.get('name', '').split('[')[0].removeprefix('test_')}"
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        outcomes[name][{"failure": "failed", "error": "failed"}.get(outcome, outcome)] += 1
        seconds[name] += float(case.get("time", 0.0))
    rows = [
        [
            name.replace("_", " "),
            ", ".join(f"{number} {outcome}" for outcome, number in outcomes[name].items()),
            f"{seconds[name]:.0f}",
        ]
        for name in outcomes
    ]
    return table(["test", "outcome", "seconds"], rows), bool(rows)


def coverage(path: Path) -> tuple[str, bool]:
    """Lines and branches together, file by file, lowest first."""
    report = json.loads(path.read_text())
    files = {name.split("stable_plugin/", 1)[1]: entry["summary"] for name, entry in report["files"].items()}
    rows = [
        [
            f"`{name}`",
            f"{entry['percent_covered']:.1f} %",
            f"{entry['num_statements'] - entry['covered_lines']}",
            f"{entry['num_branches'] - entry['covered_branches']}",
        ]
        for name, entry in sorted(files.items(), key=lambda item: (item[1]["percent_covered"], item[0]))
        if entry["num_statements"] and entry["percent_covered"] < 100.0
    ]
    whole = sum(entry["percent_covered"] >= 100.0 for entry in files.values())
    total = report["totals"]
    text = (
        f"{total['percent_covered']:.1f} % of lines and branches together; {total['covered_branches']} of "
        f"{total['num_branches']} branches. {whole} files are covered whole, the others are:\n\n"
    )
    return text + table(["file", "covered", "lines missed", "branches missed"], rows), True


def mutants(path: Path) -> tuple[str, bool]:
    """How many mutants of each file were noticed."""
    fates: dict[str, Counter[str]] = defaultdict(Counter)
    for module, fate in re.findall(r"^\s*([\w.]+?)\.x\S*__mutmut_\d+: (.+)$", path.read_text(), re.MULTILINE):
        fates[module.removeprefix("stable_plugin.").replace(".", "/") + ".py"][fate.strip()] += 1
    rows, enough = [], bool(fates)
    for name, found in sorted(fates.items()):
        noticed, total = sum(found[fate] for fate in NOTICING), found.total()
        share = 100.0 * noticed / total
        enough &= share >= NOTICED
        others = ", ".join(f"{number} {fate}" for fate, number in sorted(found.items()) if fate not in NOTICING)
        rows.append([f"`{name}`", f"{noticed} of {total}", f"{share:.1f} %", others or "none"])
    return table(["file", "noticed", "share", "not noticed"], rows), enough


def main(kind: str, path: Path) -> int:
    """Write the page, print it, and return the exit status."""
    text, enough = {"slow": slow, "coverage": coverage, "mutants": mutants}[kind](path)
    page = f"{datetime.now(UTC):%Y-%m-%d}, {commit()}.\n\n{text}\n"
    (ROOT / "docs" / "quality" / f"{kind}.md").write_text(page)
    print(page)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
