"""`generate` against transformers, against `generate_naive`, and against itself alone; what a stream shows; what is refused."""

from __future__ import annotations

import codecs
from collections.abc import Callable

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import hf
from tests.tiny import tiny
from trivium.core.errors import ConfigError, DataError
from trivium.infer.generate import Completion, generate, generate_naive, stream
from trivium.infer.sampling import Sampling
from trivium.models import presets
from trivium.models.transformer import TransformerModel, build
from trivium.nn.inputs import Inputs

VOCAB = 97
PROMPTS = [[3, 14, 15, 92, 65, 35, 8], [27], [18, 28, 18, 28, 45, 90, 45, 23, 53, 60, 2], [31, 41]]
GREEDY = Sampling(temperature=0, max_tokens=24)
MIXED = [
    Sampling(temperature=0.9, top_p=0.8, seed=1, max_tokens=20, logprobs=2),
    Sampling(temperature=0, max_tokens=9, repetition_penalty=1.4),
    Sampling(temperature=1.5, top_k=12, min_p=0.02, seed=5, max_tokens=15, frequency_penalty=0.5),
    Sampling(seed=9, max_tokens=1, logit_bias={3: 2.0}, logprobs=0),
]


def model_of(**keys) -> TransformerModel:
    shape = {"dim": 32, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 8, "hidden": 48, "vocab": VOCAB, "context": 128}
    return tiny(presets.llama(**{**shape, **keys}))


@pytest.fixture(scope="module")
def model() -> TransformerModel:
    return model_of()


KINDS = {"llama": {}, "tied, multi-query": {"tied": True, "kv_heads": 1}, "window": {"window": 5}}


# against transformers


def pair(model_type: str, **keys) -> tuple[transformers.PreTrainedModel, TransformerModel]:
    """A redrawn transformers model, and ours with its weights carried over by hand."""
    shape = dict(hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    theirs = hf.tiny(model_type, vocab_size=VOCAB, max_position_embeddings=128, **{**shape, **keys})
    config = theirs.config
    ours = build(
        presets.llama(
            dim=36, layers=2, heads=6, kv_heads=config.num_key_value_heads, head_dim=8, hidden=48, vocab=VOCAB, context=128,
            tied=config.tie_word_embeddings, base=config.rope_parameters["rope_theta"], eps=config.rms_norm_eps,
            window=keys.get("sliding_window"),
        ),
        device="cpu",
    )  # fmt: skip
    names = {"model.embed_tokens.": "embed.", "model.norm.": "final_norm.", "model.layers.": "layers.", "lm_head.": "head.out."}
    names |= {f"self_attn.{x}_proj.": f"mixer.inp.{x}." for x in "qkv"} | {"self_attn.o_proj.": "mixer.out."}
    names |= {"input_layernorm.": "mixer_norm.", "post_attention_layernorm.": "ffn_norm."}
    names |= {"mlp.gate_proj.": "ffn.inp.gate.", "mlp.up_proj.": "ffn.inp.up.", "mlp.down_proj.": "ffn.out."}
    weights = {}
    for name, tensor in theirs.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor.detach()
    ours.load_state_dict(weights)
    return theirs, ours


PAIRS = [("llama", {}), ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 3}), ("mistral", {"sliding_window": 5})]


