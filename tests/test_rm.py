"""What would let a reward model look as if it had learnt something, or end somewhere else after a crash."""
import json, os, signal, subprocess, sys, time
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from conftest import ROOT
from densirl.arms import fitting_density, pair_weights
from densirl.config import config_flags, make_config
from densirl.data import read_folds, select_pairs
from densirl.dist import Ranks
from densirl.files import read_jsonl, write_jsonl
from densirl.judging import judge_facts, judge_slices
from densirl.logps import completion_rewards, pack_groups
from densirl.models import load_reward_model, load_tokenizer
from densirl.pairs import encode_pairs
from densirl.rewards import load_judge, score_groups
from densirl.rm import Lessons, RmConfig, add_gradients, held_out_rewards, make_lessons, proxy_and_held_out, train_rm
from densirl.run_folders import own_folder, runs_of
from densirl.runs import checkpoint_home, read_log, read_manifest, run_key

def config(root, name, **given): return make_config(RmConfig, 'test', **{'root': str(root), 'out_path': f'outs/rms/{name}', **given})
def weights(folder): return load_file(folder/'model.safetensors')
def steps(folder): return [{k: v for k, v in r.items() if k != 'seconds'} for r in read_log(folder)]

@pytest.fixture(scope='module')
def plain(tiny_run): return train_rm(config(tiny_run, 'plain'))

def pairs_of(root, fold): return select_pairs(read_jsonl(root/'.cache/data/pairs_all.jsonl'), read_folds(root/'.cache/data/prompts_all.jsonl'), fold, 'prefs')

@pytest.mark.parametrize('flag', [dict(max_steps=3), dict(learning_rate=2e-3), dict(margin=1.), dict(smoothing=.2), dict(centring=.5), dict(draw='pairs'), dict(density_aware=True),
    dict(density_aware=True, density_by='loss'), dict(density_aware=True, placebo='shuffled'), dict(ensemble=2), dict(fold='gold'), dict(train='head'), dict(train='lora'), dict(batch_size=2), dict(seed=1),
    dict(max_prompt_tokens=8), dict(max_completion_tokens=2)], ids=str)
def test_every_setting_has_an_effect(tiny_run, plain, flag):
    out = train_rm(config(tiny_run, '_'.join(map(str, [*flag.keys(), *flag.values()])), **flag))
    ours, theirs = weights(out), weights(plain)
    assert any(ours[k].shape != theirs[k].shape or not torch.equal(ours[k], theirs[k]) for k in theirs)

def test_paths_have_an_effect(tiny_run, plain):
    half = tiny_run/'half.jsonl'
    write_jsonl(half, list(read_jsonl(tiny_run/'.cache/data/pairs_all.jsonl'))[::2])
    for name, flag in dict(pairs=dict(pairs_path=str(half)), sft=dict(sft_ckpt_path='.cache/models/tiny')).items():
        out = train_rm(config(tiny_run, name, **flag))
        assert out.name == name and (out/'model.safetensors').exists()
        assert any(not torch.equal(v, weights(plain)[k]) for k, v in weights(out).items())

def test_the_size_of_a_pass_changes_memory_not_results(tiny_run):
    cfg = config(tiny_run, 'passes')
    tokenizer, pairs = load_tokenizer(str(tiny_run/'outs/sft')), pairs_of(tiny_run, 'proxy')[:16]
    grads, passes = [], []
    for size in (1, 3, 16):
        model = load_reward_model(str(tiny_run/'outs/sft'))
        calls = []
        model.base_model.register_forward_hook(lambda *args: calls.append(1))
        lessons, _ = make_lessons(cfg, model, tokenizer, pairs, ['reward'], torch.float32, Ranks())
        add_gradients(config(tiny_run, 'x', device_batch_size=size), model, lessons, list(range(16)), torch.float32, 'cpu')
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        passes.append(len(calls))
    assert passes[0] == 16 and passes[0] > passes[1] > passes[2]
    for grad in grads[1:]: torch.testing.assert_close(grad, grads[0], atol=1e-5, rtol=1e-5)

def test_a_constant_model_knows_nothing(tiny_run):
    model, pairs = load_reward_model(str(tiny_run/'outs/sft')), pairs_of(tiny_run, 'eval')
    model.score.weight.data.zero_()
    rewards = held_out_rewards(model, encode_pairs(pairs, load_tokenizer(str(tiny_run/'outs/sft')), 48, 8), 8, torch.float32, Ranks())
    facts = judge_facts(rewards[:, 0, 0]-rewards[:, 1, 0], pairs, pairs)
    assert facts['accuracy']['mean'] == .5 and facts['log_loss']['mean'] == pytest.approx(np.log(2)) and facts['ece'] == 0

