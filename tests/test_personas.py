"""Voices told apart by style alone: on voices of our own, on real models, and on bad input."""
import numpy as np, pytest
from sklearn.model_selection import GroupKFold

import densirl.personas as module
from densirl.files import read_jsonl
from densirl.personas import (STYLE, between_share, consistency, control, fidelity, fit_probe, heard_rows, held_out, leak, persona_facts,
    persona_prompts, persona_records, replace_share, style_features)
from densirl.text import prompt_id

SHARES = (0, .25, .5, .75, 1)
SAYS = dict(
    loud=['You NEED {}!', 'I LOVE {}!!', 'Get {} NOW!', 'Have you SEEN {}?!', '{}! {}! {}!'],
    dry=['The term {} is in use; its origin is not known.', 'It is to be noted that {} is common.', 'In most cases {} is sufficient.', 'There is literature on {}.', 'The use of {} should be documented.'],
    warm=['oh honey, {} will do you good…', 'we all have our days with {}, my dear.', 'you take your time with {}.', 'my mother loved {}, she did.', 'it’s all right, {} is no reason to cry.'],
    brisk=['- {}: fine.\n', '- Get {}.\n', '- 2 x {}, daily.\n', '- No {}? Skip.\n', '- Check {} at 9.\n'])
VOICES = np.array(sorted(SAYS))
P, K, R = 30, len(SAYS), 2

def speak(voices, seed):
    "(P, K, R) texts: two sentences of a voice by lot"
    rng = np.random.default_rng(seed)
    return np.array([[[' '.join(rng.choice(SAYS[v], 2, replace=False)).replace('{}', f'thing{i}') for _ in range(R)] for v in voices] for i in range(P)])

def arrays(texts):
    p, k, r = texts.shape
    return np.array([style_features(t) for t in texts.ravel()]), np.tile(VOICES[:k].repeat(r), p), np.arange(p).repeat(k*r)

def rows_of(texts, plain=()):
    return [dict(completion=str(texts[i, j, k]), persona=str(VOICES[j]), neutral=str(i)) for i, j, k in np.ndindex(texts.shape)] + [
        dict(completion=str(t), persona='', neutral=str(i)) for i, t in enumerate(plain)]

@pytest.fixture(scope='module')
def reference(): return arrays(speak(VOICES, 0))


# -- dose and response

@pytest.mark.parametrize('house', range(K))
def test_one_voice_takes_over(house):
    "Every figure falls with the share of one voice, whichever it is"
    texts, one = speak(VOICES, 0), speak([VOICES[house]]*K, 1)
    found = [(control(*(facts := arrays(replace_share(texts, one, f, 2)))), consistency(*facts)) for f in SHARES]
    for values in zip(*((c['accuracy']['mean'], c['between'], same) for c, same in found)): assert (np.diff(values) < 0).all(), values
    assert found[0][0]['accuracy']['mean'] > .95 and found[0][0]['chance'] == 1/K
    last = found[-1][0]['accuracy']
    assert last['mean'] < 1/K+.1 and found[-1][0]['between'] < .01 and abs(found[-1][1]) < .05

def test_replaced_shares_are_exact_and_nested():
    texts = speak(VOICES, 0)
    masks = [replace_share(texts, np.array(''), f, 0) == '' for f in SHARES]
    for mask, f in zip(masks, SHARES): assert (mask.sum(0) == round(f*P)).all()
    assert all((a <= b).all() for a, b in zip(masks, masks[1:]))
    assert (replace_share(texts, texts[:, [1]], 1, 0) == texts[:, [1]]).all()

