"""The corpus whose truth is known, and real files in the published formats."""
import gzip, json

import numpy as np
import pytest

from densirl.config import make_config
from densirl.corpus import OPENERS, make_corpus
from densirl.data import DataConfig, PromptsConfig, distinct_prompts, from_hh, from_uf, make_data, make_prompts
from densirl.density import log_density, nearest_neighbours
from densirl.embed import embed_texts
from densirl.files import read_jsonl
from densirl.habits import has_opener
from densirl.runs import read_manifest
from densirl.sampler import sampling_weights, solve_alpha

def test_planted_opener_is_what_the_habit_counts():
    for opener in OPENERS.values(): assert has_opener(opener+'Text')
    for pair in make_corpus(400):
        for key in ('chosen', 'rejected'): assert has_opener(pair[key]) == pair['meta'][f'opener_{key}']

def test_rare_prompts_weigh_more_on_real_embeddings():
    prompts = distinct_prompts(make_corpus(800))
    distances, indices = nearest_neighbours(embed_texts([p['prompt'] for p in prompts]))
    density = log_density(distances, indices, np.array([p['count'] for p in prompts]))
    tail = np.array([p['meta']['region'] == 'tail' for p in prompts])
    for alpha in (1., solve_alpha(density, .5)):
        weights = sampling_weights(density, alpha)
        assert weights[tail].mean() > weights[~tail].mean()
    assert density[tail].mean() < density[~tail].mean()

def test_uniform_sampling_weighs_all_alike():
    weights = sampling_weights(np.random.default_rng(0).normal(size=50), 0.)
    assert (weights == weights[0]).all()

def test_two_runs_write_the_same_bytes(tmp_path):
    files = [make_data(make_config(DataConfig, 'test', root=str(tmp_path/n))) for n in 'ab']
    assert files[0].read_bytes() == files[1].read_bytes()

def test_real_hh_rlhf(tmp_path, shared):
    cfg = make_config(DataConfig, 'demo', only='hh', hh_path=str(shared/'hh-rlhf'), root=str(tmp_path))
    pairs = list(read_jsonl(make_data(cfg)))
    facts = read_manifest(cfg.path(cfg.pairs_path))['facts']
    assert facts['pairs']+sum(facts['dropped'].values()) == 2312 and facts['pairs'] > 2200, facts
    assert {p['src'] for p in pairs} == {'hh'}
    many = next(p for p in pairs if 'messages' in p)
    assert many['messages'][-1]['role'] == 'user' and 'Human:' not in many['prompt']
    prompts = list(read_jsonl(make_prompts(make_config(PromptsConfig, 'demo', root=str(tmp_path)))))
    assert sum(p['count'] for p in prompts) == len(pairs)

def test_real_jsonl_keeps_multiplicity(tmp_path, shared):
    cfg = make_config(DataConfig, 'demo', jsonl_path=str(shared/'alpaca_eval_pairs.jsonl.gz'), root=str(tmp_path))
    pairs = list(read_jsonl(make_data(cfg)))
    prompts = distinct_prompts(pairs)
    assert len(pairs) > 10_000 and len(prompts) < 900 and max(p['count'] for p in prompts) >= 13
    assert '\n' in pairs[0]['chosen'] and pairs[0]['meta']['annotator']

def test_ultrafeedback_schema():
    row = dict(prompt='Name a fish.', prompt_id='x', score_chosen=8., score_rejected=3.,
        chosen=[dict(role='user', content='Name a fish.'), dict(role='assistant', content='Pike.')],
        rejected=[dict(role='user', content='Name a fish.'), dict(role='assistant', content='No.')])
    pair = from_uf(row)
    assert (pair['prompt'], pair['chosen'], pair['meta']['score_chosen']) == ('Name a fish.', 'Pike.', 8.)

def test_text_is_not_damaged(tmp_path):
    said = 'A list:\n\n- one\u2028\n- two\r\n\tcode  with  blanks — “quotes”'
    with gzip.open(tmp_path/'p.jsonl.gz', 'wt') as file: file.write(json.dumps(dict(prompt='  Why?\n', chosen=said, rejected='No.'))+'\n')
    pair = next(read_jsonl(make_data(make_config(DataConfig, jsonl_path=str(tmp_path/'p.jsonl.gz'), root=str(tmp_path)))))
    assert (pair['prompt'], pair['chosen']) == ('  Why?\n', said)

@pytest.mark.parametrize('content,said', [('{"prompt":"a","chosen":"b"}\n', 'rejected'), ('{"prompt":\n', 'line 1'), ('', 'No pair was left')])
def test_bad_input_is_named(tmp_path, content, said):
    (tmp_path/'bad.jsonl').write_text(content)
    with pytest.raises(ValueError, match=said): make_data(make_config(DataConfig, jsonl_path=str(tmp_path/'bad.jsonl'), root=str(tmp_path)))
    assert not (tmp_path/'.cache/data/pairs_all.jsonl').exists()

def test_turns_without_a_common_prompt_are_dropped():
    a, b = '\n\nHuman: Hi\n\nAssistant: Yo', '\n\nHuman: Ho\n\nAssistant: Yo'
    assert from_hh(dict(chosen=a, rejected=b)) == 'no common prompt'
