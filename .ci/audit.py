"""Known vulnerabilities of the pinned packages: ``python .ci/audit.py PIP_AUDIT [REQUIREMENTS]``.

pip-audit calls a package that its source does not know "skipped" and finds nothing wrong with it,
so that behind a mirror without that data all is well; here it is said. Exit codes: 0 none known, 1
there are some, 2 it could not be told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PINNED = Path(__file__).resolve().parent.parent / "constraints.txt"


def main(program: str, requirements: str = str(PINNED)) -> int:
    command = [program, "--requirement", requirements, "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"audit: the data on vulnerabilities could not be had, so nothing is known: {last}")
        return 2
    skipped = [one["name"] for one in found if "skip_reason" in one]
    looked_at = [one for one in found if "skip_reason" not in one]
    if not looked_at:
        print("audit: the index has no data on vulnerabilities, so nothing is known of any package")
        return 2
    for one in looked_at:
        for vulnerability in one["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {vulnerability['id']}, fixed in {fixed}")
    if skipped:
        print(f"audit: nothing is known of {', '.join(skipped)}")
    bad = sum(bool(one["vulns"]) for one in looked_at)
    print(f"audit: {bad} of {len(looked_at)} packages have known vulnerabilities")
    return 1 if bad else 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
