#!/usr/bin/env bash
# mypy on the package as it installs, with integrations/ and launch/ inside it, and on the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

installed=$(mktemp -d)
trap 'rm -rf "$installed"' EXIT
python -m pip install --quiet --no-deps --no-build-isolation --target "$installed" .
cp -r tests "$installed/tests"
config=$PWD/mypy.ini
cd "$installed"
python -m mypy --config-file "$config" -p muon_dist -p tests
