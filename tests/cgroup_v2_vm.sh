#!/usr/bin/env bash
# tests/test_cgroups.py in a virtual machine with Debian's kernel. Version 2: as root in the root of
# the hierarchy, as root in a delegated group, as an ordinary user in one that is his, with swap.
# Version 1, where kernels bind the controllers to one or the other: as root, with swap.
#
# By hand, not in CI: 10 minutes, emulated. Needs qemu-system-x86_64 and apt (Debian's kernel and
# busybox are downloaded and unpacked, not installed). PYTHON: an interpreter with pytest, default
# python3. WORK: a directory to keep the downloads in. EXTRA: a script to run in each place too.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python3)}
work=${WORK:-$(mktemp -d /var/tmp/cgroup-vm.XXXXXX)}
cd "$work"

[ -e kernel ] || {
  kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
  apt-get download -qq "$kernel" busybox-static
  for package in ./*.deb; do dpkg -x "$package" unpacked; done
  ln -s unpacked/boot/vmlinuz-* kernel
}

rm -rf image && mkdir -p image/{bin,proc,sys,dev,tmp,run,etc,modules} && chmod 1777 image/tmp
cp unpacked/bin/busybox image/bin/
find unpacked/lib/modules \( -name zram.ko -o -name zsmalloc.ko -o -name lzo-rle.ko -o -name lzo_rle.ko \) \
  -exec cp {} image/modules/ \;
printf 'root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n' > image/etc/passwd
printf 'root:x:0:\nuser:x:1000:\n' > image/etc/group

# The interpreter with its library, its packages, its shared libraries, and the project.
"$python" - "$root" image <<'EOF'
import os, shutil, subprocess, sys, sysconfig
root, image = sys.argv[1:]
leave_out = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "lib2to3", "ensurepip",
    "*.a", "config-3*", "site-packages", "dist-packages", ".git", ".*_cache", "golden", "mypy*", "pip*")
def put(path, ignore=None):
    target = image + os.path.realpath(path)
    if os.path.isdir(path):
        shutil.copytree(path, target, dirs_exist_ok=True, ignore=ignore, symlinks=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(os.path.realpath(path), target)
interpreter = os.path.realpath(sys.executable)
put(interpreter)
for name in ("stdlib", "platstdlib"):
    put(sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix}), leave_out)
dynload = os.path.join(sys.base_prefix, "lib", f"python3.{sys.version_info.minor}", "lib-dynload")
binaries = [interpreter, *(os.path.join(dynload, n) for n in os.listdir(dynload))]
for binary in binaries:
    for line in subprocess.run(["ldd", binary], capture_output=True, text=True).stdout.splitlines():
        for word in line.split():
            if word.startswith("/") and os.path.exists(word):
                os.makedirs(os.path.dirname(image + word), exist_ok=True)
                if not os.path.exists(image + word):
                    shutil.copy2(os.path.realpath(word), image + word)
packages = sysconfig.get_path("purelib")
os.makedirs(image + "/packages")
for name in ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments", "pytest_timeout.py", "psutil"):
    source = os.path.join(packages, name)
    if os.path.isdir(source):
        shutil.copytree(source, f"{image}/packages/{name}", ignore=shutil.ignore_patterns("__pycache__"))
    elif os.path.exists(source):
        shutil.copy2(source, f"{image}/packages/{name}")
os.makedirs(image + "/project/tests")
shutil.copytree(root + "/atp_sandbox", image + "/project/atp_sandbox", ignore=leave_out)
shutil.copy2(root + "/tests/test_cgroups.py", image + "/project/tests")
open(image + "/interpreter", "w").write(interpreter)

EOF
[ -z "${EXTRA:-}" ] || cp "$EXTRA" image/project/measure.py

cat > image/init <<'EOF'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin PYTHONPATH=/packages:/project PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
ip link set lo up
chmod -R a+rX /project /packages
python=$(cat /interpreter)
for dir in $(dirname $python) /root; do while [ "$dir" != / ]; do chmod a+x $dir; dir=$(dirname $dir); done; done
uname -r
for module in zsmalloc lzo-rle lzo_rle zram; do [ -e /modules/$module.ko ] && insmod /modules/$module.ko; done
check() { echo "== $1"; shift; "$@"; echo "exit $?"; }
tests="$python -m pytest -q -p no:cacheprovider -c /dev/null --rootdir /project -p pytest_timeout --timeout 100 /project/tests/test_cgroups.py -rs"
run_in() { group=$1; shift; sh -c 'echo $$ > '$group'/cgroup.procs && exec "$@"' sh "$@"; }
swap_on() { echo 1G > /sys/block/zram0/disksize; mkswap /dev/zram0 && swapon /dev/zram0; cat /proc/swaps; }
C=/sys/fs/cgroup
version_2() {
mount -t cgroup2 -o nsdelegate cgroup /sys/fs/cgroup
check "version 2, root, root of the hierarchy" $tests
find $C -name 'atp-*'
echo "+memory +pids +cpu" > $C/cgroup.subtree_control
mkdir $C/scope
check "version 2, root, delegated group" run_in $C/scope $tests
[ -e /project/measure.py ] && check "measure, version 2" run_in $C/scope $python /project/measure.py
ls -d $C/scope/*/ 2>/dev/null; cat $C/scope/cgroup.procs
mkdir $C/user
chown 1000:1000 $C/user $C/user/cgroup.procs $C/user/cgroup.subtree_control $C/user/cgroup.threads
check "version 2, user, delegated group" run_in $C/user su user -c "exec env PYTHONPATH=$PYTHONPATH PYTHONDONTWRITEBYTECODE=1 $tests"
mount -o remount,nsdelegate,favordynmods /sys/fs/cgroup && [ -e /project/measure.py ] && \
  check "measure, version 2, favordynmods" run_in $C/scope $python /project/measure.py
swap_on
check "version 2, root, swap" run_in $C/scope $tests -k swap
}
version_1() {
mount -t tmpfs tmpfs $C
for name in memory pids freezer cpu,cpuacct; do mkdir $C/$name; mount -t cgroup -o $name cgroup $C/$name; done
[ -e /project/measure.py ] && check "measure, version 1" $python /project/measure.py
swap_on
check "version 1, root, swap" $tests
}
if grep -q version=1 /proc/cmdline; then version_1; else version_2; fi
echo "all done"
poweroff -f
EOF
chmod 755 image/init

"$python" - image > image.cpio <<'EOF'
import os, stat, sys
out, top, number = sys.stdout.buffer, sys.argv[1], 0
def put(name, mode, data=b""):
    global number
    number += 1
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name + b"\0"
    out.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))
for folder, folders, files in os.walk(top):
    for name in folders + files:
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode
        data = os.readlink(path).encode() if stat.S_ISLNK(mode) else open(path, "rb").read() if stat.S_ISREG(mode) else b""
        put(os.path.relpath(path, top).encode(), mode, data)
put(b"TRAILER!!!", 0)
EOF
gzip -1 -f image.cpio
# Emulated: nested virtualisation is not to be had everywhere.
for version in 2 1; do
  timeout "${TIMEOUT:-600}" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -m 2048 -smp 2 \
    -nographic -no-reboot -nic none -kernel kernel -initrd image.cpio.gz \
    -append "console=ttyS0 quiet panic=-1 version=$version" | tee "log-$version"
  grep -q "all done" "log-$version"
done