@torch.no_grad()
def transformers_greedy(theirs: transformers.PreTrainedModel, prompts: list[list[int]], count: int, **options) -> list[list[int]]:
    """A batch as transformers wants it: padded on the left, with its mask, and no end-of-text."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return theirs.generate(tokens, attention_mask=mask, **settings, **options)[:, longest:].tolist()


@pytest.mark.concept("T09.01", part="infer/generate.py")
@pytest.mark.parametrize(("model_type", "keys"), PAIRS)
def test_greedy_tokens_are_those_of_transformers(model_type: str, keys: dict) -> None:
    theirs, ours = pair(model_type, **keys)
    with torch.no_grad():
        logits = hf.logits(theirs, torch.tensor(PROMPTS[2:3]))
        assert 0.8 < logits.std() < 4
        torch.testing.assert_close(ours(torch.tensor(PROMPTS[2:3])).logits, logits, rtol=0, atol=1e-5 * logits.std().item())
    expected = transformers_greedy(theirs, PROMPTS, 24)
    assert len({tuple(ids) for ids in expected}) == 4
    assert [done.ids for done in generate(ours, PROMPTS, GREEDY)] == expected
    assert [done.ids for prompt in PROMPTS for done in generate(ours, [prompt], GREEDY)] == expected


@pytest.mark.concept("T09.01", part="infer/generate.py")
def test_greedy_stops_where_transformers_stops() -> None:
    theirs, ours = pair("llama")
    free = transformers_greedy(theirs, PROMPTS[:1], 24)[0]
    end = free[6]
    expected = free[: free.index(end) + 1]
    with torch.no_grad():
        tokens = torch.tensor(PROMPTS[:1])
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    assert out[0, tokens.shape[1] :].tolist() == expected
    assert generate(ours, PROMPTS[:1], GREEDY, stops=[end]) == [Completion(ids=expected, finish_reason="stop")]


def test_greedy_with_repetition_penalty_is_that_of_transformers() -> None:
    theirs, ours = pair("llama")
    expected = [transformers_greedy(theirs, [prompt], 24, repetition_penalty=1.6)[0] for prompt in PROMPTS]
    assert expected != transformers_greedy(theirs, PROMPTS, 24)
    assert [done.ids for done in generate(ours, PROMPTS, GREEDY.replace(repetition_penalty=1.6))] == expected


# the cache


@pytest.mark.concept("T08.01", part="nn/store.py")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward_at_each_step(kind: str) -> None:
    """A padded batch, token by token, then rolled back by a different number in each row, and on again."""
    model = model_of(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    rows = [list(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    segments = torch.tensor([[0] * len(row) + [-1] * (longest - len(row)) for row in rows])
    store = model.cache(len(rows), 64, rollback=5)

    def check(logits: torch.Tensor) -> None:
        full = torch.cat([model(torch.tensor([row]), keep="last").logits for row in rows])
        torch.testing.assert_close(logits, full, rtol=0, atol=1e-5)
        assert store.lengths == [len(row) for row in rows]

    check(model(Inputs(tokens, segments=segments, cache=store), keep="last").logits)
    for step in range(16):
        if step == 8:
            store.drop_last([1, 0, 5, 3])
            rows = [row[: len(row) - n] for row, n in zip(rows, (1, 0, 5, 3), strict=True)]
        new = torch.randint(0, VOCAB, (len(rows), 1), generator=generator)
        for row, token in zip(rows, new[:, 0].tolist(), strict=True):
            row.append(token)
        check(model(Inputs(new, cache=store), keep="last").logits)


@pytest.mark.concept("T08.01", part="nn/store.py")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same_without_cache(kind: str) -> None:
    model = model_of(**KINDS[kind])
    expected = generate_naive(model, PROMPTS, GREEDY)
    assert [done.ids for done in generate(model, PROMPTS, GREEDY)] == expected
    assert max(len(set(ids)) for ids in expected) > 5


@pytest.mark.concept("T08.01", part="nn/store.py")
@torch.no_grad()
def test_the_cache_holds_what_transformers_cache_holds() -> None:
    theirs, ours = pair("llama")
    cache, store = transformers.DynamicCache(config=theirs.config), ours.cache(2, 11)
    for part in torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0)).split([8, 1, 1, 1], dim=1):
        theirs(part, past_key_values=cache)
        ours(Inputs(part, cache=store))
        assert store.lengths == [cache.get_seq_length()] * 2
        for layer, held in enumerate(cache.layers):
            for name, tensor in (("k", held.keys), ("v", held.values)):
                assert store.tensor(layer, name).shape == tensor.shape
                torch.testing.assert_close(store.tensor(layer, name), tensor, rtol=0, atol=1e-5)
    assert store.bytes == sum(held.keys.nbytes + held.values.nbytes for held in cache.layers)


@pytest.mark.concept("T08.01", part="nn/store.py")
@torch.inference_mode()
def test_a_cached_step_does_not_grow_with_the_text(model: TransformerModel) -> None:
    """FLOPs of one more token: O(n) without cache, with it constant but for attention's products over the keys."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(tokens: torch.Tensor, cache=None) -> int:
        with FlopCounterMode(display=False) as counter:
            model(Inputs(tokens, cache=cache), keep="last")
        return counter.get_total_flops()

    lengths, full, cached = (16, 32, 64, 120), [], []
    for n in lengths:
        store = model.cache(1, n)
        tokens = torch.zeros(1, n, dtype=torch.int64)
        model(Inputs(tokens[:, :-1], cache=store), keep="none")
        full.append(flops(tokens))
        cached.append(flops(tokens[:, -1:], store))
    per_key = 2 * 2 * 2 * 6 * 8  # two layers, two products, multiply and add, heads x head size
    assert [flop - cached[0] for flop in cached] == [per_key * (n - 16) for n in lengths]
    head = 2 * 32 * VOCAB
    assert all(f - head >= n * (cached[0] - head - per_key * 16) for n, f in zip(lengths, full, strict=True))


