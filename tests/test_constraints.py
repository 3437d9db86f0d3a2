"""Every kind of constraint can be followed, alone and in the pairs that prompts hold, and is not followed by accident."""
import json, time
from collections import Counter

import numpy as np
import pytest

from densirl.constraints import (CLASHES, CONSTRAINTS, KEYWORDS, TASKS, compatible, constraint_prompts, count_letter, count_word, followed,
    instruction_facts, is_object, say_constraint, split_sentences, values_of)

KINDS = list(CONSTRAINTS)
POOL = 'we sat there till dark then birds sang again while old folk told a tall story about rain clouds but none of us felt cold so all had fun in mud'.split()
UNRELATED = ['The committee met on Tuesday. It reviewed last year\'s budget, and it adjourned — a bit early — at 4.30!', 'I like rain, and-so on.', 'Yes, no!', 'The committee met again. '*20]
LENIENT = {'words_at_least', 'words_at_most', 'words_between', 'sentences', 'no_word', 'no_letter', 'exclaims'}         # these can hold of a text by chance

def drawn(kind, seed): return dict(name=kind, **CONSTRAINTS[kind].draw(np.random.default_rng(seed)))


# -- a writer that follows what it is told, by trying lengths

def tokens(by, size):
    "`size` or more words that contain what the keyword, letter, case and marks constraints ask for"
    banned = by.get('no_word', {}).get('word')
    letter = by.get('no_letter', {}).get('letter')
    pool = [w for w in POOL if w != banned and not (letter and letter in w)]
    need = [by['word']['word']] if 'word' in by else []
    need += by['two_words']['pair'] if 'two_words' in by else []
    need += [by['word_times']['word']]*by['word_times']['n'] if 'word_times' in by else []
    need += [by['letter_times']['letter']*by['letter_times']['n']] if 'letter_times' in by else []
    need += [pool[0].upper()+pool[0].upper()]*by['capitals']['n'] if 'capitals' in by else []
    need += [f'**{pool[0]}**']*by['bold_parts']['n'] if 'bold_parts' in by else []
    need += [f'[{pool[0]}]']*by['placeholders']['n'] if 'placeholders' in by else []
    return need+[pool[i % len(pool)] for i in range(max(size-len(need), 0))]

def spread(found, n):
    "The same words in n parts"
    return [' '.join(found[i::n]) for i in range(n)]

def lay_out(by, found):
    stop = '!' if 'exclaims' in by or 'no_full_stops' in by else '.'
    text, n = ' '.join(found)+stop, next((c['n'] for k, c in by.items() if CONSTRAINTS[k].family == 'layout' and 'n' in c), 1)
    parts = spread(found, n)
    if 'sentences' in by: text = ' '.join(p+stop for p in parts)
    if 'paragraphs' in by: text = '\n\n'.join(p+stop for p in parts)
    if 'question_end' in by: text = ' '.join(found)+'?'
    if 'dash_items' in by: text = '\n'.join(f'- {p}' for p in parts)
    if 'numbered' in by: text = '\n'.join(f'{i+1}. {p}' for i, p in enumerate(parts))
    if 'numbered_sections' in by: text = '\n'.join(f'Section {i+1}\n{p}' for i, p in enumerate(parts))
    if 'json' in by: text = json.dumps({found[0]: ' '.join(found[1:])})
    if 'quoted' in by: text = f'"{text}"'
    if 'fenced' in by: text = f'```\n{text}\n```'
    if 'two_versions' in by: text = f'{text}\n******\n{found[-1]}'
    if 'title_line' in by: text = f'<<{found[-1]}>>\n{text}'
    if 'postscript' in by: text = f'{text}\nP.S. {found[-1]}'
    if 'first_line' in by: text = f"{by['first_line']['line']}\n{text}"
    if 'last_line' in by: text = f"{text}\n{by['last_line']['line']}"
    if 'first_word' in by: text = f"{by['first_word']['word']} {text}"
    if 'last_words' in by: text = f"{text} {by['last_words']['phrase']}"
    return text.lower() if 'lower_case' in by else text.upper() if 'upper_case' in by else text

def obey(constraints):
    "A completion that follows all constraints; `None` where none was found"
    by = {c['name']: values_of(c) for c in constraints}
    for size in range(2, 100):
        completion = lay_out(by, tokens(by, size))
        if all(followed(completion, constraints)): return completion


