#!/usr/bin/env bash
# Installs the project and exactly what the lock file names into a Python environment: `install.sh cpu|gpu [PYTHON]`.
# Nodes (deploy/node.sh) and images (deploy/Dockerfile, deploy/Dockerfile.gpu) are made by this alone.
set -euo pipefail
device=${1:?expected cpu or gpu} python=${2:-python3}
cd "$(dirname "$0")/.."
"$python" -m pip install --quiet --no-cache-dir --no-deps --require-hashes -r "deploy/requirements/$device.txt"
if [ "$device" = cpu ]; then
  # The package index has torch for CUDA alone on x86: 3 GB more. uv knows where PyTorch keeps the build for CPUs, at the
  # version that gpu.txt locks; its hash stands in no file of ours.
  version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' deploy/requirements/gpu.txt)
  "$python" -m uv pip install --quiet --no-cache --no-deps --python "$python" \
    --torch-backend cpu "torch==$version"
fi
"$python" -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation -e .
"$python" -m pip check
