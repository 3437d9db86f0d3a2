"""The corpus whose truth is known, and real files in the published formats."""
import csv, errno, gzip, json, random, signal, subprocess, sys, time
from collections import Counter

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from types import SimpleNamespace
from hypothesis import given, settings, strategies as st

from densirl.config import make_config
from densirl.corpus import OPENERS, make_corpus
from densirl.data import DataConfig, PromptsConfig, distinct_prompts, make_data, make_prompts, read_folds, select_pairs
from densirl.density import neighbourhoods
from densirl.embed import minilm
from densirl.estimators import ESTIMATORS, log_density
from densirl import files, sources
from densirl.files import read_jsonl, write_jsonl
from densirl.habits import has_opener
from densirl.near import near_groups, near_pairs, shingles
from densirl.runs import read_manifest
from densirl.shapes import pairs_by_shape
from densirl.sources import outcome
from densirl.tally import Tally
from densirl.text import FOLDS, mended, prompt_id
from densirl.weights import sampling_weights, solve_alpha

def test_planted_opener_is_what_the_habit_counts():
    for opener in OPENERS.values(): assert has_opener(opener+'Text')
    for pair in make_corpus(400):
        for key in ('chosen', 'rejected'): assert has_opener(pair[key]) == pair['meta'][f'opener_{key}']

@pytest.fixture(scope='module')
def corpus():
    "Prompts of the built-in corpus and what lies around each"
    lines = [('demo', outcome(pair, 'demo')[-1]) for pair in make_corpus(800)]
    prompts = list(distinct_prompts(lines, Tally()))
    return prompts, neighbourhoods(minilm().embed([p['prompt'] for p in prompts]), np.array([p['count'] for p in prompts]), 64)[0]

@pytest.mark.parametrize('estimator', list(ESTIMATORS))
def test_rare_prompts_weigh_more_on_real_embeddings(corpus, estimator):
    prompts, near = corpus
    density = log_density(near, 10, estimator)
    tail = np.array([p['meta']['region'] == 'tail' for p in prompts])
    for alpha in (1., solve_alpha(density, .5)):
        weights = sampling_weights(density, alpha)
        assert weights[tail].mean() > weights[~tail].mean()
    assert density[tail].mean() < density[~tail].mean()

def read(root, **given):
    "The pairs that `densirl data` makes under `root`, and the facts of its manifest"
    cfg = DataConfig(root=str(root), **{k: str(v) if k.endswith('_path') else v for k, v in given.items()})
    out = make_data(cfg)
    return list(read_jsonl(out)), read_manifest(out)['facts']

def prompts_of(root, **given):
    return list(read_jsonl(make_prompts(PromptsConfig(root=str(root), **given))))

def plain(i, **given): return dict(prompt=f'Name fish number {i}.', chosen=f'Pike {i}.', rejected='No.') | given

def chat(*said): return [dict(role=r, content=c) for r, c in zip(('user', 'assistant')*9, said)]

def uf_row(i, **given):
    return dict(prompt=f'Fish {i}?', prompt_id=str(i), chosen=chat(f'Fish {i}?', 'Pike.'), rejected=chat(f'Fish {i}?', 'No.'),
        messages=chat(f'Fish {i}?', 'Pike.'), score_chosen=8., score_rejected=3.) | given

def se_row(i, scores=(1, 4, 2), site='ai.stackexchange.com'):
    answers = [dict(answer_id=j, author=f'user {j}', author_id=j, author_profile=f'https://{site}/users/{j}', pm_score=s, selected=False,
        text=f'<p>Answer {j} – with <code>x_{j}</code></p><pre><code>if a:\n    b()\n</code></pre>') for j, s in enumerate(scores)]
    return dict(qid=i, question=f'<p>Question <b>{i}</b> of {site}?</p>', answers=answers, date='2021/05/06', metadata=[f'https://{site}/q/{i}'])

def write(path, rows):
    "The same rows in the format that the name asks for"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet': pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else: write_jsonl(path, rows)

# -- the built-in corpus and real files

def test_two_runs_write_the_same_bytes(tmp_path):
    files = [make_data(make_config(DataConfig, 'test', root=str(tmp_path/n))) for n in 'ab']
    assert files[0].read_bytes() == files[1].read_bytes()

def test_real_hh_rlhf(tmp_path, shared):
    pairs, facts = read(tmp_path, only='hh', hh_path=shared/'hh-rlhf')
    assert facts['pairs']+sum(facts['dropped'].values()) == facts['rows'] == 2312 and facts['pairs'] > 2200, facts
    assert {p['src'] for p in pairs} == {'hh'}
    many = next(p for p in pairs if 'messages' in p)
    assert many['messages'][-1]['role'] == 'user' and 'Human:' not in many['prompt']
    raw = gzip.open(shared/'hh-rlhf/harmless-base/test.jsonl.gz', 'rt', encoding='utf-8').read().split('\n')
    transcripts = {json.loads(l)['chosen'] for l in raw if l}
    role = dict(user='\n\nHuman: ', assistant='\n\nAssistant: ')
    whole = sum(''.join(role[m['role']]+m['content'] for m in p.get('messages', chat(p['prompt'])))+role['assistant']+p['chosen'] in transcripts for p in pairs)
    assert whole > .98*len(pairs), 'put together again, nearly all transcripts are what they were'
    assert sum(p['count'] for p in prompts_of(tmp_path)) == len(pairs)

