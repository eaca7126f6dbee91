"""What a batch is: its type is kept, its rows are found, cut and gathered, and its loss is weighed."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from transformers import BatchEncoding, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.modeling_outputs import BaseModelOutput

import lorafamily
from heads import BERT, bart, bart_decoder, classes, classifier, gpt2, llama, masked, padded
from lorafamily.batch import batch_axes, cut_rows, first_rows, gather_rows, loss_weight, rows_in, to_device, weigher
from lorafamily.training.processes import Processes

Pair = namedtuple("Pair", "x y")
META = torch.device("meta")


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    texts: list
    made: int = field(init=False, default=7)


class Noted(list):
    """A list that carries something."""

    note = "none"


def noted(values):
    made = Noted(values)
    made.note = "mine"
    return made


x, y, texts = torch.arange(24.0).view(6, 4), torch.arange(6), list("abcdef")
TYPES = [
    Pair(x, y),
    Frozen(x, texts),
    BatchEncoding({"x": x, "y": y}),
    BaseModelOutput(last_hidden_state=x),
    UserDict({"x": x, "texts": texts}),
    OrderedDict(x=x, y=y),
    MappingProxyType({"x": x}),
    (x, y, tuple(texts)),
    [x, y],
    {"inner": noted([x, y]), "pair": Pair(x, y), "n": 3},
]


@pytest.mark.parametrize("batch", TYPES, ids=lambda batch: type(batch).__name__)
def test_a_batch_keeps_its_type(batch):
    moved, cut = to_device(batch, META), first_rows(batch, 2)
    for made in (moved, cut):
        assert type(made) is type(batch)

    def leaves(node):
        if isinstance(node, torch.Tensor):
            return [node]
        children = vars(node) if isinstance(node, Frozen) else node
        children = children.values() if hasattr(children, "values") else children
        return [leaf for child in children if not isinstance(child, (str, int)) for leaf in leaves(child)]

    assert all(leaf.device == META for leaf in leaves(moved))
    assert leaves(cut)
    for before, after in zip(leaves(batch), leaves(cut), strict=True):
        assert torch.equal(after, before[:2])
    assert rows_in(batch) == 6
    assert rows_in(cut) == 2


def test_what_a_container_carries_beside_its_entries_stays():
    cut = first_rows({"views": noted([x, y]), "y": y, "x": x}, 2)
    assert cut["views"].note == "mine"
    assert first_rows(Frozen(x, texts), 2).made == 7
    assert first_rows(Frozen(x, texts), 2).texts == ["a", "b"]


def test_packed_sequences_are_moved_and_cut_as_sequences():
    sequences = [torch.arange(float(n)) for n in (2, 5, 1, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert to_device(packed, META).data.device == META
    cut = cut_rows({"packed": packed, "y": torch.arange(4)}, 1, 3)
    assert [s.tolist() for s in unpack_sequence(cut["packed"])] == [s.tolist() for s in sequences[1:3]]
    ((both, share),) = gather_rows([packed, packed], 6)
    assert [len(s) for s in unpack_sequence(both)] == [2, 5, 1, 3, 2, 5]
    assert share == 1


class Moves:
    """An object with a `to`, as batches of graphs and lists of images have."""

    device = torch.device("cpu")

    def to(self, device):
        moved = copy.copy(self)
        moved.device = device
        return moved


def test_an_object_is_asked_to_move_itself():
    assert to_device({"graph": Moves(), "name": "a"}, META)["graph"].device == META


ids = torch.zeros(4, 9, dtype=torch.long)
image = torch.zeros(50, 40)
rgb = torch.zeros(3, 8, 8)
AXES = {
    "positions of three kinds": (
        {"input_ids": ids, "labels": ids, "position_ids": torch.zeros(3, 4, 9)},
        (4, [0, 0, 1]),
    ),
    "as many rows as kinds of positions": (
        {"input_ids": ids[:3], "labels": ids[:3], "position_ids": torch.zeros(3, 3, 9)},
        (3, [0, 0, 1]),
    ),
    "images of several sizes beside texts": (
        {"input_ids": ids[:3], "labels": ids[:3], "pixel_values": torch.zeros(70, 12), "grid": torch.zeros(5, 3)},
        (3, [0, 0, None, None]),
    ),
    "images of one size, several a row": (
        {"input_ids": ids[:3], "labels": ids[:3], "pixel_values": torch.zeros(5, 3, 8, 8)},
        (3, [0, 0, None]),
    ),
    "positions that all rows share": (
        {"input_ids": ids, "labels": ids, "cache_position": torch.arange(9)},
        (4, [0, 0, None]),
    ),
    "class weights": ({"x": torch.zeros(64, 8), "w": torch.zeros(8), "y": torch.zeros(64)}, (64, [0, None, 0])),
    "a scalar and a setting": (
        {"x": torch.zeros(5, 3, 8, 8), "size": (224, 224), "stride": (2, 2), "t": torch.tensor(1.0)},
        (5, [0, [None, None], [None, None], None]),
    ),
    "detection": (
        {"images": [image] * 4, "targets": [{"boxes": torch.zeros(3, 4), "labels": torch.zeros(3)}] * 4},
        (4, ["entries", "entries"]),
    ),
    "detection, as torchvision collates": (
        ((rgb,) * 4, tuple({"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in range(1, 5))),
        (4, ["entries", "entries"]),
    ),
    "rows that nobody collated": ([{"image": rgb, "label": 1}] * 4, (4, "entries")),
    "pairs that nobody collated": ([(rgb, 1)] * 5, (5, "entries")),
    "texts alone": (["a", "b", "c"], (3, "entries")),
    "texts beside tensors": ({"x": torch.zeros(6, 2), "text": list("abcdef")}, (6, [0, "entries"])),
    "two encodings": ([{"ids": ids, "mask": ids}, {"ids": ids, "mask": ids}], (4, [[0, 0], [0, 0]])),
    "time first": ((torch.zeros(9, 4), torch.zeros(7, 4), torch.zeros(4)), (4, [1, 1, 0])),
    "time first, without lengths": ((torch.zeros(9, 4), torch.zeros(7, 4)), (4, [1, 1])),
    "time first, features": ({"x": torch.zeros(9, 4, 16), "y": torch.zeros(4)}, (4, [1, 0])),
    "batch first with recurrent states": (
        {"x": torch.zeros(4, 9, 16), "y": torch.zeros(4), "h": torch.zeros(2, 4, 16)},
        (4, [0, 0, 1]),
    ),
    "keys and values of layers": (
        {"input_ids": ids, "cache": ((torch.zeros(4, 2, 9, 5),) * 2,) * 3},
        (4, [0, [[0, 0]] * 3]),
    ),
    "a mask for all": ({"input_ids": ids, "labels": ids, "mask": torch.zeros(1, 1, 9, 9)}, (4, [0, 0, None])),
    "arrays": ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, (4, [0, 0])),
    "a tensor": (torch.zeros(4, 2), (4, 0)),
    "numbers": ({"n": 3, "t": torch.tensor(1)}, (0, [None, None])),
}


@pytest.mark.parametrize("named", AXES)
def test_the_axis_of_rows(named):
    batch, expected = AXES[named]
    assert batch_axes(batch) == expected


def test_images_stay_whole_while_their_list_is_cut():
    cut = first_rows({"images": [image] * 64, "targets": [{"boxes": torch.zeros(2, 4)}] * 64}, 32)
    assert len(cut["images"]) == len(cut["targets"]) == 32
    assert cut["images"][0].shape == (50, 40)


def test_what_a_tokeniser_noted_is_cut_with_its_rows():
    batch = BatchEncoding({"x": x, "y": y})
    batch._encodings = list(texts)  # words and offsets, of real tokenisers
    assert cut_rows(batch, 2, 4).encodings == ["c", "d"]


FILL = {"input_ids": 0, "labels": -100}

# Gathering


def test_a_scoring_batch_has_as_many_rows_as_asked_for():
    batches = [{"x": torch.full((5, 2), float(i)), "text": [str(i)] * 5, "w": torch.ones(2)} for i in range(9)]
    ((batch, share),) = gather_rows(batches, 32)
    assert batch["x"][:, 0].tolist() == [float(i // 5) for i in range(32)]
    assert batch["text"] == [str(i // 5) for i in range(32)]
    assert batch["w"].tolist() == [1, 1]
    assert share == 1
    ((batch, _),) = gather_rows(batches, 3)
    assert len(batch["x"]) == 3
    ((batch, _),) = gather_rows(batches, 1000)
    assert len(batch["x"]) == 45
    with pytest.raises(lorafamily.DataError, match="gave no batch"):
        gather_rows([], 32)


def test_gathered_along_the_second_axis():
    batches = [{"x": torch.full((7, 4, 3), float(i)), "y": torch.full((4,), i)} for i in range(3)]
    ((batch, _),) = gather_rows(batches, 10)
    assert batch["x"].shape == (7, 10, 3)
    assert batch["x"][0, :, 0].tolist() == batch["y"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("make", [gpt2, llama, bart, bart_decoder, masked, classifier])
def test_losses_weighed_are_the_loss_of_all_rows(make):
    """Whatever the model's loss is a mean over: rows of one batch taken apart, and batches put together."""
    model, batch = make(), classes(0, 12, 7) if make is classifier else padded(0, 12, 7)
    whole = model(**batch).loss.item()
    pieces = [cut_rows(batch, 0, 1), cut_rows(batch, 1, 4), cut_rows(batch, 4, 7)]
    weights = [loss_weight(piece, model) for piece in pieces]
    assert len(set(weights)) > 1
    losses = [model(**piece).loss.item() for piece in pieces]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    # Language models of transformers compute their loss in float32: sums over some rows and over all round otherwise.
    assert mean == pytest.approx(whole, rel=1e-6)
    ((joined, share),) = gather_rows(pieces, 7)
    assert share == 1
    assert model(**joined).loss.item() == whole


