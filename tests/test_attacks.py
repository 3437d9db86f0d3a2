"""No way to look diverse that is known here lifts the measure that decides."""
import numpy as np
import pytest

from densirl.attacks import ATTACKS, attacked
from densirl.embed import load_embedder
from densirl.measures import measure_prompts

HEALTHY = {
    'Suggest a way to spend a free Sunday in a small town.': (
        'Walk along the river until you find a bench in the sun, and read there.', 'Bake a loaf of bread and take half of it to a neighbour you hardly know.', 'Visit the flea market early and look for old postcards of the town.',
        'Take the slow bus to its last stop and walk home by a road you have never used.', 'Sleep late, cook a long breakfast, and call somebody you miss.', 'Join the chess players in the park; they are always short of a fourth board.',
        'Repair the bicycle that has stood in the cellar since spring.', 'Sit in the church while the organist practises, which costs nothing.'),
    'Why do people keep old letters that they never read again?': (
        'Because throwing them away would feel like hanging up on someone.', 'The paper itself is the memory; what it says matters less.', 'They hope that a grandchild will one day be curious.',
        'Most of us simply never tidy that particular drawer.', 'A letter proves that one was once worth an hour of somebody’s evening.', 'Handwriting is a kind of portrait, and nobody burns portraits.',
        'It is a way to keep a door open without going through it.', 'Guilt, mostly, and a little vanity about who wrote to us.'),
    'What should a beginner plant first in a shady garden?': (
        'Ferns forgive everything but drought, so begin with three of them.', 'Try hostas, and be ready to argue with the slugs.', 'Foxgloves sow themselves and reach for what light there is.',
        'Plant nothing for a month; watch where the sun falls first.', 'Wild garlic covers the ground fast and seasons the soup as well.', 'A hydrangea against the north wall will flower for years.',
        'Moss is already there. Weed around it and call it a plan.', 'Snowdrops, because they bloom before the trees have leaves.')}

@pytest.fixture(scope='module')
def embed(): return load_embedder('minilm').embed

def decided(groups, embed, judged):
    "What an evaluation says of a policy that is healthy at step 0 and says this at step 1; a judge knows what the policy would have said"
    rng, names = np.random.default_rng(0), {p: str(i) for i, p in enumerate(HEALTHY)}
    def samples(step, said):
        for p, texts in said.items():
            for i, t in enumerate(texts):
                gold = dict(gold=float(rng.normal() if t in HEALTHY[p] else -6.)) if judged else {}
                yield dict(policy='p', arm='p', seed=0, step=step, prompt_id=names[p], sample=i, completion=t, **gold)
    rows = measure_prompts([*samples(0, HEALTHY), *samples(1, groups)], [dict(id=i, prompt=p, lang='en') for p, i in names.items()], embed, embed)
    return [{m: float(np.mean([r[m] for r in rows if r['step'] == step])) for m in ('diversity', 'diversity_2', 'diversity_trimmed', 'effective_diversity', 'uncounted') if m in rows[0]} for step in (0, 1)]

QUALITY = ('all misspelt', 'one answer, misspelt', 'one answer behind odd words', 'all behind odd words', 'two off the topic', 'all off the topic', 'all one odd word')       # a judge alone can tell

@pytest.mark.parametrize('name', ATTACKS)
def test_no_attack_lifts_the_measure_that_decides(name, embed):
    groups = attacked({p: list(c) for p, c in HEALTHY.items()}, ATTACKS[name])
    healthy, spoiled = decided(groups, embed, judged=name in QUALITY)
    for measure in healthy.keys()-{'uncounted'}: assert spoiled[measure] <= healthy[measure]+.03, (measure, healthy, spoiled)
    assert healthy['uncounted'] == 0 and healthy['diversity'] > .3

def test_an_empty_completion_is_no_way_of_being_different(embed):
    one = {p: [c[0]]*7+[''] for p, c in HEALTHY.items()}
    assert decided(one, embed, False)[1]['diversity'] < 1e-6
    assert decided({p: ['']*8 for p in HEALTHY}, embed, False)[1]['diversity'] < 1e-6
    assert decided({p: [*c[:4], *['']*4] for p, c in HEALTHY.items()}, embed, False)[1]['diversity'] < .5*decided(HEALTHY, embed, False)[0]['diversity']
