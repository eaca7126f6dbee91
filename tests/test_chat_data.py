"""Files of conversations: every form, every kind of file, and the place and reason of whatever is wrong."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("tyro")

import chatting
from lorafamily.chat.forms import conversations
from lorafamily.chat.rows import Row, read
from lorafamily.chat.templates import PLAIN, Template
from lorafamily.chat.tokens import preview, tokenised
from lorafamily.errors import DataError

SYSTEM = {"role": "system", "content": "Be short."}
USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def of(**values):
    return conversations([Row("here", values)])[0]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Because."}]}]},
        {"messages": json.dumps([USER, ANSWER])},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "Why?", "output": "Because."},
        {"instruction": "Why?", "input": "", "output": "Because."},
    ],
)
def test_every_form_is_the_same_conversation(values):
    assert of(**values).messages == [USER, ANSWER]


def test_an_instruction_with_input_and_a_plain_text():
    said = of(instruction="Add.", input="1 2", output="3").messages
    assert said == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert of(text="Once.").text == "Once."
    assert of(text="Once.").messages is None


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        {"instruction": "Why?", "output": "Because.", "history": [["Why?", "Because."]]},
        {"prompt": "Why?", "completion": "Because.", "history": '[["Why?", "Because."]]'},
    ],
)
def test_a_system_message_and_earlier_turns_beside_the_conversation_belong_to_it(values):
    assert of(**values, system="Be short.").messages == [SYSTEM, USER, ANSWER, USER, ANSWER]


def test_every_kind_of_file_has_the_same_rows(tmp_path):
    rows = [{"prompt": f"Say {at}é", "completion": f'{at},\n"{at}"'} for at in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    files = ["a.jsonl", "a.jsonl.gz", "a.json", "bom.jsonl", "a.csv"]
    for name in files:
        assert [row.values for row in read(str(tmp_path / name))] == rows, name
    assert len(read(str(tmp_path))) == 3 * len(files)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    pyarrow.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.values for row in read(str(tmp_path / "a.parquet"))] == rows


def test_a_data_set_of_the_library_is_read_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "One.", "messages": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read("somebody/chats", "validation")
    assert asked == [("somebody/chats", "validation")]
    assert row.values == {"text": "One."}
    assert row.place == "somebody/chats[validation], row 1"


LINES = [
    (b"", "line 2: the line is empty"),
    (b"   ", "line 2: the line is empty"),
    (b'{"text": "caf\xe9"}', r"line 2: not UTF-8 \(byte 0xe9 at byte 14 of the line\)"),
    (b'{"text": "half', r"line 2: not JSON \(Unterminated string starting at, column 10\)"),
    (b"[1]", "line 2: must be a JSON object with keys, and is a list"),
    (b"null", "line 2: must be a JSON object with keys, and is null"),
    (b"{}", r"line 2: has the keys \(none\); a row needs messages; prompt and completion"),
    (b'{"mesages": []}', "line 2: has the keys mesages; .*; did you mean messages"),
    (b'{"messages": []}', "line 2: messages must be a list of at least one message"),
    (b'{"messages": "hello"}', "line 2: messages is a text that is no JSON"),
    (b'{"messages": [{"content": "a"}]}', "line 2: message 1 has no role"),
    (b'{"messages": [{"role": "asistant", "content": "a"}]}', '"asistant"; known are .*; did you mean assistant'),
    (b'{"messages": [{"role": "assistant", "text": "a"}]}', "line 2: message 1 has no content"),
    (b'{"messages": [{"role": "assistant", "content": 3}]}', "content of message 1 must be a text, .* type int"),
    (b'{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "message 1 has parts that are no text"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant says anything"),
    (b'{"messages": [{"role": "assistant", "content": " "}]}', "no message of the assistant says anything"),
    (b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "message 1 has the weight 2; it must be 0"),
    (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "no message .* has a weight of 1"),
    (
        b'{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "c"}',
        "one s",
    ),
    (b'{"prompt": "a", "completion": "b", "history": ["c"]}', "line 2: history must be a list of pairs"),
    (b'{"prompt": "a", "completion": "b", "system": 3}', "line 2: system must be a text"),
    (b'{"messages": ["a"]}', "message 1 must be an object with role and content"),
    (b'{"prompt": "a"}', "line 2: has no completion"),
    (b'{"prompt": "a", "completon": "b"}', "line 2: has no completion; did you mean completon"),
    (b'{"prompt": "a", "completion": ""}', "line 2: the answer is empty"),
    (b'{"instruction": "a"}', "line 2: has no output"),
    (b'{"instruction": 1, "output": "b"}', "line 2: instruction must be a text"),
    (b'{"text": ""}', "line 2: text is empty"),
    (b'{"text": null}', "line 2: text must be a text"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_broken_line_is_named_with_the_reason(line, reason, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n' + line + b"\n" + b'{"text": "good"}\n')
    with pytest.raises(DataError, match=reason) as caught:
        conversations(read(str(path)))
    said = str(caught.value)
    assert said.startswith(f"{path}, line 2: ")
    assert "\n" not in said
    assert said.endswith("(and 1 more rows are wrong); nothing was trained")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "no row in it"),
        ("a.jsonl", b"\n \n", "no row in it"),
        ("a.txt", b"hello", "data must end in .jsonl"),
        ("a.jsonl.gz", b"no gzip", "cannot be read .*[Nn]ot a gzipped file"),
        ("a.json", b'{"text": 1}', "must be a list of objects, and is an object"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "one object a line belongs in a file that ends in .jsonl"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: 3 columns, where the header has 2"),
        ("a.csv", b"prompt,completion\na\n", "line 2: 1 columns, where the header has 2"),
        ("a.csv", b"prompt,completion\na,caf\xe9\n", "line 2: not UTF-8"),
        ("a.csv", b'prompt,completion\na,"b\n', "not CSV"),
        ("a.parquet", b"PAR1 no parquet", "not Parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        conversations(read(str(tmp_path / name)))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file; did you mean chats.jsonl"):
        read(str(tmp_path / "chat.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no file that ends in"):
        read(str(tmp_path / "empty"))


def test_long_rows_are_cut_or_left_out_and_counted():
    template = Template(chatting.tokenizer(), chatting.CHATML)
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cat " * 40}]}
    hopeless = {"messages": [{"role": "user", "content": "cat " * 40}, {"role": "assistant", "content": "b"}]}
    talks = conversations([Row("here", one) for one in (short, long, hopeless)])
    cut = tokenised(talks, template, length=60)
    assert [len(row) for row in cut.rows][1:] == [60]
    assert (cut.cut, cut.dropped) == (2, 1)
    dropped = tokenised(talks, template, length=60, too_long="drop")
    assert len(dropped.rows) == 1
    assert (dropped.cut, dropped.dropped) == (0, 2)
    assert "1 rows" in dropped.line()
    assert "2 left out" in dropped.line()
    with pytest.raises(DataError, match="all 3 rows are longer than --length 5"):
        tokenised(talks, template, length=5, too_long="drop")


def test_a_look_shows_what_is_learnt_and_a_plain_text_ends():
    fast = chatting.tokenizer()
    template = Template(fast, PLAIN)
    talk, text = conversations([Row("here", {"messages": [USER, ANSWER]}), Row("here", {"text": "Once."})])
    found = tokenised([talk, text], template, length=99)
    assert preview(found.rows[0], fast, False) == "### User:\nWhy?\n\n### Assistant:« Because.<|im_end|>»\n\n"
    assert "\x1b[1;32m Because.<|im_end|>\x1b[0m" in preview(found.rows[0], fast, True)
    assert preview(found.rows[1], fast, False) == "O«nce.<|im_end|>»"
    everything = tokenised([talk], template, length=99, loss_on="everything")
    assert preview(everything.rows[0], fast, False).startswith("#«##")
