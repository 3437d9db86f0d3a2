"""The metric that decides, the statistics, the verdict: on real data, on simulated studies, and on bad input."""
import gzip, json, re, shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np, pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from conftest import densirl
from densirl.compare import NOT_MEASURES, CompareConfig, make_compare
from densirl.config import StageConfig, cli_config, config_flags, make_config, science, where
from densirl.crossed import crossed_interval, sign_flip
from densirl.curves import Curve
from densirl.diversity import FEATURES, SAME, diversity_facts, pair_features, pairwise_distance, prompt_residual, same_probability
from densirl.embed import minilm
from densirl.files import read_json, read_jsonl, write_jsonl
from densirl.lexical import pile_facts, self_bleu
from densirl.mode_collapse import EvalConfig
from densirl.report import ReportConfig, make_report
from densirl.run_folders import open_run
from densirl.simulate import simulated_study
from densirl.verdict import MEASURES, PROTOCOL, Plan, decide, estimates, is_gain


# -- people's judgement (EVALUATION 6)

@pytest.fixture(scope='module')
def labelled(shared):
    "Pairs of completions that people called the same or not: features and labels"
    with gzip.open(shared/'same_or_different_pairs.jsonl.gz') as file: rows = [json.loads(line) for line in file]
    texts = [[r[k] for r in rows] for k in ('generation_0', 'generation_1', 'prompt')]
    vectors = [minilm().embed(t) for t in texts]
    features = []
    for a, b, x, y, q in zip(texts[0], texts[1], *vectors):
        rest = prompt_residual(np.stack([x, y]), q)
        features.append(pair_features(a, b, float(x@y), float(rest[0]@rest[1])))
    return np.array(features), np.array([int(float(r['similar'])) for r in rows])

def test_distance_agrees_with_people(labelled):
    features, same = labelled
    assert roc_auc_score(same, features[:, FEATURES.index('residual')]) >= .74

def test_six_features_agree_better(labelled):
    "Cross-validated; the committed coefficients are what a fit to all pairs gives"
    features, same = labelled
    model = LogisticRegression(C=3, max_iter=5000)
    aucs = [roc_auc_score(same, cross_val_predict(model, features, same, cv=StratifiedKFold(5, shuffle=True, random_state=i), method='predict_proba')[:, 1]) for i in range(10)]
    assert np.mean(aucs) >= .78
    model.fit(features, same)
    assert np.allclose(model.coef_[0], SAME['weights'], atol=.05) and abs(model.intercept_[0]-SAME['intercept']) < .05
    assert np.allclose(same_probability(features), model.predict_proba(features)[:, 1], atol=.02)

def test_total_collapse_comes_last(shared):
    "One text for every prompt, beside real models: last by every measure that decides, first by Gini"
    with gzip.open(shared/'alpaca_eval_pairs.jsonl.gz', 'rt') as file: rows = [json.loads(line) for line in file]
    said = {}
    for r in rows:
        for side in ('chosen', 'rejected'): said.setdefault(r[f'{side}_model'], {})[r['prompt']] = r[side]
    models = sorted(said, key=lambda m: -len(said[m]))[:5]
    prompts = sorted(set.intersection(*(set(said[m]) for m in models)))[:40]
    stuck = {p: 'I am sorry, but I cannot say more than this about it today. '*4 for p in prompts}
    embed = minilm().embed
    about = dict(zip(prompts, embed(prompts)))
    def means(texts_of):
        facts = [diversity_facts(texts, embed(texts), about[p]) for p in prompts[:10] for texts in [texts_of(p)]]
        return {name: np.mean([f[name] for f in facts]) for name in facts[0]}
    healthy, narrow, collapsed = (means(texts_of) for texts_of in (lambda p: [said[m][p] for m in models], lambda p: [said[models[0]][p]]*3+[said[m][p] for m in models[3:]], lambda p: [stuck[p]]*5))
    for name in ('diversity', 'lexical_distance', 'vendi', 'classes'): assert collapsed[name] < narrow[name] < healthy[name], name
    assert collapsed['self_bleu'] > narrow['self_bleu'] > healthy['self_bleu']
    piles = {name: pile_facts(list(texts.values()), 40, 1200) for name, texts in dict({m: {p: said[m][p] for p in prompts} for m in models}, stuck=stuck).items()}
    piles = {name: found for name, found in piles.items() if found}
    assert len(piles) > 2 and min(piles, key=lambda n: piles[n]['gini']) == 'stuck'
    for name in ('mattr', 'entropy_words', 'distinct_2'): assert min(piles, key=lambda n: piles[n][name]) == 'stuck', name

