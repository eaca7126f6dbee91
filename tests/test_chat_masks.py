"""Exactly what the assistant says is learnt, whatever the chat template.

Templates: those that ship in trl, with and without generation marks, and for other families ones written here from the
published formats. The tokenizer is made up on the spot; each family's special tokens are added to it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from lorafamily.chat.forms import Conversation  # noqa: E402
from lorafamily.chat.rows import RowError  # noqa: E402
from lorafamily.chat.templates import PLAIN, Template, plain_for  # noqa: E402
from lorafamily.chat.tokens import tokens_of  # noqa: E402

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set said = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set said = messages %}{% endif %}{{ bos_token }}"
    "{% for m in said %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.index0 == 0 else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
HEADINGS = (  # no generation prompt, no special token, no marks
    "{% for m in messages %}{{ m.role | upper + '\n' + m.content + '\n---\n' }}{% endfor %}"
)
TRIMMED = (  # as Llama 2: trims, and the system message inside the first thing that the user says
    "{% if messages[0].role == 'system' %}{% set said = messages[1:] %}"
    "{% set first = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% else %}{% set said = messages %}{% set first = '' %}{% endif %}{% for m in said %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# name: (template or trl's file, special tokens, end of text, what ends a turn, knows system messages)
FAMILIES = {
    "llama 3": ("llama3", ["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", "<|eot_id|>", True),
    "qwen 2.5": ("qwen2_5", ["<|im_start|>"], "<|im_end|>", "<|im_end|>", True),
    "qwen 3": ("qwen3", ["<|im_start|>"], "<|im_end|>", "<|im_end|>", True),
    "gemma": ("gemma", ["<start_of_turn>", "<end_of_turn>"], "<eos>", "<end_of_turn>", False),
    "gemma 3": ("gemma3", ["<start_of_turn>", "<end_of_turn>"], "<eos>", "<end_of_turn>", True),
    "phi 3": ("phi3", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|endoftext|>", "<|end|>", True),
    "deepseek v3": (
        "deepseekv3",
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        True,
    ),
    "mistral": (MISTRAL, [], "</s>", "</s>", True),
    "llama 2": (TRIMMED, [], "</s>", " </s>", True),
    "chatml": (CHATML, ["<|im_start|>"], "<|im_end|>", "<|im_end|>", True),
    "chatml without special tokens": (CHATML, [], "<eos>", "<|im_end|>", True),
    "zephyr": (ZEPHYR, [], "</s>", "</s>", True),
    "plain": (PLAIN, [], "</s>", "</s>", True),
    "headings": (HEADINGS, [], "</s>", "\n---", True),
}
BEFORE = {"qwen 3": "<think>\n\n</think>\n\n"}
"""What the template itself has the model write before the last answer."""

TURNS = [
    {"role": "user", "content": "How many?\nSay it."},
    {"role": "assistant", "content": "Three, I think: 3."},
    {"role": "user", "content": "Three, I think: 3."},  # the same words from somebody else are not learnt
    {"role": "assistant", "content": "  Yes.\n\nThat many.  "},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are <welcome>"},
]
SYSTEM = {"role": "system", "content": "You count."}


def tokenizer(special: list[str], end: str):
    """Bytes as tokens, merged where a text of the test has them together, so that tokens cross words and spaces."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([turn["content"] for turn in TURNS] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token=end)
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def trl_file(name: str) -> str:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this trl has no {path.name}")
    return path.read_text()


def template_of(family: str, marks: bool = False) -> Template:
    text, special, end, _, _ = FAMILIES[family]
    if "{" not in text:
        text = trl_file(f"{text}_training" if marks else text)
    return Template(tokenizer(special, end), text)


