"""What would let a policy learn something else than it says, or end somewhere else after a crash."""
import os, re, shlex, signal, subprocess, sys, time
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from conftest import ROOT, densirl as call
from densirl.config import cli_config, config_flags, make_config
from densirl.files import read_jsonl
from densirl.grpo import GrpoConfig, first_policy, load_models, train_grpo
from densirl.rollout import completion_uniforms, pick_tokens
from densirl.run_folders import own_folder
from densirl.runs import checkpoint_home, read_log, read_manifest, run_key
from densirl.updates import UpdateConfig, merge_rollouts, roll_out, rollout_metrics, sampled_facts

def config(root, name, **given): return make_config(GrpoConfig, 'test', **{'root': str(root), 'out_dir': f'outs/policies/{name}', **given})
def weights(folder): return load_file(folder/'model.safetensors')
def steps(folder): return [{k: v for k, v in r.items() if k != 'seconds'} for r in read_log(folder)]
def same(a, b): return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())

@pytest.fixture(scope='module')
def plain(tiny_run): return train_grpo(config(tiny_run, 'plain'))

LONG = dict(max_new_tokens=80)                                   # so that completions end at different lengths
TWICE = dict(updates=2, clip_low=1e-4, clip_high=1e-4)           # so that ratios leave one

@pytest.mark.parametrize('base, flag', [(LONG, dict(variant='dr_grpo')), (LONG, dict(variant='dapo')), (TWICE, dict(variant='gspo')), (TWICE, dict(variant='cispo')), (LONG, dict(cut_counts=False)),
    (TWICE, dict(clip_low=.2)), (TWICE, dict(clip_high=.2)), (dict(updates=2), dict(kl_ratio=True)), (dict(advantages='centred'), dict(reward_scale='group')), *(({}, flag) for flag in (
    dict(advantages='centred'), dict(advantages='rloo'), dict(beta=0.), dict(kl='k1', kl_in='reward'), dict(kl='exact', kl_in='reward'), dict(kl='k2'), dict(kl='exact'), dict(kl_ratio=True),
    dict(kl_target=1e-4), dict(updates=2), dict(entropy_bonus=.1), dict(diversity_bonus=1.), dict(group_size=2), dict(learning_rate=2e-3), dict(max_steps=3), dict(max_new_tokens=4),
    dict(max_prompt_tokens=8), dict(seed=1), dict(prompts_per_step=4), dict(density_aware=False), dict(alpha='2'), dict(dtype='bfloat16'), dict(objective='pairwise'),
    dict(rewards='rm=1,math_rewards.length=1')))], ids=str)
def test_every_setting_has_an_effect(tiny_run, base, flag, tmp_path, monkeypatch):
    (tmp_path/'math_rewards.py').write_text('def length(prompts, completions): return [[len(c)%7 for c in group] for group in completions]')
    monkeypatch.syspath_prepend(tmp_path)
    without, with_it = (train_grpo(config(tiny_run, '_'.join(map(str, sum(given.items(), ()))) or 'plain', **given)) for given in (base, base|flag))
    assert not same(with_it, without)

def test_the_size_of_a_pass_changes_memory_not_results(tiny_run, plain):
    out = train_grpo(config(tiny_run, 'passes', device_batch_size=4))
    for a, b in zip(steps(plain), steps(out), strict=True):
        for k in a: assert a[k] == pytest.approx(b[k], abs=1e-4), k

def rolled(tiny_run, dtype=torch.float32, cut=48):
    "Models, and what they make of the first policy prompts, each with chance of its own"
    cfg = config(tiny_run, 'unused')
    models = load_models(cfg, *first_policy(cfg, 'cpu'), dtype)
    prompts = [p for p in read_jsonl(tiny_run/'.cache/data/prompts_all.jsonl') if p['fold'] == 'policy']
    return models, lambda *which: roll_out(models, [prompts[i] for i in which], cut, np.stack([completion_uniforms(0, 0, i, 4, 12 if len(which) > 1 else 18) for i in which]))

