"""The commands `train`, `generate` and `evaluate`: they print text or JSON; an error is one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from lorafamily.chat import evaluating, generating, settings, training
from lorafamily.chat.generating import as_json
from lorafamily.chat.model import quiet
from lorafamily.chat.options import parsed
from lorafamily.errors import LoraFamilyError
from lorafamily.training.interrupt import Interrupted

COMMANDS: dict[str, type] = {"train": settings.Train, "generate": settings.Generate, "evaluate": settings.Evaluate}


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code."""
    warnings.showwarning = _warned
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
        print("lorafamily train: the same command goes on from there", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"lorafamily {command}: stopped; nothing was changed", file=sys.stderr)
        return 130
    if result or text:
        print(as_json(result) if options.json else text)
    return 0


def _result(options: Any) -> tuple[dict[str, Any], str]:
    if isinstance(options, settings.Train):
        return training.train_command(options, _say(options.result.json))
    if isinstance(options, settings.Evaluate):
        return evaluating.evaluate_command(options, _say(options.json))
    return generating.generate_command(options)


def _say(silent: bool) -> Callable[[str], None]:
    """What prints a line, in the first of several processes."""
    silent = silent or os.environ.get("RANK", "0") != "0"
    return (lambda line: None) if silent else (lambda line: print(line, flush=True))


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in our code."""
    print(f"lorafamily: {' '.join(str(message).split())}", file=sys.stderr)
