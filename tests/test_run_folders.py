"""Nothing is lost: a stage of a few lines, run with right and wrong commands, killed, on a full disk, beside files of a person."""
import errno, json, os, shutil, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from conftest import ROOT
from densirl import run_folders
from densirl.config import StageConfig, make_config, where, within
from densirl.files import read_json
from densirl.launch import spawn
from densirl.run_folders import alone, is_made, open_run, own_folder, place, runs_of
from densirl.runs import manifest_path, read_manifest, run_key
from densirl.status import CleanConfig, StatusConfig, clean, find_results, show_status

@dataclass(frozen=True)
class Toy(StageConfig):
    "Count to a number, with a checkpoint at each step"
    stage: ClassVar[str] = 'eval'
    module: ClassVar[str] = 'runs'
    steps: int = 3
    learning_rate: float = within('[0, inf)', 1.)
    out_path: str = where('outs/toy')
    def outputs(self): return [self.out_path]

@dataclass(frozen=True)
class Table(StageConfig):
    "Write two files"
    stage: ClassVar[str] = 'density'
    module: ClassVar[str] = 'runs'
    endings: ClassVar[tuple] = ('.parquet',)
    rows: int = 1
    density_path: str = where('data/density.a.parquet')
    def outputs(self): return [self.density_path, self.density_path.replace('parquet', 'npy')]

@dataclass(frozen=True)
class Reader(StageConfig):
    "Read what Toy has made"
    stage: ClassVar[str] = 'report'
    module: ClassVar[str] = 'runs'
    out_path: str = where('outs/reader')
    def inputs(self): return dict(eval='outs/toy')
    def outputs(self): return [self.out_path]

class Killed(BaseException): pass

def run_toy(root, stop_after=99, fail=None, **given):
    "The steps that were taken now; a kill is an exception that no cleaning up follows"
    cfg, done = make_config(Toy, root=str(root), **given), []
    if is_made(cfg): return 'there'
    try:
        with open_run(cfg) as run:
            kept = sorted(run.folder.glob('checkpoint/step_*'))
            begun = int(kept[-1].name.split('_')[1]) if kept else 0
            for step in range(begun+1, cfg.steps+1):
                if fail: raise fail
                run.log('metrics', step=step)
                (run.folder/f'checkpoint/step_{step}').mkdir(parents=True)
                done.append(step)
                if len(done) == stop_after: raise Killed
            (run.folder/'n.txt').write_text(str(cfg.steps*cfg.learning_rate))
    except Killed: pass
    return done

def made(root): return (root/'outs/toy/n.txt').read_text()

def test_three_results_in_a_row_come_back_without_being_made_again(tmp_path):
    for rate in (1, 2, 3): assert run_toy(tmp_path, learning_rate=rate) == [1, 2, 3]
    for rate in (1, 2, 3, 2, 1):
        assert run_toy(tmp_path, learning_rate=rate) == 'there' and made(tmp_path) == str(3.*rate)

def test_wrong_commands_in_between_lose_nothing(tmp_path):
    assert run_toy(tmp_path) == [1, 2, 3]
    for wrong in ('nan', -1, 'x'):
        with pytest.raises(ValueError): run_toy(tmp_path, learning_rate=wrong)
    with pytest.raises(KeyError): run_toy(tmp_path, learning_rate=7, fail=KeyError('later'))
    assert run_toy(tmp_path, learning_rate=2) == [1, 2, 3]
    with pytest.raises(KeyError): run_toy(tmp_path, learning_rate=8, fail=KeyError('later'))
    assert run_toy(tmp_path) == 'there' and made(tmp_path) == '3.0'

def test_a_run_half_done_goes_on_after_others_and_after_a_forced_one_cut_short(tmp_path):
    assert run_toy(tmp_path, stop_after=2) == [1, 2]
    assert run_toy(tmp_path, learning_rate=2) == [1, 2, 3]
    assert run_toy(tmp_path, force=True, stop_after=1) == [1]
    assert run_toy(tmp_path) == [3], 'from the newest checkpoint'
    assert not list((tmp_path/'outs').rglob('checkpoint')), 'no half of a finished run is left'

def test_a_forced_run_that_was_stopped_is_resumed(tmp_path):
    assert run_toy(tmp_path) == [1, 2, 3]
    assert run_toy(tmp_path, force=True, stop_after=2) == [1, 2] and made(tmp_path) == '3.0'
    assert run_toy(tmp_path) == [3] and run_toy(tmp_path) == 'there'
    assert not runs_of(tmp_path/'outs/toy').exists(), 'the same result is not kept twice'