def test_a_sample_is_fair_and_repeatable(tmp_path, shared):
    whole, _ = read(tmp_path/'all', only='hh', hh_path=shared/'hh-rlhf')
    some, facts = read(tmp_path/'some', only='hh', hh_path=shared/'hh-rlhf', max_hh=500)
    assert facts['pairs']+sum(facts['dropped'].values()) == facts['rows'] == 2312 and facts['dropped']['hh: not drawn'] == 1812
    place = {p['id']: i for i, p in enumerate(whole)}
    where = np.array([place[p['id']] for p in some])
    assert 480 < len(some) <= 500
    quarters = np.bincount(4*where//len(whole), minlength=4)
    assert (abs(quarters-len(some)/4) < 40).all(), 'four standard errors of a fair sample'
    assert read(tmp_path/'again', only='hh', hh_path=shared/'hh-rlhf', max_hh=500)[0] == some
    assert read(tmp_path/'other', only='hh', hh_path=shared/'hh-rlhf', max_hh=500, seed=1)[0] != some

def test_real_jsonl_keeps_multiplicity(tmp_path, shared):
    pairs, _ = read(tmp_path, jsonl_path=shared/'alpaca_eval_pairs.jsonl.gz')
    prompts = prompts_of(tmp_path)
    assert len(pairs) > 10_000 and len(prompts) < 900 and max(p['count'] for p in prompts) >= 13
    assert '\n' in pairs[0]['chosen'] and pairs[0]['meta']['annotator']

@pytest.mark.parametrize('language', ['en', 'zh'])
def test_real_sharegpt(tmp_path, shared, language):
    path = shared/f'dpo_{language}_demo.json.gz'
    pairs, facts = read(tmp_path, jsonl_path=path)
    raw = json.load(gzip.open(path))
    assert facts['pairs']+sum(facts['dropped'].values()) == len(raw) == 300 and facts['pairs'] > 280, facts
    said = {r['chosen']['value'] for r in raw}
    assert all(p['chosen'] in said for p in pairs)

# -- the published schemas

@pytest.mark.parametrize('name', ['train_prefs-00000-of-00001.parquet', 'train_prefs.jsonl', 'train_prefs.jsonl.gz', 'train_prefs.jsonl.zst'])
def test_ultrafeedback(tmp_path, name):
    rows = [uf_row(0), uf_row(1, rejected=chat('Fish 1?', 'Pike.')), uf_row(2, chosen=chat('Bird?', 'Pike.')),
        uf_row(3, chosen=chat('a', 'b', 'c', 'd'), rejected=chat('a', 'b', 'c', 'e')), uf_row(4, rejected=chat('Fish 4?', ' '))]
    write(tmp_path/'data'/name, rows)
    write(tmp_path/'data/test_prefs.jsonl', [uf_row(99)])
    pairs, facts = read(tmp_path, only='uf', uf_path=tmp_path/'data')
    assert [(p['prompt'], p['chosen'], p['meta']['score_chosen']) for p in pairs] == [('Fish 0?', 'Pike.', 8.), ('User: a\n\nAssistant: b\n\nUser: c', 'd', 8.)]
    assert pairs[1]['messages'] == chat('a', 'b', 'c')
    assert facts['dropped'] == {'uf: equal completions': 1, 'uf: no common prompt': 1, 'uf: empty text': 1}

@pytest.mark.parametrize('name', ['train-00000.parquet', 'train.jsonl.gz'])
def test_stack_exchange(tmp_path, name):
    for site in ('ai.stackexchange.com', 'cooking.stackexchange.com'):
        write(tmp_path/'se/data'/site/name, [se_row(i, site=site) for i in range(20)]+[se_row(20, (2, 2), site)])
    pairs, facts = read(tmp_path, only='se', se_path=tmp_path/'se')
    assert (facts['pairs'], facts['dropped']) == (40, {'se: no two scores': 2})
    assert pairs[0]['prompt'] == 'Question **0** of ai.stackexchange.com?'
    assert pairs[0]['chosen'] == 'Answer 1 – with `x_1`\n\n```\nif a:\n    b()\n```'
    meta = pairs[0]['meta']
    assert meta['margin'] == 3 and meta['authors']['chosen'] == dict(author='user 1', author_profile='https://ai.stackexchange.com/users/1')
    assert meta['source'] == ['https://ai.stackexchange.com/q/0']
    every, _ = read(tmp_path/'all', only='se', se_path=tmp_path/'se', se_pairs='all', se_sites='cooking.stackexchange.com')
    assert len(every) == 60 and {p['meta']['source'][0].split('/')[2] for p in every} == {'cooking.stackexchange.com'}
    some, facts = read(tmp_path/'some', only='se', se_path=tmp_path/'se', max_se=10)
    assert facts['pairs']+sum(facts['dropped'].values()) == facts['rows'] == 42
    assert len(some) == 10 and len({p['meta']['source'][0].split('/')[2] for p in some}) == 2
    with pytest.raises(FileNotFoundError, match='No folder ai.stackexchange.org'): read(tmp_path/'x', only='se', se_path=tmp_path/'se', se_sites='ai.stackexchange.org')

# -- the hub, played by local files in the published schemas

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A `load_dataset` that finds the three sets in a folder; a number in `calls['fail_at']` cuts the stream there"
    write(tmp_path/'hub/hh.jsonl', [dict(chosen=f'\n\nHuman: {i}?\n\nAssistant: yes', rejected=f'\n\nHuman: {i}?\n\nAssistant: no') for i in range(30)])
    write(tmp_path/'hub/uf.parquet', [uf_row(i) for i in range(30)])
    for site in ('ai.stackexchange.com', 'cooking.stackexchange.com'):
        write(tmp_path/f'hub/data/{site}/train-0.parquet', [se_row(i, site=site) for i in range(400)])
    load, shard, calls = datasets.load_dataset, datasets.IterableDataset.shard, dict(fail_at=0, shards=0)
    def fake(repository, split, revision, streaming=False, data_files={}):
        files = {'Anthropic/hh-rlhf': ('json', 'hh.jsonl'), 'HuggingFaceH4/ultrafeedback_binarized': ('parquet', 'uf.parquet'),
            'HuggingFaceH4/stack-exchange-preferences': ('parquet', 'data/*/*.parquet')}
        kind, name = files[repository]
        assert split == ('train_prefs' if 'ultra' in repository else 'train') and streaming == ('stack' in repository)
        wanted = [str(tmp_path/'hub'/f) for f in data_files.get(split, [name])]
        return load(kind, data_files=wanted, split='train', streaming=streaming, cache_dir=str(tmp_path/'cache'))
    def counted(self, *args, **kwargs):
        calls['shards'] += 1
        if calls['shards'] == calls['fail_at']: raise ConnectionError('Server disconnected')
        return shard(self, *args, **kwargs)
    monkeypatch.setattr(datasets, 'load_dataset', fake)
    monkeypatch.setattr(datasets.IterableDataset, 'shard', counted)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name: SimpleNamespace(sha='0'*40))
    return calls

