"""What would let a training run learn nothing, or two arms differ in secret."""
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import densirl as call
from densirl.config import make_config
from densirl.dist import Ranks
from densirl.draws import Draws
from densirl.files import read_jsonl
from densirl.grpo import GrpoConfig, first_policy, grpo_steps, load_models, train_grpo
from densirl.logps import completion_rewards, pack_groups
from densirl.models import load_policy, load_reward_model
from densirl.runs import read_log, read_manifest
from densirl.trainer import make_optimizer, optimizer_step

def weights(folder): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

def test_one_small_step_moves_nearly_all_weights(tiny_run):
    model = load_policy(str(tiny_run/'outs/sft'))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, 1e-5)
    model(torch.arange(40)[None]).logits.log_softmax(-1)[..., 0].sum().backward()
    has_gradient = {n: p.grad != 0 for n, p in model.named_parameters()}
    optimizer_step(model, optimizer, Ranks())
    moved = sum(((p != before[n]) & has_gradient[n]).sum().item() for n, p in model.named_parameters())
    assert moved/sum(g.sum().item() for g in has_gradient.values()) > .99

def test_policy_opens_with_transformers_and_was_trained(tiny_run):
    start, end = weights(tiny_run/'outs/sft'), weights(tiny_run/'outs/grpo')
    assert start.keys() == end.keys()
    assert any((start[k] != end[k]).any() for k in start)

def test_reward_model_opens_with_transformers_and_scores_the_same(tiny_run):
    folder = tiny_run/'outs/rm'
    ours, theirs = load_reward_model(str(folder)), AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    prompt, completions = [1, 5, 6, 7], [[11, 12, 2], [21, 22]]
    with torch.no_grad():
        rewards = completion_rewards(ours, pack_groups([prompt], [completions]))[0, :, 0]
        rows = [prompt+c for c in completions]
        padded = [r+[theirs.config.pad_token_id]*(max(map(len, rows))-len(r)) for r in rows]
        expected = theirs(torch.tensor(padded), attention_mask=torch.tensor([[1]*len(r)+[0]*(len(p)-len(r)) for r, p in zip(rows, padded)])).logits[:, 0]
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)

def test_arms_differ_in_the_factor_alone(tiny_run):
    a, b = (read_manifest(tiny_run/f'outs/{n}') for n in ('grpo', 'grpo_baseline'))
    assert {k for k in a['config'] if a['config'][k] != b['config'][k]} == {'density_aware'}
    assert a['inputs'].keys()-b['inputs'].keys() == {'density'}
    assert all(a['inputs'][k] == b['inputs'][k] for k in b['inputs'])
    assert a['facts']['weight_variance'] > b['facts']['weight_variance'] == 0

def arm(tiny_run, name, **given):
    "Facts and draws of a small run with some settings"
    cfg = make_config(GrpoConfig, 'test', root=str(tiny_run), out_dir=f'outs/{name}', **given)
    out = train_grpo(cfg)
    return read_manifest(out)['facts'], read_log(out, 'draws')

def test_a_curriculum_moves_the_exponent(tiny_run):
    _, draws = arm(tiny_run, 'curriculum', max_steps=3, schedule='linear', alpha='-0.4', alpha_last='0.4')
    np.testing.assert_allclose([d['alpha'] for d in draws], [-.4, 0, .4], atol=1e-12)
    assert draws[1]['effective_share'] == pytest.approx(1) and draws[0]['effective_share'] < .99

def test_pairs_are_drawn_as_often_as_they_are_many(tiny_run):
    facts, draws = arm(tiny_run, 'pairs', max_steps=1, density_aware=False, draw='pairs')
    counts = [p['count'] for p in read_jsonl(tiny_run/'.cache/data/prompts_all.jsonl') if p['fold'] == 'policy']
    assert facts['alpha'] == 0 and facts['effective_share'] == pytest.approx(sum(counts)**2/sum(c*c for c in counts)/len(counts))

def test_density_can_follow_the_policy(tiny_run):
    "Measured anew, the weights change; the share for which the exponent is solved does not"
    facts, draws = arm(tiny_run, 'adaptive', max_steps=2, refresh_every=1)
    assert draws[0]['weights'] != draws[1]['weights']
    assert all(d['effective_share'] == pytest.approx(.5, abs=1e-3) for d in draws)

def test_a_placebo_draws_as_unequally_but_others(tiny_run):
    real, placebo = read_manifest(tiny_run/'outs/grpo')['facts'], arm(tiny_run, 'placebo', max_steps=2, placebo='strata')[0]
    assert placebo['effective_share'] == pytest.approx(real['effective_share']) and placebo['weight_variance'] == pytest.approx(real['weight_variance'])
    assert read_log(tiny_run/'outs/placebo', 'draws')[0]['weights'] != read_log(tiny_run/'outs/grpo', 'draws')[0]['weights']

def test_same_seed_same_run(tiny_run):
    cfg = make_config(GrpoConfig, 'test', root=str(tiny_run), out_dir='outs/again')
    train_grpo(cfg)
    first, again = (read_log(tiny_run/f'outs/{n}') for n in ('grpo', 'again'))
    assert [{k: v for k, v in r.items() if k != 'seconds'} for r in first] == [{k: v for k, v in r.items() if k != 'seconds'} for r in again]
    w, v = weights(tiny_run/'outs/grpo'), weights(tiny_run/'outs/again')
    assert all(torch.equal(w[k], v[k]) for k in w)

@pytest.mark.parametrize('stage,out,flags', [('sft', '--out_path', []), ('rm', '--out_path', []), ('grpo', '--out_dir', ['--density_aware=False'])])
def test_two_ranks_are_one_run(tiny_run, stage, out, flags):
    folders = [f'outs/ranks/{stage}_{n}' for n in (1, 2)]
    for n, folder in zip((1, 2), folders): call(stage, *(['--'] if n > 1 else []), '--profile', 'test', '--root', tiny_run, out, folder, *flags, ranks=n)
    one, two = (read_log(tiny_run/f) for f in folders)
    for a, b in zip(one, two, strict=True):
        for k in a.keys()-{'seconds', 'step', 'of'}: assert a[k] == pytest.approx(b[k], abs=1e-4), k
    load = AutoModelForSequenceClassification if stage == 'rm' else AutoModelForCausalLM
    w, v = (load.from_pretrained(tiny_run/f, dtype=torch.float32).state_dict() for f in folders)
    # Adam's first steps divide by the gradient's own size, so where it is nearly zero rounding shows.
    assert all((w[k]-v[k]).abs().mean() < 1e-5 for k in w)

def test_bf16_products_keep_fp32_masters(tiny_run):
    cfg = make_config(GrpoConfig, 'test', root=str(tiny_run), max_steps=1)
    models = load_models(cfg, *first_policy(cfg, 'cpu'), torch.bfloat16)
    before = [p.detach().clone() for p in models.policy.parameters()]
    prompts = [dict(id=str(i), prompt=f'Name {i} fish.') for i in range(4)]
    list(grpo_steps(cfg, models, Draws(cfg, prompts, np.zeros(4)), make_optimizer(models.policy, cfg.learning_rate), Ranks()))
    assert {p.dtype for p in models.policy.parameters()} == {torch.float32}
    assert {p.dtype for p in models.sampler.parameters()} == {torch.bfloat16}
    assert any((p != b).any() for p, b in zip(models.policy.parameters(), before))
    for copied, p in zip(models.sampler.parameters(), models.policy.parameters()): torch.testing.assert_close(copied, p.to(torch.bfloat16))
