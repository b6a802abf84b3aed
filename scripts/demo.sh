#!/usr/bin/env bash
# The whole way on handwritten digits: train ResNet-20, prune it with NGGM and HAP, quantize and encode it, and compare.
# Needs nothing but Python: the first call makes the virtual environment .venv, the data come with scikit-learn.
# Variables: SAVE_DIR, where the three runs go (./saves); PYTHON, to use another Python as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
ensure_environment requirements.txt

save_dir=${SAVE_DIR:-./saves}
demo=demo-$(date +%s)
common=(--dataset digits --batch-size 64 --seed 8152 --save-dir "$save_dir" --log-name demo.txt)

echo "== 1/3 train"
"$PYTHON" initial_train.py --model resnet20 --lr 0.1 --n-epochs 10 --schedule 6 9 --lr-drops 0.1 0.1 \
  "${common[@]}" --run-name "$demo-trained"
echo "== 2/3 prune to 60 % of the filters with NGGM, mend them by least squares, distil with HAP and KD"
"$PYTHON" pruning.py --t-model resnet20 --t-path "$save_dir/$demo-trained/model_best.pt" --s-copy-t --prune-mode filter-nggm \
  --prune-rates 0.6 --reconstruct auto --distill hap --lr 0.01 --n-epochs 6 --schedule 4 --lr-drops 0.1 "${common[@]}" --run-name "$demo-pruned"
echo "== 3/3 share weights, 5 bits each, and encode them"
"$PYTHON" quantize_encode.py --model resnet20 --load-path "$save_dir/$demo-pruned/model_best.pt" --quan-mode all-quan \
  --quan-bits 5 --lr 0.001 --n-epochs 3 "${common[@]}" --run-name "$demo-quantized"
"$PYTHON" scripts/demo_table.py "$save_dir/$demo-trained" "$save_dir/$demo-pruned" "$save_dir/$demo-quantized"