# -- each kind

def test_there_are_more_than_25(): assert len(KINDS) >= 28

@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_can_be_followed(kind):
    for seed in range(20):
        constraint = drawn(kind, seed)
        completion = obey([constraint])
        assert completion, say_constraint(constraint)
        assert followed(f'\n  {completion} \n\n', [constraint]) == [True]            # outer whitespace does no harm

@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_is_missed_by_an_unrelated_text(kind):
    rows = [followed(text, [drawn(kind, seed)])[0] for text in UNRELATED for seed in range(20)]
    assert not all(rows)
    if kind not in LENIENT and not kind.startswith('no_'): assert not any(rows), kind

@pytest.mark.parametrize('kind', [k for k in KINDS if k.startswith('no_')])
def test_what_must_not_occur_is_noticed_anywhere(kind):
    constraint = drawn(kind, 0)
    sign = constraint.get('word') or constraint.get('letter') or dict(no_commas=',', no_exclamations='!', no_full_stops='.', no_dashes='—')[kind]
    for text in (f'{sign} Rug', f'Rug {sign}', f'Rug {sign.upper()} rug', f'Rug\n{sign}\n'): assert followed(text, [constraint]) == [False]

@pytest.mark.parametrize('kind', KINDS)
def test_an_instruction_says_its_values_and_survives_json(kind):
    for seed in range(20):
        constraint = drawn(kind, seed)
        assert json.loads(json.dumps(constraint)) == constraint
        said = say_constraint(constraint)
        for value in values_of(constraint).values():
            for part in value if isinstance(value, list) else [value]: assert (f'"{part}"' if isinstance(part, str) else f' {part} ') in said

@pytest.mark.parametrize('text', ['', ' ', ' \n\t\r\n', '\u00a0\u2003\u200b', '```\n```', '...', '******', '{}', '[]', '""', '🙂🙂', '- \n- '])
def test_a_completion_without_words_follows_nothing(text):
    for kind in KINDS: assert followed(text, [drawn(kind, 1)]) == [False]

@pytest.mark.parametrize('text', ['天气很好。我们走吧！', 'Zoë ßtraße İstanbul ǅ', 'e\u0301t\u00e9', '\ud800 lone', 'a\x00b', '\u2028a\u2028', 'מה שלומך?', '1', '"', '**', '[', '{"a":'*5000, '['*100_000, '<<'*2000, 'P.S.'])
def test_any_text_gets_a_bool(text):
    for kind in KINDS: assert all(type(x) is bool for x in [CONSTRAINTS[kind].holds(text, **values_of(drawn(kind, 2))), *followed(text, [drawn(kind, 2)])])

@pytest.mark.parametrize('text', ['a '*20_000, '**a '*5000, '[a '*5000, '\n- '*5000, '" '*5000, '.'*20_000, '<<a '*5000, '```\na'*5000, ' \n'*10_000+'a', 'Dr. '*5000])
def test_long_texts_take_no_time(text):
    start = time.perf_counter()
    for kind in KINDS: CONSTRAINTS[kind].holds(text, **values_of(drawn(kind, 3)))
    assert time.perf_counter()-start < 5


# -- near misses

def holds(kind, text, **values): return CONSTRAINTS[kind].holds(text, **values)

