"""Chat templates: the text of a conversation, and which of its characters are the assistant's.

Templates with generation marks ({% generation %}) say so. For all others the conversation is rendered a second time
with a character of Unicode's private use area before and after each content of the assistant, which shows where the
content is, whatever the template writes around it. A turn begins where the generation prompt for the conversation so
far ends, since the model writes what follows, and ends with the end-of-turn token, which the model must learn to write.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from lorafamily.chat.rows import RowError

Span = tuple[int, int]
Messages = list[dict[str, Any]]

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message.role | capitalize + ':' }}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token + '\n\n' }}"
    "{% else %}{{ '\n' + message.content + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
)
"""For tokenizers without a template: a heading for each role, and the end-of-text token after the assistant's
content. `plain_for` adds the token that begins a text."""

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """A template with the tokenizer whose special tokens it uses. `text`: Jinja, as in its `chat_template`."""

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer, self.text = tokenizer, text
        self.marked = bool(MARK.search(text))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which matches nowhere

    @property
    def pad(self) -> int:
        """Id of the token to pad with. Padding is masked everywhere, so any token will do."""
        given = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if given is None else given)

    def render(self, messages: Messages, *, prompt: bool = False, tools: list[Any] | None = None) -> str:
        """The conversation as text. `prompt`: with the generation prompt for the assistant's next answer.

        Raises:
            RowError: the template refuses it, for example a system message.
        """
        return self._rendered(messages, prompt, tools)[0]

    def spans(self, messages: Messages, tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of the assistant's turns, as [begin, end) in characters, end-of-turn
        tokens included; without those whose weight is 0.

        Raises:
            RowError: the template refuses it, or changes the assistant's content so that it cannot be found.
        """
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked:
            text, spans = self._rendered(messages, False, tools, marks=True)
            spans = [(begin, self._through_end(text, begin, end)) for begin, end in spans if end > begin]
        else:
            text = self.render(messages, tools=tools)
            contents = self._contents(messages, text, tools)
            spans = [self._span(messages, at, text, contents.get(at), tools) for at in turns]
        weights = [messages[at].get("weight", 1) for at in turns]
        if not all(weights):
            if len(spans) != len(turns):
                raise RowError("a weight of 0 needs a template that marks every message of the assistant once")
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight]
        return text, [(begin, end) for begin, end in spans if end > begin]

    def end_of_turn(self) -> int | None:
        """Id of the token that ends the assistant's turn; None where no special token does, or where the template
        refuses so short a conversation."""
        try:
            text, spans = self.spans([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except RowError:
            return None
        ids = self.tokenizer(text[slice(*spans[-1])], add_special_tokens=False)["input_ids"] if spans else []
        return ids[-1] if ids and ids[-1] in self.tokenizer.added_tokens_decoder else None

    def _span(self, messages: Messages, at: int, text: str, content: Span | None, tools: list[Any] | None) -> Span:
        """The span of the turn of message `at`. `content`: the span of its content, None if it was not found."""
        begin = self._begin(messages, at, text, tools)
        if content is not None:
            rest = text[content[1] :]
            if at + 1 < len(messages):  # without anything of the next message
                before, after = _unused(text, messages)
                until = self.render([*messages[:at], _around(messages[at], before, after)], tools=tools)
                rest = _shared(rest, until.rpartition(after)[2])
            end = content[1] + self._length_of_end(rest, last=bool(messages[at].get("tool_calls")))
            return min(begin, content[0]), end
        until = self.render(messages[: at + 1], tools=tools)
        shared = _shared(until, text)
        if begin == len(text) or (len(shared) < len(until.rstrip()) and at + 1 < len(messages)):
            raise RowError(
                f"the chat template changes message {at + 1} so that what the assistant says cannot be found; use a "
                "template with generation marks, or --loss-on everything"
            )
        return begin, begin + self._length_of_end(shared[begin:], last=True)

    def _begin(self, messages: Messages, at: int, text: str, tools: list[Any] | None) -> int:
        """Where the model begins to write message `at`: where the text stops agreeing with the generation prompt. The
        end of the text means that this is not known, and the content decides."""
        try:
            prompt = self.render(messages[:at], prompt=True, tools=tools)
        except RowError:
            if at:
                raise
            return len(text)  # a template may refuse an empty conversation
        content = messages[at]["content"].strip()[:20]
        unprompted = prompt == self.render(messages[:at], tools=tools)  # the template has no generation prompt
        if unprompted and not text[len(prompt) :].lstrip(" ").startswith(content):
            return len(text)  # but it writes a heading before the content
        return len(_shared(prompt, text))

    def _contents(self, messages: Messages, text: str, tools: list[Any] | None) -> dict[int, Span]:
        """The span of the content of each message of the assistant, from a rendering with unused characters around it.
        The result is empty if the template changes or leaves out a content."""
        before, after = _unused(text, messages)
        answers = [at for at, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
        marked = [_around(m, before, after) if at in answers else m for at, m in enumerate(messages)]
        try:
            rendered = self.render(marked, tools=tools)
        except RowError:
            return {}
        if rendered.replace(before, "").replace(after, "") != text or rendered.count(after) != len(answers):
            return {}
        found: dict[int, Span] = {}
        end = 0
        for at, piece in zip(answers, rendered.split(after), strict=False):
            _, mark, content = piece.rpartition(before)
            end += len(piece.replace(before, ""))
            # There is no mark if the template cut the start of the content, such as a train of thought.
            found[at] = (end - len(content) if mark else len(text), end)
        return found

    def _length_of_end(self, tail: str, last: bool) -> int:
        """How many characters after the content belong to the turn: up to and including the first (or `last`) special
        token; without any, all except white space at the end."""
        found = list(self._special.finditer(tail))
        return found[-1 if last else 0].end() if found else len(tail.rstrip())

    def _through_end(self, text: str, begin: int, end: int) -> int:
        """The end of a marked span, moved behind the token that ends the turn, which marks often leave out. White space
        after that token is cut off, since the model writes nothing there."""
        inside = text[begin:end]
        found = list(self._special.finditer(inside))
        if found and not inside[found[-1].end() :].strip():
            return begin + found[-1].end()
        following = self._special.match(text, end)
        return following.end() if following else end

    def _rendered(
        self, messages: Messages, prompt: bool, tools: list[Any] | None, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise RowError(f"the chat template refuses it ({reason})") from None
        return texts[0], [(begin, end) for begin, end in spans[0]] if marks else []


def plain_for(tokenizer: Any) -> str:
    """The plain template. It begins as the tokenizer begins every text: models that always saw such a token, as Gemma
    did, are lost without it."""
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + PLAIN if begins else PLAIN


def _around(message: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """The message with a character before and after its content, within outer white space, which templates strip."""
    content = message["content"].strip()
    return {**message, "content": message["content"].replace(content, f"{before}{content}{after}", 1)}


def _unused(text: str, messages: Messages) -> tuple[str, str]:
    """Two characters of the private use area that are neither in the text nor in the messages."""
    used = set(text).union(*(str(message["content"]) for message in messages))
    found = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
    return next(found), next(found)


def _shared(one: str, other: str) -> str:
    """The longest common beginning of two texts."""
    return "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
