"""Our objectives beside TRL's, for the same tokens, rewards and old log-probabilities: losses and gradients."""
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from densirl.logps import pack_groups, token_facts
from densirl.models import load_tokenizer, make_tiny
from densirl.objectives import group_advantages
from densirl.updates import UpdateConfig, part_loss

PROMPTS, LONGEST = [[5, 6, 7], [8]], 4
COMPLETIONS = [[[11, 12, 2], [21, 2]], [[31, 9, 14, 15], [41, 42, 43, 2]]]
VARIANTS = dict(grpo=dict(loss_type='grpo'), dr_grpo=dict(loss_type='dr_grpo'), dapo=dict(loss_type='dapo'), gspo=dict(loss_type='grpo', importance_sampling_level='sequence'),
    cispo=dict(loss_type='cispo', epsilon_high=1.2))

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('words')/'tiny'
    make_tiny(folder, ['How do I make pancakes?']*9)
    return load_tokenizer(str(folder))

def small_model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, eos_token_id=2, pad_token_id=0)).eval()

def padded(rows, left):
    longest = max(map(len, rows))
    ids = [[0]*(longest-len(r))+r if left else r+[0]*(longest-len(r)) for r in rows]
    mask = [[0]*(longest-len(r))+[1]*len(r) if left else [1]*len(r)+[0]*(longest-len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)

@pytest.mark.parametrize('beta, corrected', [(0., False), (.3, False), (.3, True)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_losses_and_gradients_are_those_of_trl(tokenizer, tmp_path, variant, beta, corrected):
    small_model(0).save_pretrained(tmp_path)                # TRL loads the reference once more from where the policy came from
    model, ref, packed = LlamaForCausalLM.from_pretrained(tmp_path).eval(), small_model(1), pack_groups(PROMPTS, COMPLETIONS)
    with torch.no_grad(): logps, ref_logps = (token_facts(m, packed).logps for m in (model, ref))
    old_logps = logps+.3*torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))    # so that some ratios are clipped and some are not
    advantages = group_advantages(torch.tensor([[1., 3.], [2., -1.]]))
    tokens, clip = int(packed.mask.sum()), dict(clip_high=.2) if variant == 'cispo' else dict(clip_low=.1, clip_high=.15)

    cfg = UpdateConfig(variant=variant, kl_ratio=corrected, max_new_tokens=LONGEST, **clip)
    loss, stopped = part_loss(cfg, token_facts(model, packed), old_logps, ref_logps, advantages, packed.mask, beta, (4, tokens))
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert 0 < (stopped*packed.mask).sum() < tokens

    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=LONGEST, beta=beta, use_bias_correction_kl=corrected, epsilon=.1, bf16=False, use_cpu=True, report_to='none',
        activation_checkpointing=False, **dict(dict(epsilon_high=.15), **VARIANTS[variant]))
    trainer = GRPOTrainer(model=model, reward_funcs=lambda **_: [0.]*4, args=args, train_dataset=Dataset.from_dict(dict(prompt=['a', 'b'])), processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    prompts, prompt_mask = padded([p for p in PROMPTS for _ in range(2)], left=True)
    ids, mask = padded(sum(COMPLETIONS, []), left=False)
    flat = lambda x: x.flatten(0, 1)
    theirs = trainer._compute_loss(model.train(), dict(prompt_ids=prompts, prompt_mask=prompt_mask, completion_ids=ids, completion_mask=mask, advantages=flat(advantages),
        old_per_token_logps=flat(old_logps), ref_per_token_logps=flat(ref_logps), num_items_in_batch=torch.tensor(float(tokens))))
    theirs.backward()
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)
    assert max(g.abs().max() for g in ours) > 1e-3
    for a, p in zip(ours, model.parameters()): torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-5)
