"""Hundreds of wrong inputs, each given to the command line: what may come of it is one sentence, or a result that is right.

    python tests/bad_inputs.py            # all of them, a few minutes; prints a table and what went wrong
    python tests/bad_inputs.py density    # those whose name holds a word

A wrong input is a setting, a path, or a file of a finished run that was cut, emptied, edited or taken from elsewhere. Three things are wrong: a traceback, acceptance of what
means something else, and a file that was there before and is not afterwards. `test_bad_inputs.py` runs a part of them.
"""
import contextlib, hashlib, io, json, os, shutil, sys, tempfile, time, traceback
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable

if __name__ == '__main__': os.environ.update(HF_HUB_OFFLINE='1', DENSIRL_BEGUN='1', TOKENIZERS_PARALLELISM='false')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
from conftest import finished
from densirl import cli
from densirl.pipeline import STAGES

@dataclass(frozen=True)
class Case:
    "One wrong input"
    name: str
    words: list                            # Of the command line, without --profile and --root
    spoil: Callable = lambda root: None    # Done to the root beforehand
    wanted: str = 'refused'                # refused: a sentence; fine: a sentence or a right result; accepted: a right result


# -- settings

WRONG_NUMBERS = dict(int=('nan', 'inf', '-1', '2.5', 'x', '', '99999999999999999999', '1e3x'), float=('nan', 'inf', '-inf', 'x', '', '1e400'))
NEGATIVE = ('learning_rate', 'beta', 'kl_target', 'clip_low', 'clip_high', 'effective', 'cap', 'smoothing', 'centring', 'recall', 'unknown_limit', 'temperature', 'near', 'reward_penalty')
TEXTS = dict(alpha=('nan', 'inf', 'much', ''), alpha_last=('nan', 'much'), rewards=('rm', 'rm=x', 'rm=nan', 'rm=1,rm=2', 'nowhere.f=1', 'os.path=1'), reward_weights=('x', 'x=1', '=1'),
    max_bad=('x', '100%', '-1', 'nan', '1e9'), cap=('.5',), effective=('0', '1.1'), smoothing=('.5', '1'), recall=('0', '1.5'), near=('1.5',), density_k=('65', '100000'),
    dtype=('float16', 'int8'), kl=('k4',), variant=('ppo',), draw=('dense',), placebo=('yes',), density_estimator=('kde',), only=('xx', 'jsonl'), objective=('dpo',), factor=())

def settings():
    "Every number of every stage with values that none may have, and texts that mean nothing"
    for stage, (config, _) in STAGES.items():
        if stage in ('status', 'clean'): continue
        for f in fields(config):
            kind = type(f.default).__name__
            for value in (*WRONG_NUMBERS.get(kind, ()), *(('-1',) if f.name in NEGATIVE else ()), *TEXTS.get(f.name, ())):
                yield Case(f'setting {stage} {f.name} {value!r}', [stage, f'--{f.name}={value}'], wanted='fine' if (stage, f.name) == ('rm', 'density_k') and value.isdigit() else 'refused')   # the uniform arm reads no density
    yield Case('setting grpo group_size 1', ['grpo', '--group_size=1'])
    yield Case('setting grpo kl_ratio with k2', ['grpo', '--kl=k2', '--kl_ratio=True'])
    yield Case('setting grpo unknown flag', ['grpo', '--max_stps=3'])
    yield Case('setting unknown stage', ['grop'])


# -- paths

OUTPUT = dict(sft='out_path', rm='out_path', grpo='out_dir', eval='out_path', compare='out_path', report='out_path')
FILES = dict(data='pairs_path', prompts='prompts_path', density='density_path')

def mine(root):
    "Files of a person, in folders of several names"
    for name in ('mine/pairs.jsonl', 'mine/notes/a.txt', 'outs/my.txt', '.cache/data/my.jsonl'):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text('{"prompt":"mine"}\n')

