"""Models of many shapes, random and tiny, and how each is read: seen, packed, unpacked or refused. The self-check of a run must come to the verdict of this table."""
import copy

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from densirl.attention import why_not_packed, why_not_seen
from densirl.decode import decoding_of
from densirl.logps import completion_rewards, pack_groups, token_facts
from densirl.models import load_policy, quiet_transformers
from densirl.rollout import sampling_copy
from densirl.selfcheck import TOLERANCE, check_model, check_texts, find_way, measure_way, our_numbers, plain_numbers, randomise_, small_like

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDE = dict(SMALL, head_dim=8)
MIXED = dict(WIDE, sliding_window=8, layer_types=['sliding_attention', 'full_attention'])
GPT = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(WIDE, layer_types=['linear_attention', 'full_attention'], linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)
LATENT = dict(SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)

SEEN, PACKED, ROWS, NO = ('seen', 'shared'), ('packed', 'padded'), ('unpacked', 'padded'), ('refused', '')
KINDS = dict(                                               # name → class of the configuration, its values, how it is read and decoded, and a word of the reason
    llama=(T.LlamaConfig, SMALL, SEEN, ''),
    qwen3=(T.Qwen3Config, WIDE, SEEN, ''),
    gpt2=(T.GPT2Config, GPT, SEEN, ''),
    gpt_neox=(T.GPTNeoXConfig, SMALL, SEEN, ''),
    phi=(T.PhiConfig, SMALL, SEEN, ''),
    opt=(T.OPTConfig, SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.), SEEN, ''),
    nemotron=(T.NemotronConfig, WIDE, SEEN, ''),
    jetmoe=(T.JetMoeConfig, dict(SMALL, kv_channels=8, num_local_experts=4, num_experts_per_tok=2), SEEN, ''),
    mixtral=(T.MixtralConfig, WIDE | dict(num_local_experts=4, sliding_window=8), SEEN, ''),
    qwen3_moe=(T.Qwen3MoeConfig, WIDE | EXPERTS, SEEN, ''),
    olmo2=(T.Olmo2Config, SMALL, SEEN, ''),
    glm4=(T.Glm4Config, WIDE, SEEN, ''),
    persimmon=(T.PersimmonConfig, SMALL, SEEN, ''),
    seed_oss=(T.SeedOssConfig, WIDE, SEEN, ''),
    minicpm3=(T.MiniCPM3Config, dict(SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8), SEEN, ''),
    qwen2_moe=(T.Qwen2MoeConfig, SMALL | EXPERTS | dict(shared_expert_intermediate_size=16), SEEN, ''),
    deepseek_v3=(T.DeepseekV3Config, LATENT, SEEN, ''),
    granite=(T.GraniteConfig, SMALL | dict(logits_scaling=4., attention_multiplier=.2), SEEN, ''),
    cohere=(T.CohereConfig, SMALL | dict(logit_scale=.25), SEEN, ''),
    # windows and chunks
    mistral=(T.MistralConfig, WIDE | dict(sliding_window=8), SEEN, ''),
    ministral=(T.MinistralConfig, MIXED, SEEN, ''),
    phi3=(T.Phi3Config, SMALL | dict(sliding_window=8), SEEN, ''),
    gemma3=(T.Gemma3TextConfig, MIXED, SEEN, ''),
    qwen2_window=(T.Qwen2Config, SMALL | dict(sliding_window=8, use_sliding_window=True, max_window_layers=1), SEEN, ''),
    starcoder2=(T.Starcoder2Config, SMALL | dict(sliding_window=8), SEEN, ''),
    cohere2=(T.Cohere2Config, MIXED | dict(logit_scale=.25), SEEN, ''),
    exaone4=(T.Exaone4Config, MIXED, SEEN, ''),
    olmo3=(T.Olmo3Config, MIXED, SEEN, ''),
    smollm3=(T.SmolLM3Config, SMALL | dict(sliding_window=8, use_sliding_window=True, layer_types=['sliding_attention', 'full_attention']), SEEN, ''),
    llama4=(T.Llama4TextConfig, WIDE | dict(intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8, layer_types=['chunked_attention', 'full_attention']), SEEN, ''),
    # attention that ours lacks
    gemma2=(T.Gemma2Config, MIXED | dict(final_logit_softcapping=None), PACKED, 'caps the scores'),
    gpt_oss=(T.GptOssConfig, MIXED | dict(num_local_experts=4, num_experts_per_tok=2), PACKED, 'not the usual one'),
    diffllama=(T.DiffLlamaConfig, SMALL, ('seen', 'padded'), ''),
    # positions from the mask, or a mask of their own
    bloom=(T.BloomConfig, dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), ROWS, 'attention interface'),
    mpt=(T.MptConfig, dict(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=128), ROWS, 'attention interface'),
    falcon_alibi=(T.FalconConfig, SMALL | dict(alibi=True, new_decoder_architecture=False), ROWS, 'attention interface'),
    gptj=(T.GPTJConfig, GPT | dict(rotary_dim=4), ROWS, 'attention interface'),
    gpt_neo=(T.GPTNeoConfig, dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=8, max_position_embeddings=128), ROWS, 'attention interface'),
    stablelm=(T.StableLmConfig, SMALL, ROWS, 'attention interface'),
    doge=(T.DogeConfig, SMALL, ROWS, 'mask of its own'),
    # layers that are not attention
    qwen3_next=(T.Qwen3NextConfig, LINEAR | EXPERTS | dict(shared_expert_intermediate_size=16), ROWS, 'linear attention'),
    qwen3_5=(T.Qwen3_5TextConfig, LINEAR, ROWS, 'linear attention'),
    lfm2=(T.Lfm2Config, SMALL | dict(layer_types=['conv', 'full_attention'], block_auto_adjust_ff_dim=False), ROWS, 'conv'),
    jamba=(T.JambaConfig, SMALL | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4), ROWS, 'linear attention'),
    falcon_h1=(T.FalconH1Config, SMALL | MAMBA | dict(mamba_d_ssm=64), ROWS, 'hybrid'),
    granite_hybrid=(T.GraniteMoeHybridConfig, SMALL | MAMBA | dict(layer_types=['mamba', 'attention'], num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=32), ROWS, 'linear attention'),
    bamba=(T.BambaConfig, SMALL | MAMBA | dict(attn_layer_indices=[1]), ROWS, 'linear attention'),
    lfm3=(T.Lfm3Config, WIDE | dict(layer_types=['conv', 'full_attention'], block_auto_adjust_ff_dim=False), ROWS, 'conv'),
    olmo_hybrid=(T.OlmoHybridConfig, LINEAR, ROWS, 'linear attention'),
    mamba2=(T.Mamba2Config, dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=16), ROWS, 'linear attention'),
    xglm=(T.XGLMConfig, dict(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=128), ROWS, 'attention interface'),
    mamba=(T.MambaConfig, dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8), ('unpacked', 'equal'), 'linear attention'),
    # refused
    gemma2_capped=(T.Gemma2Config, MIXED, NO, 'caps its logits'),
    bert=(T.BertConfig, SMALL | dict(is_decoder=False), NO, 'not those of its head'),
    rwkv=(T.RwkvConfig, dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), NO, 'read one completion a row, it raises'),
    openai_gpt=(T.OpenAIGPTConfig, GPT, NO, 'no cache of the usual kind'),
    recurrent_gemma=(T.RecurrentGemmaConfig, dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, lru_width=32, attention_window_size=8), NO, 'away from a plain forward pass'),
    nemotron_h=(T.NemotronHConfig, WIDE | dict(layers_block_type=['linear_attention', 'full_attention', 'mlp'], num_hidden_layers=3, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16), NO, 'differs from `generate`'),
    minimax=(T.MiniMaxConfig, WIDE | dict(layer_types=['linear_attention', 'full_attention'], num_local_experts=2, block_size=8), NO, 'differs from `generate`'),
)
REWARD = dict(llama='seen', mistral='seen', gemma3='seen', gpt2='seen', gpt_oss='packed', bloom='unpacked', qwen3_5='unpacked', qwen3_next='unpacked', jamba='unpacked')