def test_a_full_disk_at_the_last_save_leaves_the_result_that_was_there(tmp_path, monkeypatch):
    run_toy(tmp_path)
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(run_folders, 'content_hashes', full)
        run_toy(tmp_path, learning_rate=2)
    assert made(tmp_path) == '3.0' and run_toy(tmp_path) == 'there'
    assert run_toy(tmp_path, learning_rate=2) == [], 'only the end was missing'

@pytest.mark.parametrize('moves', range(6))
def test_killed_between_the_moves(tmp_path, monkeypatch, moves):
    "Old files and new ones are moved one by one; a kill after any of them is mended by the next start"
    def write(rows):
        cfg = make_config(Table, root=str(tmp_path), rows=rows)
        if not is_made(cfg):
            with open_run(cfg) as run:
                for out in run.outputs: out.write_text(str(rows))
        return [cfg.path(p).read_text() for p in cfg.outputs()]
    assert write(1) == ['1', '1']
    left, really = [moves], os.replace
    def replace(a, b):
        if '.half-' not in str(a):
            if not left[0]: raise Killed
            left[0] -= 1
        really(a, b)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'replace', replace)
        write(2)
    assert write(2) == ['2', '2'] and write(1) == ['1', '1'] and write(2) == ['2', '2']

def test_artefacts_beside_each_other_have_manifests_of_their_own(tmp_path):
    for name in 'ab':
        with open_run(make_config(Table, root=str(tmp_path), density_path=f'data/density.{name}.parquet', rows=ord(name))) as run:
            for out in run.outputs: out.write_text(name)
    assert [read_manifest(tmp_path/f'data/density.{n}.parquet')['config']['rows'] for n in 'ab'] == [97, 98]

@pytest.mark.parametrize('place, why', [('', 'empty'), ('.', 'holds everything'), ('outs', 'in the way'), ('mine', 'in the way'), ('mine/notes.txt', 'in the way'), ('toy.jsonl', 'writes a folder')])
def test_what_a_person_owns_stays(tmp_path, place, why):
    run_toy(tmp_path)
    (tmp_path/'mine').mkdir()
    for name in ('mine/notes.txt', 'mine/metrics.jsonl', 'outs/mine.txt'): (tmp_path/name).write_text('mine')
    for _ in range(2):
        with pytest.raises(ValueError, match=why): run_toy(tmp_path, out_path=place, learning_rate=2)
    for name in ('mine/notes.txt', 'mine/metrics.jsonl', 'outs/mine.txt'): assert (tmp_path/name).read_text() == 'mine'
    assert made(tmp_path) == '3.0'

def test_a_file_put_into_a_result_stops_the_next_one_and_not_the_skip(tmp_path):
    run_toy(tmp_path)
    (tmp_path/'outs/toy/notes.txt').write_text('mine')
    assert run_toy(tmp_path) == 'there'
    with pytest.raises(ValueError, match='notes.txt is in the way'): run_toy(tmp_path, learning_rate=2)
    assert (tmp_path/'outs/toy/notes.txt').read_text() == 'mine'

def test_a_linked_folder_stays_a_link(tmp_path):
    (tmp_path/'large').mkdir(); (tmp_path/'outs').mkdir()
    (tmp_path/'outs/toy').symlink_to(tmp_path/'large')
    for rate in (1, 2): run_toy(tmp_path, learning_rate=rate)
    assert (tmp_path/'outs/toy').is_symlink() and (tmp_path/'large/n.txt').read_text() == '6.0'

def test_manifests_that_were_edited_are_a_sentence(tmp_path):
    run_toy(tmp_path)
    path = manifest_path(tmp_path/'outs/toy')
    for text in ('', '{', '[]', '{"status":"complete"}', json.dumps(read_json(path)|dict(outputs=7))):
        path.write_text(text)
        with pytest.raises(ValueError, match='manifest.json'): run_toy(tmp_path, learning_rate=2)