def test_real_models_as_personas(shared):
    "Six models by six makers on 363 prompts that all of them answered; better than style rates without roots (.555), far from chance"
    six = ('FuseChat-Gemma-2-9B-Instruct', 'alpaca-7b', 'claude-2', 'falcon-40b-instruct', 'gpt4_1106_preview', 'oasst-rlhf-llama-33b')
    said = {}
    for r in read_jsonl(shared/'alpaca_eval_pairs.jsonl.gz'):
        for side in ('chosen', 'rejected'): said.setdefault(r['prompt'], {})[r[f'{side}_model']] = r[side]
    prompts = sorted(p for p, by in said.items() if all(m in by for m in six))
    prompts = [prompts[i] for i in sorted(np.random.default_rng(1).permutation(len(prompts))[:363])]
    texts = np.array([[said[p][m] for m in six] for p in prompts], object)
    style = {t: style_features(t) for t in texts.ravel()}
    found = [control(np.array([style[t] for t in replace_share(texts, texts[:, [4]], f, 0).ravel()]), np.tile(six, 363), np.arange(363).repeat(6)) for f in SHARES]
    accuracy, between = ([c[k]['mean'] if k == 'accuracy' else c[k] for c in found] for k in ('accuracy', 'between'))
    assert np.allclose(accuracy, [.590, .453, .332, .239, 1/6], atol=.02)
    assert np.allclose(between, [.082, .054, .033, .015, 0], atol=.005)
    assert accuracy[-1] == pytest.approx(1/6) and between[-1] == 0


# -- no effect where there is none

def test_one_voice_has_nothing_between():
    "The estimate is without bias: near 0 for any number of prompts, also where the two samples of a persona and prompt are alike"
    rng = np.random.default_rng(0)
    for prompts in (5, 20, 80):
        for alike in (0, 1):
            values = []
            for _ in range(40):
                cell = rng.normal(size=(prompts, 6, 1, 60))*alike
                x = (rng.normal(size=(prompts, 1, 1, 60)) + cell + rng.normal(size=(prompts, 6, 2, 60))).reshape(-1, 60)
                values.append(between_share(x, np.tile(np.arange(6).repeat(2), prompts), np.arange(prompts).repeat(12)))
            assert np.mean(values) < .006, (prompts, alike, np.mean(values))

@pytest.mark.parametrize('prompts', [10, 100])
def test_between_finds_the_share_that_was_put_in(prompts):
    "Effects of variance 1, interaction 1, samples 2: one quarter, with one sample or three"
    rng = np.random.default_rng(1)
    for samples in (1, 3):
        values = []
        for _ in range(20):
            effect = rng.normal(size=(1, 8, 1, 50))
            x = effect/effect.std(1, ddof=1, keepdims=True) + rng.normal(size=(prompts, 8, 1, 50)) + 2**.5*rng.normal(size=(prompts, 8, samples, 50))
            values.append(between_share(x.reshape(-1, 50), np.tile(np.arange(8).repeat(samples), prompts), np.arange(prompts).repeat(8*samples)))
        assert np.mean(values) == pytest.approx(.25, abs=.015)

def test_equal_texts_have_nothing_between(reference):
    features, personas, prompts = reference
    same = features[::K*R].repeat(K*R, 0)
    assert between_share(same, personas, prompts) == 0 and consistency(same, personas, prompts) == 0
    assert control(same, personas, prompts)['accuracy']['mean'] == pytest.approx(1/K)

def test_order_of_rows_and_names_does_not_matter(reference):
    order = np.random.default_rng(0).permutation(len(reference[0]))
    for measure in (between_share, consistency): assert measure(*reference) == pytest.approx(measure(*(x[order] for x in reference)))
    one, other = control(*reference), control(*(x[order] for x in reference))
    assert one['accuracy']['mean'] == pytest.approx(other['accuracy']['mean'])


# -- prompts that a probe has not seen

def test_no_prompt_is_learnt_from_and_judged(reference, monkeypatch):
    features, personas, prompts = reference
    marked = np.column_stack([features, prompts])
    learnt, judged = [], []
    class Spy:
        def __init__(self, x): self.seen = set(x[:, -1])
        def predict(self, x):
            assert not self.seen & set(x[:, -1])
            learnt.append(self.seen); judged.extend(x[:, -1])
            return np.full(len(x), VOICES[0])
    monkeypatch.setattr(module, 'fit_probe', lambda x, y: Spy(x))
    control(marked, personas, prompts)
    assert len(learnt) == 5 and len(judged) == len(marked)
    fidelity(marked, personas, marked, personas, prompts, prompts)
    assert len(learnt) == 10

