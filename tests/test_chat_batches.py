"""Packed rows learn what padded ones do, chunked losses are the whole one, and a run goes on inside a round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import chatting
import lorafamily
from conftest import perturb_
from lorafamily.batch import IGNORED
from lorafamily.chat.batches import ChatBatches, sees_other_rows
from lorafamily.chat.loss import ChunkedLoss, difference, loss_of, own_loss
from lorafamily.chat.tokens import Tokens
from lorafamily.errors import DataError
from lorafamily.layers.placement import placement_of


def rows(count: int = 12, seed: int = 0) -> list[Tokens]:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(generator.integers(3, 20))
        learnt = generator.random(length) < 0.6
        learnt[0], learnt[-1] = False, True
        found.append(Tokens(generator.integers(0, 300, length).astype(np.int32), learnt))
    return found


def plain_loss(model, batch) -> torch.Tensor:
    """All logits at once, in their own dtype; transformers computes its loss in float32 whatever they are."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def gradients(model, batches, loss_fn) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean over all learnt tokens of all batches."""
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    model.zero_grad()
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = loss_fn(model, batch) * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "olora", "alora", "lora2", "adalora"])
def test_packed_and_padded_rows_give_the_same_loss_and_gradients(method):
    """float64; what differs is the order of sums within a row of attention, and of rows in a sum."""
    model = chatting.model("neox").double()
    lorafamily.apply(model, method, rank=4, seed=0)
    perturb_(model)
    model.eval()
    padded = list(ChatBatches(rows(), 4, 0))
    packed = list(ChatBatches(rows(), 2, 0, pack=40))
    assert len(packed) < len(padded) * 2
    assert packed[0]["position_ids"].max() < packed[0]["input_ids"].shape[1] - 1
    loss, of_padded = gradients(model, padded, plain_loss)
    packed_loss, of_packed = gradients(model, packed, ChunkedLoss(7))
    assert abs(loss - packed_loss) < 1e-9
    assert of_padded
    assert of_padded.keys() == of_packed.keys()
    for name, gradient in of_padded.items():
        torch.testing.assert_close(of_packed[name], gradient, rtol=1e-9, atol=1e-9)
        assert gradient.abs().max() > 1e-6


def test_a_model_whose_rows_see_each_other_is_noticed():
    model = chatting.model()
    assert sees_other_rows(model, 320) < 1e-4
    blind = type(model).forward
    model.forward = lambda position_ids=None, **given: blind(model, **given)  # as models that ignore the positions
    assert sees_other_rows(model, 320) > 0.1

    def alone(position_ids=None, **given):  # as kernels that tell rows apart in a batch of one only
        return blind(model, **given, **({"position_ids": position_ids} if len(given["input_ids"]) == 1 else {}))

    model.forward = alone
    assert sees_other_rows(model, 320) > 0.1


def test_every_row_is_in_a_round_once_and_packed_rows_are_full():
    for pack in (None, 32):
        batches = ChatBatches(rows(50), 3, 0, pack=pack, seed=1)
        found = list(batches)
        assert len(found) == len(batches)
        assert batches.count.tokens == sum(map(len, batches.rows))
        learnt = sorted(int(label) for batch in found for label in batch["labels"].flatten() if label != IGNORED)
        assert learnt == sorted(int(i) for row in batches.rows for i in row.ids[row.learnt])
    assert batches.count.padding < 0.1
    assert all(batch["input_ids"].shape[1] <= 32 for batch in found)


def test_buckets_pad_less_than_chance_and_rounds_differ():
    batches = ChatBatches(rows(120), 4, 0)
    first = [batch["input_ids"].clone() for batch in batches]
    assert batches.count.padding < 0.1  # rows of 3 to 19 tokens in any order: 0.35
    batches.set_epoch(1)
    assert not all(torch.equal(a, b["input_ids"]) for a, b in zip(first, batches, strict=True))
    batches.set_epoch(0)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(first, batches, strict=True))


