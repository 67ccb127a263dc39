#!/usr/bin/env bash
# Everything that wants a GPU, unattended: the tests, speed and growth, and training of the default weights for MINUTES.
#   bash benchmarks/gpu.sh OUT [MINUTES]       continues OUT/run where it exists
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [MINUTES]}
minutes=${2:-20}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader | tee "$out/device.txt"
HF_HUB_OFFLINE=1 python -m pytest tests -x -q 2>&1 | tee "$out/tests.txt"
python benchmarks/speed.py --device cuda --results "$out/speed.jsonl" --out "$out/speed.md"
python benchmarks/scale.py --device cuda --results "$out/scale.jsonl" --out "$out/scale.md" \
  --plot "$out/scale.svg" --processes 1
start=(--init default)
[ -f "$out/run/training_state.safetensors" ] && start=(--resume "$out/run")
timeout --signal=INT "${minutes}m" python -m idnerf.cli train cascade-procedural --device cuda --out "$out/run" \
  "${start[@]}" --batch-size 8 --tile 192 144 --workers 14 --save-every 200 --validate-every 1000 --precision bf16 \
  --optimizer.encoder-lr 4e-4 --optimizer.decoder-lr 5e-4 --loss.mse 10 --loss.depth-distribution 0.12 \
  --loss.depth 0.6 --loss.unseen 0.2 --scenes.camera-noise.share 0.7 \
  || true  # rates and losses of the default weights (docs/training.md)
ls -l "$out/run"