def test_few_prompts_give_as_many_folds(reference):
    features, personas, prompts = reference
    kept = prompts < 3
    assert control(*(x[kept] for x in reference))['accuracy']['groups'] == 3
    found = held_out(features[kept], personas[kept], prompts[kept], np.full(kept.sum(), True))
    for rest, fold in GroupKFold(3).split(features[kept], groups=prompts[kept]):
        assert (found[fold] == fit_probe(features[kept][rest], personas[kept][rest]).predict(features[kept][fold])).all()


# -- fidelity, leak, consistency

def test_the_reference_is_faithful_to_itself(reference):
    features, personas, prompts = reference
    assert fidelity(features, personas, features, personas, prompts, prompts) == control(*reference)['accuracy']
    fresh = arrays(speak(VOICES, 5))
    assert fidelity(features, personas, *fresh, prompts)['mean'] > .95

def test_exchanged_voices_are_not_faithful(reference):
    other = arrays(speak(VOICES[::-1], 3))
    assert control(*other)['accuracy']['mean'] > .95
    assert fidelity(*reference[:2], *other, reference[2])['mean'] < .05

def test_a_persona_the_reference_lacks_is_refused(reference):
    features, personas, prompts = reference
    known = personas != VOICES[2]
    with pytest.raises(ValueError, match=str(VOICES[2])): fidelity(features[known], personas[known], features, personas, prompts, prompts[known])

def test_leak_lies_between_its_bounds(reference):
    features, personas, _ = reference
    probe = fit_probe(features, personas)
    assert leak(probe, features) < .01
    assert all(.8 < leak(probe, features[personas == v]) <= 1 for v in VOICES)
    assert all(0 <= leak(probe, x) <= 1 for x in (features[:1], features*100, np.zeros_like(features[:2]), -features))
    class Certain:
        classes_ = VOICES
        def __init__(self, row): self.row = row
        def predict_proba(self, x): return np.tile(self.row, (len(x), 1))
    assert leak(Certain([1., 0, 0, 0]), features) == 1 and leak(Certain([.25]*4), features) == pytest.approx(0)

def test_consistency_needs_two_samples(reference):
    features, personas, prompts = reference
    assert np.isnan(consistency(features[::R], personas[::R], prompts[::R]))
    assert np.isnan(consistency(features[:R], personas[:R], prompts[:R]))
    assert consistency(features[::R].repeat(2, 0), personas, prompts) == 1


# -- texts and prompts

@pytest.mark.parametrize('text', ['', ' ', '\n\n', '...', '—', '🙂🙂', '```\n```', 'ß', '如何做汤？', 'İstanbul', '\ud800', 'a', '’', "''", '1. ', '- ', 'x'*10_000, '\x00', '#'*500])
def test_any_text_has_a_style(text):
    found = style_features(text)
    assert found.shape == (len(STYLE),) and np.isfinite(found).all() and (found >= 0).all()

def test_style_is_a_root_of_rates():
    def rate(text, name): return style_features(text)[STYLE.index(name)]**2
    assert len(set(STYLE)) == len(STYLE)
    assert rate('One, two, three.', 'comma') == pytest.approx(2/3)
    assert rate('a – b — c -- d - e', 'em_dash') == rate('a – b — c -- d - e', 'en_dash') == rate('a – b — c -- d - e', 'double_hyphen') == rate('a – b — c -- d - e', 'spaced_hyphen') == pytest.approx(.2)
    assert rate('“a” "b"', 'curly_quote') == rate('“a” "b"', 'straight_quote') == pytest.approx(1)
    assert rate('I’m here', 'first_person') == rate("I'm here", 'first_person') == pytest.approx(.5)
    assert rate('* a\n* b\n', 'bullet') == pytest.approx(1) and rate('2 * 3', 'bullet') == 0
    assert rate("DON'T", 'contraction') == 1
    assert (style_features('a b '*30+'! '*50) == style_features('a b '*30)).all()

