#!/usr/bin/env bash
# tools/test_cpus.sh [--whole] [NAME ...]    run the tests as on other processors, with other thread counts and orders
#
# Without --whole it runs the tests of what depends on a processor (pixels, latents, losses, networks, training, codes);
# with it, the whole default suite. NAME selects environments (default: all). Prints a Markdown table with a row for
# each; logs are written to .cache/cpus/.
# PYTHON   the interpreter, default .venv/bin/python
# WORKERS  options of pytest-xdist, as in the Makefile; the random order is in one process
set -uo pipefail
cd "$(dirname "$0")/.."

ENVIRONMENTS=(  # name|variables|options of pytest
    "host||"
    "generic|NUMBA_CPU_NAME=generic|"
    "haswell|NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma|"
    "aten-default|ATEN_CPU_CAPABILITY=default|"
    "aten-avx2|ATEN_CPU_CAPABILITY=avx2|"
    "onednn-sse41|ONEDNN_MAX_CPU_ISA=SSE41|"
    "onednn-avx2|ONEDNN_MAX_CPU_ISA=AVX2|"
    "one-thread|OMP_NUM_THREADS=1|"
    "two-threads|OMP_NUM_THREADS=2|"
    "random-order||-n 0 --random-order --random-order-bucket=module"
    "unraisable||-W error::pytest.PytestUnraisableExceptionWarning"
)
TESTS="tests/pipelines tests/latents tests/losses tests/models tests/training tests/codes"
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
WORKERS=${WORKERS:--n logical --maxprocesses 4 --dist loadfile}
LOGS=.cache/cpus

whole=
if [ "${1:-}" = --whole ]; then whole=1; TESTS=tests; shift; fi
wanted=" $* "
for name in "$@"; do
    [[ " ${ENVIRONMENTS[*]%%|*} " == *" $name "* ]] || { echo "error: $name: known are ${ENVIRONMENTS[*]%%|*}" >&2; exit 2; }
done

mkdir -p "$LOGS"
failed=0
printf '| environment | variables, options | result | seconds |\n| --- | --- | --- | --- |\n'
for line in "${ENVIRONMENTS[@]}"; do
    IFS='|' read -r name variables options <<<"$line"
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then continue; fi
    start=$SECONDS
    # shellcheck disable=SC2086
    env $variables "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow and not gpu and not slurm and not ffcv" \
        $WORKERS $options $TESTS >"$LOGS/$name.log" 2>&1 </dev/null || failed=1
    result=$(tail -n 1 "$LOGS/$name.log" | sed 's/ in [0-9.]*s.*//; s/=//g; s/^ *//; s/ *$//')
    printf '| %s | `%s` | %s | %d |\n' "$name" "$(echo $variables $options)" "$result" $((SECONDS - start))
done
exit $failed
