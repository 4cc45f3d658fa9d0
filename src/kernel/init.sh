#!/bin/busybox sh
# The first program of a guest whose disk has no kernel: loads the kernel's modules, mounts the root
# and starts what is in it, or the command whose words stand on the kernel's command line.
b=/bin/busybox
set --
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
$b mount -t sysfs sys /sys
for module in /modules/*.ko; do
	[ ! -e "$module" ] || $b insmod "$module"
done
root=/dev/vda type=ext4 access=rw init=/sbin/init name=
for word in $($b cat /proc/cmdline); do
	case $word in
	root=*) root=${word#root=} ;;
	rootfstype=*) type=${word#rootfstype=} ;;
	init=*) init=${word#init=} ;;
	vdisk.host=*) name=${word#vdisk.host=} ;;
	vdisk.word=*)
		# What a shell takes off the end is kept.
		value=$(printf '%b_' "${word#vdisk.word=}")
		set -- "$@" "${value%_}"
		;;
	ro | rw) access=$word ;;
	esac
done
tries=100
while [ ! -b "$root" ] && [ $tries -gt 0 ]; do
	$b usleep 50000
	tries=$((tries - 1))
done
if ! $b mount -t "$type" -o "$access" "$root" /root; then
	echo "vdisk: the root $root cannot be mounted ($type)"
	$b poweroff -f
fi
for directory in dev proc sys; do
	[ -d /root/$directory ] || $b mkdir /root/$directory
done
if [ $# = 0 ]; then
	$b mount --move /dev /root/dev
	$b umount /sys /proc
	exec $b switch_root /root "$init"
	echo "vdisk: $init cannot be started"
	$b poweroff -f
fi
# The command is not process 1: that one stays, to say how the command ended.
$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount --bind /dev /root/dev
$b mkdir -p /dev/pts
$b mount -t devpts devpts /root/dev/pts
[ -z "$name" ] || $b hostname "$name"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-linux}"
# The machine has a small disk for what is said to it.
say() {
	for disk in /sys/block/vd*; do
		[ "$($b cat "$disk/serial")" != vdisk-status ] ||
			echo "$1" | $b dd of="/dev/${disk##*/}" bs=512 conv=sync,fsync 2>/dev/null
	done
}
say begun
$b setsid -c $b chroot /root "$@" </dev/ttyS0 >/dev/ttyS0 2>&1
status=$?
kill -9 -1
$b sync
$b mount -o remount,ro /root
say "ended $status"
$b poweroff -f
