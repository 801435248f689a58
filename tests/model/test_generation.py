"""generate() and what is built on it: the same tokens as stock GPT2LMHeadModel, setting by setting."""

import functools
import logging
from threading import Thread

import pytest
import torch
import transformers
from test_model import pair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from gpt2_hf.model import GPTForCausalLM

POSITIONS = 48
VOCAB = 257  # the bytes and <|endoftext|>
EOS = 256

same_weights = functools.cache(pair)  # generate() changes no weights: the tests share the models


# A random model with a tied head repeats its last token; an untied one has more to say.
FIELDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "tie_word_embeddings": False}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are faster so, and the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def twins(attn_implementation: str = "sdpa") -> tuple[GPTForCausalLM, GPT2LMHeadModel]:
    ours, stock = same_weights(attn_implementation, **FIELDS)
    assert type(ours) is GPTForCausalLM and type(stock) is GPT2LMHeadModel
    return ours, stock


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: small enough for the random models here."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, pad_token=end)
    tokenizer.padding_side = "left"
    assert len(tokenizer) == VOCAB and tokenizer.eos_token_id == EOS
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def prompts(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(EOS, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    tokens = prompts(len(lengths), max(lengths), seed)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens.masked_fill(mask == 0, EOS), "attention_mask": mask}


def generate(model, *args, seed: int = 5, **settings) -> torch.Tensor:
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": EOS, **settings}
    torch.manual_seed(seed)
    return model.generate(*args, **settings)


def assert_same_tokens(ours, stock, *args, **settings) -> torch.Tensor:
    a, b = generate(ours, *args, **settings), generate(stock, *args, **settings)
    assert torch.equal(a, b)
    return a


STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "beam, all returned": {"num_beams": 4, "num_return_sequences": 4},
    "beam, long preferred": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam, short preferred": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": "never"},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "sample": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.5},
    "top-k": {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "min-p": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "typical": {"do_sample": True, "top_k": 0, "typical_p": 0.6},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(0, 257, 3))},
    "many ends": {"do_sample": True, "eos_token_id": list(range(0, 257, 9))},
    "banned and forced": {"bad_words_ids": [[9], [4, 5]], "suppress_tokens": [1, 2, 3], "forced_eos_token_id": 7},
    "biased": {"sequence_bias": {(11,): 0.5, (12, 13): -5.0}, "renormalize_logits": True},
    "guided": {"guidance_scale": 1.5},
    "no cache": {"use_cache": False},
    "no cache, beam": {"use_cache": False, "num_beams": 3},
}


# The strategies do not know the backend: eager has one of each way to run the model.
@pytest.mark.parametrize(
    ("name", "attn_implementation"),
    [(name, "sdpa") for name in STRATEGIES]
    + [(name, "eager") for name in ("greedy", "beam", "sample", "guided", "no cache", "no cache, beam")],
)
def test_every_strategy_gives_stock_tokens(name, attn_implementation):
    ours, stock = twins(attn_implementation)
    tokens = assert_same_tokens(ours, stock, **left_padded([9, 4, 1]), **STRATEGIES[name])
    assert len(tokens[:, 9:].unique()) > 3


def test_strategies_differ():
    """The table above would prove nothing with a model that gives one text whatever the settings."""
    ours, _ = twins()
    texts = {name: tuple(generate(ours, prompts(), **s)[0].tolist()) for name, s in STRATEGIES.items()}
    assert len(set(texts.values())) >= 15
    assert generate(ours, prompts(), do_sample=True, seed=1).ne(generate(ours, prompts(), do_sample=True, seed=2)).any()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 31, 47, 48])
