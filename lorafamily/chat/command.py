"""The commands `train`, `generate` and `evaluate`: they print text or JSON; an error is one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lorafamily.chat import evaluating, generating, settings, training
from lorafamily.chat.model import quiet
from lorafamily.chat.options import parsed
from lorafamily.errors import LoraFamilyError
from lorafamily.training.interrupt import Interrupted

COMMANDS: dict[str, tuple[type, Callable[[Any, Callable[[str], None]], tuple[dict[str, Any], str]]]] = {
    "train": (settings.Train, training.train_command),
    "generate": (settings.Generate, generating.generate_command),
    "evaluate": (settings.Evaluate, evaluating.evaluate_command),
}
"""The options, and a function of them and of one that prints a line; it returns the result as data and as text."""


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code. An ImportError names a package that is not installed."""
    warnings.showwarning = _print_warning
    of, result_of = COMMANDS[command]
    try:
        options: Any = parsed(of, arguments, command, settings.EXAMPLES[command])
        quiet()
        silent = options.json or os.environ.get("RANK", "0") != "0"  # of several processes the first prints
        result, text = result_of(options, lambda line: None if silent else print(line, flush=True))
    except (LoraFamilyError, OSError) as error:
        print(f"lorafamily {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted:
        print("lorafamily train: the same command continues from there", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"lorafamily {command}: stopped; nothing was changed", file=sys.stderr)
        return 130
    if result or text:
        print(json.dumps(result, indent=1, ensure_ascii=False) if options.json else text)
    return 0


def _print_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Print a warning as one line, without its place in our code."""
    print(f"lorafamily: {' '.join(str(message).split())}", file=sys.stderr)