def paths():
    "Outputs that are, hold or lie in what must stay"
    for stage, flag in OUTPUT.items():
        for place in ('.', '..', '/', 'outs', 'mine', '.cache', '.cache/data', '.cache/data/pairs_all.jsonl', 'mine/pairs.jsonl', 'mine/pairs.jsonl/below', 'outs/sft' if stage != 'sft' else 'outs/rm', 'x.jsonl', 'a\0b', 'x'*300):
            yield Case(f'path {stage} {flag} {place[:30]!r}', [stage, f'--{flag}={place}', '--seed=5'], mine)
        if stage not in ('grpo', 'rm'): yield Case(f'path {stage} {flag} empty', [stage, f'--{flag}=', '--seed=5'], mine)
        yield Case(f'path {stage} a folder as lock', [stage, f'--{flag}=new', '--seed=5'], lambda root: (mine(root), (root/'.new.lock').mkdir()))
    for stage, flag in FILES.items():
        for place in ('', '.', 'outs', 'mine', 'mine/pairs.jsonl', 'mine/notes/a.txt', '.cache/data/my.jsonl', 'x.txt', '.cache/data/pairs_all.jsonl' if stage != 'data' else 'outs/grpo/samples.jsonl'):
            yield Case(f'path {stage} {flag} {place!r}', [stage, f'--{flag}={place}', '--seed=5'], mine)
    yield Case('path sft into its own model', ['sft', '--model=outs/sft', '--out_path=outs/sft', '--seed=5'])
    yield Case('path data into its own source', ['data', '--jsonl_path=mine/pairs.jsonl', '--pairs_path=mine/pairs.jsonl'], mine)
    yield Case('path data into the folder of its source', ['data', '--jsonl_path=mine', '--pairs_path=mine/new.jsonl'], mine)
    yield Case('path chat over somebody\'s answers', ['chat', '--prompts_file=mine/pairs.jsonl', '--answers_path=mine/answers.jsonl'], lambda root: (mine(root), (root/'mine/answers.jsonl').write_text('mine')))
    for stage, flag in (('sft', 'model'), ('sft', 'pairs_path'), ('rm', 'sft_ckpt_path'), ('grpo', 'sft_ckpt_path'), ('grpo', 'rm_ckpt_path'), ('grpo', 'prompts_path'), ('grpo', 'plan_path'), ('chat', 'ckpt_path'),
                        ('eval', 'gold_path'), ('compare', 'eval_path'), ('compare', 'plan_path'), ('report', 'compare_path'), ('density', 'prompts_path'), ('prompts', 'pairs_path'), ('data', 'jsonl_path'), ('data', 'hh_path')):
        yield Case(f'path {stage} {flag} nowhere', [stage, f'--{flag}=no/such/place', '--seed=5'])
        yield Case(f'path {stage} {flag} an empty folder', [stage, f'--{flag}=empty', '--seed=5'], lambda root: (root/'empty').mkdir())
        yield Case(f'path {stage} {flag} a picture', [stage, f'--{flag}=picture.png', '--seed=5'], lambda root: (root/'picture.png').write_bytes(b'\x89PNG\r\n\x1a\n'+bytes(range(256))))


# -- files of a finished run