def random_model(name, auto=AutoModelForCausalLM, **changed):
    quiet_transformers()
    torch.manual_seed(0)
    config, values = KINDS[name][:2]
    model = auto.from_config(config(**(values | changed))).float().eval()
    randomise_(model)
    return model


def way_of(model): return 'seen' if not why_not_seen(model) else 'unpacked' if why_not_packed(model) else 'packed'


@pytest.mark.parametrize('name', KINDS)
def test_each_shape_is_read_as_the_table_says(name):
    _, _, (way, decoder), reason = KINDS[name]
    model, texts = random_model(name), check_texts(64)
    if way == 'refused':
        with pytest.raises(NotImplementedError, match=f'is refused by the self-check: .*{reason}.* choose another model'): find_way(model, texts, True)
        return
    with torch.no_grad(): unchecked = (our_numbers(model, texts)-plain_numbers(model, texts)).abs().max() if name != 'doge' else 0   # what is known without a check is right, or raises
    errors = find_way(model, texts, True)
    assert unchecked <= TOLERANCE and max(errors.values()) <= TOLERANCE
    assert (way_of(model), decoding_of(model)) == (way, decoder)
    assert reason in why_not_seen(model)


@pytest.mark.parametrize('name', REWARD)
def test_reward_models_give_the_rewards_of_transformers(name):
    model = random_model(name, AutoModelForSequenceClassification, num_labels=2)
    errors = find_way(model, check_texts(64), True)
    assert errors.keys() == {'reward', 'gradient'} and max(errors.values()) <= TOLERANCE and way_of(model) == REWARD[name]


