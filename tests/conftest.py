"""One small run of the whole experiment, with the two-layer model, that several tests look at."""
import os, subprocess, sys
from pathlib import Path

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared/data'

def densirl(*words, ok=True, ranks=1, timeout=300):
    "Call the command line as a user would; returns what it printed"
    head = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'DENSIRL_ROOT': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *head, '-m', 'densirl.cli', *map(str, words)], cwd=ROOT, env=env, timeout=timeout,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == ok, done.stdout[-3000:]
    return done.stdout

def finished(root):
    "Run every stage of profile `test` in a root folder, in fp32 also where the CPU has units for bf16"
    from densirl.config import make_config
    from densirl.files import write_json
    from densirl.pipeline import make_inputs
    from densirl.report import ReportConfig, make_report
    cfg = make_config(ReportConfig, 'test', root=str(root))
    write_json(Path(root)/'.cache/precision_cpu.json', dict(dtype='float32'))
    make_inputs(cfg)
    make_report(cfg)
    return Path(root)

@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    "Root folder in which every stage of profile `test` has run"
    return finished(tmp_path_factory.mktemp('tiny'))

@pytest.fixture(scope='session')
def shared():
    "Real data, beside the repository where it is there"
    if not SHARED.exists(): pytest.skip('the folder ../shared/data with real data is not here')
    return SHARED
