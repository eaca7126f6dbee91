"""Our adapters on the models of peft's own tests: every model class, every set of targets, every check.

    python experiments/checks/peft_zoo.py --peft PATH                          # PATH: a checkout of huggingface/peft
    python experiments/checks/peft_zoo.py --peft PATH --page docs/peft-zoo.md  # writes the page as well

Models, targets and options are read from `TEST_CASES` in tests/test_custom_models.py of the checkout; the checks are
ours. Nothing of that repository is copied here. Ends with exit code 1 if a check fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that rooms find each other

import waiting  # noqa: F401 - before torch

# isort: split
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from io import StringIO
from typing import Literal

import torch
import tyro

import lorafamily
from checks.peft_cases import ALPHA, RANK, Case, Zoo, commit_of, read, said
from checks.peft_checks import CHECKS, BaseError, Check
from pages import page
from pages.page import Heading, Part, Table, Text


@dataclass(frozen=True)
class Settings:
    """Check our adapters on the models of peft's tests."""

    peft: Path
    """checkout of github.com/huggingface/peft, the folder that has tests/"""
    out: Path = Path("runs/peft-zoo")
    """folder for zoo.json"""
    page: Path | None = None
    """Markdown page to write as well"""


@dataclass(frozen=True)
class Outcome:
    """The result of a check. refused: by an error of ours that says why; base: the model fails without adapters,
    too."""

    status: Literal["holds", "refused", "fails", "base"]
    reason: str = ""


def run_check(check: Check, case: Case) -> Outcome:
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            check(case)
    except BaseError as error:
        return Outcome("base", str(error))
    except lorafamily.LoraFamilyError as error:
        return Outcome("refused", said(error))
    except Exception as error:
        return Outcome("fails", said(error))
    return Outcome("holds")


def run(case: Case) -> dict[str, Outcome]:
    """All checks on one case."""
    return {name: run_check(check, case) for name, (_, check) in CHECKS.items()}


Results = Sequence[tuple[Case, Mapping[str, Outcome]]]


def totals(results: Results) -> Counter[str]:
    return Counter(outcome.status for _, outcomes in results for outcome in outcomes.values())


WORDS = {"holds": "✓", "refused": "refused", "fails": "**fails**", "base": "–"}
WHOLE = {"refused": "refused", "fails": "**fails**", "base": "cannot run without adapters"}


def as_page(zoo: Zoo, results: Results, facts: Mapping[str, str]) -> list[Part]:
    notes: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        word = WORDS[outcome.status]
        return word if outcome.status == "holds" else f"{word}[^{notes.setdefault(outcome.reason, len(notes) + 1)}]"

    lines = [["model: layers; options", "cases", *CHECKS]]
    uniform = [["model: layers; options", "cases", "what", "reason"]]
    for case, outcomes in results:
        head, (first, *rest) = [case.label, str(len(case.sources))], outcomes.values()
        if first.status != "holds" and all(outcome == first for outcome in rest):
            uniform.append([*head, WHOLE[first.status], first.reason])
        else:
            lines.append([*head, *(cell(outcomes[name]) for name in CHECKS)])
    together: list[Part] = [Text("The same in every check:"), Table(uniform)] if len(uniform) > 1 else []
    count = totals(results)
    in_cases = sum(bool(case.sources) for case, _ in results)
    parts: list[Part] = [
        Text("Written by `experiments/checks/peft_zoo.py`; do not edit."),
        Text(
            "The models, targets and options of `TEST_CASES` in `tests/test_custom_models.py` of "
            "[peft](https://github.com/huggingface/peft), with our adapters on them and our checks. A case of peft's "
            "LoRA is run with its rank, alpha, dropout and targets; cases of other methods add their models and "
            f"targets, at rank {RANK} and alpha {ALPHA:g}. Equal ones are one line, *cases* says how many it stands "
            "for. Lines with 0 cases are model classes that peft has for other tests, adapted wherever they can be. "
            "Models with tied weights are in neither; ours are in `tests/test_peft_zoo.py`."
        ),
        Table([["what", "value"], *([name, value] for name, value in facts.items())]),
        Heading("Totals"),
        Text(
            f"{zoo.total} cases of peft, {zoo.of_lora} of them LoRA's, come to {in_cases} lines; "
            f"{len(results) - in_cases} lines are further models. Of {sum(count.values())} checks, {count['holds']} "
            f"hold, {count['refused']} are refused with a reason, {count['fails']} fail, and in {count['base']} the "
            "model cannot do without adapters what is asked of it with them."
        ),
        Heading("Checks"),
        Text("\n".join(f"- **{name}**: {claim}." for name, (claim, _) in CHECKS.items())),
        Heading("Results"),
        Text("✓ holds; refused: with an error of ours, see the note; –: the model cannot do it by itself."),
        Table(lines),
        *together,
        Text("\n".join(f"[^{number}]: {reason}" for reason, number in notes.items()) or "Nothing to note."),
        Heading("No equivalent"),
        Text(
            f"{zoo.whole} of the {zoo.of_lora} cases of LoRA were run as they are. In the others, these options were "
            "left away, since there is nothing of the kind here:"
        ),
        Table([["option of LoRA", "cases"], *([f"`{name}`", str(n)] for name, n in sorted(zoo.options.items()))]),
        Text("Of cases of these methods, only models, targets and `modules_to_save` were taken:"),
        Table([["method", "cases"], *([f"`{name}`", str(n)] for name, n in sorted(zoo.methods.items()))]),
    ]
    if zoo.not_made:
        reasons = "\n".join(f"- `{name}`: {reason}" for name, reason in zoo.not_made.items())
        parts.append(Text(f"Model classes that could not be made without arguments:\n\n{reasons}"))
    return parts


def main(settings: Settings) -> None:
    torch.use_deterministic_algorithms(True)
    zoo = read(settings.peft)
    results: list[tuple[Case, dict[str, Outcome]]] = []
    for case in zoo.cases:
        results.append((case, run(case)))
        count = totals(results[-1:])
        print(f"{case.label}: {', '.join(f'{n} {status}' for status, n in count.items())}", flush=True)
    command = "python experiments/checks/peft_zoo.py --peft PATH --page docs/peft-zoo.md"
    facts = {"command": f"`{command}`", "date": str(date.today()), "peft's tests": commit_of(settings.peft)}
    facts |= {name: version(name) for name in ("peft", "torch", "transformers", "lorafamily")}
    write_json(settings.out, zoo, results, facts)
    if settings.page is not None:
        settings.page.parent.mkdir(parents=True, exist_ok=True)
        parts = as_page(zoo, results, facts)
        settings.page.write_text(page.markdown("The models of peft's tests", parts, settings.page.parent))
    for case, outcomes in results:
        for name, outcome in outcomes.items():
            if outcome.status == "fails":
                print(f"fails: {case.label}, {name}: {outcome.reason}")
    print(", ".join(f"{n} {status}" for status, n in totals(results).items()))
    sys.exit(1 if totals(results)["fails"] else 0)


def write_json(folder: Path, zoo: Zoo, results: Results, facts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"case": case.label, "sources": case.sources, "checks": {name: asdict(o) for name, o in outcomes.items()}}
        for case, outcomes in results
    ]
    left = {"options": zoo.options, "methods": zoo.methods, "classes": zoo.not_made}
    whole = {"facts": facts, "totals": totals(results), "no equivalent": left, "cases": lines}
    (folder / "zoo.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