def test_batches_padded_to_different_lengths_stay_apart_and_are_weighed():
    model = gpt2()
    one, other = padded(0, 12), padded(1, 9)
    pieces = gather_rows([one, other, padded(2, 12)], 10, lambda batch: loss_weight(batch, model))
    assert [tuple(piece["labels"].shape) for piece, _ in pieces] == [(6, 12), (4, 9)]
    assert sum(share for _, share in pieces) == pytest.approx(1)
    found = sum(share * model(**piece).loss.item() for piece, share in pieces)
    filled = {key: torch.nn.functional.pad(other[key], (0, 3), value=value) for key, value in FILL.items()}
    together = {key: torch.cat([one[key], filled[key], padded(2, 12)[key][:2]]) for key in one}
    assert found == pytest.approx(model(**together).loss.item(), rel=1e-6)
    with pytest.raises(lorafamily.DataError, match="no label counts in the 4 rows"):
        gather_rows([one | {"labels": torch.full((4, 12), -100)}], 10, lambda batch: loss_weight(batch, model))


def test_what_a_loss_is_a_mean_over():
    batch = padded(0, 12)
    counted = int((batch["labels"] != -100).sum())
    assert loss_weight(batch, bart()) == counted
    assert loss_weight(batch, gpt2()) == int((batch["labels"][:, 1:] != -100).sum())
    assert loss_weight(batch) == counted
    assert loss_weight({"x": x}) == 6
    assert loss_weight({"n": 3}) == 1
    assert loss_weight({"x": x, "labels": torch.zeros(6, 2)}) == 6  # numbers to be near: no tokens
    head = torch.nn.Sequential(gpt2())
    assert loss_weight(batch, head) == loss_weight(batch, gpt2())  # inside another module
    assert loss_weight(batch, speech("mean")) == 4