@pytest.mark.parametrize('name', ['mistral', 'gemma3', 'llama4', 'qwen3_5', 'lfm2', 'jamba'])
def test_a_wrong_mask_would_show(name):
    "The same texts read as one packed row without rule or mask are nats away, so the check can fail"
    model = random_model(name)
    texts = check_texts(64)
    packed = pack_groups(texts.prompts[:1], texts.completions[:1])
    with torch.no_grad():
        logs = model(packed.ids, position_ids=packed.positions).logits[0].log_softmax(-1)
        row = logs[packed.source[0], packed.target[0]]*packed.mask[0]
        plain = plain_numbers(model, texts)[:2, :row.shape[-1]]
    assert (row-plain).abs().max() > 100*TOLERANCE


def test_windows_and_chunks_matter_beyond_their_length():
    "With a window as long as the texts, a model is another one"
    for name, field in (('mistral', 'sliding_window'), ('gemma3', 'sliding_window'), ('llama4', 'attention_chunk_size')):
        short, long = random_model(name), random_model(name, **{field: 64})
        packed = pack_groups(*zip(*zip(check_texts(64).prompts, check_texts(64).completions)))
        with torch.no_grad(): assert (token_facts(short, packed).logps-token_facts(long, packed).logps).abs().max() > 100*TOLERANCE


def test_the_check_builds_a_small_model_of_each_kind_of_layer():
    model = random_model('gemma3', num_hidden_layers=12, layer_types=(['sliding_attention']*5+['full_attention'])*2, sliding_window=64)
    small, cut = small_like(model)
    assert cut == 'layers and widths' and small.config.layer_types == ['sliding_attention']*5+['full_attention'] and small.config.sliding_window == 8


def test_what_a_check_finds_is_kept_and_written_on_the_model(tmp_path, capsys):
    model = random_model('diffllama')
    before = torch.get_rng_state()
    facts = check_model(model, tmp_path, 'mine')
    assert facts['way'] == 'seen' and facts['decoder'] == 'padded' and max(facts[k] for k in ('nats', 'gradient', 'decoding', 'own_nats', 'own_decoding')) < facts['tolerance']
    assert 'mine decodes with the KV cache of transformers' in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    again = random_model('diffllama')
    assert decoding_of(again) == 'shared' and check_model(again, tmp_path) == facts and decoding_of(again) == 'padded' and len(list((tmp_path/'checks').iterdir())) == 1
    assert decoding_of(copy.deepcopy(again)) == 'padded'


def test_a_model_that_only_fails_at_its_own_size_is_found():
    "The small model is right, and the model itself adds up its rows"
    model = random_model('mistral', sliding_window=64)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x)+x.cumsum(1)
    with pytest.raises(NotImplementedError, match='nats per token'): measure_way(model)


def test_text_is_taken_out_of_a_model_of_text_and_images(tmp_path):
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    whole = AutoModelForCausalLM.from_config(T.Gemma3Config(text_config=MIXED, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path/'whole')
    text, ids = load_policy(str(tmp_path/'whole')), torch.arange(5, 25)[None]
    with torch.no_grad(): torch.testing.assert_close(text(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    text.save_pretrained(tmp_path/'text')
    with torch.no_grad(): torch.testing.assert_close(load_policy(str(tmp_path/'text'))(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_copy_that_samples_in_bf16_keeps_rotary_frequencies_in_fp32():
    model = random_model('llama')
    half = sampling_copy(model, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq) and half.model.rotary_emb.inv_freq.dtype == torch.float32
