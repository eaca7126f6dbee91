"""Rows as conversations or plain texts; the form of a row follows from its keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorafamily.chat.rows import Row, RowError, checked, tried
from lorafamily.terminal import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = "messages; prompt and completion; instruction, input (if any) and output; or text"
KEYS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")


@dataclass(frozen=True)
class Conversation:
    """One row. `place`: such as "chats.jsonl, line 3"; `messages`: with `role` and `content`, as chat templates take
    them; None for a plain text; `tools`: descriptions of functions that the template may show."""

    place: str
    messages: list[dict[str, Any]] | None
    text: str = ""
    tools: list[Any] | None = None


def conversations(rows: Iterable[Row]) -> list[Conversation]:
    """Every row as a conversation or a text. If some are neither, DataError gives the place and reason of the first."""
    return checked(tried(row.place, _conversation, row) for row in rows)


def _conversation(row: Row) -> Conversation:
    values, place = row.values, row.place
    if "messages" in values:
        messages = _with_system(values, _messages(values["messages"]))
        tools = _parsed(values.get("tools"), "tools")
        if tools is not None and not isinstance(tools, list):
            raise RowError("tools must be a list of function descriptions")
        return Conversation(place, messages, tools=tools or None)
    if "prompt" in values or "completion" in values:
        prompt, completion = values.get("prompt"), values.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return Conversation(place, _with_system(values, _messages([*prompt, *completion])))
        user, assistant = _text(values, "prompt"), _text(values, "completion")
    elif "instruction" in values or "output" in values:
        user, assistant = _text(values, "instruction"), _text(values, "output")
        if values.get("input"):
            user += f"\n\n{_text(values, 'input')}"
    elif "text" in values:
        text = _text(values, "text")
        if not text.strip():
            raise RowError("text is empty")
        return Conversation(place, None, text)
    else:
        close = next((hint for key in values if (hint := nearest(key, KEYS))), "")
        raise RowError(f"has the keys {', '.join(values) or '(none)'}; a row needs {FORMS}{close}")
    if not assistant.strip():
        raise RowError("the answer is empty, so there is nothing to learn")
    said = [part for pair in _history(values) for part in pair] + [user, assistant]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return Conversation(place, _with_system(values, turns))


def _with_system(values: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the system message that a row has beside them, if any."""
    text = _text(values, "system") if values.get("system") is not None else ""
    before = {"role": "system", "content": text}
    if not text.strip() or messages[0] == before:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise RowError("has one system message in system and another in messages")
    return [before, *messages]


def _history(values: dict[str, Any]) -> list[list[str]]:
    """Earlier turns of an instruction, as pairs of what was said and its answer."""
    pairs: Any = _parsed(values.get("history"), "history") or []
    if isinstance(pairs, list) and all(isinstance(p, list) and [*map(type, p)] == [str, str] for p in pairs):
        return pairs
    raise RowError("history must be a list of pairs of texts: what was said, and the answer")


def _text(values: dict[str, Any], key: str) -> str:
    if key not in values:
        raise RowError(f"has no {key}{nearest(key, values)}")
    if not isinstance(values[key], str):
        raise RowError(f"{key} must be a text, and is of type {type(values[key]).__name__}")
    return str(values[key])


def _messages(given: Any) -> list[dict[str, Any]]:
    given = _parsed(given, "messages")
    if not isinstance(given, list) or not given:
        raise RowError("messages must be a list of at least one message")
    messages = [_message(message, number) for number, message in enumerate(given, 1)]
    spoken = [m for m in messages if m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))]
    if not any(message.get("weight", 1) for message in spoken):
        what = "has a weight of 1" if spoken else "says anything"
        raise RowError(f"no message of the assistant {what}, so there is nothing to learn")
    return messages


def _message(given: Any, number: int) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RowError(f"message {number} must be an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    role, content = message.get("role"), message.get("content", "" if message.get("tool_calls") else None)
    if role is None:
        raise RowError(f"message {number} has no role{nearest('role', message)}")
    if role not in ROLES:
        raise RowError(f'message {number} has the role "{role}"; known are {", ".join(ROLES)}{nearest(role, ROLES)}')
    if content is None:
        raise RowError(f"message {number} has no content{nearest('content', message)}")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content) or not all(isinstance(part.get("text"), str) for part in parts):
            raise RowError(f"message {number} has parts that are no text; only text can be trained on")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise RowError(f"content of message {number} must be a text, and is of type {type(content).__name__}")
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"message {number} has the weight {message['weight']!r}; it must be 0 (not learnt) or 1")
    return {**message, "role": role, "content": content}


def _parsed(given: Any, key: str) -> Any:
    """A list is JSON text in a column of a CSV file."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise RowError(f"{key} is a text that is no JSON ({error.msg}, column {error.colno})") from None
