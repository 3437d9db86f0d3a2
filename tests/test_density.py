"""The density stage on files: every embedder, languages that cannot be read, input that cannot be used."""
import numpy as np
import pyarrow.parquet as pq
import pytest

from densirl.config import make_config
from densirl.density import DensityConfig, make_density, read_clusters, read_density
from densirl.embed import load_embedder, mean_states, minilm, minilm_folder, model_embedder
from densirl.files import read_jsonl, write_jsonl
from densirl.grpo import GrpoConfig, train_grpo
from densirl.maps import interactive_map
from densirl.runs import read_manifest, up_to_date
from densirl.text import prompt_id
from densirl.weights import sampling_weights, solve_alpha

ENGLISH = [f'{ask} {thing}?' for ask in ('How do I cook', 'Where can I buy', 'What is the history of') for thing in
    ('rice', 'a bicycle', 'the piano', 'oranges', 'wool', 'a lighthouse', 'cheese', 'a telescope', 'chess', 'the tomato')]
CHINESE = [f'{ask}{thing}？' for ask in ('如何制作', '在哪里可以买到', '请介绍一下') for thing in
    ('米饭', '自行车', '钢琴', '橙子', '羊毛', '灯塔', '奶酪', '望远镜', '象棋', '番茄')]

def write_prompts(root, texts, counts=None):
    path = root/'prompts.jsonl'
    write_jsonl(path, (dict(id=prompt_id(t), prompt=t, count=c, fold='policy', src='jsonl') for t, c in zip(texts, counts or [1]*len(texts))))
    return path

def density_of(root, path, **given):
    return make_density(make_config(DensityConfig, 'test', root=str(root), prompts_path=str(path), **given))

@pytest.mark.parametrize('embedder, name, width', [('minilm', 'all-MiniLM-L6-v2', 384), ('tfidf', 'tfidf', 29), ('lm', 'lm', 64), (str(minilm_folder()), 'model', 384)])
def test_every_embedder_goes_through_the_stage(tiny_run, tmp_path, embedder, name, width):
    given = dict(embedder=embedder, lm_path=str(tiny_run/'outs/sft')) if embedder == 'lm' else dict(embedder=embedder)
    out = density_of(tmp_path, write_prompts(tmp_path, ENGLISH), **given)
    facts = read_manifest(out)['facts']
    assert facts['embedder']['name'] == name and facts['prompts'] == 30
    rows = np.load(tmp_path/'.cache/data/density.embeddings.npy')
    assert rows.shape == (30, width)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4)
    assert len(read_density(out)) == 30 and len(read_clusters(out)) == 30

@pytest.mark.parametrize('spread', ['centre', 'whiten'])
def test_spreading_takes_the_common_direction_out(tiny_run, tmp_path, spread):
    path, own = write_prompts(tmp_path, ENGLISH), dict(embedder='lm', lm_path=str(tiny_run/'outs/sft'))
    before = read_manifest(density_of(tmp_path, path, **own))['facts']['anisotropy']
    after = read_manifest(density_of(tmp_path, path, spread=spread, **own))['facts']['anisotropy']
    assert abs(after) < .05 < before

def test_padding_does_not_change_an_embedding(tiny_run):
    "The same text alone and in a batch of long ones"
    long = ['A long text about many things. '*40]*3
    for embedder in (minilm(), model_embedder(str(tiny_run/'outs/sft')), load_embedder(str(minilm_folder()))):
        np.testing.assert_allclose(embedder.embed(ENGLISH[:1]+long)[0], embedder.embed(ENGLISH[:1])[0], atol=1e-4)

def test_minilm_is_what_sentence_transformers_makes_of_it():
    "Long texts too: both cut at 256 tokens"
    texts = ENGLISH+['One sentence follows another, and none of them is the last. '*40]
    np.testing.assert_allclose(minilm().embed(texts), load_embedder(str(minilm_folder())).embed(texts), atol=1e-4)

def test_vectors_are_made_once(tmp_path, monkeypatch):
    path = write_prompts(tmp_path, ENGLISH)
    density_of(tmp_path, path)
    monkeypatch.setattr('densirl.embed.mean_states', lambda *_: pytest.fail('embedded again'))
    density_of(tmp_path, path, neighbours=20)