@pytest.mark.parametrize('kind, text, values, wanted', [
    ('sentences', 'Mr. Fox e.g. slept. He woke at 3.30 a day. Why?! "So."', dict(n=4), True),
    ('sentences', 'it rains... still. and then', dict(n=2), True),
    ('sentences', '1. It rains.\n2. It pours.', dict(n=2), True),
    ('sentences', '下雨了。天黑了。', dict(n=2), True),
    ('paragraphs', 'One.\n \t\n\n\nTwo.\r\n\r\nThree.', dict(n=3), True),
    ('paragraphs', 'One.\n\n---\n\nTwo.', dict(n=2), True),
    ('question_end', 'Is it **so?**', {}, True),
    ('question_end', 'Is it so? Yes', {}, False),
    ('exclaims', 'Yes?! No!', {}, True),
    ('exclaims', 'So what!? Go! Now', {}, False),
    ('lower_case', '天气很好', {}, False),
    ('upper_case', '12', {}, False),
    ('capitals', 'A B C I', dict(n=2), False),
    ('capitals', "DON'T use NATO2", dict(n=2), True),
    ('word', '*River*-bank _river_', dict(word='river'), True),
    ('word', 'riverside', dict(word='river'), False),
    ('word_times', "river's River, rivers", dict(word='river', n=2), True),
    ('no_letter', 'cafe\u0301', dict(letter='e'), False),
    ('no_letter', 'ＥＧＧ', dict(letter='e'), False),
    ('no_dashes', 'a well‑known case', {}, False),
    ('dash_items', '- a\n  - b\n\n- c', dict(n=3), True),
    ('dash_items', '- a\n-b\n**c**', dict(n=1), True),
    ('dash_items', '• a\n• b', dict(n=2), False),
    ('numbered', '**1.** a\n2. b', dict(n=2), True),
    ('numbered', '1) a\n2) b', dict(n=2), False),
    ('numbered', '1. a\n2. b\n1. c', dict(n=2), False),
    ('numbered_sections', '## SECTION 1: a\nb\n\n## Section 2\nc', dict(n=2), True),
    ('numbered_sections', 'Section 1 a\nSection 2 b\nSection 3 c', dict(n=2), False),
    ('numbered_sections', 'See section 1 and section 2', dict(n=2), False),
    ('json', '{"a": 1} so', {}, False),
    ('json', '\u00a0{"a": [1, null]}\u00a0', {}, True),
    ('json', '{"a": Infinity}', {}, False),
    ('json', "{'a': 1}", {}, False),
    ('quoted', '“It rains.”', {}, True),
    ('quoted', '"It rains.', {}, False),
    ('fenced', '```text\na\n```', {}, True),
    ('fenced', '```\na\n```\nb\n```\nc\n```', {}, False),
    ('two_versions', 'a\n******\nb\n******\nc', {}, False),
    ('two_versions', 'a ****** b', {}, False),
    ('two_versions', 'It rains.\n******\nit RAINS', {}, False),
    ('title_line', '**<<A>>**\r\nb', {}, True),
    ('title_line', '<<A>>\n<<B>>\nc', {}, False),
    ('title_line', '<< >>\nc', {}, False),
    ('postscript', 'a\n\n**P.S.** b', {}, True),
    ('postscript', 'a\nP.S.', {}, False),
    ('postscript', 'a P.S. b', {}, False),
    ('first_line', '**the end**\n\na', dict(line='The end'), True),
    ('first_line', 'The end', dict(line='The end'), False),
    ('last_line', 'a\nThe end, friends', dict(line='The end'), False),
    ('bold_parts', '**a** b **c d**', dict(n=2), True),
    ('bold_parts', '**a\nb** *c*', dict(n=1), False),
    ('placeholders', '[a b] [c]', dict(n=2), True),
    ('placeholders', '- [ ] a [2]', dict(n=1), False),
    ('first_word', '# Today', dict(word='Today'), True),
    ('first_word', "Today's", dict(word='Today'), False),
    ('last_words', 'will tell', dict(phrase='time will tell'), False),
    ('last_words', 'TIME, will tell."', dict(phrase='time will tell'), True),
])
def test_near_misses(kind, text, values, wanted): assert holds(kind, text, **values) == wanted


# -- prompts

@pytest.mark.parametrize('seed', range(3))
def test_every_prompt_can_be_obeyed(seed):
    for row in constraint_prompts(200, seed):
        assert obey(row['constraints']), row['prompt']
        families = [CONSTRAINTS[c['name']].family for c in row['constraints']]
        assert len(set(families)) == len(families)

def test_every_pair_that_is_declared_compatible_can_be_obeyed():
    for i, a in enumerate(KINDS):
        for b in KINDS[i+1:]:
            for seed in range(5):
                one, other = drawn(a, seed), drawn(b, seed+100)
                assert compatible(one, other) == compatible(other, one)
                if compatible(one, other): assert obey([one, other]), (one, other)

