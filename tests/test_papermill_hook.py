"""The papermill command itself, in a real terminal and with a real pipe, on notebooks that may be spoilt."""
import json, os, pty, subprocess, sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from densirl import papermill_hook as hook

installed = any(e.value.startswith('densirl.papermill_hook') for e in entry_points(group='papermill.engine'))
needs_install = pytest.mark.skipif(not installed, reason='densirl is not installed: pip install -e . --no-deps')


def make_notebook(path, default):
    "A notebook whose parameter `x` is `default`, and which prints it"
    tagged = new_code_cell(f'x = {default!r}'); tagged.metadata['tags'] = ['parameters']
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(new_notebook(cells=[tagged, new_code_cell('print(repr(x))')], metadata=kernel), path)

def printed(path): return json.loads(path.read_text())['cells'][-1]['outputs'][0]['text']

@pytest.fixture
def repo(tmp_path):
    (tmp_path/'settings.ini').touch()
    make_notebook(tmp_path/'nbs'/'toy.ipynb', default=True)
    return tmp_path

def command(*args): return [sys.executable, '-m', 'papermill', *args]

def script(*args):
    "The installed `papermill` script, or where there is none, what it does"
    path = Path(sys.executable).parent/'papermill'
    if path.exists(): return [str(path), *args]
    return [sys.executable, '-c', 'import sys; sys.argv[0] = "papermill"; from papermill.__main__ import papermill; papermill()', *args]

def environment(**extra):
    env = {k: v for k, v in os.environ.items() if k not in ('DENSIRL_RUNS', 'IN_TEST')}
    return {**env, 'PYDEVD_DISABLE_FILE_VALIDATION': '1', **extra}

def in_terminal(cmd, cwd, **extra):
    "Run `cmd` with a pseudo terminal for all three streams; its exit status and what it showed"
    main, side = pty.openpty()
    proc = subprocess.Popen(cmd, cwd=cwd, env=environment(**extra), stdin=side, stdout=side, stderr=side)
    os.close(side)
    shown = b''
    try:
        while chunk := os.read(main, 4096): shown += chunk
    except OSError: pass                                    # Linux says so when the other side has gone
    os.close(main)
    return proc.wait(60), shown.decode(errors='replace')


@needs_install
@pytest.mark.parametrize('call', [script, command])
def test_runs_as_typed_in_a_terminal(repo, call):
    source = (repo/'nbs'/'toy.ipynb').read_bytes()
    status, shown = in_terminal(call('nbs/toy.ipynb', '-p', 'x', 'False'), repo)
    assert status == 0, shown
    assert printed(repo/'outs'/'notebooks'/'toy.x=False.ipynb') == ['False\n']
    assert (repo/'nbs'/'toy.ipynb').read_bytes() == source

@needs_install
def test_another_folder_for_results(repo, tmp_path_factory):
    runs = tmp_path_factory.mktemp('runs')
    make_notebook(repo/'toy-copy.ipynb', default=True)      # beside settings.ini, not in nbs/
    source = (repo/'toy-copy.ipynb').read_bytes()
    status, shown = in_terminal(script('toy-copy.ipynb', '-p', 'x', 'False'), repo, DENSIRL_RUNS=str(runs))
    assert status == 0, shown
    assert [p.name for p in runs.iterdir()] == ['toy-copy.x=False.ipynb'] and not (repo/'outs').exists()
    assert (repo/'toy-copy.ipynb').read_bytes() == source

@needs_install
def test_a_pipe_with_a_notebook_in_it_overwrites_nothing(repo):
    make_notebook(repo/'other.ipynb', default='piped')
    source = (repo/'nbs'/'toy.ipynb').read_bytes()
    with subprocess.Popen(['cat', 'other.ipynb'], cwd=repo, stdout=subprocess.PIPE) as cat:
        res = subprocess.run(script('nbs/toy.ipynb', '-p', 'x', '3'), cwd=repo, env=environment(), stdin=cat.stdout,
                             capture_output=True, text=True, timeout=120)
    assert res.returncode == 0, res.stderr
    assert (repo/'nbs'/'toy.ipynb').read_bytes() == source
    assert printed(repo/'outs'/'notebooks'/'toy.x=3.ipynb') == ['3\n']

@needs_install
def test_results_never_go_among_the_sources(repo):
    source = (repo/'nbs'/'toy.ipynb').read_bytes()
    status, shown = in_terminal(script('nbs/toy.ipynb'), repo, DENSIRL_RUNS='nbs')
    assert status == 1 and 'lies among the sources' in shown and 'Traceback' not in shown
    assert (repo/'nbs'/'toy.ipynb').read_bytes() == source and len(list((repo/'nbs').iterdir())) == 1

@needs_install
def test_redirected_output_stays_papermills_own(repo):
    res = subprocess.run(script('nbs/toy.ipynb', '-p', 'x', 'False'), cwd=repo, env=environment(), stdin=subprocess.DEVNULL,
                         capture_output=True, text=True, timeout=120)
    assert res.returncode == 0, res.stderr
    assert json.loads(res.stdout)['cells'][-1]['outputs'][0]['text'] == ['False\n']
    assert not (repo/'outs').exists()

def test_papermills_options_are_still_the_ones_we_know():
    from papermill.cli import papermill
    kinds = {1: set(), 2: set(), 0: set()}
    for p in papermill.params:
        if p.param_type_name == 'option': kinds[0 if p.is_flag else p.nargs].update([*p.opts, *p.secondary_opts])
    asks = {'--help-notebook', '--version'}
    assert kinds[0] - asks == hook.NONE and asks <= hook.ASKS
    assert kinds[2] == hook.TWO
    assert {o for o in kinds[1] if o.startswith('--parameters')} == {o for o in hook.ONE if o.startswith('--')}