def learnt(template: Template, messages: list[dict]) -> list[str]:
    """What is learnt, run by run."""
    row = tokens_of(Conversation("here", messages), template)
    runs, last = [], False
    for token, counts in zip(row.ids.tolist(), row.learnt.tolist(), strict=True):
        if counts and not last:
            runs.append([])
        if counts:
            runs[-1].append(token)
        last = counts
    return [template.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [2, 4, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_the_assistant_says_is_learnt_with_the_end_of_its_turn(family, turns, system):
    template, (_, _, _, end, knows_system) = template_of(family), FAMILIES[family]
    messages = ([SYSTEM] if system else []) + TURNS[:turns]
    if system and not knows_system:
        with pytest.raises(RowError, match=r"refuses it.*System role not supported"):
            template.spans(messages)
        return
    text, spans = template.spans(messages)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    found = [text[begin:end] for begin, end in spans]
    assert len(found) == len(said)
    for number, (content, span) in enumerate(zip(said, found, strict=True)):
        before = BEFORE.get(family, "") if number == len(said) - 1 else ""
        # templates trim or keep white space; around it nothing but it may differ
        assert span.strip().removeprefix(before.strip()).strip() == f"{content.strip()}{end}" or span.strip() == (
            f"{before}{content}{end}".strip()
        )
        assert span.endswith(end)
    runs = learnt(template, messages)
    assert [run.strip() for run in runs] == [span.strip() for span in found], "tokens say what characters say"


@pytest.mark.parametrize("family", ["llama 3", "qwen 2.5", "gemma", "gemma 3", "phi 3"])
def test_incremental_rendering_finds_what_generation_marks_say(family):
    """trl's marked templates are somebody else's word on what is learnt. Two differences are theirs: Qwen's marks take
    in the line break that the generation prompt ends with, and Phi's the end-of-text token after the last end of turn.
    """
    ours, theirs = template_of(family), template_of(family, marks=True)
    assert theirs.marked
    assert not ours.marked
    for messages in (TURNS[:2], TURNS, [SYSTEM, *TURNS[:4]]):
        if messages[0] is SYSTEM and not FAMILIES[family][4]:
            continue
        row, marked = (tokens_of(Conversation("here", messages), one) for one in (ours, theirs))
        assert row.ids.tolist() == marked.ids.tolist()
        more = marked.learnt & ~row.learnt
        assert not (row.learnt & ~marked.learnt).any()
        extra = {"qwen 2.5": "\n", "phi 3": "<|endoftext|>"}.get(family)
        assert {ours.tokenizer.decode(token) for token in row.ids[more].tolist()} == ({extra} if extra else set())


def test_a_train_of_thought_that_the_template_drops_from_earlier_turns_is_no_error():
    template = template_of("qwen 3")
    thought = {"role": "assistant", "content": "<think>\nOne, two.\n</think>\n\nThree."}
    runs = learnt(template, [TURNS[0], thought, TURNS[2], thought])
    assert runs == ["Three.<|im_end|>", "<think>\nOne, two.\n</think>\n\nThree.<|im_end|>"]


def test_marks_that_leave_the_end_of_turn_out_get_it():
    marked = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
    )
    template = Template(tokenizer(["<|im_start|>"], "<|im_end|>"), marked)
    assert template.marked
    assert learnt(template, TURNS[:2]) == ["Three, I think: 3.<|im_end|>"]


@pytest.mark.parametrize(("family", "marks"), [(family, False) for family in FAMILIES] + [("llama 3", True)])
def test_an_answer_of_weight_0_is_not_learnt(family, marks):
    template = template_of(family, marks)
    runs = learnt(template, TURNS[:4])
    assert len(runs) == 2
    assert learnt(template, [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]) == runs[1:]
    assert learnt(template, [*TURNS[:3], {**TURNS[3], "weight": 0}]) == runs[:1]


def test_the_plain_template_begins_as_the_tokenizer_does():
    fast = tokenizer(["<s>"], "</s>")
    assert plain_for(fast) == PLAIN
    fast.bos_token = "<s>"
    assert plain_for(fast) == PLAIN, "it has such a token, and does not begin texts with it"
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
    )
    template = Template(fast, plain_for(fast))
    row = tokens_of(Conversation("here", TURNS[:2]), template)
    assert row.ids[:2].tolist() == [fast.bos_token_id, *fast("###", add_special_tokens=False)["input_ids"][:1]]
    assert learnt(template, TURNS[:2]) == learnt(Template(fast, PLAIN), TURNS[:2])


def test_a_call_of_a_tool_is_learnt_whole():
    template = template_of("qwen 2.5")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "count", "arguments": {"n": 3}}}]}
    answer = {"role": "tool", "content": "3"}
    runs = learnt(template, [TURNS[0], call, answer, TURNS[1]])
    assert runs[0].startswith("<tool_call>")
    assert runs[0].endswith("</tool_call><|im_end|>")
    assert runs[1:] == ["Three, I think: 3.<|im_end|>"]


def test_a_template_that_rewrites_what_is_said_is_refused():
    template = Template(tokenizer([], "</s>"), CHATML.replace("m.content", "(m.content | upper | reverse | join)"))
    assert learnt(template, TURNS[:2])  # the last turn is all that follows the prompt
    turned = CHATML.replace("m.content", "(m.content if loop.last else loop.index | string)")
    with pytest.raises(RowError, match="changes message 2"):
        Template(tokenizer([], "</s>"), turned).spans(TURNS)
