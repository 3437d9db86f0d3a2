"""Attention without padding must be attention, in any decoder of the transformers library that it takes."""
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from densirl.attention import can_see
from densirl.logps import pack_groups, token_facts

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = dict(
    llama=LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    qwen2=Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=False),
    qwen3=Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    gpt2=GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0., attn_pdrop=0., embd_pdrop=0.),
    mistral=MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4096),
    gemma2=Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=None))
PACKED = pack_groups([[5, 6, 7], [8]], [[[11, 12, 2], [21]], [[31], [41, 42, 43]]])

def model_of(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation='eager' if kind == 'gemma2' else 'sdpa').eval()

@pytest.mark.parametrize('kind', CONFIGS)
def test_log_probabilities_are_those_of_the_model(kind):
    model = model_of(kind)
    assert can_see(model) == (kind != 'gemma2')
    logps = token_facts(model, PACKED).logps
    logps.sum().backward()
    ours, alone = [p.grad.clone() for p in model.parameters()], torch.zeros_like(logps)
    model.zero_grad()
    for g, (prompt, completions) in enumerate([([5, 6, 7], [[11, 12, 2], [21]]), ([8], [[31], [41, 42, 43]])]):
        for c, text in enumerate(completions):
            rows = model(torch.tensor([prompt+text])).logits[0].log_softmax(-1)[len(prompt)-1:-1]
            alone[g, c, :len(text)] = rows.gather(-1, torch.tensor(text)[:, None]).squeeze(-1)
    alone.sum().backward()
    torch.testing.assert_close(logps, alone, atol=1e-5, rtol=1e-5)
    for a, p in zip(ours, model.parameters()): torch.testing.assert_close(a, p.grad, atol=1e-4, rtol=1e-4)

def test_long_completions_are_seen_in_blocks():
    model = model_of('llama')
    model.config.max_position_embeddings = 1024
    rng = torch.Generator().manual_seed(0)
    prompt, text = (torch.randint(3, 64, (n,), generator=rng).tolist() for n in (40, 600))
    with torch.no_grad():
        logps = token_facts(model, pack_groups([prompt], [[text, text[:300]]])).logps
        rows = model(torch.tensor([prompt+text])).logits[0].log_softmax(-1)[39:-1]
    expected = rows.gather(-1, torch.tensor(text)[:, None]).squeeze(-1)
    torch.testing.assert_close(logps[0, 0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logps[0, 1, :300], expected[:300], atol=1e-4, rtol=1e-4)