def test_halves_of_one_policy_do_not_differ():
    "Of sixteen completions of a prompt eight against eight: called different in at most 8 % of resamples"
    rng, prompts = np.random.default_rng(0), 60
    centres = rng.normal(size=(prompts, 1, 16))
    cloud = centres+rng.normal(size=(prompts, 16, 16))*rng.uniform(.3, 1.5, size=(prompts, 1, 1))
    cloud /= np.linalg.norm(cloud, axis=-1, keepdims=True)
    def p_value():
        halves = [rng.permutation(16) for _ in range(prompts)]
        gaps = [pairwise_distance(c[h[:8]])-pairwise_distance(c[h[8:]]) for c, h in zip(cloud, halves)]
        return crossed_interval(np.array([gaps]))['p']
    assert np.mean([p_value() < .05 for _ in range(500)]) <= .08


# -- simulated studies

@pytest.mark.parametrize('name,world', dict(
    slower=dict(drift=.75), bump=dict(drift=.75, shape='bump', spacing='random'), moved=dict(moved=.3, drift=.75, shape='cliff', spacing='even', looks=6)).items())
def test_slower_drift_is_no_gain(name, world):
    "An arm that only drifts a quarter less looks better at the end and is not called so"
    plan, gains, ends, words = Plan(min_kl=1.), [], [], []
    for i in range(50):
        study = simulated_study(np.random.default_rng([i, len(name)]), prompts=60, **world)
        found = estimates(study, plan, ways=False)
        gains.append(is_gain(found['gains']['uniform'], plan))
        if gains[-1]: found = estimates(study, plan)
        ends.append(found['at_the_end']['low'] > 0)
        words.append(decide(found, plan)[0])
    assert np.mean(gains) <= .1 and words.count('SUPPORTED') <= 1
    assert np.mean(ends) > .2

def test_an_arm_that_does_not_narrow_at_all_is_supported():
    "Its curve is one flat line, which has a place everywhere"
    study = simulated_study(np.random.default_rng(0))
    flat = [Curve(c.steps, c.values|{m: np.repeat(c.values[m][:1], len(c.steps), 0) for m in ('diversity', 'diversity_2', 'diversity_trimmed', 'effective_diversity')}) for c in study.arms['density']]
    found = estimates(replace(study, arms=study.arms|dict(density=flat)), Plan(min_kl=1.))
    assert decide(found, Plan(min_kl=1.))[0] == 'SUPPORTED'

def test_sign_flip_is_exact():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=6)
    signs = np.array([[1-2*(i >> j & 1) for j in range(6)] for i in range(64)])
    assert sign_flip(rows) == pytest.approx(np.mean(np.abs(signs@rows) >= abs(rows.sum())-1e-12))


# -- said beforehand

@dataclass(frozen=True)
class Toy(StageConfig):
    "A stage that leaves a checkpoint"
    stage: ClassVar[str] = 'eval'
    module: ClassVar[str] = 'runs'
    plan_path: str = where('')
    def outputs(self): return ['out']

def test_a_plan_is_not_noted_after_the_run_has_begun(tmp_path):
    (tmp_path/'plan.json').write_text('{}')
    planned = Toy(root=str(tmp_path), plan_path='plan.json')
    def begin(cfg, step=1):
        with pytest.raises(KeyboardInterrupt), open_run(cfg) as run:
            (run.folder/f'checkpoint/step_{step}').mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        return read_json(run.folder/'manifest.json')
    assert 'plan' not in begin(Toy(root=str(tmp_path)))
    assert 'plan' not in begin(planned)
    first = begin(replace(planned, force=True), step=2)['plan']
    assert first['commit'] == ''
    (tmp_path/'plan.json').write_text('{"seeds": 9}')
    assert begin(planned, step=3)['plan'] == first


# -- from the command line

def evaluate(root, *words):
    return densirl('eval', '--profile', 'test', '--root', root, *words)