def test_processes_take_different_batches_and_equally_many():
    parts = [ChatBatches(rows(13), 2, 0, rank=rank, num_replicas=3) for rank in range(3)]
    found = [list(part) for part in parts]
    assert {len(own) for own in found} == {2} == {len(part) for part in parts}
    said = [batch["input_ids"].tolist() for own in found for batch in own]
    assert len({str(one) for one in said}) == 6
    with pytest.raises(DataError, match="3 rows make fewer batches than there are processes"):
        ChatBatches(rows(3), 2, 0, rank=0, num_replicas=4)


@pytest.mark.parametrize("method", ["adalora", "lora2"])
def test_a_run_goes_on_inside_a_round_of_packed_rows_to_the_bit(method, tmp_path):
    def run(steps: int, folder, stop: int | None = None):
        model = chatting.model()
        lorafamily.apply(model, method, rank=3, seed=0)
        batches = ChatBatches(rows(40), 2, 0, pack=40, seed=3)
        assert len(batches) > 4
        options = {"log_dir": folder, "pictures": False, "save_every": 3, "resume": "auto"} if folder else {}

        def on_step(step):
            if step.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) if stop else torch.enable_grad():
            lorafamily.train(
                model, batches, steps=steps, loss_fn=ChunkedLoss(16), loss_over="tokens", lr=1e-2, seed=0,
                progress=False, on_step=on_step, **options,
            )  # fmt: skip
        return {at: a.state_dict() for at, a in placement_of(model).adapters.items()}

    whole = run(16, None)
    run(16, tmp_path, stop=8)  # dies after a checkpoint at step 6, in the second round
    again = run(16, tmp_path)
    for at, tensors in whole.items():
        for name, value in tensors.items():
            assert torch.equal(again[at][name], value), (at, name)


@pytest.mark.parametrize("targets", ["attention", ["q_proj", "lm_head"]])
def test_the_chunked_loss_is_the_whole_one(targets):
    """In float64 to the last digits, gradients of an adapted head included; in float32 as near as transformers' own."""
    model = chatting.model()
    lorafamily.apply(model, "lora", rank=4, seed=0, targets=targets)
    perturb_(model)
    (batch,) = ChatBatches(rows(6), 6, 0)
    theirs = own_loss(model, batch).item()
    assert abs(ChunkedLoss(7)(model, batch).item() - theirs) <= 1e-6 * theirs
    model.double()
    whole, of_whole = gradients(model, [batch], plain_loss)
    assert targets == "attention" or any("lm_head" in name for name in of_whole)
    for chunk in (1, 7, 10_000):
        chunked, of_chunked = gradients(model, [batch], ChunkedLoss(chunk))
        assert abs(chunked - whole) <= 1e-14 * whole
        for name, gradient in of_whole.items():
            torch.testing.assert_close(of_chunked[name], gradient)


def test_a_model_that_does_more_than_a_linear_head_is_noticed():
    assert difference(chatting.model(), 320) < 1e-6
    capped = chatting.model("gemma2", final_logit_softcapping=2.0)
    assert difference(capped, 320) > 1e-3


def test_the_balance_of_routers_is_learnt_and_is_no_perplexity():
    """transformers adds it to the loss in eval mode too. At a usual coefficient it is too small to be noticed."""
    model = chatting.model(
        "mixtral", num_key_value_heads=4, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1e-3
    )
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    loss_fn, entropy = loss_of(4, model), ChunkedLoss(4)(model, batch).item()
    assert abs(loss_fn(model, batch).item() - entropy) < 1e-6 * entropy
    trained = loss_fn(model.train(), batch).item()
    assert trained == model(**batch).loss.item()
    assert 1e-4 < trained / entropy - 1 < 1e-3
    model.config.output_router_logits = False
    assert isinstance(loss_of(4, model), ChunkedLoss)
