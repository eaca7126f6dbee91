"""The commands `train`, `generate` and `evaluate`: they print text or JSON; an error is one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lorafamily.chat import evaluating, generating, settings, training
from lorafamily.chat.model import quiet
from lorafamily.chat.options import parsed
from lorafamily.errors import LoraFamilyError
from lorafamily.training.interrupt import Interrupted

COMMANDS: dict[str, type] = {"train": settings.Train, "generate": settings.Generate, "evaluate": settings.Evaluate}


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code."""
    warnings.showwarning = _print_warning
    try:
        options: Any = parsed(COMMANDS[command], arguments, command, settings.EXAMPLES[command])
        quiet()
        result, text = _result(options)
    except (LoraFamilyError, OSError) as error:
        print(f"lorafamily {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f'lorafamily {command}: needs {error.name}: pip install "lorafamily[chat]"', file=sys.stderr)
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


def _result(options: Any) -> tuple[dict[str, Any], str]:
    def say(line: str) -> None:
        if not options.json and os.environ.get("RANK", "0") == "0":  # of several processes the first
            print(line, flush=True)

    if isinstance(options, settings.Train):
        return training.train_command(options, say)
    if isinstance(options, settings.Evaluate):
        return evaluating.evaluate_command(options, say)
    return generating.generate_command(options)


def _print_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Print a warning as one line, without its place in our code."""
    print(f"lorafamily: {' '.join(str(message).split())}", file=sys.stderr)