def speech(reduction: str) -> Wav2Vec2ForCTC:
    sizes = {"num_hidden_layers": 1, "conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,)}
    sizes |= {"num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4}
    torch.manual_seed(0)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**BERT, **sizes}, ctc_loss_reduction=reduction)).eval()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_a_sum_over_rows_adds_up(reduction):
    """The default of wav2vec2."""
    model = speech(reduction)
    random = torch.Generator().manual_seed(1)
    sounds, labels = torch.randn(6, 60, generator=random), torch.randint(1, 20, (6, 5), generator=random)
    whole = model(input_values=sounds, labels=labels).loss.item()
    pieces = [{"input_values": sounds[some], "labels": labels[some]} for some in (slice(0, 1), slice(1, 6))]
    apart = [{**pieces[0], "labels": labels[:1, :4]}, pieces[1]]  # are not joined
    weigh = weigher("auto", model)
    shared = Processes(torch.device("cpu")).shares(pieces, weigh, False)
    # float32: sums over some rows and over all round otherwise.
    assert sum(share * model(**piece).loss.item() for piece, share in shared) == pytest.approx(whole, rel=1e-5)
    assert [share for _, share in gather_rows(apart, 6, weigh)] == [share for _, share in shared]


def test_the_ways_to_weigh():
    model, batch = gpt2(), padded(0, 12)
    own = lambda model, batch: model(**batch).loss  # noqa: E731
    assert weigher("auto", model)(batch) == loss_weight(batch, model)
    assert weigher("auto", model, own)(batch) == 4
    assert weigher("rows", model)(batch) == 4
    assert weigher("tokens", model, own)(batch) == loss_weight(batch, model)
    assert weigher(lambda batch: torch.tensor(5), model)(batch) == 5.0
    with pytest.raises(lorafamily.DataError, match='loss_over="tokens" counts whole numbers'):
        weigher("tokens", model)({"x": x})
    with pytest.raises(lorafamily.DataError, match="loss_over gave -1 for a batch"):
        weigher(lambda batch: -1, model)(batch)
    with pytest.raises(lorafamily.DataError, match="loss_over='words': must be"):
        weigher("words", model)
