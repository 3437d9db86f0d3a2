"The engine on models of other shapes than the built-in ones: what it says, what it learns, and where it falls back."
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig, Qwen2Config, Qwen3Config

from densirl import rollout
from densirl.attention import can_see, why_not_seen
from densirl.decode import CachedReader, EqualReader, Reader, can_lay_out, laid_out, laying_out, make_reader
from densirl.logps import group_hidden, pack_groups, token_facts
from densirl.rollout import completion_uniforms, generate
from densirl.vocab import check_head

SMALL = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SHAPES = dict(
    llama=lambda: LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    llama_full=lambda: LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=False),
    qwen2=lambda: Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=False),
    qwen3=lambda: Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    phi=lambda: PhiConfig(**SMALL, tie_word_embeddings=False),    # its head has a bias
    gpt2=lambda: GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0))
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation='sdpa').eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn_like(p))
    return model


def chance(samples, tokens): return np.stack([completion_uniforms(0, 0, i, samples, tokens) for i in range(len(PROMPTS))])


@pytest.mark.parametrize('shape', SHAPES)
def test_greedy_decoding_is_that_of_transformers(shape):
    model = random_model(SHAPES[shape]())
    assert isinstance(make_reader(model, PROMPTS, 1, 8), Reader)
    for prompt, (ours,) in zip(PROMPTS, generate(model, PROMPTS, chance(1, 8), eos=2, temperature=0)):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=8)[0, len(prompt):].tolist()
        assert ours == theirs


@pytest.mark.parametrize('shape', SHAPES)
def test_both_memories_write_the_same_texts_while_completions_end(shape):
    model = random_model(SHAPES[shape]())
    drawn = chance(4, 20)
    free = generate(model, PROMPTS, drawn, eos=2)
    often = max(set(tokens := [t for group in free for row in group for t in row]), key=tokens.count)    # as the end, so that rows end early
    ours = generate(model, PROMPTS, drawn, eos=often)
    assert len({len(row) for group in ours for row in group}) > 2, 'no completion ended early'
    model.config.attn_logit_softcapping = 1e9                                                            # any reason to fall back
    assert isinstance(make_reader(model, PROMPTS, 1, 8), CachedReader)
    assert generate(model, PROMPTS, drawn, eos=often) == ours


DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])

def linear_layers(model): return [m for m in model.modules() if type(m) is torch.nn.Linear]

def small_llama(dtype=torch.float32):
    model = random_model(LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True)).to(dtype)
    if not all(can_lay_out(layer.weight) for layer in linear_layers(model)): pytest.skip(f'this CPU lays nothing out in {dtype}')
    return model


@DTYPES
@torch.no_grad()
def test_laid_out_weights_are_those_of_now_and_are_put_away_afterwards(dtype):
    model, ids = small_llama(dtype), torch.arange(6)[:, None]
    eps = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=.1, rtol=.05)

    def said(rows):
        with laying_out(model) as lay_out:
            lay_out(rows)
            return model(ids).logits
    for rows in (6, 3): torch.testing.assert_close(said(rows), model(ids).logits, **eps)
    before = said(6)
    for p in model.parameters(): p.mul_(1.5)
    torch.testing.assert_close(said(6), model(ids).logits, **eps)
    assert (said(6)-before).abs().max() > .5
    with pytest.raises(KeyError), laying_out(model) as lay_out:
        lay_out(6)
        raise KeyError
    assert not any('forward' in vars(layer) for layer in linear_layers(model))


@DTYPES
@torch.no_grad()
def test_the_laid_out_weight_is_what_its_rows_meet_and_no_others(dtype):
    layer = linear_layers(small_llama(dtype))[0]
    multiply, x = laid_out(layer, 4), torch.ones(4, 32, dtype=dtype)
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(multiply(x), before, atol=.05, rtol=.02)        # of the weight as it was laid out
    torch.testing.assert_close(multiply(x[:3]), layer(x[:3]), atol=.05, rtol=.02)


def test_under_autocast_and_in_other_precisions_weights_are_left_alone():
    model = small_llama()
    with torch.autocast('cpu', torch.bfloat16), laying_out(model) as lay_out:
        lay_out(4)
        assert not any('forward' in vars(layer) for layer in linear_layers(model))
    linear_layers(model)[0].half()
    with laying_out(model) as lay_out:
        lay_out(4)
        assert ['forward' in vars(layer) for layer in linear_layers(model)][:2] == [False, True]


