"""
Writes the claims ledger: `python tests/claims_ledger.py`, from the repository's root.

Every claim is checked at several seeds; `results/claims.json` keeps the worst of them, and a hash of the code that ran.
The functions below are also what `test_claims.py` compares the stored ledger with.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from claims import registry
from claims.registry import Claim, Exact, Measured

from iclgd_helpers import storage
from iclgd_helpers.experiments import provenance
from iclgd_helpers.pages.claims import PATH
from iclgd_helpers.paths import repository_root

ROOT = repository_root()

SEEDS = (0, 1, 2)
CHECKED_CODE = ("theory/gradient_step.py", "theory/transformer.py")  # of the helper package
DIGITS = 1e-3  # relative: how closely what is not a residual repeats


@cache
def outcome(identity: str, seed: int) -> Exact | Measured:
    """What the check finds at one seed."""
    return registry.load()[identity].outcome(seed)


def seeds(claim: Claim) -> tuple[int, ...]:
    """Seeds of a claim; one is enough where nothing is drawn."""
    return SEEDS if claim.drawn else SEEDS[:1]


@cache
def code_hash(module: Path) -> str:
    """Hash of a check's module and the helpers it checks; comments and layout do not count."""
    return provenance.code_hash((module, *(ROOT / "iclgd_helpers" / name for name in CHECKED_CODE)))


def module_of(claim: Claim) -> Path:
    """File that defines the claim's check."""
    return Path(inspect.getfile(inspect.unwrap(claim.check)))


def entry(claim: Claim) -> dict[str, Any]:
    """The claim's line in the ledger: largest residual, each control's smallest error of all seeds; first intervals."""
    found = [outcome(claim.id, seed) for seed in seeds(claim)]
    exact = isinstance(found[0], Exact)
    values: dict[str, Any] = {
        "tolerance": claim.tolerance if exact else None,
        "residual": max(float(f.residual) for f in found) if exact else None,
    }
    if exact:
        wrong = [{"error": min(errors)} for errors in zip(*(f.control_errors for f in found), strict=True)]
    else:
        first = found[0]
        values |= {"interval": list(map(float, first.interval)), "level": float(first.level), "n": int(first.n)}
        values["side"] = claim.side
        wrong = [{"interval": list(map(float, ends))} for ends in first.control_intervals]
    controls = [
        {"text": control.text, "erratum": list(control.erratum)} | error
        for control, error in zip(claim.controls, wrong, strict=True)
    ]
    texts = ("id", "statement", "source", "notebook", "status", "refutes", "drawn")
    return (
        {name: getattr(claim, name) for name in texts}
        | values
        | {
            "controls": controls,
            "seeds": len(seeds(claim)),
            "test": f"tests/claims/test_claims.py::test_claim[{claim.id}]",
            "check_hash": code_hash(module_of(claim)),
        }
    )


def broken_rules(claim: Claim, found: Exact | Measured) -> list[str]:
    """What is wrong with one outcome: an identity must hold and its control must miss; intervals must not overlap."""
    if isinstance(found, Exact):
        if not (
            claim.tolerance
            and found.control_errors
            and all(map(math.isfinite, (found.residual, *found.control_errors)))
        ):
            return ["an exact check needs a tolerance, a control and finite errors"]
        least = registry.LEAST_CONTROL * claim.tolerance
        rules = {
            f"residual {found.residual:.1e} is above {claim.tolerance:.0e}": 0 <= found.residual <= claim.tolerance
        } | {
            f"control error {error:.1e} is below {least:.0e}: {control.text}": error >= least
            for control, error in zip(claim.controls, found.control_errors, strict=True)
        }
    else:
        if not found.control_intervals:
            return ["a measured claim needs a control"]
        low, high = found.interval
        rules = {
            "an interval runs from its lower to its upper end": all(
                a <= b for a, b in (found.interval, *found.control_intervals)
            ),
            "level is between 0 and 1, and n at least 2": 0 < found.level < 1 and found.n >= 2,
        } | {
            f"the interval is not {claim.side} the control's: {control.text}": {
                "below": high < ends[0],
                "above": ends[1] < low,
            }.get(claim.side, False)
            for control, ends in zip(claim.controls, found.control_intervals, strict=True)
        }
    return [text for text, holds in rules.items() if not holds]


def near(old: list[float], new: list[float]) -> bool:
    """Whether numbers that are no residuals repeat."""
    size = max(map(abs, new))
    return len(old) == len(new) and all(abs(a - b) <= DIGITS * size for a, b in zip(old, new, strict=True))


def same_control(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a control has the same words and still fails as it did."""
    numbers = [([c["error"]] if "error" in c else c["interval"]) for c in (old, new)]
    return all(old[name] == new[name] for name in ("text", "erratum")) and near(*numbers)


def differences(stored: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """Names of what is no longer as stored; of the residual only that it is still within the tolerance."""
    changed = sorted(set(stored) ^ set(fresh))
    for name in set(stored) & set(fresh):
        old, new = stored[name], fresh[name]
        if name == "residual" and new is not None:
            same = old is not None and 0 <= old <= fresh["tolerance"] and new <= fresh["tolerance"]
        elif name == "interval" and None not in (old, new):
            same = near(old, new)
        elif name == "controls":
            same = len(old) == len(new) and all(same_control(a, b) for a, b in zip(old, new, strict=True))
        else:
            same = old == new
        changed += [] if same else [name]
    return changed


def missing_verdicts(claim: dict[str, Any], folder: Path = ROOT / "notebooks") -> list[str]:
    """What the claim's notebook does not print in a compared cell: its verdict, and that of its control."""
    path = folder / f"{claim['notebook']}.ipynb"
    if not path.is_file():
        return [f"there is no {path.name}"]
    cells = [c for c in nbformat.read(path, as_version=4).cells if "nbval-check-output" in c.metadata.get("tags", [])]
    printed = "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    lines = re.findall(r"^(.+?) ((?:CONTROL )?PASS)\b", printed, flags=re.M)
    verdicts = {f"{name} {verdict}" for names, verdict in lines for name in names.split(", ")}
    wanted = (f"{claim['id']} PASS", f"{claim['id']} CONTROL PASS")
    return [text for text in wanted if text not in verdicts]


def main() -> int:
    """Exit status 1 when a claim breaks a rule; the ledger is then left as it was."""
    claims = registry.load().values()
    faults = {
        f"{c.id}, seed {seed}": rules
        for c in claims
        for seed in seeds(c)
        if (rules := broken_rules(c, outcome(c.id, seed)))
    }
    for where, rules in faults.items():
        print(f"{where}: {'; '.join(rules)}", file=sys.stderr)
    if faults:
        return 1
    storage.write_json(PATH, {"claims": [entry(c) for c in claims]})
    print(f"{len(claims)} claims in {PATH.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
