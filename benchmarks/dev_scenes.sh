#!/usr/bin/env bash
# The README's table: default weights and reference rows on the development scenes under DATA.
#   bash benchmarks/dev_scenes.sh DATA OUT
set -euo pipefail
data=${1:?usage: benchmarks/dev_scenes.sh DATA OUT}
out=${2:?usage: benchmarks/dev_scenes.sh DATA OUT}
run() { name=$1; shift; idnerf evaluate "$@" --json "$out/$name.json" --save "$out/$name"; }
run rff "$data/nerf_llff_data" --protocol mvsnerf --size 480x320
run dtu "$data/DTU" --protocol mvsnerf
run lego "$data/nerf_synthetic/lego" --protocol mvsnerf --size 400x400
run fountain "$data/strecha_fountain-P11" --size 504x336
run printer "$data/printer" --num-sources 2 --size 640x480
run fox "$data/fox" --size 270x480 --targets 0,5,10,15,20,25,30,35,40,45
python - "$out" <<'PY'
import json, sys
from pathlib import Path

print("| scene | views | default weights | nearest source | best plane | plane sweep |\n|---|---|---|---|---|---|")
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
    rows = [report, *(report["references"][row] for row in ("copy", "plane", "sweep"))]
    for scene in report["scenes"]:
        count = sum(view["scene"] == scene for view in report["views"])
        cells = [f"{row['scenes'][scene]['psnr']:.2f} / {row['scenes'][scene]['ssim']:.3f}" for row in rows]
        print(f"| {scene} | {count} | " + " | ".join(cells) + " |")
PY