def test_a_group_in_anothers_place_is_all_there(tiny_run):
    _, roll = rolled(tiny_run)
    merged, plain = merge_rollouts(roll(0, 1, 2), roll(3), [1]), roll(0, 3, 2)
    n = min(merged.ref_logps.shape[-1], plain.ref_logps.shape[-1])
    assert [merged.texts[i] == plain.texts[i] for i in (0, 2)] == [True, True] and merged.texts[1] == roll(3).texts[0] != roll(0, 1, 2).texts[1]
    for rows in (merged, roll(3)): assert torch.isfinite(rows.ref_logps).all()
    torch.testing.assert_close(merged.ref_logps[[0, 2], :, :n], plain.ref_logps[[0, 2], :, :n], atol=1e-5, rtol=0)
    alone = roll(3).ref_logps[0]
    torch.testing.assert_close(merged.ref_logps[1, :, :alone.shape[-1]], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.rewards['reward'][1], roll(3).rewards['reward'][0], atol=1e-5, rtol=0)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_way_from_the_reference_begins_at_zero(tiny_run, dtype):
    models, roll = rolled(tiny_run, dtype)
    rollout = roll(0, 1)
    facts = sampled_facts(UpdateConfig(kl='exact'), models, rollout)
    assert (facts.logps-rollout.ref_logps).abs().max() == 0 and facts.kl.abs().max() < 1e-6

def test_prompts_that_are_too_long_are_cut_and_counted(tiny_run):
    rollout = rolled(tiny_run, cut=8)[1](0, 1)
    assert rollout.cut == [True, True] and {len(ids) for ids in rollout.ids} == {8} and rollout_metrics(rollout)['cut_prompts'] == 1

def test_tokens_follow_the_model():
    "100,000 draws from 64 tokens, with the chance of real runs"
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    chance = torch.tensor(np.concatenate([completion_uniforms(0, step, slot, 8, 25).ravel() for step in range(125) for slot in range(4)]))
    found = torch.bincount(pick_tokens(logits.expand(len(chance), 64), chance), minlength=64).numpy()
    assert len(chance) == 100_000 and chisquare(found, (logits.double().softmax(-1)*len(chance)).numpy()).pvalue > 1e-3

GIVEN = dict(max_steps=12, save_every=2, eval_every=4, density_aware=True, refresh_every=3, kl_target=1e-3, updates=2, resample=1)

def start(cfg, after=2):
    "The command line in a process of its own, once it has a checkpoint of a step"
    env = os.environ | {'DENSIRL_ROOT': str(ROOT), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', 'densirl.cli', 'grpo', *config_flags(cfg)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    home = checkpoint_home(own_folder(cfg, run_key(cfg)))
    while process.poll() is None and not (home/f'step_{after:08d}').exists(): time.sleep(.002)
    return process

@pytest.fixture(scope='module')
def whole(tiny_run):
    torch.set_num_threads(1)
    return train_grpo(config(tiny_run, 'whole', **GIVEN))

@pytest.mark.parametrize('how, after', [(signal.SIGKILL, 4), (signal.SIGKILL, 8), (signal.SIGTERM, 4)], ids=str)
def test_a_stopped_run_goes_on_to_the_same_end(tiny_run, whole, how, after):
    "Checkpoints 4 and 8 lie behind a refreshed density and are no steps at which it is refreshed"
    cfg = config(tiny_run, f'stopped_{how.name}_{after}', force=how == signal.SIGTERM, **GIVEN)
    out, process = cfg.path(cfg.out_dir), start(cfg, after)
    process.send_signal(how)
    said, _ = process.communicate()
    if how == signal.SIGTERM:
        assert process.returncode == 0
        words = shlex.split(re.search('resume with: densirl grpo (.*)', said)[1])
        cfg = cli_config(GrpoConfig, words, 'densirl grpo')
    begun = own_folder(cfg, run_key(cfg))
    assert read_manifest(begun)['status'] == 'running' and checkpoint_home(begun).exists() and not out.exists()
    torch.set_num_threads(1)
    train_grpo(cfg)
    assert read_manifest(out)['status'] == 'complete' and not checkpoint_home(out).exists() and not begun.parent.exists()
    assert steps(out) == steps(whole) and same(out, whole)
    for log in ('draws', 'samples', 'held_out'): assert read_log(out, log) == read_log(whole, log), log

def test_two_runs_into_one_folder_are_refused(tiny_run):
    cfg = config(tiny_run, 'shared', **GIVEN)
    process = start(cfg)
    with pytest.raises(RuntimeError, match='Another process is at work'): train_grpo(cfg)
    process.kill()
    process.communicate()

SYNCHRONISED = """
import sys, torch
import densirl.trainer as trainer
from densirl.config import make_config
from densirl.dist import gather, join_ranks, leave_ranks
from densirl.grpo import GrpoConfig, train_grpo

ranks, seen, average_ = join_ranks(), [], trainer.average_
def digests(gradients): return [round(g.double().abs().sum().item(), 12) for g in gradients]
def watched(gradients, world):
    before = digests(gradients)
    average_(gradients, world)
    seen.append((before, digests(gradients)))
trainer.average_ = watched
train_grpo(make_config(GrpoConfig, 'test', root=sys.argv[1], out_dir='outs/policies/synchronised', updates=2))
one, two = gather(seen, ranks)
if ranks.main: print('different before', all(a[0] != b[0] for a, b in zip(one, two)), 'equal after', all(a[1] == b[1] for a, b in zip(one, two)), 'steps', len(one))
leave_ranks()
"""

def test_ranks_share_their_gradients(tiny_run, tmp_path):
    (tmp_path/'watch.py').write_text(SYNCHRONISED)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'DENSIRL_ROOT': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    said = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path/'watch.py', tiny_run], env=env, capture_output=True, text=True, timeout=300)
    assert 'different before True equal after True steps 4' in said.stdout, said.stdout[-1000:]+said.stderr[-2000:]