def test_three_sets_from_the_hub(tmp_path, hub):
    pairs, facts = read(tmp_path, max_se=100, max_uf=20)
    assert facts['sources'] == dict(hh=30, uf=20, se=100) and facts['se_revision'] == '0'*40
    assert facts['pairs']+sum(facts['dropped'].values()) == facts['rows']
    sites = [p['meta']['source'][0].split('/')[2] for p in pairs if p['src'] == 'se']
    assert 15 < sites.count('ai.stackexchange.com') < 85
    assert not (tmp_path/'.cache/data/se_parts').exists() or not list((tmp_path/'.cache/data/se_parts').iterdir())

def test_an_interrupted_download_goes_on(tmp_path, hub):
    whole, _ = read(tmp_path/'whole', only='se', max_se=300)
    hub.update(shards=0, fail_at=6)
    with pytest.raises(ConnectionError, match='row group 6 of at most 16.*run the same command again'): read(tmp_path/'cut', only='se', max_se=300)
    assert not (tmp_path/'cut/.cache/data/pairs_all.jsonl').exists()
    hub.update(shards=0, fail_at=0)
    again, _ = read(tmp_path/'cut', only='se', max_se=300, max_bad='1%', dedup='prompt')
    assert again == whole
    rest = hub['shards']
    hub['shards'] = 0
    read(tmp_path/'third', only='se', max_se=300)
    assert rest == hub['shards']-5, 'the five row groups that were read are not read again'

def test_sites_are_chosen_on_the_hub(tmp_path, hub):
    pairs, _ = read(tmp_path, only='se', se_sites='cooking.stackexchange.com', max_se=1000)
    assert len(pairs) == 400 and all('cooking' in p['prompt'] for p in pairs)

def test_a_hub_out_of_reach_says_how_to_go_on(tmp_path, monkeypatch):
    def nowhere(*args, **kwargs): raise TimeoutError()
    monkeypatch.setattr(datasets, 'load_dataset', nowhere)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', nowhere)
    for name in ('hh', 'uf', 'se'):
        with pytest.raises(ConnectionError, match=f'cannot be read from the hub.*--{name}_path.*--no-{name}'): read(tmp_path, only=name)

# -- text