def test_swapping_every_pair_negates_every_margin(tiny_run, plain):
    model, pairs = load_reward_model(str(plain)), pairs_of(tiny_run, 'eval')
    swapped = [p | dict(chosen=p['rejected'], rejected=p['chosen']) for p in pairs]
    one, two = (held_out_rewards(model, encode_pairs(rows, load_tokenizer(str(plain)), 48, 8), 1, torch.float32, Ranks()) for rows in (pairs, swapped))
    torch.testing.assert_close(torch.tensor(one[:, 0]-one[:, 1]), torch.tensor(two[:, 1]-two[:, 0]), atol=1e-6, rtol=0)

def test_shuffled_labels_teach_nothing(tiny_run):
    rng, path = np.random.default_rng(0), tiny_run/'shuffled.jsonl'
    write_jsonl(path, [p | (dict(chosen=p['rejected'], rejected=p['chosen']) if rng.random() < .5 else {}) for p in read_jsonl(tiny_run/'.cache/data/pairs_all.jsonl')])
    facts = read_manifest(train_rm(config(tiny_run, 'shuffled', pairs_path=str(path), max_steps=40, held_out=512)))['facts']
    assert facts['accuracy']['low'] <= .5 <= facts['accuracy']['high']

def test_it_learns_what_can_be_learnt(tiny_run):
    path = tiny_run/'easy.jsonl'
    write_jsonl(path, [p | dict(chosen='Yes.', rejected='No no no.') for p in read_jsonl(tiny_run/'.cache/data/pairs_all.jsonl')])
    facts = read_manifest(train_rm(config(tiny_run, 'easy', pairs_path=str(path), max_steps=30)))['facts']
    assert facts['accuracy']['mean'] == 1 and facts['longer_wins']['mean'] == 0

@pytest.mark.parametrize('train', ['full', 'head', 'lora'])
def test_a_killed_run_goes_on_to_the_same_end(tiny_run, train):
    given = dict(train=train, max_steps=30, save_every=3, eval_every=10, ensemble=2)
    whole = train_rm(config(tiny_run, f'whole_{train}', **given))
    cfg = config(tiny_run, f'killed_{train}', **given)
    out = cfg.path(cfg.out_path)
    env = os.environ | {'DENSIRL_ROOT': str(ROOT), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', 'densirl.cli', 'rm', *config_flags(cfg)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = own_folder(cfg, run_key(cfg))
    while process.poll() is None and not list(checkpoint_home(begun).glob('step_*')): time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_manifest(begun)['status'] == 'running' and not out.exists()
    torch.set_num_threads(1)
    train_rm(cfg)
    assert read_manifest(out)['status'] == 'complete' and not checkpoint_home(out).exists() and not begun.exists()
    assert steps(out) == steps(whole)
    assert read_log(out, 'margins') == read_log(whole, 'margins')
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(out).items())

def test_an_exploding_run_stops_with_its_last_good_checkpoint(tiny_run):
    cfg = config(tiny_run, 'exploding', learning_rate=1e4, train='head', max_steps=30, save_every=1)
    with pytest.raises(FloatingPointError, match='lower --learning_rate'): train_rm(cfg)
    kept = list(checkpoint_home(own_folder(cfg, run_key(cfg))).glob('step_*/tensors.safetensors'))
    assert len(kept) == 1 and all(t.isfinite().all() for t in load_file(kept[0]).values())

def test_another_setting_does_not_go_on_from_an_old_checkpoint(tiny_run):
    cfg = config(tiny_run, 'exploding', train='head', learning_rate=1e-3, max_steps=3)
    out = train_rm(cfg)
    assert [r['step'] for r in read_log(out)] == [1, 2, 3] and [len(list(run.glob('step_*'))) for run in runs_of(out).glob('*/checkpoint')] == [1]

def test_many_heads_open_with_transformers_and_score_the_same(tiny_run):
    out = train_rm(config(tiny_run, 'many', heads='source', ensemble=3))
    names = read_manifest(out)['facts']['heads']
    ours, theirs = load_reward_model(str(out)), AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert theirs.config.num_labels == len(names) and [theirs.config.id2label[i] for i in range(len(names))] == names
    packed = pack_groups([[1, 5, 6]], [[[11, 12, 2], [21, 2]]])
    with torch.no_grad(): rewards, expected = completion_rewards(ours, packed)[0, 0], theirs(torch.tensor([[1, 5, 6, 11, 12, 2]])).logits[0]
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    tokenizer = load_tokenizer(str(out))
    sceptic, mean = (score_groups(load_judge(str(out), tokenizer, how=how), packed, 1) for how in ('min', 'mean'))
    assert (sceptic < mean).all()
    with pytest.raises(ValueError, match="no head 'x'"): load_judge(str(out), tokenizer, weights='x=1')