# against itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_what_it_is_alone(kind: str) -> None:
    """Settings, seeds and lengths differ by row; batch-mates, their order, chunks and smaller batches change nothing."""
    model = model_of(**KINDS[kind])
    alone = [generate(model, [prompt], one)[0] for prompt, one in zip(PROMPTS, MIXED, strict=True)]
    assert [done.ids for done in alone] == generate_naive(model, PROMPTS, MIXED)
    assert [len(done.ids) for done in alone] == [20, 9, 15, 1]

    def same(found: list[Completion], expected: list[Completion]) -> None:
        for a, b in zip(found, expected, strict=True):
            assert (a.ids, a.finish_reason, a.text) == (b.ids, b.finish_reason, b.text)
            assert (a.logprobs is None) == (b.logprobs is None)
            torch.testing.assert_close(torch.tensor(a.logprobs or []), torch.tensor(b.logprobs or []), rtol=0, atol=1e-5)

    same(generate(model, PROMPTS, MIXED), alone)
    same(generate(model, PROMPTS[::-1], MIXED[::-1]), alone[::-1])
    for chunk in (1, 3, 4, 7):
        same(generate(model, PROMPTS, MIXED, chunk=chunk), alone)
        same(generate(model, PROMPTS[2:3], MIXED[2:3], chunk=chunk), alone[2:3])
    for batch in (1, 2, 3):
        same(generate(model, PROMPTS, MIXED, batch=batch), alone)
    same(generate(model, [PROMPTS[0]] * 3, [MIXED[0]] * 3), [alone[0]] * 3)
    assert len({tuple(done.ids) for done in generate(model, [PROMPTS[0]] * 6, MIXED[0].many(6))}) == 6


def test_logprobs_are_those_of_the_full_forward(model: TransformerModel) -> None:
    done = generate(model, PROMPTS, [one.replace(logprobs=n) for one, n in zip(MIXED, (3, 0, 1, 2), strict=True)])
    for prompt, row, n in zip(PROMPTS, done, (3, 0, 1, 2), strict=True):
        with torch.no_grad():
            own = model(torch.tensor([prompt + row.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(row.logprobs), own.gather(1, torch.tensor(row.ids)[:, None])[:, 0], rtol=0, atol=1e-5)
        assert (row.top is None) == (n == 0)
        if row.top is not None:
            assert [list(top) for top in row.top] == own.topk(n).indices.tolist()
            torch.testing.assert_close(torch.tensor([list(top.values()) for top in row.top]), own.topk(n).values, rtol=0, atol=1e-5)


def test_the_draws_follow_the_model(model: TransformerModel) -> None:
    """Frequencies of the first two tokens over seeds, against the product of the model's own probabilities."""
    draws = 4000
    keep = {"top_k": 3, "max_tokens": 2}
    rows = [Sampling(seed=seed, **keep) for seed in range(draws)]
    pairs = [tuple(done.ids) for done in generate(model, [PROMPTS[0]] * draws, rows)]

    def next_of(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(3)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    expected = {(a, b): p * q for a, p in next_of(PROMPTS[0]).items() for b, q in next_of([*PROMPTS[0], a]).items()}
    assert set(pairs) <= set(expected)
    statistic = sum((pairs.count(pair) - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)) > 0.01


def test_dropout_is_off_and_each_module_is_left_as_it_was() -> None:
    expected = generate(model_of(), PROMPTS, GREEDY)
    model = model_of().train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    assert generate(model, PROMPTS, GREEDY) == expected
    assert not any(seen)
    events = stream(model, PROMPTS, GREEDY)
    next(events)
    events.close()
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# text and streams


class Pieces:
    """A decoder over a made-up vocabulary: each id is a few bytes, some of them parts of characters."""

    TABLE = ["a", "b", "c", " ", "é", "<e", "nd>", "<", "e", "n", "d", ">"]
    BYTES = [text.encode() for text in TABLE] + [b"\xe2", b"\x82", b"\xac", b"\xe2\x82", b"\x82\xac", b"\xf0\x9f", b"\x98\x80"]

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.BYTES[token % len(self.BYTES)])

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)

    @classmethod
    def whole(cls, ids: list[int]) -> str:
        return b"".join(cls.BYTES[token % len(cls.BYTES)] for token in ids).decode("utf-8", "replace")


def collect(model: TransformerModel, rows: int, **options) -> list[Completion]:
    """What a reader of the stream puts together, with the rules of a stream checked on the way."""
    done: list[Completion] = [Completion(text="") for _ in range(rows)]
    for event in stream(model, PROMPTS[:rows], **options):
        assert done[event.row].finish_reason is None
        done[event.row].add(event)
    assert all(row.finish_reason for row in done)
    return done


def test_a_stream_adds_up_to_the_answers(model: TransformerModel) -> None:
    sampling = [Sampling(seed=i, max_tokens=40, temperature=1.3) for i in range(4)]
    done = generate(model, PROMPTS, sampling, stops=[5, 30], decoder=Pieces)
    assert collect(model, 4, sampling=sampling, stops=[5, 30], decoder=Pieces) == done
    assert {row.finish_reason for row in done} == {"stop", "length"}
    for row in done:
        stopped = row.finish_reason == "stop"
        assert stopped == (row.ids[-1] in (5, 30)) and not {5, 30} & set(row.ids[:-1])
        assert row.text == Pieces.whole(row.ids[:-1] if stopped else row.ids)
    assert any("\ufffd" in row.text or "€" in row.text for row in done)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.data())
