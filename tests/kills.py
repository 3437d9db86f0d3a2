"""Stages and the whole pipeline, killed at random points and started again: the same bytes, nobody left at work, nothing left behind.

    python tests/kills.py                 # 20 kills of each stage and of the pipeline: about an hour
    python tests/kills.py rm grpo --kills 5
    python tests/kills.py pipeline --signal TERM

A stage is started with the command line, killed after a random part of the time that it takes, and started again with the same command. Its files must then equal those of a run
that nobody has killed. `test_kills.py` does a small part of it.
"""
import argparse, os, random, shutil, signal, subprocess, sys, tempfile, time, uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]
os.environ['HF_HUB_OFFLINE'] = '1'
from densirl.config import make_config
from densirl.files import HALF
from densirl.pipeline import STAGES, make_inputs
from densirl.runs import content_hashes

GIVEN = dict(rm=['--max_steps=12', '--save_every=2'], grpo=['--max_steps=6', '--save_every=1'])      # long enough to be killed in between
ORDER = [s for s in STAGES if s not in ('chat', 'status', 'clean', 'plan')]
OUTPUTS = dict(data=['.cache/data/pairs_all.jsonl', '.cache/data/bad_rows.jsonl'], prompts=['.cache/data/prompts_all.jsonl', '.cache/data/prompt_id_map.tsv', '.cache/data/stats.json'],
    density=['.cache/data/density.parquet', '.cache/data/density.embeddings.npy'], sft=['outs/sft'], rm=['outs/rm'], grpo=['outs/grpo'], eval=['outs/eval'], compare=['outs/compare'], report=['outs/report'])

def begin(words, tag):
    "Start a command whose descendants can be found by a tag in their environment"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'DENSIRL_ROOT': str(ROOT), 'OMP_NUM_THREADS': '1', 'KILL_TAG': tag}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def tagged(tag):
    "Processes that are alive and carry the tag"
    found = []
    for entry in Path('/proc').iterdir():
        if not entry.name.isdigit(): continue
        try:
            if f'KILL_TAG={tag}'.encode() in (entry/'environ').read_bytes() and (entry/'stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z': found.append(int(entry.name))
        except OSError: continue
    return found

def left_at_work(tag, seconds=20.):
    "Processes with the tag that are still alive after some seconds"
    until = time.time()+seconds
    while (alive := tagged(tag)) and time.time() < until: time.sleep(.2)
    return alive

def halves(root): return [str(f) for f in Path(root).rglob(f'*{HALF}*')]

def kill_once(words, after, how, wait=True):
    "Start a command, end it after some seconds; what it printed, and who is left at work"
    tag = uuid.uuid4().hex
    process = begin(words, tag)
    try: said, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(how)
        said = '' if not wait else process.communicate()[0]
    return said, left_at_work(tag) if wait else tag

def finish(words):
    "Run a command to its end; seconds it took"
    tag, start = uuid.uuid4().hex, time.time()
    process = begin(words, tag)
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said[-3000:]
    return time.time()-start

def try_stage(stage, kills, how, chance, folder):
    "How many of the kills of a stage ended in the same bytes, and what went wrong"
    base = Path(folder)/f'{stage}_base'
    base.mkdir()
    make_inputs(make_config(STAGES[stage][0], 'test', root=str(base)))
    words = lambda root: ['-m', 'densirl.cli', stage, '--profile=test', f'--root={root}', *GIVEN.get(stage, [])]
    whole = shutil.copytree(base, Path(folder)/f'{stage}_whole')
    seconds = finish(words(whole))
    expected = content_hashes([whole/o for o in OUTPUTS[stage]])
    assert expected, f'{stage} wrote none of {OUTPUTS[stage]}'
    same, wrong = 0, []
    for i in range(kills):
        root = shutil.copytree(base, Path(folder)/f'{stage}_{i}')
        after = chance.uniform(.35, 1.)*seconds if i%4 else chance.uniform(0, 1)*seconds
        _, alive = kill_once(words(root), after, how)
        finish(words(root))
        found = content_hashes([root/o for o in OUTPUTS[stage]])
        moved = sorted(k for k in expected.keys()|found.keys() if expected.get(k) != found.get(k))
        faults = [f'after {after:.2f} s: {what}' for what in (moved and f'other bytes in {moved[:3]}', alive and f'{len(alive)} left at work', halves(root) and f'left behind {halves(root)[:3]}') if what]
        wrong += faults
        same += not moved
        shutil.rmtree(root)
    print(f'{stage}: {same} of {kills} ended in the same bytes ({seconds:.1f} s a run)'+''.join(f'\n    {w}' for w in wrong), flush=True)
    return len(wrong)

def try_pipeline(kills, how, chance, folder):
    "The same for the whole pipeline"
    words = lambda root: ['-m', 'densirl.pipeline', '--profile=test', f'--root={root}']
    whole = Path(folder)/'pipeline_whole'
    seconds = finish(words(whole))
    parts = [o for outs in OUTPUTS.values() for o in outs]+['outs/rm_gold', 'outs/grpo_baseline']
    hashes = lambda root: {o: content_hashes([root/o]) for o in parts if o not in ('outs/report', 'outs/compare', 'outs/eval')}
    expected, same, wrong = hashes(whole), 0, []
    for i in range(kills):
        root = Path(folder)/f'pipeline_{i}'
        after = chance.uniform(0, 1)*seconds
        _, alive = kill_once(words(root), after, how)
        finish(words(root))
        moved = [o for o, h in hashes(root).items() if h != expected[o]]
        wrong += [f'after {after:.1f} s: {what}' for what in (moved and f'other bytes in {moved}', alive and f'{len(alive)} left at work', halves(root) and f'left behind {halves(root)[:3]}') if what]
        same += not moved
        shutil.rmtree(root)
    print(f'pipeline: {same} of {kills} ended in the same bytes ({seconds:.0f} s a run)'+''.join(f'\n    {w}' for w in wrong), flush=True)
    return len(wrong)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stages', nargs='*', default=[*ORDER, 'pipeline'])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--signal', default='KILL', choices=['KILL', 'TERM', 'INT'])
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args()
    how, chance = getattr(signal, f'SIG{given.signal}'), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        return sum(try_pipeline(given.kills, how, chance, folder) if s == 'pipeline' else try_stage(s, given.kills, how, chance, folder) for s in given.stages)

if __name__ == '__main__': sys.exit(bool(main()))
