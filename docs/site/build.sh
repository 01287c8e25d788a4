#!/usr/bin/env bash
# The documentation site in build/site; any warning is an error. Needs the extra `docs`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MUON_DIST_INSTALLED=$(mktemp -d)
export MUON_DIST_INSTALLED
trap 'rm -rf "$MUON_DIST_INSTALLED"' EXIT
python -m pip install --quiet --no-deps --no-build-isolation --target "$MUON_DIST_INSTALLED" .
export NO_MKDOCS_2_WARNING=1 # an advertisement
python -m mkdocs build --strict --quiet
