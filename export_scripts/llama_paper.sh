#!/usr/bin/env bash
# MPIFA on a LLaMA model in the setting of the paper (arXiv 2501.19090, section 6): 128 windows of 2,048 WikiText-2
# tokens, lambda 0.25, one U and one V step, uniform density; then the same with our closed solver, and the 2:4
# baselines. Needs GPUs, the package `datasets` and the model; resumes where it was interrupted.
#
#     GPUS=4 export_scripts/llama_paper.sh MODEL OUT
#
# It has not been run. Where it differs from the paper: the ridge is relative to the input energy, and WikiText-2 rows are
# joined by line breaks. The paper's own figures are not repeated here, see its tables. `evaluate` runs in fp32.
set -euo pipefail
model=${1:?usage: $0 MODEL OUT} out=${2:?usage: $0 MODEL OUT}
mkdir -p "$out"

compress() { # NAME OPTIONS...
  local target="$out/$1"
  shift
  [ -d "$target" ] && return
  OMP_NUM_THREADS="${THREADS:-8}" torchrun --nproc-per-node "${GPUS:-1}" --no-python pifa-deploy compress "$model" "$target" --dtype fp16 \
    --calibration datasets:Salesforce/wikitext:wikitext-2-raw-v1:train \
    --calibration-samples 128 --sequence-length 2048 --activation-dtype fp16 "$@"
}

python - "$out/wikitext2-test.txt" <<'PYTHON'
import sys
from pathlib import Path

from datasets import load_dataset

rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
Path(sys.argv[1]).write_text("\n".join(rows), encoding="utf-8")
PYTHON

for density in 0.9 0.8 0.7 0.6 0.5 0.4; do
  compress "alternating-$density" --method mpifa --density "$density" --solver alternating \
    --ridge 1e-3 --ridge-shape identity
  compress "closed-$density" --method mpifa --density "$density"
  compress "whitened-$density" --method whitened --density "$density" --format lowrank
done
compress owl-0.5 --method mpifa --density 0.5 --layer-density owl
for method in magnitude wanda ria sparsegpt; do
  compress "$method" --method "$method"
done
pifa-deploy evaluate "$model" "$out"/{alternating,closed,whitened,owl}-* "$out"/magnitude "$out"/wanda "$out"/ria "$out"/sparsegpt --device cuda \
  --context 2048 --max-windows 100000 --text wikitext2="$out/wikitext2-test.txt" --json "$out/perplexity.json"
