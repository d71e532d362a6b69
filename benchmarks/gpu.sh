#!/usr/bin/env bash
# Everything that is worth measuring on one GPU, in under ten minutes, from a bare checkout.
#
#     bash benchmarks/gpu.sh [OUT]
#
# Needs Python with jax for this GPU, flax, optax, orbax-checkpoint, transformers, safetensors, jinja2, jaxtyping, rich
# and tyro; what is missing is installed for the run if an index can be reached. Parity needs pytest, the comparison
# needs torch with trl, accelerate and datasets: both are left out, and said to be, where those are not there.
#
# In OUT (default runs/gpu): NAME.json (its last line is the result), NAME.log (messages), summary.txt.
# PYTHON names the interpreter, PEER_PYTHON the one that has TRL, BUDGET the seconds in all, SMALL and LARGE other models.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/runs/gpu}"
python="${PYTHON:-python3}"
peer="${PEER_PYTHON:-$python}"
budget="${BUDGET:-580}"

mkdir -p "$out"
out="$(cd "$out" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 1
export PYTHONPATH="$root:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 TOKENIZERS_PARALLELISM=false
# The step compiles again what sampling and the update have compiled; its compile seconds are then those of a cache.
export JAX_COMPILATION_CACHE_DIR="$work/cache"

# item NAME SECONDS COMMAND...: runs it within its own limit and what is left of the budget.
item() {
  local name="$1" limit="$2" left=$((budget - SECONDS)) code
  shift 2
  if ((left < 15)); then
    echo "$name: no time left"
    return
  fi
  ((limit > left)) && limit=$left
  local began=$SECONDS
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log"
  code=$?
  echo "$name: exit code $code after $((SECONDS - began)) s"
  ((code == 0)) || tail -n 3 "$out/$name.log"
}

has() { "$1" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))" "${@:2}"; }

for package in flax optax orbax-checkpoint transformers safetensors jinja2 jaxtyping rich tyro; do
  module="${package/orbax-checkpoint/orbax}"
  has "$python" "$module" && continue
  timeout 60 "$python" -m pip install --quiet --no-deps --target "$work/site" "$package" >>"$out/install.log" 2>&1 ||
    echo "$package: missing, and not installed"
done

"$python" -c 'import jax; print(jax.__version__, jax.default_backend(), jax.devices())' | tee "$out/device.txt"
command -v nvidia-smi >/dev/null && nvidia-smi >>"$out/device.txt"

if has "$python" pytest hypothesis; then
  # Without the conftest, which asks for CPU; products of float32 in full precision, since tolerances are for those.
  JAX_DEFAULT_MATMUL_PRECISION=highest item parity 90 "$python" -m pytest tests/model/test_attention.py tests/model/test_backends.py \
    --noconftest --override-ini filterwarnings= -p no:cacheprovider
else
  echo "parity: left out, pytest and hypothesis are not there"
fi

small=(--model "${SMALL:-qwen2.5-0.5b}" --dtype bfloat16)
# 128 rows in decoding; 16 groups of 8 with 1,024 + 256 tokens in the update.
large=(--model "${LARGE:-qwen2.5-1.5b}" --dtype bfloat16 --prompts 16 --group 8 --prompt-len 1024 --new-tokens 256)

item sample-0.5b 90 "$python" -m kardia_jax bench sample "${small[@]}" --prompts 8 --json
item sample-1.5b 120 "$python" -m kardia_jax bench sample "${large[@]}" --json
item update-1.5b 120 "$python" -m kardia_jax bench update "${large[@]}" --micro-batches 4 --json
item step-1.5b 150 "$python" -m kardia_jax bench step "${large[@]}" --micro-batches 4 --steps 2 --json

if has "$peer" trl accelerate datasets; then
  item trl-0.5b 180 "$python" benchmarks/vs_trl.py --python "$peer" --models "$work/models" "${small[@]}" --prompts 4 \
    --steps 2 --json
else
  echo "trl-0.5b: left out, trl, accelerate and datasets are not there"
fi

item step-0.5b 90 "$python" -m kardia_jax bench step "${small[@]}" --prompts 4 --steps 2 --json

"$python" benchmarks/summary.py "$out" | tee "$out/summary.txt"
echo "$SECONDS s in all; results in $out"