def test_weights_are_laid_out_for_the_rows_that_are_read(monkeypatch):
    model, asked, read = small_llama(), [], []
    usual = rollout.laying_out

    @contextmanager
    def noted(model):
        with usual(model) as lay_out: yield lambda rows: (asked.append(rows), lay_out(rows))
    monkeypatch.setattr(rollout, 'laying_out', noted)
    monkeypatch.setattr(Reader, 'read', lambda self, tokens, read_on=Reader.read: (read.append(len(tokens)), read_on(self, tokens))[1])
    drawn = chance(4, 20)
    often = max(set(tokens := [t for group in generate(model, PROMPTS, drawn, eos=2) for row in group for t in row]), key=tokens.count)
    asked.clear(), read.clear()
    generate(model, PROMPTS, drawn, eos=often)
    assert len(set(read)) > 1 and asked == read[:len(asked)] and len(asked) == min(len(read), 20-rollout.WORTH)


@pytest.mark.parametrize('shape', SHAPES)
def test_log_probabilities_and_gradients_are_those_of_autograd(shape):
    model, ref = (random_model(SHAPES[shape]()) for _ in range(2))
    with torch.no_grad():
        for p in ref.parameters(): p.add_(.1*torch.randn_like(p))
    completions = [[[21, 22, 2], [31]], [[41, 42], [51, 52, 53, 54]], [[61, 62, 2], [71, 2]]]
    packed = pack_groups(PROMPTS, completions)
    assert can_see(model)
    weights = torch.randn(3, *packed.mask.shape)*packed.mask

    def ours(): return token_facts(model, packed, ref, 'gradient')

    def plain():
        found = torch.zeros(3, *packed.mask.shape)
        for g, prompt in enumerate(PROMPTS):
            for c, text in enumerate(completions[g]):
                rows = torch.tensor([prompt+text])
                logs, other = (m(rows).logits[0, len(prompt)-1:-1].log_softmax(-1) for m in (model, ref))
                found[0, g, c, :len(text)] = logs[torch.arange(len(text)), torch.tensor(text)]
                found[1, g, c, :len(text)] = -(logs.exp()*logs).sum(-1)
                found[2, g, c, :len(text)] = (logs.exp()*(logs-other.detach())).sum(-1)
        return found

    def gradients(rows): return torch.autograd.grad((rows*weights).sum(), list(model.parameters()))
    facts, expected = ours(), plain()
    rows = torch.stack([facts.logps, facts.entropy, facts.kl])
    torch.testing.assert_close(rows, expected, atol=2e-5, rtol=1e-4)
    for a, b in zip(gradients(rows), gradients(expected)): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_other_attention_falls_back_and_says_why():
    hybrid = random_model(LlamaConfig(**SMALL, num_key_value_heads=2))
    hybrid.config.layer_types = ['conv', 'full_attention']
    assert why_not_seen(hybrid) == 'it has layers of conv' and isinstance(make_reader(hybrid, PROMPTS, 1, 8), EqualReader)
    capped = random_model(LlamaConfig(**SMALL, num_key_value_heads=2))
    packed = pack_groups(PROMPTS[:1], [[[21, 22]]])
    with torch.no_grad(): ours = group_hidden(capped, packed)
    capped.config.attn_logit_softcapping = 1e9
    assert 'caps the scores' in why_not_seen(capped) and isinstance(make_reader(capped, PROMPTS, 1, 8), CachedReader)
    with torch.no_grad(): torch.testing.assert_close(group_hidden(capped, packed), ours, atol=1e-5, rtol=1e-4)
    capped.config.final_logit_softcapping = 30.
    with pytest.raises(NotImplementedError, match='caps its logits'): token_facts(capped, packed)


def test_a_model_that_scales_its_logits_unheard_of_is_refused():
    model = random_model(SHAPES['llama']())
    check_head(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 2*out.logits
        return out
    model.forward = scaled
    with pytest.raises(NotImplementedError, match='not those of its head'): check_head(model)


def test_a_large_vocabulary_never_makes_all_logits_at_once(monkeypatch):
    from densirl import vocab
    model = random_model(LlamaConfig(**SMALL | dict(vocab_size=150_000), num_key_value_heads=2))
    largest, log_probs = [], vocab.log_probs

    def spy(states, *head):
        largest.append(len(states))
        return log_probs(states, *head)
    monkeypatch.setattr(vocab, 'log_probs', spy)
    packed = pack_groups([[5, 6]]*4, [[list(range(10, 160))]*2]*4)
    token_facts(model, packed).logps.sum().backward()
    assert max(largest) == 256 and len(largest) == 2*-(-1200//256), 'logits are made twice, a few hundred rows at a time'
