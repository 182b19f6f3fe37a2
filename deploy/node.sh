#!/usr/bin/env bash
# Makes a node of a Ray cluster from a plain Ubuntu 24.04: `node.sh aws|gcp|azure`. Run by `ray up` through setup_commands;
# may be run again. The environment is ~/env; a node where an NVIDIA driver answers gets torch for CUDA, others for CPUs.
set -euo pipefail
cloud=${1:?expected aws, gcp or azure}
cd "$(dirname "$0")"

# A first boot updates itself and holds the package manager's locks meanwhile.
sudo cloud-init status --wait >/dev/null 2>&1 || true
again() { for _ in $(seq 60); do "$@" && return; sleep 10; done; return 1; }
if ! python3 -c 'import ensurepip' 2>/dev/null; then
  again sudo apt-get update -qq
  again sudo DEBIAN_FRONTEND=noninteractive apt-get install -qq -y -o DPkg::Lock::Timeout=300 python3-venv
fi

device=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=gpu; fi
if ! cmp -s "requirements/$device.txt" ~/env/installed.txt; then
  python3 -m venv --clear ~/env
  bash install.sh "$device" ~/env/bin/python
  cp "requirements/$device.txt" ~/env/installed.txt
fi
grep -q latent-env ~/.profile || echo 'export PATH=~/env/bin:$PATH RAY_AUTH_MODE=token # latent-env' >> ~/.profile

# Says so to Ray when the cloud is about to take a spot node back.
sed "s|@HOME@|$HOME|g; s|@USER@|$(id -un)|g; s|@CLOUD@|$cloud|g" latent-spot.service |
  sudo tee /etc/systemd/system/latent-spot.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl enable --quiet --now latent-spot.service