def test_prompts_of_every_length_up_to_the_last_position(length, attn_implementation):
    ours, stock = twins(attn_implementation)
    room = POSITIONS + 1 - length  # the last token is drawn, but never read
    tokens = assert_same_tokens(ours, stock, prompts(2, length), max_new_tokens=room)
    assert tokens.shape == (2, POSITIONS + 1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_text_beyond_the_last_position(use_cache):
    """Stock fails in the embedding of positions; a model that went on would write without knowing where it is."""
    for model in twins():
        with pytest.raises((IndexError, ValueError)):
            generate(model, prompts(1, 40), max_new_tokens=10, use_cache=use_cache)
        with pytest.raises((IndexError, ValueError)):
            model(prompts(1, POSITIONS + 1))


def test_left_padding_changes_no_text():
    ours, _ = twins()
    batch = left_padded([9, 4, 1, 7])
    together = generate(ours, **batch)[:, 9:]
    for row, tokens, mask in zip(together, batch["input_ids"], batch["attention_mask"], strict=True):
        prompt = tokens[mask.bool()][None]
        assert torch.equal(generate(ours, prompt)[0, prompt.shape[1] :], row)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_inputs_embeds_instead_of_tokens(settings):
    ours, stock = twins()
    batch = left_padded([9, 4])
    embeds = ours.transformer.wte(batch["input_ids"]).detach()
    mask = batch["attention_mask"]
    alone = assert_same_tokens(ours, stock, inputs_embeds=embeds, attention_mask=mask, **settings)
    assert torch.equal(alone, generate(ours, **batch, **settings)[:, 9:])
    # With both, the text starts with the tokens.
    both = generate(ours, **batch, inputs_embeds=embeds, **settings)
    assert torch.equal(both[:, 9:], alone)


def test_scores_logits_attentions_and_hidden_states_on_request():
    ours, stock = twins("eager")
    wanted = {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True}
    a, b = (
        generate(m, **left_padded([6, 3]), **wanted, return_dict_in_generate=True, repetition_penalty=1.3)
        for m in (ours, stock)
    )
    assert torch.equal(a.sequences, b.sequences) and len(a.scores) == 20
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
    for name in ("attentions", "hidden_states"):
        for step, expected in zip(getattr(a, name), getattr(b, name), strict=True):
            assert [t.shape for t in step] == [t.shape for t in expected]
            # Rows of pure padding attend to nothing in particular: only the newest token is compared.
            for x, y in zip(step, expected, strict=True):
                torch.testing.assert_close(x[..., -1:, :], y[..., -1:, :], rtol=1e-4, atol=1e-4)
    transition = ours.compute_transition_scores(a.sequences, a.scores)
    torch.testing.assert_close(transition, stock.compute_transition_scores(b.sequences, b.scores), rtol=1e-4, atol=1e-4)


# Caches


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_every_cache_gives_the_tokens_of_no_cache(cache, settings, attn_implementation):
    if cache.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("offloaded caches need a device to offload from")
    ours, stock = twins(attn_implementation)
    batch = left_padded([9, 4, 1])
    tokens = assert_same_tokens(ours, stock, **batch, cache_implementation=cache, **settings)
    assert torch.equal(tokens, generate(ours, **batch, use_cache=False, **settings))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_prefill_in_chunks(chunk, cache):
    ours, stock = twins()
    batch = left_padded([10, 4, 1])
    tokens = assert_same_tokens(ours, stock, **batch, prefill_chunk_size=chunk, cache_implementation=cache)
    assert torch.equal(tokens, generate(ours, **batch))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 5, 1, 6]], ids=["whole", "one by one", "mixed"])
