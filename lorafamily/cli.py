"""The command `lorafamily`: train on conversations; inspect, merge, compress, export and plan adapters.

An error is one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from lorafamily.deploy.checkpoint import merge_checkpoint
from lorafamily.deploy.checkpoint_entries import FOLDER, entries_of, is_weights, refuse_used
from lorafamily.deploy.combine import Cut, compressed
from lorafamily.deploy.files import load
from lorafamily.deploy.merge import merge
from lorafamily.deploy.peft import export_peft
from lorafamily.deploy.plain import PLAIN
from lorafamily.deploy.saved import Saved, read, write
from lorafamily.errors import FileError, LoraFamilyError, StateError
from lorafamily.insight.grids import rank_grid
from lorafamily.names import OUTSIDE, by_stack
from lorafamily.planner.command import add_options, plan_methods
from lorafamily.terminal import any_text, nearest

BLOCKS = " ▁▂▃▄▅▆▇█"
CHAT = {
    "train": "Fine-tune a causal language model on a file of conversations.",
    "generate": "Let a model with an adapter answer.",
    "evaluate": "Loss, perplexity and exact match on a file of conversations.",
}
"""Commands of `lorafamily.chat`, which defines their options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    any_text()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in CHAT:
        try:  # they need the packages of `lorafamily[chat]`
            from lorafamily.chat.command import run

            return run(arguments[0], arguments[1:])
        except ImportError as error:
            print(f'lorafamily {arguments[0]}: needs {error.name}: pip install "lorafamily[chat]"', file=sys.stderr)
            return 2
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        result, text = given.run(given)
    except (LoraFamilyError, OSError) as error:
        print(f"lorafamily {given.command}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if given.json else text)
    return 0


def inspect_folder(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Show what an adapter folder has."""
    saved = read(given.path)
    slices = {at: entry["slices"] for at, entry in saved.modules.items()}
    result = {
        "method": saved.record["method"],
        "base": saved.record["base"]["architecture"],
        "written by": saved.record["written by"],
        "parameters": sum(adapter.trainable() for adapter in saved.adapters.values()),
        "slices": sum(slices.values()),
        "bytes": _bytes(file for file in saved.folder.iterdir() if file.is_file()),
        "extra trained": {at: list(value.shape) for at, value in saved.extra_trained.items()},
        "modules": {
            at: {**{key: entry[key] for key in ("shape", "slices", "scale")}, "norm": saved.adapters[at].norm()}
            for at, entry in saved.modules.items()
        },
    }
    if given.png is not None:
        from lorafamily.insight.drawing import save  # matplotlib takes long to import
        from lorafamily.insight.heatmaps import rank_heatmap

        initial = {at: entry["initial_slices"] for at, entry in saved.modules.items()}
        title = f"{saved.record['method']} on {result['base']}: slices by layer and matrix"
        save(rank_heatmap(initial, slices, title), given.png)
    return result, _table(saved, result) + "\n\n" + _heatmap(slices)


def merge_into_checkpoint(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Merge an adapter into a checkpoint on disk."""
    saved = read(given.adapter)
    if given.dequantise is not None:
        return _merge_dequantised(given, saved)
    size = _bytes({entry.file for entry in entries_of(given.base).values()})
    with tqdm(total=size, unit="B", unit_scale=True, desc="merging", disable=given.json) as bar:
        merge_checkpoint(given.base, saved, given.out, bar.update)
    result = {"out": str(given.out), "merged": len(saved.adapters), "bytes": size}
    return result, f"{given.out}: {given.base} with {len(saved.adapters)} layers merged, {size / 2**20:,.0f} MiB"


def _merge_dequantised(given: argparse.Namespace, saved: Saved) -> tuple[dict[str, Any], str]:
    """Merge with the base's own loader, which knows its format but holds the whole model in memory."""
    refuse_used(given.out)
    model = load(_base(given, saved), given.adapter)
    merge(model, dequantise=getattr(torch, given.dequantise), keep="none")
    model.save_pretrained(given.out)
    for file in given.base.iterdir():  # the tokenizer and so on, but no index of the old shards
        of_weights = is_weights(file) or file.name.endswith(".index.json")
        if file.is_file() and not of_weights and not (given.out / file.name).exists():
            shutil.copyfile(file, given.out / file.name)
    result = {"out": str(given.out), "merged": len(saved.adapters), "bytes": _bytes(given.out.iterdir())}
    return result, f"{given.out}: {given.base} in {given.dequantise} with {len(saved.adapters)} layers merged"


def compress_folder(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write an adapter as plain LoRA of lower rank, the best for each layer or for all together."""
    saved = read(given.adapter)
    cut = Cut(given.rank, given.energy, given.budget, given.rank_budget)
    method, sizing, adapters, report = compressed(saved.adapters, cut)
    record = saved.record | {"method": PLAIN}
    write(replace(saved, record=record, method=method, sizing=sizing, adapters=adapters), given.out)
    worst = max(report, key=lambda row: row.error)
    before, after = sum(row.slices_before for row in report), sum(row.rank_after for row in report)
    error = f"largest error ‖ΔW − ΔW′‖ / ‖ΔW‖ {worst.error:.1%} ({worst.module})"
    if given.rank is None and given.energy is None:  # a budget chooses the ranks of all layers together
        error += f", {report.error:.1%} in all"
    result = {"out": str(given.out), "modules": [asdict(row) for row in report], "error": report.error}
    return result, f"{given.out}: {before} slices → total rank {after}; {error}"


def export_folder(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write an adapter as a LoRA folder for peft, inference servers or diffusers."""
    saved = read(given.adapter)
    folder = export_peft(load(_base(given, saved), given.adapter), given.out, layout=given.layout)
    size = _bytes(folder.iterdir())
    return {"out": str(folder), "bytes": size}, f"{folder}: {size / 1024:,.0f} KiB, layout {given.layout}"


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _base(given: argparse.Namespace, saved: Saved) -> Any:
    """The model that the adapter was made for, loaded by transformers or diffusers."""
    architecture, installed = saved.record["base"]["architecture"], []
    for library, parent in (("transformers", "PreTrainedModel"), ("diffusers", "ModelMixin")):
        try:
            module = importlib.import_module(library)
        except ImportError:
            continue
        installed.append(library)
        cls = getattr(module, architecture, None)
        if isinstance(cls, type) and issubclass(cls, getattr(module, parent)):
            if not (given.base / "config.json").is_file():
                raise FileError(f"{given.base}: no config.json there; {FOLDER}")
            return getattr(module, architecture).from_pretrained(given.base)
    if not installed:
        raise StateError("the base is loaded with transformers or diffusers, and neither is installed")
    raise StateError(
        f"{architecture} is no model of {' or '.join(installed)}; load base and adapter in Python, and call "
        "lorafamily.export_peft or lorafamily.merge"
    )


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, and suggests the nearest command or option."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        known += [name for action in self._actions for name in action.choices or () if isinstance(name, str)]
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        close = nearest(wrong[1] or wrong[2], known) if wrong else ""
        self.exit(2, f"{self.prog}: {message}{close}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lorafamily", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"lorafamily {version('lorafamily')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in CHAT.items():
        commands.add_parser(name, help=about)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.add_argument("--json", action="store_true", help="print a JSON object, and no progress bar")
        added.set_defaults(run=run)
        return added

    def converting(name: str, run: Any, out: str) -> argparse.ArgumentParser:
        added = command(name, run)
        added.add_argument("--adapter", type=Path, required=True, help="folder that lorafamily.save wrote")
        added.add_argument("--out", type=Path, required=True, help=out)
        return added

    looking = command("inspect", inspect_folder)
    looking.add_argument("path", type=Path, help="folder that lorafamily.save wrote")
    looking.add_argument("--png", type=Path, help="draw the slices by layer and matrix into this file")
    merging = converting("merge", merge_into_checkpoint, out="new folder for the merged checkpoint")
    merging.add_argument("--base", type=Path, required=True, help="folder of a transformers checkpoint (safetensors)")
    merging.add_argument(
        "--dequantise",
        choices=("bfloat16", "float16", "float32"),
        help="turn a quantised checkpoint into one of this dtype; needs memory for the whole model",
    )
    smaller = converting("compress", compress_folder, out="folder for the smaller adapter")
    amount = smaller.add_mutually_exclusive_group(required=True)
    amount.add_argument("--rank", type=int, help="largest rank of every layer")
    amount.add_argument("--energy", type=float, help="smallest share of ‖ΔW‖² that every layer keeps")
    amount.add_argument("--budget", type=float, help="adapter parameters of all layers; see lorafamily.compress")
    amount.add_argument("--rank-budget", type=int, help="slices of all layers")
    exporting = converting("export", export_folder, out="folder for the files")
    exporting.add_argument("--base", type=Path, required=True, help="folder of the checkpoint the adapter is for")
    exporting.add_argument(
        "--layout", choices=("peft", "serving", "diffusers"), default="peft", help="see lorafamily.export_peft"
    )
    add_options(command("plan", plan_methods))
    return parser


def _table(saved: Saved, result: dict[str, Any]) -> str:
    width = max((len(at) for at in saved.modules), default=6)
    head = f"{'module':<{width}}  {'d_out × d_in':>13}  {'slices':>9}  {'scale':>6}  {'‖ΔW‖':>9}"
    lines = [f"{saved.record['method']} for {result['base']}, {saved.folder}", head, "─" * len(head)]
    for at, entry in saved.modules.items():
        d_out, d_in = entry["shape"]
        before, now = entry["initial_slices"], entry["slices"]
        slices = f"{now}" if now == before else f"{before} → {now}"
        norm = result["modules"][at]["norm"]
        lines.append(f"{at:<{width}}  {f'{d_out} × {d_in}':>13}  {slices:>9}  {entry['scale']:>6.3g}  {norm:>9.3g}")
    lines.append("─" * len(head))
    size = f"{result['bytes'] / 1024:,.0f} KiB on disk"
    lines.append(f"{result['parameters']:,} adapter parameters, {result['slices']} slices, {size}")
    if saved.extra_trained:
        lines.append(f"also trained: {', '.join(saved.extra_trained)}")
    return "\n".join(lines)


def _heatmap(ranks: dict[str, int]) -> str:
    """For every stack a grid of matrices by layers, whose blocks are as high as slices are many."""
    top, lines = max([1, *ranks.values()]), []
    grids = {stack: rank_grid({name: ranks[name] for name in names}) for stack, names in by_stack(ranks).items()}
    width = max((len(name) for matrices, _, _ in grids.values() for name in matrices), default=0)
    for stack, (matrices, layers, grid) in grids.items():
        extent = "" if stack == OUTSIDE else f", {layers[0]} to {layers[-1]}"
        lines.append(f"{stack + ': ' if stack else ''}slices by layer{extent}; {BLOCKS[-1]} = {top}")
        for name, row in zip(matrices, grid, strict=True):
            cells = ["·" if rank != rank else BLOCKS[round(rank / top * (len(BLOCKS) - 1))] for rank in row]
            lines.append(f"{name:<{width}}  {''.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