def cut(text): return text[:len(text)//2]
SPOILS = dict(empty=lambda b: b'', cut=cut, noise=lambda b: bytes(range(256))*8, list=lambda b: b'[1, 2]\n', number=lambda b: b'7\n', text=lambda b: b'"words"\n', open=lambda b: b'{"a":\n')

def spoil(name, how, orphan=True):
    "Spoil a file; without its manifest, which would only say that it has changed"
    def do(root):
        path = root/name
        path.write_bytes(how(path.read_bytes()))
        if orphan:
            for manifest in (path.parent/'manifest.json', path.with_name(f'{path.name}.manifest.json')): manifest.unlink(missing_ok=True)
    return do

def edited(change):
    "Change the first record of a JSON-lines file, or the one of a JSON file"
    def how(data):
        first, _, rest = data.partition(b'\n') if not data.startswith(b'{\n') else (data, b'', b'')
        record = json.loads(first)
        change(record)
        return json.dumps(record).encode()+b'\n'+rest
    return how

def without(key): return edited(lambda r: r.pop(key))
def having(key, value): return edited(lambda r: r.update({key: value}))

READERS = {'.cache/data/pairs_all.jsonl': ('prompts', 'sft', 'rm'), '.cache/data/prompts_all.jsonl': ('density', 'sft', 'grpo'), '.cache/data/density.parquet': ('grpo', 'eval'), 'outs/sft/config.json': ('rm', 'grpo'), 'outs/sft/model.safetensors': ('rm', 'grpo'),
    'outs/sft/tokenizer.json': ('rm', 'grpo'), 'outs/sft/tokenizer_config.json': ('rm',), 'outs/sft/generation_config.json': ('grpo',), 'outs/sft/source.json': ('rm',), 'outs/rm/config.json': ('grpo',), 'outs/rm/model.safetensors': ('grpo',),
    'outs/rm/tokenizer.json': ('grpo',), 'outs/grpo/samples.jsonl': ('eval',), 'outs/grpo/draws.jsonl': ('eval',), 'outs/grpo/manifest.json': ('eval',), 'outs/rm/manifest.json': ('grpo',), '.cache/data/prompts_all.jsonl.manifest.json': ('density',),
    'outs/eval/eval.json': ('compare', 'report'), 'outs/eval/per_prompt.jsonl': ('compare',), 'outs/eval/prompts.jsonl': ('compare', 'report'), 'outs/eval/samples.jsonl': ('report',), 'outs/eval/across.jsonl': ('report',), 'outs/compare/compare.json': ('report',)}
FORCED = ['--force']

def files():
    "Files that a stage reads, spoilt in every way"
    for name, stages in READERS.items():
        ways = dict(SPOILS, gone=None)
        if not name.endswith(('.json', '.jsonl')): ways = {k: v for k, v in ways.items() if k in ('empty', 'cut', 'noise', 'gone')}
        for stage in stages:
            for way, how in ways.items():
                do = (lambda root, name=name: (root/name).unlink()) if how is None else spoil(name, how, orphan='manifest' not in name)
                fine = (name.endswith('source.json') and way=='gone') or name.endswith('generation_config.json') or (name.endswith('manifest.json') and way=='gone') or (name.endswith('tokenizer_config.json'))
                yield Case(f'file {name} {way} for {stage}', [stage, *FORCED], do, 'fine' if fine else 'refused')
    for key in ('prompt', 'chosen', 'rejected', 'prompt_id'):
        for stage in ('prompts', 'sft', 'rm'):
            yield Case(f'field pairs without {key} for {stage}', [stage, *FORCED], spoil('.cache/data/pairs_all.jsonl', without(key)), 'fine' if key=='prompt_id' or stage=='prompts' or key=='rejected' else 'refused')
            yield Case(f'field pairs with {key} a number for {stage}', [stage, *FORCED], spoil('.cache/data/pairs_all.jsonl', having(key, 7)), 'fine' if (stage=='prompts' and key!='prompt') or key=='rejected' else 'refused')
    for key in ('id', 'prompt', 'count', 'fold'):
        for stage in ('density', 'sft', 'rm', 'grpo'):
            yield Case(f'field prompts without {key} for {stage}', [stage, *FORCED, *(['--density_aware=False'] if stage=='grpo' else [])], spoil('.cache/data/prompts_all.jsonl', without(key)), 'fine' if (key in ('count', 'prompt') and stage in ('sft', 'rm')) or (key=='fold' and stage=='density') else 'refused')
            yield Case(f'field prompts with {key} a list for {stage}', [stage, *FORCED, *(['--density_aware=False'] if stage=='grpo' else [])], spoil('.cache/data/prompts_all.jsonl', having(key, [1])), 'fine' if (key in ('count', 'prompt') and stage in ('sft', 'rm')) or (key=='fold' and stage=='density') else 'refused')
    for key in ('model_type', 'vocab_size', 'hidden_size', 'num_hidden_layers', 'architectures'):
        yield Case(f'field config without {key}', ['grpo', *FORCED], spoil('outs/sft/config.json', without(key)), 'fine' if key=='architectures' else 'refused')
        yield Case(f'field config with {key} a text', ['grpo', *FORCED], spoil('outs/sft/config.json', having(key, 'seven')), 'fine' if key=='architectures' else 'refused')
    for key in ('policies', 'prompts', 'settings', 'embedders', 'gold_sd', 'density_embedder', 'exact_kl'):
        yield Case(f'field eval.json without {key} for compare', ['compare', *FORCED], spoil('outs/eval/eval.json', without(key)), 'fine' if key=='exact_kl' else 'refused')
        yield Case(f'field eval.json with {key} a number for compare', ['compare', *FORCED], spoil('outs/eval/eval.json', having(key, 7)), 'fine' if key in ('exact_kl', 'gold_sd') else 'refused')
    for key in ('policy', 'step', 'prompt_id', 'seed', 'arm', 'n', 'diversity', 'kl'):
        yield Case(f'field per_prompt without {key}', ['compare', *FORCED], spoil('outs/eval/per_prompt.jsonl', without(key)), 'fine' if key in ('seed', 'arm', 'diversity', 'kl') else 'refused')
        yield Case(f'field per_prompt with {key} a text', ['compare', *FORCED], spoil('outs/eval/per_prompt.jsonl', having(key, 'many')), 'fine' if key in ('seed', 'arm', 'prompt_id', 'policy') else 'refused')
    for key in ('prompt_id', 'sample', 'completion', 'step'):
        yield Case(f'field samples without {key} for eval', ['eval', *FORCED], spoil('outs/grpo/samples.jsonl', without(key)))
        yield Case(f'field samples with {key} a list for eval', ['eval', *FORCED], spoil('outs/grpo/samples.jsonl', having(key, [1])))
    for key in ('stage', 'status', 'config', 'inputs', 'outputs', 'digest', 'code', 'facts'):
        yield Case(f'field manifest without {key}', ['grpo', *FORCED], spoil('outs/rm/manifest.json', without(key), orphan=False))
        yield Case(f'field manifest with {key} a number', ['grpo', *FORCED], spoil('outs/rm/manifest.json', having(key, 7), orphan=False))
    for key in ('estimates', 'plan', 'curves', 'arms', 'why', 'verdict', 'exploratory', 'groups', 'seeds'):
        yield Case(f'field compare.json without {key}', ['report', *FORCED], spoil('outs/compare/compare.json', without(key)))


# -- plans and lists of one's own

PLANS = ['', '{', '[]', '7', 'null', '{"seeds":0}', '{"seeds":-1}', '{"seeds":2.5}', '{"seeds":"six"}', '{"seeds":NaN}', '{"seeds":true}', '{"seeds":6,"seeds":8}', '{"level":0}', '{"level":0.5}', '{"level":NaN}', '{"level":-1}', '{"sedes":6}', '{"metric":"gini"}',
    '{"metric":["diversity"]}', '{"secondaries":["gini"]}', '{"secondaries":"vendi"}', '{"second":"x"}', '{"protocol":[]}', '{"protocol":{"n_promts":3}}', '{"treated":7}', '{"treated":"uniform"}', '{"control":""}', '{"skip":1}', '{"min_kl":"two"}', '{"equivalence":2}',
    '{"rate_margin":Infinity}', '{"gold_margin":-1}', '{"widest":0}', '{"question":7}']
TABLES = {'rows.jsonl': ['', '\n\n', '{', '[]', '7', '{"prompt":"a"}', '{"prompt":"a","chosen":"b"}', '{"prompt":7,"chosen":"b","rejected":"c"}', '{"prompt":"a","chosen":["b"],"rejected":"c"}', '{"chosen":[],"rejected":[]}', '{"chosen":[{"role":"user"}],"rejected":[{"role":"user"}]}',
    '{"prompt":"","chosen":"","rejected":""}', '{"prompt":"a","chosen":"b","rejected":"b"}', '{"conversations":[],"chosen":{},"rejected":{}}', '{"question":"a","answers":[]}', '{"question":"a","answers":7}', '{"messages":7,"prompt":"a","chosen":"b","rejected":"c"}', '{"meta":7,"prompt":"a","chosen":"b","rejected":"c"}', '\x00\x01', '{"prompt":"a","chosen":"b","rejected":"c"'],
    'rows.json': ['[', '[1]', '[{"prompt":"a"}]', '[] []', '{"a":1}', '[{"prompt":"a","chosen":"b","rejected":"c"}] and more'], 'rows.jsonl.gz': ['not packed'], 'rows.jsonl.zst': ['not packed'], 'rows.parquet': ['not parquet'], 'rows.txt': ['plain words'], 'rows.csv': ['prompt,chosen', 'a,b,c\n1,2,3']}
COMPLETIONS = ['', '{', '7', '{"prompt":"a"}', '{"completion":"a"}', '{"prompt":7,"completion":"a"}', '{"prompt":"a","completion":7}', '{"prompt":"a","completions":"hello"}', '{"prompt":"a","completions":[7]}', '{"prompt":"a","completion":"b","step":"x"}', '{"prompt":"a","completion":"b","seed":"x"}', '{"prompt":"a","completion":"b","gold":"x"}', '{"prompt":"a","completion":"b","gold":NaN}', '{"prompt":"a","completion":"b","step":-1}', '{"prompt":"a","completion":"b","step":1.5}', '{"prompt":"a","completion":"b","seed":true}', '{"prompt":"a","completions":{"b":1}}']

def texts():
    "Plans, pairs, prompts and completions that a person has written"
    def put(name, text): return lambda root: (root/name).write_text(text, encoding='utf-8', errors='surrogatepass')
    for text in PLANS:
        yield Case(f'plan {text!r} for grpo', ['grpo', '--plan_path=plan.json', '--seed=5'], put('plan.json', text))
        yield Case(f'plan {text!r} for compare', ['compare', '--plan_path=plan.json'], put('plan.json', text))
    for name, contents in TABLES.items():
        for text in contents: yield Case(f'pairs {name} {text[:40]!r}', ['data', f'--jsonl_path={name}', '--pairs_path=new/pairs.jsonl'], put(name, text))
    for text in COMPLETIONS: yield Case(f'completions {text!r}', ['eval', '--completions', 'said.jsonl', '--out_path=new', '--gold_path='], put('said.jsonl', text))
    for text in ('', '{', '7', '{"text":"a"}', '{"prompt":7}', '{"messages":7}', '{"messages":[]}', '{"messages":[{"role":"user"}]}'):
        yield Case(f'prompts {text!r} for chat', ['chat', '--prompts_file=ask.jsonl', '--answers_path=new/answers.jsonl'], put('ask.jsonl', text))
        yield Case(f'prompts {text!r} for eval', ['eval', '--samples=weights', '--ckpt_paths', 'outs/sft', '--prompt_set=ask.jsonl', '--out_path=new'], put('ask.jsonl', text))

def cases():
    "All of them, in a fixed order"
    return [*settings(), *paths(), *files(), *texts()]


# -- what comes of them

UNCOMPARED = ("manifest.json", "metrics.jsonl", "placing.json")   # hold the time of day

def contents(root):
    "Hashes of all files below a root, wherever they were moved; locks, caches and logs of this run left out"
    found = Counter()
    for f in root.rglob('*'):
        if f.is_file() and not f.name.endswith((".lock", ".manifest.json")) and f.name not in UNCOMPARED and "tb" not in f.parts: found[hashlib.sha256(f.read_bytes()).hexdigest()] += 1
    return found

def copy_of(done, root):
    "A root like the finished one, of hard links, which are replaced and never written into"
    shutil.copytree(done, root, copy_function=os.link, dirs_exist_ok=True)

def call(words):
    "The command line within this process: exit code, what it said, and a traceback if there was one"
    said, before = io.StringIO(), sys.argv
    sys.argv = ['densirl', *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): cli.main()
        code, trace = 0, ''
    except SystemExit as end: code, trace = (end.code if isinstance(end.code, int) else 1), ''; said.write(str(end.code) if isinstance(end.code, str) else '')
    except BaseException as error: code, trace = 1, ''.join(traceback.format_exception(error)[-3:])
    finally: sys.argv = before
    return code or 0, said.getvalue(), trace

def outcome(case, done):
    "What came of a case: 'sentence', 'accepted', or what is wrong"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)/'root'
        copy_of(done, root)
        for f in root.rglob('*'):                              # spoiling must not reach the finished root
            if f.is_file() and f.stat().st_nlink > 1 and f.stat().st_size < 2**21: data = f.read_bytes(); f.unlink(); f.write_bytes(data)
        case.spoil(root)
        before = contents(root)
        profile = [] if case.words[0] not in STAGES else ['--profile=test', f'--root={root}']
        code, said, trace = call([*case.words, *profile])
        lost = before-contents(root)
        what = 'traceback' if trace else 'lost' if lost else 'sentence' if code else 'accepted'
        if what == 'accepted' and case.wanted == 'refused': what = 'accepted what means something else'
        if what == 'sentence' and case.wanted == 'accepted': what = 'refused what is right'
        return what, (trace or said).strip()[-600:]

def main():
    words, began = sys.argv[1:], time.time()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()): done = finished(Path(folder)/'done')
        found = Counter()
        for i, case in enumerate(chosen := [c for c in cases() if all(w in c.name for w in words)], 1):
            what, said = outcome(case, done)
            found[what] += 1
            if what not in ('sentence', 'accepted'): print(f'{what}: {case.name}\n    '+said.replace('\n', '\n    '), flush=True)
            elif words: print(f'{what}: {case.name}: {said.splitlines()[-1] if said else ""}', flush=True)
            if i%100 == 0: print(f'{i}/{len(chosen)} after {time.time()-began:.0f} s', flush=True)
    print(f'{sum(found.values())} inputs in {time.time()-began:.0f} s: '+', '.join(f'{n} {what}' for what, n in found.most_common()))
    return sum(n for what, n in found.items() if what not in ('sentence', 'accepted'))

if __name__ == '__main__': sys.exit(bool(main()))