hostile = st.text(st.characters(), max_size=40)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(hostile, hostile, hostile), min_size=1, max_size=5))
def test_hostile_strings_survive(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp('hostile')
    rows = [dict(prompt=f'{i} {p}', chosen=f'+{c}', rejected=f'-{r}') for i, (p, c, r) in enumerate(texts)]
    (root/'in.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='ascii')
    out = make_data(DataConfig(jsonl_path=str(root/'in.jsonl'), root=str(root)))
    found = [json.loads(line) for line in out.read_bytes().decode('utf-8').split('\n')[:-1]]
    whole = mended(rows)
    assert [{k: f[k] for k in r} for f, r in zip(found, whole)] == whole
    assert read_manifest(out)['facts']['mended'] == sum(a != b for a, b in zip(json.loads(json.dumps(rows)), whole))
    make_prompts(PromptsConfig(root=str(root)))
    ids = (root/'.cache/data/prompt_id_map.tsv').read_bytes().decode('utf-8').split('\n')[:-1]
    assert [line.split('\t')[0] for line in ids] == [prompt_id(r['prompt']) for r in whole] and all(line.count('\t') == 1 for line in ids)

@pytest.mark.parametrize('said', ['A list:\n\n- one\u2028\n- two\r\n\tcode  with  blanks — “quotes”', 'x'*2**20, 'a\x00b\x1f\x7f\x85\ufeff\u202e', '\u0130İ ﬁ e\u0301'],
    ids=['layout', 'megabyte', 'control', 'unicode'])
@pytest.mark.parametrize('name', ['p.jsonl', 'p.jsonl.gz', 'p.jsonl.zst', 'p.json', 'p.json.gz'])
def test_text_is_not_damaged(tmp_path, said, name):
    row = dict(prompt='  Why?\n', chosen=said, rejected='No.')
    with files.atomic(tmp_path/name) as file: file.write(json.dumps(row) if 'jsonl' in name else json.dumps([row], indent=1))
    pairs, _ = read(tmp_path, jsonl_path=tmp_path/name, pairs_path='out/'+name.replace('jsonl', 'json').replace('json', 'jsonl'))
    assert (pairs[0]['prompt'], pairs[0]['chosen']) == ('  Why?\n', said)

# -- duplicates and folds

def test_duplicates(tmp_path):
    rows = [plain(0), plain(0), plain(0, chosen='Trout.'), plain(0, prompt='Name  fish\nnumber 0. ', chosen='Trout.')]
    write(tmp_path/'a.jsonl', rows)
    sizes = {}
    for how in ('none', 'pair', 'prompt'):
        pairs, facts = read(tmp_path/how, jsonl_path=tmp_path/'a.jsonl', dedup=how)
        sizes[how] = (len(pairs), [p['count'] for p in prompts_of(tmp_path/how)], facts['dropped'])
    assert sizes == dict(none=(4, [4], {}), pair=(3, [3], {'jsonl: same pair again': 1}), prompt=(1, [1], {'jsonl: same prompt again': 3}))

def test_sources_share_prompts(tmp_path):
    write(tmp_path/'h.jsonl', [dict(chosen=f'\n\nHuman: Fish {i}?\n\nAssistant: yes', rejected=f'\n\nHuman: Fish {i}?\n\nAssistant: no') for i in range(5)])
    write(tmp_path/'u.jsonl', [uf_row(i) for i in range(3, 10)])
    read(tmp_path, hh_path=tmp_path/'h.jsonl', uf_path=tmp_path/'u.jsonl', se=False)
    prompts = prompts_of(tmp_path)
    _, facts = read(tmp_path/'once', hh_path=tmp_path/'h.jsonl', uf_path=tmp_path/'u.jsonl', se=False, dedup='prompt')
    assert facts['prompts_shared']['hh']['uf'] == 2, 'what is dropped was there before'
    assert json.loads((tmp_path/'.cache/data/stats.json').read_text())['prompts_shared'] == dict(hh=dict(hh=5, uf=2), uf=dict(hh=2, uf=7))
    assert [p['sources'] for p in prompts if 'sources' in p] == [['hh', 'uf']]*2
    assert 'pairs: 12' in (tmp_path/'.cache/data/stats.txt').read_text()

def test_near_duplicates_stay_in_one_fold(tmp_path):
    rng = random.Random(0)
    def text(): return ' '.join(rng.choice('river mountain autumn train violin letter copper window garden thunder'.split())+str(rng.randrange(99)) for _ in range(12))
    texts = [text() for _ in range(120)]
    ends = ('', ' x', ' yes')
    write(tmp_path/'a.jsonl', [plain(i, prompt=t+end) for i, t in enumerate(texts) for end in ends])
    read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    apart = prompts_of(tmp_path, near=0)
    together = prompts_of(tmp_path, near=.8)
    groups = list(read_jsonl(tmp_path/'.cache/data/near_groups.jsonl'))
    assert len(groups) == 120 and all(len(g['prompts']) == 3 for g in groups)
    def crossing(prompts):
        folds = {p['prompt']: p['fold'] for p in prompts}
        return sum(len({folds[t+e] for e in ends}) > 1 for t in texts)
    assert crossing(apart) > 30 and crossing(together) == 0
    assert [p['id'] for p in together] == [p['id'] for p in apart], 'nothing is removed'
    folds = read_folds(tmp_path/'.cache/data/prompts_all.jsonl')
    pairs = list(read_jsonl(tmp_path/'.cache/data/pairs_all.jsonl'))
    chosen = [select_pairs(pairs, folds, f, 'prefs') for f in ('policy', 'proxy', 'gold', 'eval')]
    assert sum(map(len, chosen)) == len(pairs)

# -- bad input, each named with its remedy

def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path

@pytest.mark.parametrize('content,said', [
    (b'{"prompt":"a","chosen":"b"}\n', "line 1: no field 'rejected'"),
    (b'{"prompt":"a","chosen":"b","rejected":"c"}\n{"prompt":\n', 'line 2: not valid JSON'),
    (b'\n\n{"prompt":"a\xff","chosen":"b","rejected":"c"}\n', 'line 3: not valid UTF-8'),
    (b'{"prompt":"a","chosen":"b","rejected":null}\n', "line 1: 'rejected' is not a text but NoneType"),
    (b'{"prompt":"a","chosen":["b"],"rejected":["c"]}\n', "line 1: 'chosen' is not a list of objects"),
    (b'{"prompt":"a","chosen":"b","rejected":"c","messages":"d"}\n', "line 1: 'messages' is not a list of objects"),
    (b'[1]\n', 'item 1: not an object but int'),
    (b'{"prompt":"a","chosen":"b","rejected":"c","meta":"x"}\n', "line 1: 'meta' is not an object"),
    (b'[{"prompt":"a","chosen":"b"\n"rejected":"c"}]', 'line 2: the list breaks after item 0'),
    (b'{"conversations":[],"chosen":{"from":"gpt","value":"a"},"rejected":{"from":"gpt","value":"b"},"system":5}', "line 1: 'system' is not a text"),
    (b'['*100_000, 'nested too deeply|breaks after item 0'),
    (b'"text"\n', 'line 1: not an object but str'),
    (b'{"prompt":"a","chosen":"b","rejected":"b"}\n', 'No pair was left.*equal completions'),
    (b'', 'is empty'),
    (b'\n\n', 'No pair was left')])
def test_bad_input_is_named(tmp_path, content, said):
    (tmp_path/'bad.jsonl').write_bytes(content)
    if content[:1] == b'[': (tmp_path/'bad.jsonl').rename(tmp_path/'bad.json')
    with pytest.raises(ValueError, match=said) as error: read(tmp_path, jsonl_path=next(tmp_path.glob('bad.json*')))
    assert 'bad.json' in str(error.value)
    assert not (tmp_path/'.cache/data/pairs_all.jsonl').exists()

@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.json.gz', 'a.parquet', 'a.json'])
def test_a_truncated_file_is_named(tmp_path, name):
    rows = [plain(i) for i in range(3000)]
    if '.json' in name and 'jsonl' not in name:
        with files.atomic(tmp_path/name) as file: json.dump(rows, file)
    else: write(tmp_path/name, rows)
    cut(tmp_path/name, -1000)
    with pytest.raises(ValueError, match=f'{name}.* after |{name}, line 1: the list breaks after item 29') as error: read(tmp_path, jsonl_path=tmp_path/name, max_bad='10%')
    assert 'fetch it again' in str(error.value)
    assert not (tmp_path/'.cache/data/pairs_all.jsonl').exists()

def test_paths_that_hold_nothing(tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='No .jsonl, .json, .csv, .tsv or .parquet file in'): read(tmp_path, only='hh', hh_path=tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='nowhere'): read(tmp_path, only='hh', hh_path=tmp_path/'nowhere')
    with pytest.raises(ValueError, match='--jsonl_path'): read(tmp_path, only='jsonl')
    with pytest.raises(ValueError, match='No source is left'): read(tmp_path, hh=False, uf=False, se=False)

@pytest.mark.parametrize('rows', [500, 5], ids=['one process', 'two processes'])
def test_a_few_bad_rows_may_pass(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(sources, 'ROWS', rows)
    monkeypatch.setattr('densirl.data.cpu_cores', lambda: 2)
    lines = [json.dumps(plain(i)).encode() for i in range(400)]
    lines[7], lines[200] = b'{"prompt":', b'{"prompt":"a","chosen":"b"}'
    (tmp_path/'a.jsonl').write_bytes(b'\n'.join(lines))
    with pytest.raises(ValueError, match='line 8: not valid JSON.*--max_bad'): read(tmp_path/'x', jsonl_path=tmp_path/'a.jsonl')
    with pytest.raises(ValueError, match='2 of 400 rows are bad, more than --max_bad=0.4.*listed in .*bad_rows.jsonl'): read(tmp_path/'y', jsonl_path=tmp_path/'a.jsonl', max_bad='0.4%')
    pairs, facts = read(tmp_path, jsonl_path=tmp_path/'a.jsonl', max_bad='0.5%')
    assert (len(pairs), facts['bad']) == (398, 2)
    noted = list(read_jsonl(tmp_path/'.cache/data/bad_rows.jsonl'))
    assert [n['place'].split(', ')[1] for n in noted] == ['line 8', 'line 201'] and noted[0]['row'] == '{"prompt":'
    listed, = (tmp_path/'y/.cache/data').rglob('bad_rows.jsonl')
    assert len(list(read_jsonl(listed))) == 2, 'listed although there are too many'

def test_bad_rows_are_counted_among_those_that_were_read(tmp_path):
    rows = [json.dumps(uf_row(i)).encode() if i%20 else b'{' for i in range(2000)]
    (tmp_path/'u.jsonl').write_bytes(b'\n'.join(rows))
    with pytest.raises(ValueError, match='of 100 rows are bad'): read(tmp_path, only='uf', uf_path=tmp_path/'u.jsonl', max_uf=100, max_bad='1%')

def test_one_process_or_two_write_the_same(tmp_path, monkeypatch):
    write(tmp_path/'a.jsonl', [plain(i%90) for i in range(100)])
    made = {}
    for rows in (500, 5):
        monkeypatch.setattr(sources, 'ROWS', rows)
        monkeypatch.setattr('densirl.data.cpu_cores', lambda: 2)
        read(tmp_path/str(rows), jsonl_path=tmp_path/'a.jsonl')
        prompts_of(tmp_path/str(rows))
        made[rows] = [(tmp_path/str(rows)/'.cache/data'/n).read_bytes() for n in ('pairs_all.jsonl', 'prompts_all.jsonl', 'prompt_id_map.tsv')]
    assert made[500] == made[5]

def test_a_failed_run_leaves_the_old_file_usable(tmp_path):
    write(tmp_path/'a.jsonl', [plain(i) for i in range(9)])
    read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    (tmp_path/'bad.jsonl').write_text('{')
    with pytest.raises(ValueError, match='line 1'): read(tmp_path, jsonl_path=tmp_path/'bad.jsonl')
    assert len(prompts_of(tmp_path)) == 9

def test_a_broken_pairs_file_is_named(tmp_path):
    (tmp_path/'p.jsonl').write_text(json.dumps(dict(plain(0), id='x', src='mine'))+'\n{"prompt":\n')
    with pytest.raises(ValueError, match='p.jsonl, line 2: not valid JSON'): prompts_of(tmp_path, pairs_path=str(tmp_path/'p.jsonl'))
    (tmp_path/'p.jsonl').write_text(json.dumps(dict(plain(0), id='x', src='mine'))+'\n')
    assert prompts_of(tmp_path, pairs_path=str(tmp_path/'p.jsonl'))[0]['id'] == prompt_id(plain(0)['prompt'])

def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path/'a.jsonl', [plain(0)])
    read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    before = (tmp_path/'.cache/data/pairs_all.jsonl').read_bytes()
    write(tmp_path/'a.jsonl', [plain(0), plain(1)])
    def full(handle): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(OSError, match='disk is full.*as it was before'): read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    assert (tmp_path/'.cache/data/pairs_all.jsonl').read_bytes() == before

def test_killed_while_writing(tmp_path):
    write(tmp_path/'small.jsonl', [plain(0)])
    read(tmp_path, jsonl_path=tmp_path/'small.jsonl')
    write(tmp_path/'big.jsonl', [plain(i, chosen=f'Pike {i} '*200) for i in range(12_000)])
    out = tmp_path/'.cache/data/pairs_all.jsonl'
    old = out.read_bytes()
    command = [sys.executable, '-m', 'densirl.cli', 'data', f'--jsonl_path={tmp_path/"big.jsonl"}', f'--root={tmp_path}']
    for moment in (1, 12_000_000):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while sum(f.stat().st_size for f in out.parent.rglob('.pairs_all.jsonl.half-*')) < moment:
            assert process.poll() is None, 'it ended before it could be killed'
            time.sleep(.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert out.read_bytes() == old
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    assert sum(1 for _ in read_jsonl(out)) == 12_000
    assert not list(out.parent.rglob('*.half-*')), 'what the killed runs left is gone'
    assert [f.read_bytes() for f in out.parent.glob('.pairs_all.jsonl.runs/*/pairs_all.jsonl')] == [old], 'what was there before is kept'

# -- rows that mean something else than they seem to

def said(role, content, **more): return dict(role=role, content=content, **more)

TALK = [said('user', 'Name a ship.'), said('assistant', 'The ketch.'), said('user', 'Another?')]
FIRST = dict(prompt='User: Name a ship.\n\nAssistant: The ketch.\n\nUser: Another?', messages=TALK, chosen='A yawl.', rejected='A cart.')
GOOD, BAD = said('assistant', 'A yawl.'), said('assistant', 'A cart.')
MARKED = '\n\nHuman: Name a ship.\n\nAssistant: The ketch.\n\nHuman: Another?\n\nAssistant:'
def share(messages): return [{'from': dict(user='human', assistant='gpt', system='system')[m['role']], 'value': m['content']} for m in messages]

@pytest.mark.parametrize('row', [
    dict(prompt='Another?', messages=TALK, chosen='A yawl.', rejected='A cart.'),
    dict(prompt='Name a ship.', messages=[*TALK, GOOD], chosen='A yawl.', rejected='A cart.'),
    dict(messages=TALK, chosen=[GOOD], rejected=[BAD]),
    dict(messages=TALK, chosen=GOOD, rejected=BAD),
    dict(prompt=TALK, chosen='A yawl.', rejected='A cart.'),
    dict(prompt=TALK, chosen=[*TALK, GOOD], rejected=[*TALK, BAD]),
    dict(prompt='Another?', chosen=[*TALK, GOOD], rejected=[*TALK, BAD]),
    dict(prompt=MARKED, chosen=' A yawl.', rejected=' A cart.'),
    dict(prompt=MARKED.strip(), chosen=' A yawl.', rejected='A cart.'),
    dict(prompt=MARKED, chosen=MARKED+' A yawl.', rejected=MARKED+' A cart.'),
    dict(chosen=MARKED+' A yawl.', rejected=MARKED+' A cart.'),
    dict(conversations=share(TALK), chosen=share([GOOD])[0], rejected=share([BAD])[0]),
    dict(conversations=TALK, chosen='A yawl.', rejected='A cart.'),
    dict(prompt=[said('User', 'Name a ship.'), *TALK[1:]], chosen=[said('assistant', [dict(type='text', text='A '), dict(type='text', text='yawl.')])], rejected=[BAD])])
def test_one_talk_in_many_shapes(row):
    assert pairs_by_shape(row) == [FIRST]
    system = [dict(p, messages=[said('system', 'Be brief.'), *TALK], prompt='System: Be brief.\n\n'+FIRST['prompt']) for p in [FIRST]]
    assert pairs_by_shape(dict(row, system='Be brief.')) == system, 'a system text beside any shape comes first'

@pytest.mark.parametrize('row,reason', [
    (dict(messages=[*TALK, said('assistant', 'A sloop.')], chosen='A yawl.', rejected='A cart.'), 'messages end with another answer than the chosen one'),
    (dict(prompt='Bake bread.', messages=TALK, chosen='A yawl.', rejected='A cart.'), 'prompt and messages disagree'),
    (dict(prompt=[TALK[0], said('assistant', '', tool_calls=[dict(name='x')]), TALK[2]], chosen=[GOOD], rejected=[BAD]), 'tool calls'),
    (dict(prompt=[TALK[0], said('assistant', None, function_call=dict(name='x')), TALK[2]], chosen=[GOOD], rejected=[BAD]), 'tool calls'),
    (dict(prompt=[TALK[0], TALK[1], said('tool', '14'), TALK[2]], chosen=[GOOD], rejected=[BAD]), 'tool calls'),
    (dict(conversations=[*share(TALK[:1]), {'from': 'function_call', 'value': '{}'}, {'from': 'observation', 'value': '14'}], chosen=share([GOOD])[0], rejected=share([BAD])[0]), 'tool calls'),
    (dict(prompt='Name a ship.', tools=[dict(name='x')], chosen='A yawl.', rejected='A cart.'), 'tool calls'),
    (dict(prompt=[TALK[0], said('assistant', None), TALK[2]], chosen=[GOOD], rejected=[BAD]), 'a turn without text'),
    (dict(prompt=[TALK[0], said('assistant', ' '), TALK[2]], chosen=[GOOD], rejected=[BAD]), 'an empty turn'),
    (dict(prompt=[TALK[0], said('critic', 'Hm.'), TALK[2]], chosen=[GOOD], rejected=[BAD]), "a turn of the role 'critic'"),
    (dict(prompt=[said('user', [dict(type='image'), dict(type='text', text='What?')])], chosen=[GOOD], rejected=[BAD]), 'pictures or sound'),
    (dict(prompt='What is it?', images=['x.png'], chosen='A yawl.', rejected='A cart.'), 'pictures or sound'),
    (dict(prompt=[said('system', 'Be long.'), TALK[0]], system='Be brief.', chosen=[GOOD], rejected=[BAD]), 'two system texts')])
def test_a_row_that_cannot_mean_what_it_says_is_left_out(row, reason): assert pairs_by_shape(row) == [reason]

def test_talks_with_the_same_last_words_are_two_prompts(tmp_path):
    rows = [dict(prompt='Another?', messages=[said('user', f'Name {what}.'), said('assistant', 'One.'), said('user', 'Another?')], chosen='Two.', rejected='No.') for what in ('a ship', 'a loaf')]
    write(tmp_path/'a.jsonl', rows)
    read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    assert len(prompts_of(tmp_path)) == 2
    write(tmp_path/'raw.jsonl', [dict(r, src='mine') for r in rows])
    with pytest.raises(ValueError, match='raw.jsonl, line 1: the prompt is not the text of its messages.*densirl data'): prompts_of(tmp_path, pairs_path=str(tmp_path/'raw.jsonl'))

@pytest.mark.parametrize('name', ['h.jsonl', 'h.json', 'h.csv'])
def test_halves_of_characters_are_mended_and_counted(tmp_path, name):
    rows = [plain(0, chosen='a boat \ud83d\udea4', note='cut \ud83d'), plain(1, prompt='cut \udea4 here', note='x'), plain(2, note='🚤')]
    if name == 'h.csv':
        with open(tmp_path/name, 'w', encoding='utf-8', errors='surrogatepass', newline='') as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else: (tmp_path/name).write_text('\n'.join(map(json.dumps, rows)) if name == 'h.jsonl' else json.dumps(rows))
    pairs, facts = read(tmp_path, jsonl_path=tmp_path/name)
    assert facts['mended'] == 2 and [p['meta']['note'] for p in pairs] == ['cut \ufffd', 'x', '🚤']
    assert pairs[0]['chosen'] == 'a boat 🚤' and pairs[1]['prompt'] == 'cut \ufffd here'
    (tmp_path/'.cache/data/pairs_all.jsonl').read_bytes().decode('utf-8')
    (tmp_path/'raw.jsonl').write_text(json.dumps(dict(plain(0), chosen='cut \ud83d', src='mine')))
    with pytest.raises(ValueError, match='raw.jsonl, line 1: half a surrogate pair.*densirl data'): prompts_of(tmp_path/'raw', pairs_path=str(tmp_path/'raw.jsonl'))
    (tmp_path/'raw.json').write_text(json.dumps([dict(plain(0), src='mine')]))
    with pytest.raises(ValueError, match='raw.json, item 1: not JSON lines.*densirl data'): prompts_of(tmp_path/'raw', pairs_path=str(tmp_path/'raw.json'))
    assert {p['id'] for p in prompts_of(tmp_path)} == {p['prompt_id'] for p in pairs}

# -- tables, names of columns, folders

@pytest.mark.parametrize('name', ['t.csv', 't.tsv', 't.csv.gz', 't.parquet', 't.jsonl', 't.json'])
def test_columns_are_renamed_in_every_format(tmp_path, name):
    rows = [dict(instruction=f'Name loaf {i}, please:\n"rye"?', good='Rye; yes.\r\nAnd more.', bad='No.', score=str(i)) for i in range(3)]
    if name.endswith('.parquet') or name.endswith('.jsonl'): write(tmp_path/name, rows)
    elif name.endswith('.json'): (tmp_path/name).write_text(json.dumps(rows))
    else:
        with files.atomic(tmp_path/name) as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter='\t' if 'tsv' in name else ',')
            table.writeheader()
            table.writerows(rows)
    pairs, _ = read(tmp_path, jsonl_path=tmp_path/name, columns='prompt=instruction,chosen=good,rejected=bad')
    assert [(p['prompt'], p['chosen'], p['rejected'], p['meta']) for p in pairs] == [(r['instruction'], r['good'], r['bad'], dict(score=r['score'])) for r in rows]
    with pytest.raises(ValueError, match="no field 'answer', only 'bad', 'good', 'instruction', 'score'"): read(tmp_path, jsonl_path=tmp_path/name, columns='prompt=instruction,chosen=answer,rejected=bad')
    for wrong in ('prompt', 'question=instruction', 'prompt=a,prompt=b', 'chosen='):
        with pytest.raises(ValueError, match='columns'): read(tmp_path, jsonl_path=tmp_path/name, columns=wrong)
    with pytest.raises(ValueError, match='columns.*--jsonl_path'): read(tmp_path, source='demo', columns='prompt=a')

@pytest.mark.parametrize('text,said', [
    ('prompt,chosen,rejected\na,b,c\nd,e\n', 'line 3: 2 fields where the first row has 3'),
    ('prompt,chosen,rejected\n"a\nb",c,d\ne,f,g,h\n', 'line 4: 4 fields where'),
    ('prompt,chosen,rejected\na,b,c\n"d,e,f\ng,h,i\n', 'line 3: the table breaks in the row that begins there'),
    ('prompt,chosen,chosen\na,b,c\n', "names its columns 'prompt', 'chosen', 'chosen'"),
    ('prompt,chosen,rejected\na,"[{\'role\': \'user\', \'content\': \'b\'}]",c\n', 'line 2: a field holds messages in a form that is not JSON'),
    ('prompt;chosen;bad\na;b;c\n', "line 2: no field 'rejected', only 'bad', 'chosen', 'prompt'")])
def test_a_broken_table_is_named(tmp_path, text, said):
    (tmp_path/'bad.csv').write_text(text, newline='')
    with pytest.raises(ValueError, match=said): read(tmp_path, jsonl_path=tmp_path/'bad.csv')

def test_a_few_ragged_rows_may_pass(tmp_path):
    (tmp_path/'a.csv').write_text('prompt,chosen,rejected\n'+''.join(f'p{i},yes,no\n' for i in range(20))+'cut,\n')
    pairs, facts = read(tmp_path, jsonl_path=tmp_path/'a.csv', max_bad='5%')
    assert (len(pairs), facts['bad']) == (20, 1)

def test_messages_in_a_table(tmp_path):
    (tmp_path/'a.csv').write_text('chosen,rejected\n'+','.join('"'+json.dumps([*TALK, end]).replace('"', '""')+'"' for end in (GOOD, BAD))+'\n')
    assert read(tmp_path, jsonl_path=tmp_path/'a.csv')[0][0]['messages'] == TALK

def test_what_follows_a_list_is_not_lost(tmp_path):
    for end in ('\n{"prompt":"x"}', ' []', 'x', ','):
        (tmp_path/'a.json').write_text(json.dumps([plain(0), plain(1)])+end)
        with pytest.raises(ValueError, match='line [12]: the list breaks after item 2 .the list ends there'): read(tmp_path, jsonl_path=tmp_path/'a.json')
    (tmp_path/'a.json').write_text(json.dumps([plain(0)])+' \n'*70_000)
    assert len(read(tmp_path, jsonl_path=tmp_path/'a.json')[0]) == 1

def test_a_folder_gives_its_training_split(tmp_path, capsys):
    folder = tmp_path/'set'
    write(folder/'data/train-00000-of-00002.parquet', [plain(0)])
    write(folder/'data/train-00001-of-00002.parquet', [plain(1)])
    write(folder/'data/test-00000-of-00001.parquet', [plain(2)])
    for name in ('dataset_infos.json', 'dataset_dict.json', 'state.json', '.cache/huggingface/download/x.json'): files.write_json(folder/name, dict(splits={}))
    pairs, _ = read(tmp_path, jsonl_path=folder)
    assert [p['chosen'] for p in pairs] == ['Pike 0.', 'Pike 1.'] and 'set: reading train, not test' in capsys.readouterr().out
    assert [p['chosen'] for p in read(tmp_path/'t', jsonl_path=folder, split='test')[0]] == ['Pike 2.']
    with pytest.raises(ValueError, match='holds no split dev, but test, train'): read(tmp_path/'d', jsonl_path=folder, split='dev')
    write(tmp_path/'held/validation/0000.parquet', [plain(3)])
    assert len(read(tmp_path/'v', jsonl_path=tmp_path/'held')[0]) == 1 and 'held: reading validation' in capsys.readouterr().out
    write(tmp_path/'held/mine.jsonl', [plain(4)])
    assert [p['chosen'] for p in read(tmp_path/'w', jsonl_path=tmp_path/'held')[0]] == ['Pike 4.']

# -- folds

def exact_leak(prompts, threshold=.6):
    "Fraction of the fold eval with a near-copy in another fold, from all pairs"
    shingled = [set(shingles(p['prompt']).tolist()) for p in prompts]
    held = [i for i, p in enumerate(prompts) if p['fold'] == 'eval']
    others = [j for j, p in enumerate(prompts) if p['fold'] != 'eval']
    alike = lambda a, b: len(a & b) >= threshold*len(a | b)
    return sum(any(alike(shingled[i], shingled[j]) for j in others) for i in held)/len(held)

def test_folds_of_the_built_in_corpus_do_not_leak(tmp_path):
    make_data(make_config(DataConfig, 'demo', root=str(tmp_path)))
    prompts = prompts_of(tmp_path)
    stats = json.loads((tmp_path/'.cache/data/stats.json').read_text())
    assert exact_leak(prompts) == pytest.approx(stats['leak']['any'], abs=.01) and stats['leak']['any'] < .02
    crowded = lambda rows: np.mean([p['meta']['region'] == 'crowd' for p in rows])
    for fold, fraction in FOLDS.items():
        mine = [p for p in prompts if p['fold'] == fold]
        assert abs(len(mine)/len(prompts)-fraction) < .02, fold
        assert abs(crowded(mine)-crowded(prompts)) < .1, 'crowded and rare prompts are in every fold'
    by_name = prompts_of(tmp_path/'names', near=0, pairs_path=str(tmp_path/'.cache/data/pairs_all.jsonl'))
    assert exact_leak(by_name) > .6, 'what names alone would do'

def test_folds_depend_on_the_set_of_prompts_alone(tmp_path):
    rng, rows, folds = random.Random(0), [dict(p, id='') for p in make_corpus(300)], {}
    for name, order in dict(a=rows, b=rows[::-1], more=rows+[plain(i, prompt=''.join(rng.choices('abcdefghijklmnop ', k=60))) for i in range(30)]).items():
        write(tmp_path/f'{name}.jsonl', order)
        read(tmp_path/name, jsonl_path=tmp_path/f'{name}.jsonl')
        folds[name] = {p['id']: p['fold'] for p in prompts_of(tmp_path/name)}
    assert folds['a'] == folds['b']
    assert all(folds['more'][n] == f for n, f in folds['a'].items()), 'loners that are added move nobody'

def test_case_and_punctuation_make_no_other_prompt(tmp_path):
    texts = [t for i in range(40) for t in (f'Why {i}?', f'why “{i}”', f'WHY, {i}!')]
    write(tmp_path/'a.jsonl', [plain(i, prompt=t) for i, t in enumerate(texts)])
    read(tmp_path, jsonl_path=tmp_path/'a.jsonl')
    folds = {p['prompt']: p['fold'] for p in prompts_of(tmp_path, near=0)}
    assert all(len({folds[t] for t in texts[i:i+3]}) == 1 for i in range(0, 120, 3)) and len(set(folds.values())) == 4
    with pytest.raises(ValueError, match='near is 1.5'): prompts_of(tmp_path, near=1.5)

def test_a_crowd_that_chains_is_split(tmp_path):
    "Each prompt is near to the next, the ends have nothing in common"
    chain = [f'{" ".join(str(1000+j) for j in range(i, i+8))}' for i in range(200)]
    pairs = near_pairs(chain)
    sizes = Counter(near_groups([prompt_id(t) for t in chain], chain, pairs))
    assert len(near_pairs(chain)[0]) >= 190 and max(sizes.values()) <= 8 and sizes.total() == 200

def test_two_files_of_pairs_in_one_folder(tmp_path):
    "Each has its own list of bad rows, its own prompts and their figures"
    for name, n in (('a', 20), ('b', 30)):
        make_data(make_config(DataConfig, 'test', root=str(tmp_path), demo_pairs=n, pairs_path=f'd/{name}.jsonl'))
        make_prompts(make_config(PromptsConfig, 'test', root=str(tmp_path), pairs_path=f'd/{name}.jsonl', prompts_path=f'd/prompts.{name}.jsonl'))
    assert [json.loads((tmp_path/f'd/prompts.{n}.stats.json').read_text())['pairs'] for n in 'ab'] == [20, 30]

def test_a_table_with_other_names_is_told_how_to_name_them(tmp_path):
    (tmp_path/'t.csv').write_text('Question Text,good,bad\nwhy?,so,not so\n')
    for given in ({}, dict(max_bad='50%')):
        with pytest.raises(ValueError, match="line 2: no field .*, only 'Question Text', 'bad', 'good'; say with --columns"): read(tmp_path/'x', jsonl_path=str(tmp_path/'t.csv'), **given)
    with pytest.raises(ValueError, match="columns has 'Question Text'; give pairs"): read(tmp_path/'x', jsonl_path=str(tmp_path/'t.csv'), columns='Question Text')
    assert read(tmp_path/'x', jsonl_path=str(tmp_path/'t.csv'), columns='prompt=Question Text,chosen=good,rejected=bad')[0][0]['prompt'] == 'why?'
