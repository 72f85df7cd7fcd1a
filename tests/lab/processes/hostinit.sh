#!/bin/bash
# The first moments of a simulated host: PID 1 of new mount, UTS, IPC, PID, network and control group namespaces builds the
# host's file system, waits until its cables are plugged in, and hands over to the host's own init.
#
#   hostinit.sh NAME HARDWARE INIT MODELS [FOLDER...]
#
# HARDWARE is the folder that hardware.py keeps, INIT is simple or systemd, MODELS becomes /srv/models (empty: none), each
# FOLDER is seen read-only in its own place. Says "mounted" on stdout, waits for a line on stdin, and says "ok" at the
# handover.
set -eu
name=$1 hardware=$2 init=$3 models=$4
shift 4
root=$hardware/root
firmware=$hardware/firmware
pseudo="nosuid,nodev,noexec"

hostname "$name"
ip link set lo up

mkdir -p "$root"
rm -rf "$hardware/work" && mkdir "$hardware/work"
mount -t overlay sparklab -o "lowerdir=/,upperdir=$hardware/up,workdir=$hardware/work" "$root"

mount -t proc -o $pseudo proc "$root/proc"
mount -t sysfs -o $pseudo sysfs "$root/sys"
mount -t tmpfs -o mode=755,size=4m tmpfs "$root/dev"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for device in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
    mknod -m 666 "$root/dev/${device%% *}" c ${device#* }
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
mkdir "$root"/dev/{pts,shm,mqueue}
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
if [ "$init" = systemd ]; then
    mount -t cgroup2 -o nsdelegate cgroup2 "$root/sys/fs/cgroup" 2>/dev/null || {
        mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
        mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    }
fi

# What the firmware shows lies over /sys and /proc. sysfs takes no new folder, so /sys/class becomes a tmpfs with the real
# classes bound in; not an overlay, which would answer "stale" for an interface that has been there before.
mkdir -p "$hardware/class"
mount --bind "$root/sys/class" "$hardware/class"
mount -t tmpfs -o mode=755 tmpfs "$root/sys/class"
mkdir -p "$root"/sys/class/{infiniband,dmi/id}
for class in "$hardware"/class/*; do
    case ${class##*/} in infiniband | dmi) continue ;; esac
    [ -d "$class" ] || continue
    mkdir "$root/sys/class/${class##*/}"
    echo "$class $root/sys/class/${class##*/} none bind 0 0"
done >"$hardware/classes"
mount --all --fstab "$hardware/classes" # one process for all of them
mount --bind "$firmware/infiniband" "$root/sys/class/infiniband"
mount --bind "$firmware/dmi" "$root/sys/class/dmi/id"
mount --bind "$firmware/proc/meminfo" "$root/proc/meminfo"
mount --bind "$firmware/proc/swaps" "$root/proc/swaps"
mount --bind "$hardware/facts" "$root/etc/sparklab"
mount -o remount,bind,ro "$root/etc/sparklab"

# A host sets its own network's knobs and no other of the kernel that it shares with this machine.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount --bind "$firmware/proc/osrelease" "$root/proc/sys/kernel/osrelease"
mount --bind "$firmware/proc/drop_caches" "$root/proc/sys/vm/drop_caches"
mount -o remount,bind,ro "$root/proc/sys"
[ ! -e "$root/proc/sysrq-trigger" ] || mount --bind /dev/null "$root/proc/sysrq-trigger"

for folder; do
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
    mount -o remount,bind,ro "$root$folder"
done
if [ -n "$models" ]; then
    mkdir -p "$root/srv/models"
    mount --bind "$models" "$root/srv/models"
fi

echo mounted
read -r _
for speed in "$firmware"/speed/*; do
    mount --bind "$speed" "$root/sys/devices/virtual/net/${speed##*/}/speed"
done
mount -o remount,bind,ro "$root/sys" # and a writable /sys would make NetworkManager wait for udevd

cd "$root"
mkdir -p .machine
pivot_root . .machine
cd /
umount -l /.machine
rmdir /.machine
echo ok # from here on, whoever enters sees the host's root and not this machine's
exec 1>&2
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
# Not this machine's clock, kernel modules, raw devices or kernel log.
guard="setpriv --bounding-set -sys_time,-sys_module,-sys_rawio,-syslog,-mknod,-wake_alarm --"
if [ "$init" = systemd ]; then
    exec env -i container=sparklab PATH="$PATH" $guard /lib/systemd/systemd --system --log-target=journal --show-status=0 </dev/null
fi
exec $guard /usr/bin/python3 -IS /usr/lib/sparklab/init.py </dev/null
