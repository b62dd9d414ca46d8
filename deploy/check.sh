#!/usr/bin/env bash
# Tries what is in this folder, as far as a machine without systemd as init can; README.md says what
# that is.
#   deploy/check.sh [--rehearse | --containers]     PYTHON=... chooses the interpreter (.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m pytest -q -rs tests/deploy

for compose in "docker compose" docker-compose; do
  if $compose version >/dev/null 2>&1; then
    $compose -f deploy/container/compose.yaml --profile server --profile device config --quiet
    echo "$compose takes compose.yaml"
    found=1
    break
  fi
done
[ "${found:-}" ] || echo "compose.yaml was not given to docker compose: it is not here"

case "${1:-}" in
  --rehearse) "$python" scripts/rehearse_units.py ;;
  --containers)
    docker image inspect fedpeat >/dev/null 2>&1 ||
      docker build -f deploy/container/Dockerfile -t fedpeat .
    "$python" scripts/rehearse_containers.py
    ;;
esac