def test_weights_are_sampled_anew_and_once(tiny_run, tmp_path):
    "Any folder, on our own prompts; the second call finds what was said, and one more prompt changes nothing for the others"
    out = tmp_path/'eval'
    words = ('--ckpt_paths', 'outs/grpo', 'outs/sft', '--samples', 'weights', '--prompt_set', 'open', '--n_prompts', 4, '--gold_path=', '--out_path')
    said = evaluate(tiny_run, *words, out)
    assert 'outs/sft, step 0: diversity' in said
    rows = list(read_jsonl(out/'samples.jsonl'))
    assert len(rows) == (2+1)*4*2 and {r['arm'] for r in rows} == {'density', 'sft'}
    assert 'prompts ×' not in evaluate(tiny_run, *words, tmp_path/'again') and list(read_jsonl(tmp_path/'again/samples.jsonl')) == rows
    more = [w if w != 4 else 5 for w in words]
    evaluate(tiny_run, *more, tmp_path/'five')
    five = [r for r in read_jsonl(tmp_path/'five/samples.jsonl') if r['prompt_id'] in {r['prompt_id'] for r in rows}]
    assert five == rows

def test_runs_by_pattern_with_their_checkpoints(tiny_run, tmp_path):
    root = tmp_path/'root'
    shutil.copytree(tiny_run, root)
    for arm, aware in (('density', True), ('uniform', False)):
        densirl('grpo', '--profile', 'test', '--root', root, f'--density_aware={aware}', '--keep_weights=True', '--seed', 3, '--out_dir', f'outs/study/{arm}/seed_3')
    evaluate(root, '--runs', 'outs/study/*/seed_*', '--samples', 'weights', '--n_prompts', 5)
    rows = list(read_jsonl(root/'outs/eval/per_prompt.jsonl'))
    assert {(r['arm'], r['seed'], r['step']) for r in rows} == {(a, 3, s) for a in ('density', 'uniform') for s in (0, 1, 2)}
    start = {a: [r['diversity'] for r in rows if r['arm'] == a and r['step'] == 0] for a in ('density', 'uniform')}
    assert start['density'] == start['uniform'] and all(r['kl'] == pytest.approx(0, abs=1e-4) for r in rows if r['step'] == 0)
    shutil.rmtree(root/'outs/study/density/seed_3/snapshots')
    evaluate(root, '--runs', 'outs/study/*/seed_*', '--samples', 'weights', '--n_prompts', 5, '--out_path', 'outs/less')
    densirl('compare', '--profile', 'test', '--root', root, '--eval_path', 'outs/less')
    found = read_json(root/'outs/compare/compare.json')
    assert [c['steps'] for c in found['curves'] if c['region'] == 'all'] == [[0, 2], [0, 1, 2]]
    assert '"seeds": 1' in (root/'outs/compare/compare.json').read_text()

def test_a_plan_knows_all_settings_and_measures_of_an_evaluation(tiny_run):
    assert set(PROTOCOL) == science(EvalConfig()).keys()
    measured = {k for r in read_jsonl(tiny_run/'outs/eval/per_prompt.jsonl') for k in r}-set(NOT_MEASURES)
    assert 'diversity' in measured and measured <= set(MEASURES)

def test_a_pattern_that_finds_nothing(tiny_run):
    said = densirl('eval', '--profile', 'test', '--root', tiny_run, '--runs', 'outs/none/*', ok=False)
    assert 'outs/none/*' in said and 'densirl grpo' in said and 'Traceback' not in said

ODD = ('', 'word', '```python\nprint(1)\n```', 'An ordinary sentence about bread and butter.', '\n\n', '如何', '?!', 'a '*300)

def nothing_missing(value):
    "No number of a JSON value is null, which is how a NaN is written"
    if isinstance(value, dict): return all(map(nothing_missing, value.values()))
    return all(map(nothing_missing, value)) if isinstance(value, list) else value is not None

