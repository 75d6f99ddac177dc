#!/usr/bin/env bash
# Everything that is measured on a GPU, unattended, from a bare checkout and without a network:
#
#   bench/gpu.sh [--quick] [--dry] [--only PART]… [--out DIR]
#
# Runs the tests that need a GPU, then roofline.py, kernels.py, decode.py and peers.py, each in calls of under nine
# minutes, and leaves one JSON in DIR (bench/results), also where a part failed. Quantised and sparse models are decoded
# in the layouts they are published in, with random weights; of two the routers prefer some experts. --quick is over in
# three minutes: tests, a small roofline, decode of the 1B model. --dry runs tiny shapes without a GPU. The GPU's clocks,
# power limit and modes are left as they are.
#
# PYTHON is the interpreter (python3), with torch and CuPy. FWD_WHEELS is a folder of pure wheels that it lacks, which
# are put beside it for this run. FWD_COMMIT names the commit where the checkout has no repository.
#
# Exit codes: 0, 1 if a part failed, 2 usage, 6 no GPU that can be used.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "bench/gpu.sh: no interpreter ${PYTHON:-python3}: set PYTHON" >&2; exit 2; }
python=$(realpath -s "$python")
out=$root/bench/results
quick=() dry=() only=""

usage() {
    echo "usage: bench/gpu.sh [--quick] [--dry] [--only PART]… [--out DIR]" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --quick) quick=(--quick) ;;
        --dry) dry=(--dry) ;;
        --only) [[ ${2:-} ]] || usage; only+=" $2 "; shift ;;
        --out) [[ ${2:-} ]] || usage; out=$(realpath -m "$2"); shift ;;
        *) usage ;;
    esac
    shift
done

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
began=$SECONDS
total=$((${#quick[@]} ? 170 : 14400)) # seconds for everything
longest=530                           # seconds for one call
sparse=(gpt-oss-20b gpt-oss-120b qwen3-30b-a3b qwen3-30b-a3b-fp8 glm-4.7-flash)

# Run one part; keep its exit code, its time and the end of what it said. Its seconds are bounded by what is left.
part() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 left=$((total - SECONDS + began)) start=$SECONDS code
    shift 2
    [[ ! $only || $only == *" $name "* ]] || return 0
    limit=$((left < limit ? left : limit))
    echo "== $name"
    if ((limit < 5)); then
        echo "no time left" | tee "$work/$name.log"
        code=124
    else
        timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$work/$name.log"
        code=${PIPESTATUS[0]}
    fi
    echo "$code $((SECONDS - start))" >"$work/$name.part"
}

bench() { # NAME SECONDS SCRIPT FLAGS…
    local name=$1 seconds=$2 script=$3
    shift 3
    part "$name" "$seconds" "$python" "$root/bench/$script" "$@" "${quick[@]}" --save "$work/$name"
}

helper() { # MODULE FLAGS…
    (cd "$root/bench" && "$python" -m "$@")
}

if [[ ${FWD_WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$FWD_WHEELS"/*.whl || exit 1
fi
export PYTHONPATH=$root${FWD_WHEELS:+:$work/site}${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
cd "$root" || exit 1

device=(--device cuda)
if ((${#dry[@]})); then
    device=(--device host --tiny)
elif ! helper gpu.cards >/dev/null 2>"$work/reason"; then
    reason=$(tail -n 1 "$work/reason")
    [[ $reason != ModuleNotFoundError* ]] || reason+=": give its wheel in FWD_WHEELS"
    echo "bench/gpu.sh needs a GPU: $reason" >&2
    exit 6
fi

# Versions of packages are the machine's, so their warnings are no errors here.
mapfile -t tests < <(grep -lrE --include='test_*.py' 'mark\.gpu|\bexecution\b' tests)
part tests $((${#quick[@]} ? 75 : longest)) "$python" -m pytest -m gpu -W default -p no:cacheprovider \
    --junitxml="$work/tests.xml" "${tests[@]}"
bench roofline $((${#quick[@]} ? 40 : longest)) roofline.py "${device[@]}"
roofline=$(find "$work/roofline" -name '*.json' -print -quit 2>/dev/null)
limits=(${roofline:+--roofline "$roofline"})

if ((!${#quick[@]})); then
    bench kernels "$longest" kernels.py "${device[@]}" "${limits[@]}"
    for model in llama-8b-fp8 llama-8b-nvfp4 gpt-oss-120b qwen3-30b-a3b-fp8 glm-4.7-flash; do
        ((${#dry[@]})) || bench "kernels-$model" "$longest" kernels.py --model "$model" "${device[@]}" "${limits[@]}"
    done
fi
bench decode-llama-1b "$longest" decode.py llama-1b "${device[@]}" "${limits[@]}"
if ((!${#quick[@]})); then
    if ((!${#dry[@]})); then
        for model in llama-8b llama-8b-fp8 llama-8b-nvfp4 "${sparse[@]}"; do
            bench "decode-$model" "$longest" decode.py "$model" "${device[@]}" "${limits[@]}"
        done
        for model in gpt-oss-120b qwen3-30b-a3b; do
            bench "decode-$model-skewed" "$longest" decode.py "$model" --skewed "${device[@]}" "${limits[@]}"
        done
        bench peers-llama-8b "$longest" peers.py llama-8b "${device[@]}" "${limits[@]}"
    fi
    bench peers-llama-1b "$longest" peers.py llama-1b "${device[@]}" "${limits[@]}"
fi

compgen -G "$work/*.part" >/dev/null || usage # --only named none
helper gpu.collect "$work" "${quick[@]}" "${dry[@]}" --save "$out"
