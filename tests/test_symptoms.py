"""Patterns on sentences written without a look at them, rates against statsmodels, and the suite from completions to its page."""
import gzip, json
from collections import Counter

import numpy as np
import pytest

from densirl.artefacts import artefact_page, artefact_tables, marked, marked_examples, suite_prompts
from densirl.constraints import instruction_facts
from densirl.calibration import CALIBRATED, break_sentence, calibrate, clean_sentences
from densirl.checkers import HARPER, SPELLING
from densirl.contrasts import contrast_hits
from densirl.dashes import dash_hits
from densirl.files import repo_root, write_json
from densirl.languages import language_of
from densirl.mode_collapse import EvalConfig, make_eval
from densirl.prose import prose
from densirl.rates import by_prompt, rate_interval, rate_ratio
from densirl.report import read_artefacts
from densirl.runs import PACKAGE_DATA, input_hash
from densirl.slop import slop_hits
from densirl.symptoms import count_symptoms, rate_rows, symptom_rows, table_of
from sentences import CONTRAST_NO, CONTRAST_YES, DASH_NO, DASH_YES

DATA = repo_root()/'../shared/data/alpaca_eval_pairs.jsonl.gz'


# -- patterns

def test_contrasts_are_found_in_their_tier():
    found = Counter((kind, kind in {h.kind for h in contrast_hits(text)}) for text, kind in CONTRAST_YES)
    assert (found['just', False], found['only', False]) == (0, 0)
    assert found['recast', True] >= 35, found              # of 39: four say "was never about", "We don't need more … we need" and the like

def test_ordinary_sentences_are_no_contrasts():
    kinds = Counter(h.kind for text in CONTRAST_NO for h in contrast_hits(text))
    assert (kinds['just'], kinds['only']) == (0, 0)
    assert kinds['recast'] <= 15, kinds                    # the loose tier takes "It isn't far. It's on the left." too

@pytest.mark.parametrize('quote', ["'", '’'])
@pytest.mark.parametrize('end', ["; it{q}s more", " — it{q}s more", ", it{q}s more", ". It{q}s more", " - it{q}s more", " -- it{q}s more", ", but more"])
def test_every_apostrophe_and_dash(quote, end): assert [h.kind for h in contrast_hits(f'This isn{quote}t just food{end.format(q=quote)}.')] == ['just']

def test_dashes_are_told_apart():
    wrong = [(text, kind) for text, kind in DASH_YES if [h.kind for h in dash_hits(text)] != [kind]]
    assert wrong == []

def test_what_is_no_dash():
    wrong = [text for text in DASH_NO if dash_hits(text)]
    assert len(wrong) <= 2, wrong                          # a file name with two hyphens, and code indented without a fence

def test_hits_lie_where_they_were_found():
    for text, _ in CONTRAST_YES + DASH_YES:
        assert len(prose(text)) == len(text)
        assert ''.join(part for part, _ in marked(text)) == text