@pytest.mark.parametrize('one, other', [
    (dict(name='lower_case'), dict(name='upper_case')), (dict(name='lower_case'), dict(name='capitals', n=2)),
    (dict(name='json'), dict(name='dash_items', n=2)), (dict(name='json'), dict(name='first_word', word='Today')),
    (dict(name='no_letter', letter='e'), dict(name='word', word='yellow')), (dict(name='no_letter', letter='e'), dict(name='two_words', pair=['music', 'river'])),
    (dict(name='no_letter', letter='e'), dict(name='numbered_sections', n=2)), (dict(name='no_letter', letter='p'), dict(name='postscript')),
    (dict(name='last_words', phrase='time will tell'), dict(name='last_line', line='The end')), (dict(name='last_words', phrase='and that is all'), dict(name='no_word', word='is')),
    (dict(name='last_words', phrase='time will tell'), dict(name='question_end')), (dict(name='word', word='river'), dict(name='no_word', word='the')),
    (dict(name='no_full_stops'), dict(name='numbered', n=3)), (dict(name='no_full_stops'), dict(name='postscript')), (dict(name='no_dashes'), dict(name='dash_items', n=2)),
    (dict(name='no_exclamations'), dict(name='exclaims')), (dict(name='words_at_most', n=20), dict(name='words_at_least', n=40)),
])
def test_contradictions_are_known(one, other): assert not compatible(one, other) and not compatible(other, one)

def test_clashes_name_families_and_kinds():
    for pair in CLASHES: assert len(pair) == 2 and pair <= {*KINDS, *(c.family for c in CONSTRAINTS.values())}

def test_verbatim_texts_hold_no_keyword():
    for kind in ('first_line', 'last_line', 'first_word', 'last_words'):
        for seed in range(50): assert not any(count_word(text, word) for text in values_of(drawn(kind, seed)).values() for word in KEYWORDS)

def test_prompts_are_the_same_each_time_and_differ_by_seed():
    assert constraint_prompts(60, 1) == constraint_prompts(60, 1) != constraint_prompts(60, 2)
    assert constraint_prompts(30, 1) == constraint_prompts(60, 1)[:30]
    assert constraint_prompts(0) == []

@pytest.mark.parametrize('n, seed', [(60, s) for s in range(10)]+[(3000, 0)])
def test_prompts_ask_for_everything_alike(n, seed):
    rows = constraint_prompts(n, seed)
    counts = Counter(c['name'] for r in rows for c in r['constraints'])
    assert set(counts) == set(KINDS) and len({r['id'] for r in rows}) == n
    assert [len(r['constraints']) for r in rows] == [1 if i%3 == 0 else 2 for i in range(n)]
    assert max(counts.values()) <= 2*min(counts.values())
    for row in rows: assert row['prompt'].startswith(TASKS) and all(say_constraint(c) in row['prompt'] for c in row['constraints'])


# -- facts

def test_perfect_deaf_and_silent_policies():
    rows = [dict(prompt_id=p['id'], constraints=p['constraints']) for p in constraint_prompts(60)]
    perfect, silent = (instruction_facts([dict(r, completion=write(r)) for r in rows]) for write in (lambda r: obey(r['constraints']), lambda r: ''))
    assert perfect['prompts']['mean'] == perfect['instructions']['mean'] == 1 and perfect['prompts']['low'] < 1
    assert silent['prompts']['mean'] == silent['instructions']['mean'] == 0
    assert all(row['share'] == 1 for row in perfect['by_kind'].values()) and set(perfect['by_kind']) == set(KINDS)
    assert sum(row['n'] for row in perfect['by_kind'].values()) == perfect['instructions']['n'] == 100
    json.dumps(perfect)

def test_intervals_are_over_prompts():
    row = dict(constraints=[dict(name='no_commas')], completion='It rains.')
    once = [dict(row, prompt_id=str(i), completion=text) for i, text in enumerate(['It rains.', 'Rain, rain.']*5)]
    a, b = instruction_facts(once)['prompts'], instruction_facts(once*8)['prompts']
    assert (b['n'], b['groups']) == (80, 10) and abs(a['low']-b['low']) < 1e-9

def test_rows_without_constraints_are_refused():
    with pytest.raises(ValueError, match='prompt a has no constraints'): instruction_facts([dict(prompt_id='a', completion='So.', constraints=[])])

def test_small_tools():
    assert split_sentences('') == [] and count_letter('', 'e') == 0 and not is_object('')