def test_stop_strings_end_the_answer_before_them(model: TransformerModel, seed: int, data: st.DataObject) -> None:
    """Stop strings are cut from what the model says anyway, so they begin and end inside tokens; ids stay as sampled."""
    free = generate(model, PROMPTS[:1], Sampling(seed=seed, max_tokens=14, temperature=1.3), decoder=Pieces)[0]
    start = data.draw(st.integers(0, max(0, len(free.text) - 1)))
    stop = free.text[start : start + data.draw(st.integers(1, 4))] or "a"
    sampling = Sampling(seed=seed, max_tokens=14, temperature=1.3, stop=("never", stop))
    done = generate(model, PROMPTS[:1], sampling, decoder=Pieces)[0]
    assert collect(model, 1, sampling=sampling, decoder=Pieces) == [done]
    assert done.ids == free.ids[: len(done.ids)]
    if stop in free.text:
        assert done.finish_reason == "stop"
        assert done.text == free.text[: free.text.index(stop)]
        assert len(done.ids) == len(free.ids) or stop in Pieces.whole(done.ids)
        assert stop not in Pieces.whole(done.ids[:-1]) or "\ufffd" in stop
    else:
        assert done == free


def test_the_beginning_of_a_stop_string_is_let_out_at_the_end(model: TransformerModel) -> None:
    sampling = [Sampling(seed=i, max_tokens=10) for i in range(4)]
    free = generate(model, PROMPTS, sampling, stops=[5, 30], decoder=Pieces)
    held = [one.replace(stop=(done.text[-2:] + "never",)) for one, done in zip(sampling, free, strict=True)]
    assert collect(model, 4, sampling=held, stops=[5, 30], decoder=Pieces) == free


def test_own_stop_ids_join_the_models(model: TransformerModel) -> None:
    free = generate(model, PROMPTS, GREEDY)
    sampling = [GREEDY, GREEDY.replace(stop_ids=(free[1].ids[3],)), GREEDY, GREEDY]
    done = generate(model, PROMPTS, sampling, stops={free[2].ids[2]})
    assert done[1].ids == free[1].ids[: free[1].ids.index(free[1].ids[3]) + 1] and done[1].finish_reason == "stop"
    assert done[2].ids == free[2].ids[: free[2].ids.index(free[2].ids[2]) + 1] and done[2].finish_reason == "stop"


# limits and refusals


def test_the_context_bounds_prompt_and_answer(model: TransformerModel) -> None:
    prompt = [7] * 120
    for context, room in ((None, 8), (125, 5), (121, 1)):
        for found in (generate(model, [prompt, [1]], GREEDY, context=context), generate(model, [prompt], GREEDY, context=context)):
            assert (len(found[0].ids), found[0].finish_reason) == (room, "length")
    assert generate_naive(model, [prompt], GREEDY) == [generate(model, [prompt], GREEDY)[0].ids]
    assert generate(model, [], GREEDY) == [] and list(stream(model, [], GREEDY)) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1], [1] * 128], {}, r"prompts\[1\] has 128 tokens; the context of 128 leaves no room"),
        ([[1] * 9], {"context": 8}, r"has 9 tokens; the context of 8"),
        ([[1, VOCAB]], {}, "holds token 97, outside the model's vocabulary of 97"),
        ([[-1]], {}, "holds token -1"),
        ([[1], [2]], {"sampling": [GREEDY]}, "2 prompts, but 1 sampling"),
        ([[1]], {"sampling": GREEDY.replace(stop=("x",))}, "need a decoder"),
        ([[1]], {"sampling": GREEDY.replace(logit_bias={VOCAB: 1.0})}, "token 97 is outside"),
    ],
)
@pytest.mark.parametrize("run", [generate, stream])
def test_what_cannot_be_done_is_said_before_anything_runs(
    model: TransformerModel, run: Callable, prompts: list, options: dict, message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        run(model, prompts, **options)