def test_pieces_through_a_cache_equal_the_whole(pieces, static, attn_implementation):
    """The definition of a cache, with left padding: no stock model is involved."""
    ours, _ = twins(attn_implementation)
    batch = left_padded([20, 11, 2])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=ours.config, max_cache_len=32) if static else DynamicCache(config=ours.config)
    logits, end = [], 0
    with torch.no_grad():
        whole = ours(**batch, position_ids=positions, use_cache=False).logits
        for size in pieces:
            here = slice(end, end := end + size)
            out = ours(
                batch["input_ids"][:, here],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=positions[:, here],
                past_key_values=cache,
                use_cache=True,
            )
            assert out.past_key_values is cache and cache.get_seq_length() == end
            logits.append(out.logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


def test_a_cache_without_positions_counts_on():
    ours, stock = twins()
    tokens = prompts(2, 20)
    with torch.no_grad():
        whole = ours(tokens).logits
        for model in (ours, stock):
            out = model(tokens[:, :12], use_cache=True)
            rest = model(tokens[:, 12:], past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(rest.logits, whole[:, 12:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_given_cache_is_read_and_filled_whatever_use_cache_says(use_cache):
    """As stock: use_cache decides what is returned."""
    tokens = prompts(1, 12)
    for model in twins():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :8], past_key_values=cache)
            out = model(tokens[:, 8:], past_key_values=cache, use_cache=use_cache)
            expected = model(tokens).logits[:, 8:]
        torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 12
        assert (out.past_key_values is not None) == use_cache


def test_cache_format_equals_stock():
    ours, stock = twins()
    with torch.no_grad():
        a, b = (model(prompts(), use_cache=True).past_key_values for model in (ours, stock))
    assert type(a) is type(b) and len(a) == len(b) == 3
    for x, y in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(x.keys, y.keys)
        torch.testing.assert_close(x.values, y.values)
    # One's cache goes on in the other.
    with torch.no_grad():
        torch.testing.assert_close(
            ours(prompts(seed=2), past_key_values=b).logits, stock(prompts(seed=2), past_key_values=a).logits
        )


def test_conversation_of_several_turns_reuses_the_cache():
    ours, stock = twins()
    dialogue = {}
    for model in (ours, stock):
        tokens, cache, read = prompts(1, 6), None, []
        hook = model.transformer.wte.register_forward_hook(lambda _, ids, __, read=read: read.append(ids[0].shape[1]))
        for turn in range(3):
            out = generate(
                model, tokens, past_key_values=cache, max_new_tokens=5, return_dict_in_generate=True, use_cache=True
            )
            assert torch.equal(out.sequences, generate(model, tokens, max_new_tokens=5, use_cache=False))
            tokens, cache = torch.cat([out.sequences, prompts(1, 4, seed=turn)], 1), out.past_key_values
        hook.remove()
        dialogue[type(model)] = tokens
        # Each turn reads what is new: the prompt, or the last answer's last token and four tokens; then one by one.
        new = [n for n in read if n == 1]
        assert read.count(6) >= 1 and read.count(5) >= 2 and len(new) >= 3 * 4
    assert torch.equal(dialogue[GPTForCausalLM], dialogue[GPT2LMHeadModel])


def test_cropped_repeated_and_reordered_caches():
    ours, stock = twins()
    tokens = prompts(3, 12)
    order = torch.tensor([2, 0, 0])
    for model in (ours, stock):
        with torch.no_grad():
            cache = model(tokens, use_cache=True).past_key_values
            cache.crop(-5)
            again = model(tokens[:, 7:], past_key_values=cache).logits
            torch.testing.assert_close(again, ours(tokens).logits[:, 7:], rtol=1e-4, atol=1e-4)
            cache.reorder_cache(order)
            follow = prompts(3, 4, seed=3)
            expected = ours(torch.cat([tokens[order], follow], 1)).logits[:, 12:]
            torch.testing.assert_close(model(follow, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
            cache = model(tokens[:1], use_cache=True).past_key_values
            cache.batch_repeat_interleave(3)
            expected = ours(torch.cat([tokens[:1].repeat(3, 1), follow], 1)).logits[:, 12:]
            torch.testing.assert_close(model(follow, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_ready_made_mask_of_four_dimensions(kind):
    """Two documents in a row, a tree of candidates: callers bring masks that are not triangles."""
    ours, stock = twins()
    tokens = prompts(2, 10)
    allowed = torch.ones(10, 10).tril().bool()
    allowed[6:, :6] = False
    positions = torch.tensor([[*range(6), *range(4)]])
    mask = allowed if kind == "boolean" else torch.zeros(10, 10).masked_fill(~allowed, torch.finfo(torch.float32).min)
    inputs = {"attention_mask": mask.expand(2, 1, 10, 10), "position_ids": positions}
    with torch.no_grad():
        a, b = ours(tokens, **inputs).logits, stock(tokens, **inputs).logits
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a[:, 6:], ours(tokens[:, 6:]).logits, rtol=1e-4, atol=1e-4)


# Assisted generation


@pytest.mark.parametrize("assistant", ["ours", "stock"])
@pytest.mark.parametrize("target", ["ours", "stock"])
def test_assisted_generation_is_greedy_generation(target, assistant):
    models = dict(zip(("ours", "stock"), twins(), strict=True))
    # An assistant that is right now and then: the target with a little noise in its weights.
    helper = dict(zip(("ours", "stock"), pair(**FIELDS), strict=True))
    helper = helper[assistant]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in helper.parameters():
            p.add_(0.01 * torch.randn_like(p))
    for seed in (1, 2, 3):
        prompt = prompts(1, 6, seed)
        calls = []
        hook = models[target].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tokens = generate(models[target], prompt, assistant_model=helper)
        hook.remove()
        assert torch.equal(tokens, generate(models["stock"], prompt))
        assert len(calls) < 20  # some guesses were right


def test_prompt_lookup_is_greedy_generation():
    ours, stock = twins()
    for seed in (1, 2, 3):
        prompt = prompts(1, 5, seed).repeat(1, 3)
        tokens = generate(ours, prompt, prompt_lookup_num_tokens=3)
        assert torch.equal(tokens, generate(stock, prompt))
        assert_same_tokens(ours, stock, prompt, prompt_lookup_num_tokens=3, do_sample=True)


def test_continuous_batching_equals_one_prompt_at_a_time():
    """generate_batch() packs prompts of any length through a paged cache; it goes on to the backend "paged|sdpa"."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers sizes its pages in another way")
    ours, _ = pair(**FIELDS)  # of its own: the attention backend is changed
    rows = [prompts(1, length, seed=length)[0].tolist() for length in (9, 4, 1, 17, 30)]
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS}
    # Without these numbers it takes most of the machine's memory for its pages.
    pages = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=32)
    config = GenerationConfig(**settings)
    answers = ours.generate_batch(rows, generation_config=config, continuous_batching_config=pages)
    expected = [generate(twins()[1], torch.tensor([row]), **settings)[0, len(row) :].tolist() for row in rows]
    assert [answer.generated_tokens for answer in answers.values()] == expected


# Text in, text out


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_pipeline(settings, batch_size, tokenizer):
    texts = ["A", "To be, or not", "Full fathom five", "ROMEO:", "x" * 20]
    results = []
    for model in twins():
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        torch.manual_seed(3)
        results.append(pipe(texts, max_new_tokens=12, **{"do_sample": False, **settings}))
    assert results[0] == results[1]
    for prompt, answers in zip(texts, results[0], strict=True):
        assert all(answer["generated_text"].startswith(prompt) for answer in answers)
        assert len(answers) == settings.get("num_return_sequences", 1)


def test_pipeline_has_nothing_to_complain_of(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ours, stock = twins()
    for model in (stock, ours):
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        assert "not supported" not in caplog.text


def test_streamers_pass_on_each_token(tokenizer, capsys):
    ours, _ = twins()
    inputs = tokenizer("Now is the winter", return_tensors="pt")
    text = tokenizer.decode(generate(ours, **inputs)[0], skip_special_tokens=True)
    generate(ours, **inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=generate, args=(ours,), kwargs={**inputs, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(generate(ours, **inputs)[0, 17:], skip_special_tokens=True)


def test_stop_strings_end_the_text(tokenizer):
    ours, stock = twins()
    inputs = tokenizer(["Now is the winter", "of our"], return_tensors="pt", padding=True)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    settings = {"suppress_tokens": [i for i in range(VOCAB) if i not in letters], "no_repeat_ngram_size": 2}
    free = tokenizer.decode(generate(ours, **inputs, **settings)[0, 17:])
    stop = free[6:8]
    assert len(free) == 20 and free.index(stop) == 6
    tokens = assert_same_tokens(ours, stock, **inputs, **settings, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(tokens[0, 17:], skip_special_tokens=True) == free[:8]


def test_max_time_and_logits_processors_are_called():
    ours, stock = twins()

    def only_even(tokens, scores):
        return scores.masked_fill(torch.arange(VOCAB) % 2 == 1, -torch.inf)

    tokens = assert_same_tokens(ours, stock, prompts(), logits_processor=[only_even])
    assert (tokens[:, 7:] % 2 == 0).all()
    assert generate(ours, prompts(), max_time=0.0).shape[1] == 8


# Compiled


def test_decoding_compiles_without_graph_break():
    """A static cache and a forward pass compiled whole: what generate() does by itself on a GPU."""
    ours, stock = pair(**FIELDS)
    batch = left_padded([9, 4])
    expected = generate(stock, **batch)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {**batch, "cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(generate(ours, **settings), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(generate(ours, **settings), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_decoding_compiled_by_inductor():
    batch = left_padded([9, 4])
    ours, stock = pair(**FIELDS, n_layer=1)
    torch._dynamo.reset()
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    tokens = generate(ours, **batch, cache_implementation="static", compile_config=compiled)
    torch._dynamo.reset()
    assert torch.equal(tokens, generate(stock, **batch))


def test_decoding_with_a_compiled_forward():
    """As users compile by hand, with a cache that grows; the kernels are Inductor's own affair."""
    batch = left_padded([9, 4])
    ours, stock = pair(**FIELDS, n_layer=1)
    torch._dynamo.reset()
    ours.forward = torch.compile(ours.forward, dynamic=True, backend="aot_eager")
    tokens = generate(ours, **batch)
    torch._dynamo.reset()
    assert torch.equal(tokens, generate(stock, **batch))
