#!/bin/sh
# Installs the Debian packages of packages.txt, and of the lists given, that are not there yet; says and does nothing when all are.
# Starts no service, now or at the next boot: what it installs is for the simulated hosts, not for this machine.
set -eu
wanted=$(sed 's/#.*//' "$(dirname "$(readlink -f "$0")")/packages.txt" "$@")
policy=/usr/sbin/policy-rc.d # asked before any service is started; 101 is no (invoke-rc.d(8))

installed() {
    dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort -u
}

before=$(mktemp) && after=$(mktemp)
restore() {
    rm -f "$before" "$after"
    [ -z "${missing:-}" ] || rm -f "$policy"
    if [ -e "$policy.kept" ]; then mv "$policy.kept" "$policy"; fi
}
trap restore EXIT

installed >"$before"
missing=$(printf '%s\n' $wanted | sort | comm -23 - "$before")
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || { missing= && echo "tests/lab/install.sh needs root" >&2 && exit 1; }

if [ -e "$policy" ]; then mv "$policy" "$policy.kept"; fi
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # one word each
apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1 || {
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends $missing >/dev/null
}

# Packages enable their units as they are installed: take that back for those that are new here.
installed >"$after"
comm -13 "$before" "$after" | xargs --no-run-if-empty dpkg --listfiles |
    sed -n 's,^\(/usr\)\?/lib/systemd/system/\([^/@]*\.\(service\|socket\|timer\)\)$,\2,p' |
    xargs --no-run-if-empty systemctl disable --quiet 2>/dev/null || true