def test_a_reward_model_made_elsewhere_is_a_judge(tiny_run, tmp_path):
    tokenizer = load_tokenizer(str(tiny_run/'outs/sft'))
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_run/'outs/sft', num_labels=1, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewards = score_groups(load_judge(str(tmp_path), tokenizer), pack_groups([[1, 5, 6]], [[[11, 12, 2], [21, 2]]]), 1)
    with torch.no_grad(): torch.testing.assert_close(rewards[0, 0], theirs(torch.tensor([[1, 5, 6, 11, 12, 2]])).logits[0, 0], atol=1e-5, rtol=1e-5)

def test_a_card_says_what_made_it(plain):
    card = (plain/'README.md').read_text('utf-8')
    assert len(card.splitlines()) > 20 and all(word in card for word in ('pipeline_tag: text-classification', '"learning_rate": 0.001', 'Held-out log-loss', 'the longer completion wins'))

def test_states_are_computed_once(tiny_run):
    train_rm(config(tiny_run, 'head_a', train='head'))
    found = {f: f.stat().st_mtime_ns for f in (tiny_run/'.cache/states').iterdir()}
    train_rm(config(tiny_run, 'head_b', train='head', learning_rate=.1))
    assert {f: f.stat().st_mtime_ns for f in (tiny_run/'.cache/states').iterdir()} == found

def test_slices_count_every_pair_once_each(tiny_run, plain):
    known = {p['id']: p for p in pairs_of(tiny_run, 'eval')}
    logged = read_log(plain, 'margins')
    found = judge_slices(np.array([r['margin'] for r in logged]), [known[r['id']] for r in logged], np.arange(len(logged)))
    assert {sum(row['n'] for row in parts.values()) for parts in found.values()} == {len(logged)}

def test_held_out_pairs_come_from_all_of_the_fold(tiny_run):
    "Not from the head of the file, where the first source stands"
    _, held_out = proxy_and_held_out(config(tiny_run, 'x', held_out=4))
    fold = pairs_of(tiny_run, 'eval')
    assert [p['id'] for p in held_out] == sorted(p['id'] for p in fold)[:4] != [p['id'] for p in fold[:4]]

def test_a_run_killed_within_its_first_checkpoint_begins_again(tiny_run):
    cfg = config(tiny_run, 'early', max_steps=6, save_every=3)
    out = train_rm(cfg)
    expected, begun = steps(out), own_folder(cfg, run_key(cfg))
    begun.parent.mkdir(); out.rename(begun)
    manifest = json.loads((begun/'manifest.json').read_text())
    (begun/'manifest.json').write_text(json.dumps(manifest | dict(status='running')))
    (checkpoint_home(begun)/'.step_00000003.half-x').mkdir(parents=True)
    assert steps(train_rm(cfg)) == expected

def test_a_checkpoint_without_its_logs_is_refused(tiny_run, monkeypatch):
    cfg = config(tiny_run, 'logless', max_steps=6, save_every=3)
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('densirl.rm.write_rm', stop)
        with pytest.raises(KeyboardInterrupt): train_rm(cfg)
    (own_folder(cfg, run_key(cfg))/'metrics.jsonl').write_text('')
    with pytest.raises(ValueError, match='shorter than at the last checkpoint'): train_rm(cfg)

def test_an_isolated_prompt_weighs_at_least_as_much_as_a_crowded_one(tiny_run):
    "However many pairs the crowd brings along"
    cfg, pairs = config(tiny_run, 'x', density_aware=True), pairs_of(tiny_run, 'proxy')
    logs, totals = fitting_density(cfg), {}
    densest = max(pairs, key=lambda p: logs[p['prompt_id']])
    many = pairs+[densest]*50
    for pair, weight in zip(many, pair_weights(cfg, many, logs)): totals[pair['prompt_id']] = totals.get(pair['prompt_id'], 0)+weight
    order = sorted(totals, key=logs.get)
    assert all(totals[a] >= totals[b]-1e-12 for a, b in zip(order, order[1:]))

def test_a_rank_without_pairs_has_nothing_to_do():
    lessons = Lessons([([1, 2], [[3], [4]])], [4], torch.ones(1, 1), torch.empty(0))
    assert add_gradients(RmConfig(), None, lessons, [], torch.float32, 'cpu').tolist() == [0, 0, 0, 0]

def test_another_stages_folder_is_not_overwritten(tiny_run):
    before = {name: read_manifest(tiny_run/f'outs/{name}') for name in ('sft', 'grpo')}
    with pytest.raises(ValueError, match='holds a run of the stage grpo'): train_rm(config(tiny_run, 'x', out_path='outs/grpo'))
    with pytest.raises(ValueError, match='apart from what it reads'): train_rm(config(tiny_run, 'x', out_path='outs/sft'))
    assert {name: read_manifest(tiny_run/f'outs/{name}') for name in before} == before