def test_status_and_clean(tmp_path, capsys):
    run_toy(tmp_path)
    run_toy(tmp_path, learning_rate=2)
    run_toy(tmp_path, learning_rate=3, stop_after=1)
    (tmp_path/'outs/.x.json.half-0a1b').write_text('half')
    show_status(make_config(StatusConfig, root=str(tmp_path)))
    said = capsys.readouterr().out
    assert 'take back with: densirl eval --profile=full' in said and 'unfinished at step 1' in said and '--learning_rate=3.0' in said
    clean(make_config(CleanConfig, root=str(tmp_path)))
    assert 'would remove' in capsys.readouterr().out and len(find_results(tmp_path)) == 3
    with alone(tmp_path/'outs/toy'):
        clean(make_config(CleanConfig, root=str(tmp_path), yes=True))
        assert len(find_results(tmp_path)) == 3, 'a process is at work'
    clean(make_config(CleanConfig, root=str(tmp_path), yes=True))
    assert [r.state for r in find_results(tmp_path)] == ['in place'] and made(tmp_path) == '6.0' and not (tmp_path/'outs/.x.json.half-0a1b').exists()

def run_reader(root, **given):
    cfg = make_config(Reader, root=str(root), **given)
    if not is_made(cfg):
        with open_run(cfg) as run: (run.folder/'n.txt').write_text(made(root))

def said_of(root, capsys):
    capsys.readouterr()
    show_status(make_config(StatusConfig, root=str(root)))
    return capsys.readouterr().out.replace(str(root), 'ROOT')

def test_status_says_what_was_made_from_something_else_and_what_comes_back_first(tmp_path, capsys):
    "A kept run comes back by its command only where what it read is there again"
    run_toy(tmp_path)
    run_reader(tmp_path)
    run_toy(tmp_path, learning_rate=2)
    assert 'outs/reader  report  in place' in (said := said_of(tmp_path, capsys)) and said.count('made from another outs/toy than is there now') == 1
    run_reader(tmp_path)
    old = next(runs_of(tmp_path/'outs/toy').glob('*/')).name
    said = said_of(tmp_path, capsys)
    assert f'made from another outs/toy than is there now\n    first take back outs/.toy.runs/{old}\n    take back with: densirl report' in said
    shutil.rmtree(runs_of(tmp_path/'outs/toy'))
    assert 'made anew, from what is there now, by: densirl report' in said_of(tmp_path, capsys)
    run_reader(tmp_path)
    assert capsys.readouterr().out == 'outs/reader is up to date\n'

def test_a_run_says_that_its_input_was_made_from_something_else(tmp_path, capsys):
    @dataclass(frozen=True)
    class Last(Reader):
        stage: ClassVar[str] = 'compare'
        def inputs(self): return dict(eval='outs/reader')
    run_toy(tmp_path)
    run_reader(tmp_path)
    with open_run(make_config(Last, root=str(tmp_path), out_path='outs/a')): pass
    assert 'made from' not in capsys.readouterr().out
    run_toy(tmp_path, learning_rate=2)
    with open_run(make_config(Last, root=str(tmp_path), out_path='outs/b')): pass
    assert 'outs/reader was made from another outs/toy than is there now' in capsys.readouterr().out

def test_commands_of_status_name_the_root_and_a_root_that_is_none_is_a_sentence(tmp_path, capsys):
    run_toy(tmp_path)
    assert 'clean' not in said_of(tmp_path, capsys), 'there is nothing to remove'
    run_toy(tmp_path, learning_rate=2)
    assert '`densirl clean --root ROOT --yes`' in said_of(tmp_path, capsys)
    clean(make_config(CleanConfig, root=str(tmp_path), yes=True))
    capsys.readouterr()
    clean(make_config(CleanConfig, root=str(tmp_path), yes=True))
    assert capsys.readouterr().out == 'nothing to remove\n' and not runs_of(tmp_path/'outs/toy').exists()
    for config in (StatusConfig, CleanConfig):
        with pytest.raises(ValueError, match='nowhere is no folder'): make_config(config, root=str(tmp_path/'nowhere'))

@pytest.mark.parametrize('place, why', [('outs/toy/inner', 'inside the run of the stage eval'), ('outs', 'holds the run of the stage eval at .*outs/toy')])
def test_a_run_neither_in_another_one_nor_around_it(tmp_path, place, why):
    run_toy(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match=why): run_toy(tmp_path, out_path=place)
    assert sorted(tmp_path.rglob('*')) == before

def test_a_process_that_is_stopping_is_waited_for(tmp_path, capsys):
    held = ('import time; from pathlib import Path; from densirl.run_folders import alone\n'
            f'with alone(Path({str(tmp_path/"toy")!r})) as stopping: stopping(); print("held", flush=True); time.sleep(1)')
    process = spawn([sys.executable, '-c', held], {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with alone(tmp_path/'toy'): pass
    assert 'waiting for another process that is stopping' in capsys.readouterr().out
    process.wait()
