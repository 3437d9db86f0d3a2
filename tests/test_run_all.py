"""One command does everything, also after it was killed, and the next call does nothing."""
import json, os, signal, subprocess, sys, time

import nbformat, pytest

from conftest import ROOT
from kills import begin, halves, left_at_work
from densirl.config import make_config
from densirl.files import read_json
from densirl.pipeline import Job, RunConfig, finish, plan
from densirl.report import render

def run_all(*words):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'DENSIRL_ROOT': str(ROOT)}
    done = subprocess.run([sys.executable, '-m', 'densirl.pipeline', *map(str, words)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout

def test_all_of_it_killed_and_twice(tmp_path):
    words = ('--profile', 'test', '--root', tmp_path)
    plan = run_all(*words, '--dry_run')
    assert '03_grpo.density_aware=False' in plan and not (tmp_path/'outs/grpo').exists()
    tag = 'all_of_it'
    first = begin(['-m', 'densirl.pipeline', *words], tag)
    while not list((tmp_path/'outs').glob('.grpo*.runs/*')): time.sleep(.05); assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert left_at_work(tag) == [], 'processes that the killed one had started'
    finished = sum((tmp_path/f'outs/{arm}/manifest.json').exists() for arm in ('grpo', 'grpo_baseline'))      # a fast machine may have put one in place
    said = run_all(*words)
    assert said.count('up to date, skipped') == 4+finished and halves(tmp_path) == []
    summary = json.loads((tmp_path/'outs/report/summary.json').read_text())
    assert summary['verdict'] == '' and summary['used']['embedder'] == 'all-MiniLM-L6-v2'
    assert summary['factor'] == {'density': {'density_aware': [True, False]}}
    page = (tmp_path/'outs/report/report.html').read_text()
    assert 'not a verdict' in page and 'http' not in page.replace('http-equiv', '')
    for name in ('00_data', '03_grpo.density_aware=True', '03_grpo.density_aware=False', '04_eval_mode_collapse'):
        nb = nbformat.read(tmp_path/f'outs/notebooks/{name}.ipynb', 4)
        assert not any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', []))
    again = run_all(*words)
    assert again.count('up to date, skipped') == 7 and 'running' not in again

def test_report_escapes_model_output(tiny_run):
    bad = '<script>alert(1)</script>'
    summary = read_json(tiny_run/'outs/report/summary.json')
    page = render(summary=summary, figures=[], artefacts={}, rows=[dict(prompt=bad, before=bad, uniform=bad, density=bad)])
    assert bad not in page and page.count('&lt;script&gt;') == 4

def test_the_failed_sibling_is_the_one_reported(tmp_path):
    "The arm that is stopped because the other failed is not blamed"
    steps = plan(make_config(RunConfig, 'test', root=str(tmp_path)))[-3:-1]
    jobs = []
    for step, code in zip(steps, ('import time; time.sleep(60)', 'print("out of luck"); raise SystemExit(3)')):
        log = tmp_path/f'{step.name}.log'
        with open(log, 'w') as out: jobs.append(Job(step, subprocess.Popen([sys.executable, '-c', code], stdout=out), log, time.time()))
    with pytest.raises(RuntimeError, match='density_aware=False failed(?s:.*)out of luck'): finish(jobs)
    assert jobs[0].process.poll() is not None

def test_paths_of_a_set_choose_it():
    from densirl.data import DataConfig
    assert make_config(DataConfig, 'demo', hh_path='somewhere').paths() == {'hh': 'somewhere'}
    assert make_config(DataConfig, 'demo').paths() == {'demo': ''}
    assert make_config(DataConfig, hh=False).paths() == {'uf': '', 'se': ''}