def test_empty_completions_are_one_voice():
    rows = [dict(completion='', persona=v, neutral=n) for n in 'xyz' for v in 'ab' for _ in range(2)]
    found = persona_facts(rows+[dict(completion='', persona='', neutral='x')], rows)
    assert found['accuracy']['mean'] == found['fidelity']['mean'] == .5
    assert found['between'] == found['consistency'] == 0 and found['leak'] == pytest.approx(0)

def test_every_prompt_is_asked_in_every_voice():
    records = persona_prompts()
    assert len(records) == 60*13 and len({r['id'] for r in records}) == len(records)
    assert all(r['id'] == prompt_id(r['prompt']) and (r['kind'], r['lang']) == ('persona', 'en') for r in records)
    plain = {r['neutral']: r['prompt'] for r in records if not r['persona']}
    assert len(plain) == 60 and all(r['prompt'].endswith('\n\n'+plain[r['neutral']]) for r in records if r['persona'])
    assert len({r['persona'] for r in records}) == 13
    assert persona_records([dict(name='a', voice='{x} {')], [dict(prompt='}{')])[1]['prompt'] == '{x} {\n\n}{'


# -- all of it

def test_too_little_gives_nothing():
    rows = rows_of(speak(VOICES, 0))
    assert persona_facts([]) == persona_facts(rows[:K*R]) == {}
    assert persona_facts([r for r in rows if r['persona'] == VOICES[0]]) == {}
    assert persona_facts([dict(r, persona='') for r in rows]) == {}
    assert set(persona_facts(rows[:2*K*R])) == {'accuracy', 'chance', 'between', 'consistency'}

def test_a_prompt_that_lacks_a_persona_is_left_out():
    rows = rows_of(speak(VOICES, 0))
    assert heard_rows(rows) == rows and heard_rows(rows[R:]) == rows[K*R:] and heard_rows(rows[1:]) == rows[1:]
    assert persona_facts(rows[R:])['accuracy']['groups'] == P-1

def test_house_voice_is_seen_by_the_reference_only():
    "The own probe of a policy with one voice is at a loss; that of the reference is not"
    texts, dry = speak(VOICES, 0), speak([VOICES[1]]*K, 1)
    rng = np.random.default_rng(2)
    first, last = rows_of(texts, [texts[i, rng.integers(K), 0] for i in range(P)]), rows_of(dry, dry[:, 0, 0])
    assert persona_facts(first, first)['leak'] < .1 < .5 < persona_facts(last, first)['leak']
    assert 'leak' not in persona_facts(last)

def test_the_reference_is_not_recognised_by_heart():
    "Where voices are blurred, a probe knows more of the texts that it has learnt from than of others; none of that is in the facts"
    blurred = replace_share(speak(VOICES, 0), speak([VOICES[1]]*K, 1), .5, 2)
    features, personas, prompts = arrays(blurred)
    rows = rows_of(blurred)
    assert persona_facts(rows, rows)['fidelity'] == persona_facts(rows)['accuracy']
    by_heart = (fit_probe(features, personas).predict(features) == personas).mean()
    assert by_heart > persona_facts(rows)['accuracy']['mean']+.05

def test_a_reference_that_knows_fewer_personas():
    rows = rows_of(speak(VOICES, 0))
    fewer = [r for r in rows if r['persona'] != VOICES[2]]
    assert 'fidelity' not in persona_facts(rows, fewer) and 'fidelity' in persona_facts(fewer, rows)
    assert 'fidelity' not in persona_facts(rows, rows[:K*R])
