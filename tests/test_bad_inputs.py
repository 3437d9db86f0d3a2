"""A part of the inputs of `bad_inputs.py`: one sentence, or a right result; no traceback, nothing lost."""
import pytest
import bad_inputs

PART = [c for c in bad_inputs.cases() if not c.name.startswith('setting')][::17]+[c for c in bad_inputs.cases() if c.name.startswith('setting')][::67]

@pytest.mark.parametrize('case', PART, ids=lambda c: c.name)
def test_a_wrong_input_gives_a_sentence(case, tiny_run, monkeypatch):
    monkeypatch.setenv('DENSIRL_BEGUN', '1')
    what, said = bad_inputs.outcome(case, tiny_run)
    assert what in ('sentence', 'accepted'), said

def test_there_are_hundreds_of_them_and_each_is_another():
    names = [c.name for c in bad_inputs.cases()]
    assert len(names) == len(set(names)) > 1000
