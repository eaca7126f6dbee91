"""Answers of a model, in batches, and the command `lorafamily generate`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.utils.rnn import pad_sequence

from lorafamily.chat.forms import Conversation
from lorafamily.chat.model import read_base, read_template
from lorafamily.chat.rows import RowError
from lorafamily.chat.settings import Generate
from lorafamily.chat.templates import Template
from lorafamily.deploy.files import load
from lorafamily.deploy.saved import RECORD
from lorafamily.errors import DataError, FileError
from lorafamily.terminal import nearest

RUN = "run.yaml"


def generate_command(options: Generate, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Run the command; returns its result as data and as text.

    Raises:
        DataError: nothing was asked, or an option makes no sense.
        FileError: there is no such model or adapter.
    """
    if options.max_new < 1:
        raise DataError(f"--max-new {options.max_new}: must be at least 1 token")
    if options.temperature < 0:
        raise DataError(f"--temperature {options.temperature:g}: must be at least 0")
    if not 0 < options.top_p <= 1:
        raise DataError(f"--top-p {options.top_p:g}: must be in (0, 1]")
    asked = list(options.prompt)
    if not asked and not sys.stdin.isatty():
        asked = [sys.stdin.read().rstrip("\n")]
    if not any(prompt.strip() for prompt in asked):
        raise DataError('nothing was asked: lorafamily generate --adapter FOLDER "Hello", or on standard input')
    adapters = [] if options.adapter is None else [options.adapter]
    name = model_name(options.model, adapters)
    warn_of_other_quantisation(options.quantise, adapters)
    template = read_template(name, options.template, options.adapter)
    model = read_base(name, options, template)
    if options.adapter is not None:
        load(model, options.adapter)
    system = [{"role": "system", "content": options.system}] if options.system else []
    torch.manual_seed(options.seed)
    try:
        prompts = [template.render([*system, {"role": "user", "content": question}], prompt=True) for question in asked]
    except RowError as error:
        raise DataError(str(error)) from None
    temperature, top_p = options.temperature, options.top_p
    answers = list(answers_to(model, template, prompts, options.max_new, temperature=temperature, top_p=top_p))
    text = "\n\n".join(f"> {question}\n{answer}" for question, answer in zip(asked, answers, strict=True))
    return {"model": name, "answers": answers}, answers[0] if len(answers) == 1 else text


def model_name(given: str | None, adapters: Sequence[Path]) -> str:
    """The base: the given one, or that of the first adapter's run.

    Raises:
        FileError: a folder holds no adapter, or damaged options.
        DataError: no base is given, and the adapter does not come from a run.
    """
    for adapter in adapters:
        if not (adapter / RECORD).is_file():
            close = "" if adapter.exists() else nearest(adapter.name, [file.name for file in adapter.parent.glob("*")])
            raise FileError(f"--adapter {adapter}: no {RECORD} there; it must be a folder that train wrote{close}")
    if given is not None:
        return given
    if adapters and (adapters[0] / RUN).is_file():
        if "model" not in (options := _model_options(adapters[0])):
            raise FileError(f"{adapters[0] / RUN}: not the options of a run; give --model")
        return str(options["model"])
    raise DataError("needs --model, the folder or name of the base")


def warn_of_other_quantisation(given: str | None, adapters: Sequence[Path]) -> None:
    """Warn of adapters that were trained on a base quantised otherwise: they added to other weights."""
    for adapter in adapters:
        options = _model_options(adapter)
        if options and (then := options.get("quantise")) != given:
            which, say = ("full precision", "leave out --quantise") if then is None else (then, f"--quantise {then}")
            warnings.warn(f"--adapter {adapter}: trained on the base in {which}; for that one {say}", stacklevel=2)


def _model_options(adapter: Path) -> dict[str, Any]:
    """What the run of an adapter was told about its base; nothing where it is not of a run, or the file is damaged."""
    try:
        return dict(yaml.safe_load((adapter / RUN).read_text(encoding="utf-8"))["model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError):
        return {}


@torch.no_grad()
def answers_to(
    model: Any,
    template: Template,
    prompts: Sequence[str],
    max_new: int,
    *,
    batch: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """What the model writes after each prompt (a text from the template), at most `max_new` tokens; see `end_tokens`.

    `temperature`: 0 takes the likeliest token each time. `batch`: prompts at a time. The model's own generation config,
    which may punish repetition or sample from a few tokens only, has no say but in what ends an answer.
    """
    from transformers import GenerationConfig

    tokenizer = template.tokenizer
    ends, pad = end_tokens(model, template), template.pad
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(max_new_tokens=max_new, eos_token_id=ends, pad_token_id=pad, **sampling)
    for begin in range(0, len(prompts), batch):
        found = tokenizer(list(prompts[begin : begin + batch]), add_special_tokens=False)["input_ids"]
        rows = [torch.tensor(row, dtype=torch.long, device=model.device) for row in found]
        # Padding comes first, so that new tokens follow the text.
        ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        own = model.generation_config
        model.generation_config = settings  # settings given to `generate` would be completed by the model's own
        try:
            written = model.generate(input_ids=ids, attention_mask=mask)
        finally:
            model.generation_config = own
        for row in written[:, ids.shape[1] :].tolist():
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            yield tokenizer.decode(row[:end], skip_special_tokens=True).strip()


def end_tokens(model: Any, template: Template) -> list[int]:
    """Ids of the tokens that end an answer, by the generation config, the tokenizer or the template's end of a turn."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {template.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given]), template.end_of_turn()}
    return sorted(token for token in found if token is not None)


def questions_of(conversations: Iterable[Conversation], template: Template, most: int) -> tuple[list[str], list[str]]:
    """Of the first `most` conversations, the prompts for the assistant's last answers, and those answers."""
    questions, answers = list[str](), list[str]()
    for talk in conversations:
        if talk.messages is not None and len(answers) < most:
            last = max(at for at, message in enumerate(talk.messages) if message["role"] == "assistant")
            questions.append(template.render(talk.messages[:last], prompt=True, tools=talk.tools))
            answers.append(talk.messages[last]["content"])
    return questions, answers
