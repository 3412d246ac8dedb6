#!/usr/bin/env bash
# Trains a small Vision Transformer on scikit-learn's handwritten digits and uses it: a few minutes on two CPU cores,
# with no download but the packages.
#
#   bash scripts/quickstart.sh [flags of vit_jax.main, such as --config.total_steps=200]
#
# What it leaves is in runs/quickstart: the model folder (model/), some images of the test split (images/), a picture of
# what the model says about them (predictions.png), and the logs of the run. A finished one is removed and trained again
# by the next call; one that was stopped (Ctrl-C) goes on.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$root/scripts/setup.sh")
python=$venv/bin/python
workdir=runs/quickstart
cd "$root"

if [[ -d $workdir/checkpoints && ! -e $workdir/model ]]; then
  echo "Going on with $workdir, which was stopped (to train from the start, remove that folder first)."
elif [[ -e $workdir ]]; then
  echo "Removing $workdir, what the last quickstart left, so that this one trains from the start."
  rm -rf "$workdir"
fi

echo
command=(-m vit_jax.main --config configs/digits.py --workdir "$workdir" "$@")
echo "Training: python ${command[*]}"
"$python" "${command[@]}"

echo
"$python" scripts/quickstart_picture.py "$workdir"
images=("$workdir"/images/*.png)
echo
echo "Predicting: python -m vit_jax predict --model $workdir/model --top_k 3 ${images[0]} ${images[1]}"
"$python" -m vit_jax predict --model "$workdir/model" --top_k 3 "${images[0]}" "${images[1]}"

accuracy=$("$python" - "$workdir/metrics.jsonl" <<'PY'
import json
import sys

with open(sys.argv[1], encoding='utf-8') as lines:
    measured = [row for row in map(json.loads, lines) if 'accuracy_test' in row]
print(f"{100 * measured[-1]['accuracy_test']:.1f}")
PY
)

cat <<END

The model is in $workdir/model, the picture in $workdir/predictions.png.
To try next, after 'source .venv/bin/activate':

  python -m vit_jax predict --model $workdir/model $workdir/images
  python -m vit_jax.main --config configs/b16.py
  python -m vit_jax.main --config configs/b16.py --config.dataset=/path/to/your/photos

(the second fine-tunes ViT-B/16 on photos of flowers, the third on your own: one folder for each class;
both download the released weights once and are meant for a GPU)

test accuracy: $accuracy %
END
