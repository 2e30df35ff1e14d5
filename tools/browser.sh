#!/usr/bin/env bash
# Prints the path of a Chromium that the tests of the report can drive; installs one where it may.
set -euo pipefail

find_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name"; then return 0; fi
    done
    return 1
}

if find_browser; then exit 0; fi

become_root=()
if [ "$(id -u)" -ne 0 ]; then become_root=(sudo -n); fi
if command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then
    echo "installing chromium with apt-get" >&2
    # ${array[@]+…}: an empty array is an unset variable to bash before 4.4.
    ${become_root[@]+"${become_root[@]}"} apt-get update -qq >&2
    ${become_root[@]+"${become_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >&2
    if find_browser; then exit 0; fi
fi

echo "error: no Chromium found, and it cannot be installed from here." >&2
echo "Install chromium or google-chrome with your system's package manager, so that it is on the PATH" >&2
echo "(Debian: sudo apt-get install chromium · Fedora: sudo dnf install chromium · macOS: brew install --cask chromium)." >&2
exit 1