def test_a_rate_does_not_depend_on_length():
    if not DATA.exists(): pytest.skip(f'{DATA} is not there')
    with gzip.open(DATA, 'rt', encoding='utf-8') as file: rows = [json.loads(line) for line, _ in zip(file, range(1200))]
    whole, groups = [(r['prompt'], r['chosen']) for r in rows], {}
    for prompt, text in whole: groups.setdefault(prompt, []).append(text)
    def counted(side): return [(p, f) for p, c in side if (f := count_symptoms(c, 'en'))['words']]
    def table(side, kind): return by_prompt(*zip(*((f[kind], f['words'], p) for p, f in side)))
    sides = counted(whole), counted([(p, c[:len(c)//2]) for p, c in whole]), counted([(p, '\n\n'.join(texts)) for p, texts in groups.items()])
    for kind in ('dashes', 'slop'):
        halves, joined = (rate_ratio((table(sides[0], kind), table(other, kind))) for other in sides[1:])
        assert joined['estimable'] and .98 < joined['ratio'] < 1.02, (kind, joined)
        assert .8 < halves['ratio'] < 1.25, (kind, halves)                      # halves differ in what they say as well: nbs/studies/symptoms


# -- rates

def poisson(counts, sizes, prompts, x=None):
    import statsmodels.api as sm
    design = np.ones((len(counts), 1)) if x is None else sm.add_constant(np.array(x, float))
    return sm.GLM(np.array(counts, float), design, family=sm.families.Poisson(), offset=np.log(sizes)).fit(cov_type='cluster', cov_kwds=dict(groups=np.unique(prompts, return_inverse=True)[1], use_correction=False))

def some(seed, n=60):
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(n//3), 3)
    sizes = rng.integers(20, 400, n)
    return rng.poisson(sizes*.02*rng.gamma(2, .5, n//3)[prompts]), sizes, prompts

@pytest.mark.parametrize('seed', range(3))
def test_a_rate_is_that_of_a_clustered_poisson_regression(seed):
    counts, sizes, prompts = some(seed)
    fit, ours, n = poisson(counts, sizes, prompts), rate_interval(by_prompt(counts, sizes, prompts)), len(set(prompts))
    assert np.isclose(ours['rate'], 1000*np.exp(fit.params[0]))
    assert np.isclose(ours['se'], fit.bse[0]*np.sqrt(n/(n-1)), rtol=1e-6)

def test_a_ratio_is_that_of_a_clustered_poisson_regression():
    one, two = some(0), some(5)
    fit = poisson(*(np.concatenate([a, b]) for a, b in zip(one, two)), x=[1]*60+[0]*60)
    ours = rate_ratio((by_prompt(*one), by_prompt(*two)))
    assert np.isclose(ours['log'], fit.params[1])
    from scipy import stats
    assert np.isclose(np.log(ours['high'])-ours['log'], stats.t.ppf(.975, 19)*fit.bse[1]*np.sqrt(20/19), rtol=1e-6)

def test_equal_rates_are_seldom_called_different():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        shared = rng.gamma(1, 1, 100)
        tables = [by_prompt(rng.poisson(2*shared), np.full(100, 200), range(100)) for _ in range(2)]
        wrong += rate_ratio(tuple(tables))['p'] < .05
    assert wrong <= 36, wrong                              # 9 % of 400

def test_over_seeds_too_equal_rates_are_seldom_called_different():
    "Prompts react to an arm each in its own way, in every seed alike: that is no effect"
    rng, wrong, n = np.random.default_rng(0), 0, 60
    for _ in range(300):
        own, shared = np.exp(rng.normal(0, .5, (2, n))), rng.gamma(2, .5, n)
        seeds = [[by_prompt(rng.poisson(4*shared*own[arm]), np.full(n, 200), range(n)) for arm in (0, 1)] for _ in range(6)]
        wrong += rate_ratio(*map(tuple, seeds))['p'] < .05
    assert wrong <= 27, wrong                              # 9 % of 300; over seeds alone a third

def test_prompts_without_english_are_no_witnesses():
    rows = [dict(policy='p', step=0, prompt_id=str(i), em=90*(i == 0), words=1000*(i == 0)) for i in range(3)]
    assert len(table_of(rows, 'em')) == 1

def test_everybody_is_compared_with_where_they_began():
    def said(policy, step, text): return [dict(policy=policy, arm=policy, seed=0, step=step, prompt_id=str(i), sample=0, completion=text) for i in range(100)]
    dashes, none = 'Bread — and salt — and butter.', 'Bread — and salt and butter.'
    prompts = [dict(id=str(i), prompt='Why?', lang='en') for i in range(100)]
    rows = symptom_rows(said('a', 0, none)+said('a', 9, dashes)+said('b', 0, dashes)+said('b', 9, dashes), prompts)
    found = {r['policy']: r for r in rate_rows(rows) if r['symptom'] == 'em'}
    assert np.isclose(found['a']['to_reference']['ratio'], 2) and np.isclose(found['b']['to_reference']['ratio'], 1)
    assert 'to_reference' not in found['reference']

def test_instructions_are_clustered_by_prompt():
    rows = [dict(prompt_id=p, completion='one two', constraints=[dict(name='no_commas'), dict(name='words_at_most', n=1)]) for p in 'aaaab']
    facts = instruction_facts(rows)
    assert facts['instructions']['groups'] == 2 and facts['instructions']['mean'] == .5


# -- languages and checkers

def test_a_language_after_much_code():
    assert language_of('```\n'+'x = 1\n'*500+'```\nDas Programm zählt von eins bis zehn und gibt jede Zahl aus.')[0] == 'de'

def test_russian_dashes_are_not_marked():
    text = 'Книга лежит на столе — это очень интересная книга о море.'
    assert marked(text, 'ru') == [(text, '')] and count_symptoms(text, 'ru')['words'] == 0

@pytest.mark.parametrize('lang', CALIBRATED)
def test_languages_of_clean_sentences(lang): assert np.mean([language_of(s)[0] == lang for s in clean_sentences(lang)]) >= .9

@pytest.mark.parametrize('lang', ['de', 'ru'])
def test_spelling_is_seen_and_grammar_is_not_claimed(lang):
    row = calibrate(SPELLING, lang, clean_sentences(lang))
    assert row['claims'] == 'spelling' and row['recall']['letters']['mean'] > .8 and row['false_alarms']['mean'] < .1

def test_harper_sees_what_comes_twice():
    row = calibrate(HARPER, 'en', clean_sentences('en'))
    assert row['recall']['twice']['mean'] > .4 and row['false_alarms']['mean'] < .1

@pytest.mark.parametrize('lang', CALIBRATED)
@pytest.mark.parametrize('kind', ['letters', 'forms', 'order', 'twice'])
def test_sentences_can_be_broken(lang, kind):
    broken = [(s, break_sentence(s, lang, kind)) for s in clean_sentences(lang)]
    assert all(b != s for s, b in broken) and sum(bool(b) for _, b in broken) >= 40
    assert [b for _, b in broken] == [break_sentence(s, lang, kind) for s in clean_sentences(lang)]


# -- the suite

def test_the_suite_on_ready_completions(tmp_path):
    prompts = suite_prompts(3)
    said = {'': 'Bread isn’t just food — it’s a testament to patience.', 'persona': 'Arr! The bread, matey, be fine.', 'constraint': 'ok.', 'language': 'Das Brot wird im Ofen langsam braun und knusprig.'}
    with open(tmp_path/'mine.jsonl', 'w', encoding='utf-8') as file:
        for step, model in ((0, 'mine'), (5, 'mine')):
            for p in prompts:
                for i in range(2): file.write(json.dumps(dict(prompt=p['prompt'], prompt_id=p['id'], completion=said.get(p['kind'], said[''])+(' <b>Again.</b>' if step else ''), model=model, step=step))+'\n')
    out = make_eval(EvalConfig(suite='artefacts', completions=('mine.jsonl',), gold_path='', embedder='tfidf', root=str(tmp_path), out_path='outs/eval'))
    assert out.name == 'eval_artefacts'
    tables = json.loads((out/'artefacts.json').read_text())
    assert {r['policy'] for r in tables['rates']} == {'reference', 'mine'}
    assert all(tables[k] for k in ('rates', 'learned', 'languages', 'mistakes', 'calibration', 'voices', 'instructions', 'ideas'))
    page = (out/'artefacts.html').read_text()
    assert '<mark class="just"' in page and '<b>Again' not in page and '&lt;b&gt;Again' in page

def test_an_unfinished_suite_is_said(tmp_path):
    write_json(tmp_path/'outs/eval_artefacts/manifest.json', dict(status='running', stage='eval'))
    with pytest.raises(RuntimeError, match='suite artefacts'): input_hash(tmp_path/'outs/eval_artefacts', 'artefacts')

def test_symptoms_of_other_weights_are_left_out(tmp_path, capsys):
    old, new = ([dict(name='outs/grpo', digest=d, code='c', inputs={})] for d in ('1', '2'))
    write_json(tmp_path/'artefacts.json', {})
    write_json(tmp_path/'eval.json', dict(policies=old))
    assert read_artefacts(tmp_path, new, {'outs/grpo'}) == {} and 'outs/grpo' in capsys.readouterr().out

def test_texts_of_the_package_are_part_of_the_code():
    reads = {f.stem for f in (repo_root()/'densirl').glob('*.py') if 'importlib.resources.files(' in f.read_text('utf-8') or 'PackageLoader(' in f.read_text('utf-8')}
    assert reads-{'artefacts'} <= PACKAGE_DATA.keys() and PACKAGE_DATA['prompt_sets'] == 'prompts'      # artefacts imports prompt_sets, which reads the same folder

def test_a_page_without_anything_still_opens():
    tables = artefact_tables([dict(policy='p', arm='p', seed=0, step=0, prompt_id='a', sample=0, completion='')], [dict(id='a', prompt='Why?')], lambda texts: np.eye(len(texts)))
    assert 'Symptoms' in artefact_page(tables, marked_examples([], []))
    assert slop_hits('') == dash_hits('') == contrast_hits('') == []
