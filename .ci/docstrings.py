"""Run pydoclint, and accept a missing section of returns or yields where the summary is the description.

usage: python .ci/docstrings.py FOLDER

"Return the forces, (n_atoms, 3) in eV/Å." describes its result as well as a section does, and pydoclint has no option for
that. Prints the findings and their number by folder, and fails if there are any.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

FINDING = re.compile(r"(?P<path>\S+\.py):(?P<line>\d+): (?P<code>DOC\d+): (?P<text>.*)")
SUMMARY = {"DOC201": ("Return ", "Return:"), "DOC402": ("Yield ", "Iterate "), "DOC404": ("Yield ", "Iterate ")}


@cache
def summaries(path):
    """Return the docstrings of a file's functions by the lines of their definitions and decorators."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found |= dict.fromkeys(range(first, node.body[0].lineno + 1), ast.get_docstring(node) or "")
    return found


def is_described(finding):
    """Return whether the summary of the docstring describes what the finding misses."""
    openings = SUMMARY.get(finding["code"], ())
    return summaries(finding["path"]).get(int(finding["line"]), "").startswith(tuple(openings) or ("\0",))


def main(folder):
    """Print the findings, and return the exit code."""
    command = [sys.executable, "-m", "pydoclint.main", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    findings = [match for match in map(FINDING.search, output.splitlines()) if match]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not findings):
        print(output)
        return 2
    left = [finding for finding in findings if not is_described(finding)]
    for finding in left:
        print(f"{finding['path']}:{finding['line']}: {finding['code']} {finding['text'].partition(' (Or could')[0]}")
    for place, count in sorted(Counter(str(Path(finding["path"]).parent) for finding in left).items()):
        print(f"{count:4} {place}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
