# Shared by scripts/setup, scripts/test and scripts/demo: where things are, and how they are said.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
# A Python path from outside would shadow the package that was just built.
unset PYTHONPATH
# The demo looks for binaries where cargo puts them by default.
unset CARGO_TARGET_DIR

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A Python of at least 3.11.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed: install it (Debian: apt-get install python3 python3-venv)"
}
