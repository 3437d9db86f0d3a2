"""Three doors, one config; and what is said when something is missing or misspelt."""
import dataclasses, json, os, subprocess, sys

import nbformat, pytest

from conftest import ROOT, densirl as call
from densirl import pipeline
from densirl.config import cli_config, digest, field_helps, make_config, notebook_config, plain_values
from densirl.grpo import GrpoConfig
from densirl.models import load_policy, start_path
from densirl.rm import RmConfig
from densirl.sft import SftConfig

def test_three_doors_one_digest(monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    page = notebook_config(GrpoConfig, plain_values(dict(profile='demo', density_aware='false', json=json)))
    line = cli_config(GrpoConfig, ['--', '--profile', 'demo', '--density_aware=False'], 'densirl grpo')
    code = make_config(GrpoConfig, max_steps=30, prompts_per_step=4, learning_rate=5e-5, beta=.02, max_prompt_tokens=48,
        max_new_tokens=line.max_new_tokens, eval_every=10, eval_prompts=line.eval_prompts, density_aware=False)
    assert digest(page) == digest(line) == digest(code)
    assert page.outputs() == ['outs/grpo_baseline'] and not page.density_aware

def test_the_start_is_part_of_the_inputs(tmp_path):
    assert make_config(RmConfig, sft_ckpt_path='someone/model').inputs()['hub_sft'] == 'someone/model'
    assert make_config(GrpoConfig, sft_ckpt_path='someone/model').inputs()['hub_sft'] == 'someone/model'
    assert make_config(SftConfig, model='models/mine/local').inputs()['source'] == 'models/mine/local'
    assert make_config(GrpoConfig).inputs()['sft'] == 'outs/sft'

def test_original_flags_and_defaults():
    cfg = make_config(GrpoConfig)
    assert (cfg.max_steps, cfg.learning_rate, cfg.beta, cfg.density_aware, cfg.density_k) == (5000, 1e-5, .1, True, 10)
    for name in ('device_batch_size', 'sft_ckpt_path', 'rm_ckpt_path', 'pairs_path', 'prompts_path', 'out_dir'): assert hasattr(cfg, name)

@pytest.mark.parametrize('words,said', [
    (['prompts'], 'densirl data'), (['density'], 'densirl prompts'), (['sft'], 'densirl data'), (['rm'], 'densirl sft'),
    (['grpo'], 'densirl sft'), (['eval'], 'densirl grpo'), (['data', '--jsonl_path', 'nowhere.jsonl'], 'nowhere.jsonl')])
def test_missing_input_names_path_and_command(tmp_path, words, said):
    out = call(*words, '--root', tmp_path, ok=False)
    assert said in out and 'Traceback' not in out and str(tmp_path) in out, out

def test_missing_reward_model(tiny_run):
    out = call('grpo', '--profile', 'test', '--root', tiny_run, '--rm_ckpt_path', 'outs/none', ok=False)
    assert 'densirl rm' in out and 'outs/none' in out and 'Traceback' not in out

@pytest.mark.parametrize('words,near', [(['grpo', '--max_stps', '3'], '--max_steps'), (['grop'], 'grpo'), (['data', '--no-hhh'], '--no_hh')])
def test_unknown_words_name_the_nearest(words, near):
    assert near in call(*words, ok=False)

def papermill(tmp_path, *parameters):
    "Run a page with only its parameters, class and config cells, as papermill would"
    nb = nbformat.read(ROOT/'nbs/03_grpo.ipynb', 4)
    stop = next(i for i, c in enumerate(nb.cells) if c.source.startswith('cfg = notebook_config'))
    nb.cells = [c for c in nb.cells[:stop+1] if c.cell_type == 'code']
    nb.cells.append(nbformat.v4.new_code_cell('print("density_aware is", cfg.density_aware, type(cfg.density_aware).__name__)'))
    nbformat.write(nb, tmp_path/'page.ipynb')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'DENSIRL_ROOT': str(ROOT)}
    done = subprocess.run([sys.executable, '-m', 'papermill', tmp_path/'page.ipynb', tmp_path/'out.ipynb', '--no-progress-bar', *parameters],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=200)
    return done.returncode, done.stderr+(tmp_path/'out.ipynb').read_text()

def test_papermill_reads_false_as_false(tmp_path):
    code, said = papermill(tmp_path, '-p', 'density_aware', 'false')
    assert code == 0 and 'density_aware is False bool' in said, said[-2000:]

def test_papermill_refuses_an_unknown_parameter(tmp_path):
    code, said = papermill(tmp_path, '-p', 'densty_aware', 'False')
    assert code != 0 and 'nearest is density_aware' in said

def test_every_setting_is_explained():
    for config, _ in pipeline.STAGES.values(): assert set(field_helps(config)) >= {f.name for f in dataclasses.fields(config)}, config

@pytest.mark.parametrize('words,said', [(['--max_steps', '0'], 'max_steps is 0'), (['--group_size=-4'], 'group_size is -4')])
def test_sizes_begin_at_one(words, said):
    with pytest.raises(ValueError, match=said): cli_config(GrpoConfig, words, 'densirl grpo')

def test_a_reward_model_is_no_policy(tiny_run):
    with pytest.raises(ValueError, match='is a reward model .* not a policy'): load_policy(str(tiny_run/'outs/rm'))

def test_a_hub_name_out_of_reach_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match='nobody/nothing is no folder here, and the hub did not give it'): start_path('nobody/nothing', tmp_path/'x', 'sft')

def test_stopping_by_hand_is_no_traceback(monkeypatch):
    def stop(cfg): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'run_all', stop)
    monkeypatch.setattr(sys, 'argv', ['run_all', '--profile', 'test'])
    with pytest.raises(SystemExit, match='stopped; the same command goes on'): pipeline.main()