def odd_completions(folder, seeds, steps=(0, 5, 10), prompts=6, skip=()):
    "Files of ready completions for two arms, some of them odd"
    rng, files = np.random.default_rng(0), []
    for arm in ('density', 'uniform'):
        rows = [dict(prompt=f'Question {p}?', model=arm, seed=s, step=t, completion=ODD[rng.integers(len(ODD))], kl=float(t), gold=float(rng.normal()))
            for s in range(seeds) for t in steps for p in range(prompts) for _ in range(3) if (arm, s, t, p) not in skip]
        write_jsonl(folder/f'{arm}.jsonl', rows)
        files.append(str(folder/f'{arm}.jsonl'))
    return files

def test_odd_completions_give_defined_numbers(tmp_path):
    "Empty, one word, all code, one sign: measured, and nowhere a NaN"
    files = odd_completions(tmp_path, 1)
    said = evaluate(tmp_path, '--completions', *files)
    assert not re.search(r'\bnan\b', said, re.IGNORECASE)
    for name in ('per_prompt', 'across'): assert nothing_missing(list(read_jsonl(tmp_path/f'outs/eval/{name}.jsonl')))
    assert nothing_missing(read_json(tmp_path/'outs/eval/eval.json'))

def test_fewer_than_six_seeds_and_a_missing_checkpoint(tmp_path):
    "Described, INCONCLUSIVE by rule; the report has no NaN and says how many seeds"
    files = odd_completions(tmp_path, 2, skip={('density', 0, 5, p) for p in range(6)}|{('uniform', 1, 10, 3)})
    evaluate(tmp_path, '--completions', *files)
    words = dict(profile='test', root=str(tmp_path))
    found = read_json(make_compare(make_config(CompareConfig, **words))/'compare.json')
    assert found['verdict'] == 'INCONCLUSIVE' and '2 paired seeds' in found['why'][0] and found['left_out'] == dict(prompts=1, seeds=0)
    assert found['estimates']['prompts'] == 5 and len(found['curves'][0]['steps']) == 2
    out = make_report(make_config(ReportConfig, **words))
    page = (out/'report.html').read_text()
    assert 'INCONCLUSIVE' in page and 'exploratory' in page and nothing_missing(read_json(out/'summary.json'))
    assert not re.search(r'\bnan\b', re.sub(r'base64,[^"]*', '', page), re.IGNORECASE)

def test_other_prompts_and_single_completions(tmp_path):
    "What not every policy has completed is left out and counted; where nothing is left there is a sentence"
    rows = [dict(prompt=p, completion=c, model=m) for m, ps in (('a', 'xyz'), ('b', 'yzw')) for p in ps for c in ('one', 'two words')]
    write_jsonl(tmp_path/'some.jsonl', rows)
    evaluate(tmp_path, '--completions', tmp_path/'some.jsonl')
    assert {r['prompt_id'] for r in read_jsonl(tmp_path/'outs/eval/per_prompt.jsonl')} == {p['id'] for p in read_jsonl(tmp_path/'outs/eval/prompts.jsonl')} and len(list(read_jsonl(tmp_path/'outs/eval/prompts.jsonl'))) == 2
    write_jsonl(tmp_path/'none.jsonl', [r for r in rows if (r['model'], r['prompt']) in {('a', 'x'), ('b', 'w')}])
    said = densirl('eval', '--profile', 'test', '--root', tmp_path, '--completions', tmp_path/'none.jsonl', ok=False)
    assert 'No prompt was completed by all' in said and 'Traceback' not in said
    said = densirl('compare', '--profile', 'test', '--root', tmp_path, ok=False)
    assert 'no density arm' in said and 'Traceback' not in said

def test_lists_come_through_every_door():
    cfg = cli_config(EvalConfig, ['--ckpt_paths', 'outs/a', 'outs/b', '--profile=demo'], 'densirl eval')
    assert cfg.ckpt_paths == ('outs/a', 'outs/b') and cli_config(EvalConfig, config_flags(cfg), 'densirl eval') == cfg
    assert make_config(EvalConfig, 'demo', ckpt_paths='outs/a outs/b') == cfg

def test_self_bleu_is_sacrebleus():
    from sacrebleu import sentence_bleu
    texts = ['the cat sat on the mat today', 'the cat lay on the mat today', 'a dog ran off with my shoe']
    assert self_bleu(texts) == pytest.approx(np.mean([sentence_bleu(t, texts[:i]+texts[i+1:]).score for i, t in enumerate(texts)])/100, abs=1e-6)