def test_a_language_the_embedder_cannot_read_is_compared_with_itself(tmp_path, capsys):
    path = write_prompts(tmp_path, ENGLISH+CHINESE)
    within = density_of(tmp_path, path)
    assert read_manifest(within)['facts']['compared_within'] == ['zh'] and 'unknown to all-MiniLM-L6-v2' in capsys.readouterr().out
    def chinese_mass(out):
        logs = np.array(list(read_density(out).values()))
        return sampling_weights(logs, solve_alpha(logs, .5))[30:].sum()
    kept = chinese_mass(within)
    naive = chinese_mass(density_of(tmp_path, path, languages='across', density_path=str(tmp_path/'naive.parquet')))
    assert naive < .3 and abs(kept-.5) < .05

def test_multiplicity_reaches_the_density(tmp_path):
    path = write_prompts(tmp_path, ENGLISH, [21]+[1]*29)
    once = density_of(tmp_path, write_prompts(tmp_path/'once', ENGLISH), density_path=str(tmp_path/'once.parquet'))
    often, once = read_density(density_of(tmp_path, path)), read_density(once)
    gain = {i: often[i]-once[i] for i in once}
    assert gain[prompt_id(ENGLISH[0])] >= max(gain.values())-1e-6 > 0       # those beside it gain as much, since it lies in their balls

def test_fewer_prompts_than_k_and_one_prompt(tmp_path):
    out = density_of(tmp_path, write_prompts(tmp_path, ENGLISH[:3]))
    assert len(read_density(out, k=10)) == 3
    with pytest.raises(ValueError, match='at least two'): density_of(tmp_path, write_prompts(tmp_path, ENGLISH[:1]))

def test_a_larger_k_than_stored_and_an_old_file_are_refused(tmp_path):
    out = density_of(tmp_path, write_prompts(tmp_path, ENGLISH), neighbours=5)
    assert read_density(out, 5)
    with pytest.raises(ValueError, match='density_k is 6, but 5 neighbours are stored'): read_density(out, 6)
    table = pq.read_table(out)
    pq.write_table(table.drop_columns(['cluster', 'group']), out)
    with pytest.raises(ValueError, match="no column 'cluster'"): read_density(out)

def test_densities_of_other_prompts_are_refused(tiny_run, tmp_path):
    other = density_of(tmp_path, write_prompts(tmp_path, ENGLISH))
    with pytest.raises(ValueError, match='made from other prompts'):
        train_grpo(make_config(GrpoConfig, 'test', root=str(tiny_run), out_dir='outs/other', density_path=str(other)))

def test_the_map_escapes_prompts():
    page = interactive_map(np.zeros((2, 2)), ['</script><script>alert(1)</script>', '"\' & <b>'], dict(source=['a', '<i>']))
    assert '<script>alert' not in page and '</script><script>alert' not in page.replace('&lt;', '<').replace('&gt;', '>')

@pytest.mark.parametrize('flag', [dict(recall=0.), dict(recall=1.5), dict(unknown_limit=2.)], ids=str)
def test_shares_that_are_none_are_refused_at_once(tmp_path, flag):
    write_prompts(tmp_path, ['A?', 'B?', 'C?'])
    with pytest.raises(ValueError, match='give a number in'): make_density(make_config(DensityConfig, 'demo', root=str(tmp_path), **flag))

GERMAN = [ask.format(thing) for ask in ('Wie kocht oder benutzt man eigentlich {} am besten?', 'Wo kann man heute noch in der Stadt {} kaufen?', 'Was ist die lange Geschichte hinter dem Wort {}?') for thing in
    ('Reis', 'ein Fahrrad', 'das Klavier', 'Orangen', 'Wolle', 'einen Leuchtturm', 'Käse', 'ein Fernrohr', 'Schach', 'die Tomate')]

def test_languages_get_their_share_by_default(tmp_path):
    "The same thirty questions in two languages, of which the embedder knows every token"
    longer = [t.replace('?', ' when there is not much time in the morning?') for t in ENGLISH]
    path = write_prompts(tmp_path, longer+GERMAN)
    def german_mass(**given):
        logs = np.array(list(read_density(density_of(tmp_path, path, **given)).values()))
        return sampling_weights(logs, solve_alpha(logs, .5))[30:].sum()
    assert abs(german_mass()-.5) < .05 < abs(german_mass(languages='across', density_path=str(tmp_path/'across.parquet'))-.5)
