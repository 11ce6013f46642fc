"""The small parts of an engine: text as it comes, order of waiting requests, attention of packed requests."""

from __future__ import annotations

import collections
import random

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from peftk.serve import packed_attention
from peftk.serve.fair_queue import FairQueue
from peftk.serve.text import TextStream


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer with a token for every byte, so that characters come in parts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<e>": 256}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_its_first_stop_string(bytewise, seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("aab€ü") for _ in range(40))
    stops = ["".join(draw.choice("ab€") for _ in range(draw.randint(2, 4))) for _ in range(3)]
    stream, parts = TextStream(bytewise, stops), []
    for token in bytewise(text)["input_ids"]:
        parts.append(stream.add(token))
        shown = "".join(parts)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(parts) + stream.finish() == (text[: min(ends)] if ends else text)


@pytest.mark.parametrize("end", [[], [256]])
def test_a_character_that_does_not_end_is_told_at_the_end(bytewise, end):
    ids = bytewise("a€ü🙂b")["input_ids"]
    for count in range(len(ids) + 1):
        stream = TextStream(bytewise, ["zz"])
        shown = "".join([stream.add(token) for token in [*ids[:count], *end]])
        assert "\ufffd" not in shown
        text = shown + stream.finish()
        assert text == bytewise.decode(ids[:count]), count
        assert stream.finish() == ""


def test_special_tokens_are_not_text_and_without_a_tokenizer_there_is_none(bytewise):
    stream = TextStream(bytewise, [])
    ids = bytewise("ab")["input_ids"]
    assert "".join(stream.add(token) for token in [*ids, 256]) == "ab"
    assert TextStream(None, []).add(3) == ""


def test_tenants_are_served_in_turn_by_the_work_that_they_got():
    queue: FairQueue[str] = FairQueue()
    for number in range(30):
        queue.add("many", f"m{number}")
    for number in range(3):
        queue.add("few", f"f{number}")
    order = []
    while len(queue):
        item = next(iter(queue))
        tenant = {"m": "many", "f": "few", "l": "late"}[item[0]]
        assert queue.remove(tenant, item)
        queue.served(tenant, 10 if tenant == "many" else 20)
        order.append(item)
        if len(order) == 10:
            queue.add("late", "l")  # begins level with the others, not with all that they ever had
    assert order[:9].count("f0") + order[:9].count("f1") + order[:9].count("f2") >= 2
    assert [i for i in order if i[0] == "m"] == [f"m{n}" for n in range(30)]
    assert order.index("l") <= 12
    counts = collections.Counter(item[0] for item in order)
    assert counts == {"m": 30, "f": 3, "l": 1}
    assert not queue.remove("many", "m0")


def test_tenants_that_have_nothing_to_wait_for_are_forgotten():
    queue: FairQueue[int] = FairQueue()
    for number in range(100):
        queue.add(f"tenant {number}", number)
        queue.remove(f"tenant {number}", number)
        queue.served(f"tenant {number}", 10)
    assert len(queue._work) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_packed_attention_is_that_of_each_request_alone(dtype, heads):
    (H, G), D = heads, 16
    queries, keys = [1, 7, 1, 5, 1], [9, 7, 1, 12, 30]  # decoding, prompts, a prompt that goes on
    q = torch.randn(1, H, sum(queries), D).to(dtype)
    k, v = (torch.randn(1, G, sum(keys), D).to(dtype) for _ in range(2))
    ends_q, ends_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (queries, keys))
    out, _ = packed_attention.attend(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=ends_q, cu_seq_lens_k=ends_k)
    assert out.shape == (1, sum(queries), H, D)
    for i in range(len(queries)):
        a, b = slice(*ends_q[i : i + 2].tolist()), slice(*ends_k[i : i + 2].tolist())
        n, s = queries[i], keys[i]
        scores = (q[:, :, a].double() @ k[:, :, b].repeat_interleave(H // G, 1).double().transpose(2, 3)) * 0.3
        scores.masked_fill_(torch.ones(n, s).triu(s - n + 1).bool(), -torch.inf)
        wanted = scores.softmax(-1) @ v[:, :, b].repeat_interleave(H // G, 1).double()
        error = (out[:, a].double() - wanted.transpose(1, 2)).abs().max()
        assert error < (2e-6 if dtype == torch.float32 else 2e-2)
