#!/usr/bin/env bash
# Everything that wants a GPU, unattended: the tests, speed and growth, and training of the default weights for STEPS.
#   bash benchmarks/gpu.sh OUT [STEPS]       continues OUT/run where it exists, with the options it was started with
# STEPS is what the lease holds: a training that is cut short loses what it gains as the rate falls. Rates and losses are
# those of the default weights' sixth to eighth piece, without light noise (docs/training.md; the last one took 3e-4 for the
# decoder, and light noise): twice these rates undid weights that were trained already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [STEPS]}
steps=${2:-4000}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader | tee "$out/device.txt"
HF_HUB_OFFLINE=1 python -m pytest tests -x -q 2>&1 | tee "$out/tests.txt"
python benchmarks/speed.py --device cuda --results "$out/speed.jsonl" --out "$out/speed.md"
python benchmarks/scale.py --device cuda --results "$out/scale.jsonl" --out "$out/scale.md" --plot "$out/scale.svg"
start=(--init default --out "$out/run" --steps "$steps" --batch-size 8 --tile 192 144 --save-every 200
  --validate-every 1000 --precision bf16 --enlarged-share 0.7 --optimizer.encoder-lr 1.5e-4 --optimizer.decoder-lr 2e-4
  --loss.mse 10 --loss.depth-distribution 0.12 --loss.depth 0.6 --loss.unseen 0.2 --scenes.camera-noise.share 0.7)
[ -f "$out/run/training_state.safetensors" ] && start=(--resume "$out/run")
python -m idnerf.cli train cascade-procedural --device cuda --workers 14 "${start[@]}"
ls -l "$out/run"