def test_two_ranks_draw_and_learn_as_one(tiny_run):
    folders = [f'outs/policies/ranks_{n}' for n in (1, 2)]
    for n, folder in zip((1, 2), folders):
        call('grpo', *(['--'] if n > 1 else []), '--profile', 'test', '--root', tiny_run, '--out_dir', folder, '--refresh_every=1', '--updates=2', '--kl=exact', '--kl_target=.01', ranks=n)
    one, two = (tiny_run/f for f in folders)
    assert [d['prompts'] for d in read_log(one, 'draws')] == [d['prompts'] for d in read_log(two, 'draws')]
    for a, b in zip(steps(one), steps(two), strict=True): assert a == pytest.approx(b, abs=1e-4)
    assert [s['completion'] for s in read_log(one, 'samples')[:12]] == [s['completion'] for s in read_log(two, 'samples')[:12]]

def test_looks_are_denser_early_and_kept(tiny_run):
    out = train_grpo(config(tiny_run, 'looks', max_steps=8, eval_every=4, keep_weights=True))
    assert [r['step'] for r in read_log(out, 'held_out')] == [0, 1, 2, 4, 8]
    assert {r['step'] for r in read_log(out, 'samples')} == {0, 1, 2, 4, 8}
    assert {f.name for f in (out/'snapshots').iterdir()} == {f'step_{s:06d}' for s in (0, 1, 2, 4, 8)}

@pytest.mark.parametrize('kl', ['k3', 'exact'])                  # the exact distance asks the reference after groups were replaced
def test_flat_groups_are_replaced_and_said(tiny_run, tmp_path, monkeypatch, kl):
    "A reward that likes only prompts with an even number of letters more than nothing leaves the others flat"
    (tmp_path/'odd_rewards.py').write_text('def odd(prompts, completions): return [[float(i) if len(p)%2 else 0. for i in range(len(g))] for p, g in zip(prompts, completions)]')
    monkeypatch.syspath_prepend(tmp_path)
    given = dict(rewards='odd_rewards.odd=1', max_steps=4, prompts_per_step=8, kl=kl)
    without, replaced = (read_log(train_grpo(config(tiny_run, f'resample_{kl}_{n}', resample=n, **given)), 'draws') for n in (0, 4))
    assert sum(len(d['flat']) for d in without) > sum(len(d['flat']) for d in replaced) and any(d['replaced'] for d in replaced)
    assert not any(d['replaced'] for d in without)

@pytest.mark.parametrize('given, said', [(dict(rewards='no.such=1'), 'no function'), (dict(group_size=1), 'at least 2'), (dict(updates=0), 'updates is 0'), (dict(beta=float('nan')), 'beta is nan'), (dict(rewards='rm=1,rm=2'), 'once'), (dict(eval_every=0), 'eval_every is 0'), (dict(objective='pairwise', updates=3), '--updates belong'), (dict(resample=1, replacement=False), 'leave one'), (dict(kl_target=1., beta=0.), 'nothing to steer'),
    (dict(kl_ratio=True, kl='exact'), 'leave it out'), (dict(objective='pairwise', rewards='math_rewards.length=1'), 'head of a reward model alone'), (dict(max_new_tokens=4000), 'reads 1024 tokens'), (dict(eval_prompts=10**6), 'lower --eval_prompts')], ids=str)
def test_bad_settings_are_a_sentence(tiny_run, given, said):
    with pytest.raises(ValueError, match=said): train_grpo(config(tiny_run, 'bad', **given))
